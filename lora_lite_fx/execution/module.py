"""How an adapted model is run, as against what it computes.

Its graph is flat and plain: what passes, `remove`, `merge`, `inspect`, files and exports see. What runs is derived
from it: a copy, optimized, with what depends on parameters alone taken out and its layers checkpointed if so asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.placement import HasGraphs, placements
from ..adapters.state import describe_adapters, trainable_parameters
from ..errors import AdapterError, shown
from ..graph.copies import copy_graph, share_signatures
from ..graph.subgraph import forward_of
from ..graph.tensors import keep_aliases
from ..log import phase
from ..passes import OPTIMIZATIONS, Pipeline, Program
from .checkpointing import cut_layers
from .prologue import Prologue, cut_prologue


@dataclass(frozen=True)
class Execution:
    """How a graph is run.

    Args:
        passes: what optimizes it.
        checkpoint_layers: whether its layers keep only their inputs for the backward pass, and are run again in it.
    """

    passes: Pipeline = OPTIMIZATIONS
    checkpoint_layers: bool = False


_ADAPT = "llfx.adapt(model, cfg) returns a model of the same class, which has it."
_ELSEWHERE = {
    "generate": _ADAPT,
    "config": _ADAPT,
    "save_pretrained": "llfx.save(graph, path) and llfx.save_peft(graph, folder) write its adapters.",
    "merge_and_unload": "llfx.merge(graph) returns the model with its adapters folded in.",
    "unload": "llfx.remove(graph) returns the model without its adapters.",
    "disable_adapter": "llfx.remove(graph) returns the model without its adapters, over the same weights.",
}
"""What to use in place of attributes that a graph does not have, and that transformers and PEFT give their models."""


class AdaptedGraphModule(fx.GraphModule):
    """A graph module that computes what its graph says, run as its `execution` says.

    What runs is derived at the first call after a recompile, so that passes can change the graph; with gradients, or in
    training, it is another program than in inference. `torch.fx.Interpreter`, and so `torch.export`, run the graph
    itself.
    """

    execution: Execution | None = None  # none while it is being made
    prologues: dict[Program, Prologue]

    def __init__(self, root: nn.Module, graph: fx.Graph, execution: Execution) -> None:
        super().__init__(root, graph)
        self.execution = execution
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedGraphModule:
        share_signatures(self, memo)
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, AdaptedGraphModule)
        twin.execution = self.execution
        twin.recompile()
        return twin

    def recompile(self) -> Any:
        code = super().recompile()
        if self.execution is not None:
            self._drop_derived()
            cls: Any = type(self)
            cls.forward = _running_what_is_derived(cls.forward, self.execution.checkpoint_layers)
        return code

    def _drop_derived(self) -> None:
        # The class is this module's alone. What is derived are its methods.
        cls: Any = type(self)
        for method in map(_method, get_args(Program)):
            if method in vars(cls):
                delattr(cls, method)
        cls.prologues = {}

    # Constant for torch.compile, which would else trace it.
    @torch.compiler.assume_constant_result
    def _derive(self, program: Program) -> None:
        """Make the method that runs this program, unless it is there."""
        cls: Any = type(self)
        if _method(program) in vars(cls):
            return
        with phase(f"derived the {program} program") as details:
            graph = self._make_methods(program)
            details.append(f"{len(graph.nodes)} nodes")

    def _make_methods(self, program: Program) -> fx.Graph:
        """Make the method that runs this program, and those that it calls; returns the graph of the first."""
        cls: Any = type(self)
        graph = self._optimized(program)
        # What is cut out are methods too; the outer graph calls them as if modules.
        if program == "checkpointed":
            for name, method in cut_layers(self, graph, "_layer").items():
                setattr(cls, name, method)
        if (prologue := cut_prologue(self, graph, _prologue(program))) is not None:
            cls.prologues[program] = prologue
            setattr(cls, _prologue(program), _running(program))
        setattr(cls, _method(program), forward_of(self, graph))
        return graph

    def _optimized(self, program: Program) -> fx.Graph:
        """A copy of the graph, optimized."""
        assert self.execution is not None
        derived = fx.GraphModule(self, copy_graph(self.graph))
        self.execution.passes.of(program).run(derived)
        derived.graph.owning_module = None  # it would be asked for the modules that stand for methods
        return derived.graph

    def train(self, mode: bool = True) -> AdaptedGraphModule:
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdaptedGraphModule:
        # What to(), half(), cuda() and the like all go through. They replace the data of tensors, unseen by versions,
        # and what is derived depends on the device.
        self._drop_derived()
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in _ELSEWHERE:
                raise AttributeError(f"A rewritten graph has no {name}. {_ELSEWHERE[name]}") from error
            raise

    def extra_repr(self) -> str:
        """Return the lines on the adapters that `repr` shows."""
        return "\n".join(describe_adapters(self))

    def print_trainable_parameters(self) -> None:
        """Print one line: how many parameters train now, of how many, as PEFT prints it."""
        print(trainable_parameters(self))

    def _forget(self) -> None:
        for prologue in self.prologues.values():
            prologue.forget()


def _method(program: Program) -> str:
    return f"_run_{program}"


def _prologue(program: Program) -> str:
    return f"_prologue_of_{program}"


def _running_what_is_derived(plain: Callable[..., Any], checkpoints_layers: bool) -> Callable[..., Any]:
    def forward(self: AdaptedGraphModule, *args: Any, **kwargs: Any) -> Any:
        program: Program = "inference"
        # Compiled, parameter work is done in each call: there what is best kept for inference would cost more.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            program = "checkpointed" if checkpoints_layers and self.training else "training"
        self._derive(program)
        return getattr(self, _method(program))(*args, **kwargs)

    # torch.compile counts recompilations by code: each module needs its own.
    forward.__code__ = forward.__code__.replace()
    return functools.update_wrapper(forward, plain)  # for its signature


def _running(program: Program) -> Callable[..., Any]:
    def prologue(self: AdaptedGraphModule) -> Any:
        work = self.prologues[program]
        return work.inline(self) if torch.compiler.is_compiling() else work(self)

    return prologue


def optimize(model: fx.GraphModule | ExportedProgram, passes: Pipeline = OPTIMIZATIONS) -> fx.GraphModule:
    """The same adapted model over the same tensors, optimized by `passes`.

    What `rewrite` and `load` return is optimized by all of them. With this, some can be left out,
    `optimize(gm, OPTIMIZATIONS.without("share_siblings"))`, or all, `optimize(gm, Pipeline(()))`; and a graph from a
    `.pt2` file, where only the plain graph is kept, can be optimized again.

    Args:
        model: what `rewrite` or `load` returned, or an exported program of it. It is not changed; the result has its
            parameters, not copies of them, so that an optimizer of the one serves the other.
        passes: from `lora_lite_fx.passes`; they change only how the graph is run, not `model.graph`.

    Raises:
        AdapterError: `model` is no graph.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"A graph is needed, as rewrite, load or torch.export return it; not {shown(model)}.{_optimize_hint(model)}"
        )
    return run_as(model, Execution(passes, checkpoints_layers(model)))


def _optimize_hint(model: object) -> str:
    if isinstance(model, HasGraphs):
        return " The graphs of an adapted model are optimized already."
    if isinstance(model, nn.Module) and not placements(model):
        return " Only adapters are optimized: optimize(rewrite(model, LoRA(r=8)))."
    return ""


def run_as(model: fx.GraphModule, execution: Execution) -> AdaptedGraphModule:
    """The same graph over the same tensors, not copies of them, in the same mode; run as `execution` says."""
    result = AdaptedGraphModule(model, model.graph, execution)
    keep_aliases(model, result)
    return result.train(model.training)


def execution_of(model: object) -> Execution:
    """How `model` is run, if it is such a graph; else how graphs are run by default."""
    return (isinstance(model, AdaptedGraphModule) and model.execution) or Execution()


def checkpoints_layers(model: nn.Module | ExportedProgram) -> bool:
    """Whether `model` checkpoints its layers: a graph that does, or a Hugging Face model set to do so."""
    return execution_of(model).checkpoint_layers or (
        isinstance(model, nn.Module)
        and any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    )
