"""The module that `rewrite` returns: it holds a plain graph, and runs programs that are derived from it.

Passes, `remove`, `merge`, `inspect`, files and exports see the plain, flat graph. A program is an optimized copy of the
graph, in which parameter work is computed apart, and whose layers are checkpointed if the caller asks for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.placement import HasGraphs, placements
from ..adapters.state import describe_adapters, trainable_parameters
from ..capture.signature import CallSignature
from ..errors import AdapterError, shown
from ..graph.copies import copy_graph, share_signatures
from ..graph.subgraph import forward_of
from ..graph.tensors import keep_aliases
from ..log import phase
from ..passes import OPTIMIZATIONS, LeaveOutInputs, PassReport, Pipeline, Program
from .casting import follow_cast
from .checkpointing import cut_layers
from .prologue import Prologue, cut_prologue

_DERIVED = "_run_"
"""The names of the methods that run programs begin with this."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_constant_when_compiled: Callable[[_Function], _Function] = torch.compiler.assume_constant_result


@dataclass(frozen=True)
class Execution:
    """The way in which a graph is run.

    Args:
        passes: the passes that optimize the programs.
        checkpoint_layers: whether the layers keep only their inputs for the backward pass, and run again in it.
        signature: how the graph is called; None for a graph that takes its inputs and nothing else.
        source: a weak reference to the model that it was captured from; calling it returns the model, or None.
    """

    passes: Pipeline = OPTIMIZATIONS
    checkpoint_layers: bool = False
    signature: CallSignature | None = None
    source: Callable[[], nn.Module | None] = lambda: None

    @property
    def programs(self) -> tuple[Program, Program]:
        """The program for training mode, and the one for inference."""
        return "checkpointed" if self.checkpoint_layers else "training", "inference"


_ADAPT = "llfx.adapt(model, cfg) returns a model of the same class, which has it."
_ELSEWHERE = {
    "generate": _ADAPT,
    "config": _ADAPT,
    "save_pretrained": "llfx.save(graph, path) and llfx.save_peft(graph, folder) write its adapters.",
    "merge_and_unload": "llfx.merge(graph) returns the model with its adapters folded in.",
    "unload": "llfx.remove(graph) returns the model without its adapters.",
    "disable_adapter": "llfx.remove(graph) returns the model without its adapters, over the same weights.",
}
"""The functions to use in place of attributes that transformers and PEFT give their models and a graph lacks."""


class AdaptedGraphModule(fx.GraphModule):
    """A graph module that computes what its graph says, and runs it as its `execution` says.

    A program is derived at the first call that needs it after a recompile, so that passes can change the graph. Calls
    with gradients or in training mode run another program than inference. `torch.fx.Interpreter`, and so
    `torch.export`, run the graph itself.
    """

    execution: Execution | None = None  # None while the module is being made
    prologues: dict[str, Prologue]  # by the method that reads them
    reports: dict[str, list[PassReport]]  # by the method that runs the program

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
            cls.forward = _forward_of_programs(cls.forward, self.execution)
        return code

    def pass_reports(self, program: Program) -> list[PassReport]:
        """Return what each pass did when `program` was derived; derive the program first if no call has needed it."""
        return self.reports[self._derive(program, ())]

    def _drop_derived(self) -> None:
        # torch.fx makes a class for each module, so the methods of the programs can be attributes of the class.
        cls: Any = type(self)
        for method in [name for name in vars(cls) if name.startswith(_DERIVED)]:
            delattr(cls, method)
        cls.prologues = {}
        cls.reports = {}

    # Otherwise torch.compile would trace it.
    @_constant_when_compiled
    def _derive(self, program: Program, left_out: tuple[str, ...]) -> str:
        """Make the method that runs this program for calls that leave these arguments out, unless the class has it.

        Returns:
            The name of the method.
        """
        cls: Any = type(self)
        method = "_without_".join((f"{_DERIVED}{program}", *left_out))
        if method in vars(cls):
            return method
        without = f" for calls without {', '.join(left_out)}" if left_out else ""
        with phase(f"derived the {program} program{without}") as details:
            graph, cls.reports[method] = self._optimized(program, left_out)
            # The parts that are cut out become methods too; the outer graph calls them as if they were modules.
            if program == "checkpointed":
                for name, layer in cut_layers(self, graph, f"{method}_layer").items():
                    setattr(cls, name, layer)
            if (prologue := cut_prologue(self, graph, f"{method}_prologue")) is not None:
                cls.prologues[method] = prologue
                setattr(cls, f"{method}_prologue", _running(method))
            setattr(cls, method, forward_of(self, graph))
            details.append(f"{len(graph.nodes)} nodes")
        return method

    def _optimized(self, program: Program, left_out: tuple[str, ...]) -> tuple[fx.Graph, list[PassReport]]:
        """Return an optimized copy of the graph, and the reports of the passes that optimized it."""
        assert self.execution is not None
        derived = fx.GraphModule(self, copy_graph(self.graph))
        if left_out:
            assert self.execution.signature is not None
            Pipeline((LeaveOutInputs(self.execution.signature.omission(left_out)),)).run(derived)
        reports = self.execution.passes.of(program).run(derived)
        derived.graph.owning_module = None  # torch.fx would ask it for modules, but the calls stand for methods
        return derived.graph, reports

    def train(self, mode: bool = True) -> AdaptedGraphModule:
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdaptedGraphModule:
        # to(), half(), cuda() and the like all come here. They replace the data of tensors, which version counters do
        # not show, and programs depend on the device.
        follow_cast(self, fn)
        self._drop_derived()
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        return self

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


def _forward_of_programs(plain: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    signature, checkpoints_layers = execution.signature, execution.checkpoint_layers

    def forward(self: AdaptedGraphModule, *args: Any, **kwargs: Any) -> Any:
        program: Program = "inference"
        # Under torch.compile nothing is cached between calls, so run the training program; inference's precomputed
        # factors would be rebuilt every call.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            program = "checkpointed" if checkpoints_layers and self.training else "training"
        if signature is None or not signature.has_defaults:
            return getattr(self, self._derive(program, ()))(*args, **kwargs)
        values, left_out = signature.bind(args, kwargs)
        results = getattr(self, self._derive(program, left_out))(*values)
        return signature.omission(left_out).returned(results) if left_out else results

    # torch.compile counts recompilations by code object, so each module needs one of its own.
    forward.__code__ = forward.__code__.replace()
    forward = functools.update_wrapper(forward, plain)  # the signature of `plain` shows
    if signature is not None:
        forward.__signature__ = signature.of_method  # type: ignore[attr-defined]
    return forward


def _running(method: str) -> Callable[..., Any]:
    def prologue(self: AdaptedGraphModule) -> Any:
        work = self.prologues[method]
        return work.inline(self) if torch.compiler.is_compiling() else work(self)

    return prologue


def optimize(model: fx.GraphModule | ExportedProgram, passes: Pipeline = OPTIMIZATIONS) -> fx.GraphModule:
    """Return the same adapted model over the same tensors, optimized by `passes`.

    All passes optimize the models that `rewrite` and `load` return. This function leaves out some of them,
    `optimize(gm, OPTIMIZATIONS.without("share_siblings"))`, or all, `optimize(gm, Pipeline(()))`. It also optimizes a
    graph from a `.pt2` file again, because such a file holds only the plain graph.

    Args:
        model: the result of `rewrite` or `load`, or an exported program of it. It is not changed. The result has its
            parameters, not copies of them, so that an optimizer of the one serves the other.
        passes: from `lora_lite_fx.passes`; they change only how the graph is run, not `model.graph`.

    Raises:
        AdapterError: `model` is not a graph.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"optimize takes a graph that rewrite, load or torch.export returned, not {shown(model)}."
            f"{_optimize_hint(model)}"
        )
    return run_as(model, replace(execution_of(model), passes=passes, checkpoint_layers=checkpoints_layers(model)))


def _optimize_hint(model: object) -> str:
    if isinstance(model, HasGraphs):
        return " The graphs of an adapted model are optimized already."
    if isinstance(model, nn.Module) and not placements(model):
        return " Only adapters are optimized: optimize(rewrite(model, LoRA(r=8)))."
    return ""


def run_as(model: fx.GraphModule, execution: Execution) -> AdaptedGraphModule:
    """Return the same graph over the same tensors, not copies of them, in the same mode, run as `execution` says."""
    result = AdaptedGraphModule(model, model.graph, execution)
    keep_aliases(model, result)
    return result.train(model.training)


def execution_of(model: object) -> Execution:
    """Return the execution of `model`, or the default one if `model` is not an `AdaptedGraphModule`."""
    return (isinstance(model, AdaptedGraphModule) and model.execution) or Execution()


def checkpoints_layers(model: nn.Module | ExportedProgram) -> bool:
    """Check whether `model`, a graph or a Hugging Face model, checkpoints its layers."""
    return execution_of(model).checkpoint_layers or (
        isinstance(model, nn.Module)
        and any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    )
