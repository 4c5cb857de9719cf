"""How an adapted model is run, as against what it computes.

Its graph is flat and plain: what passes, `remove`, `merge`, `inspect`, files and exports see. What runs is derived
from it: a copy, optimized, with what depends on parameters alone taken out and its layers checkpointed if so asked.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..capture.signature import CallSignature
from ..errors import AdapterError
from ..graph.subgraph import forward_of
from ..graph.tensors import keep_aliases
from ..passes import OPTIMIZATIONS, LeaveOutInputs, Pipeline, Program
from .checkpointing import cut_layers
from .prologue import Prologue, cut_prologue

_DERIVED = "_run_"
"""What the names of the methods begin with that run what is derived from a graph."""


@dataclass(frozen=True)
class Execution:
    """How a graph is run.

    Args:
        passes: what optimizes it.
        checkpoint_layers: whether its layers keep only their inputs for the backward pass, and are run again in it.
        signature: how it is called; None for a graph that takes its inputs and nothing else.
    """

    passes: Pipeline = OPTIMIZATIONS
    checkpoint_layers: bool = False
    signature: CallSignature | None = None


class AdaptedGraphModule(fx.GraphModule):
    """A graph module that computes what its graph says, run as its `execution` says.

    What runs is derived at the first call after a recompile, so that passes can change the graph; with gradients, or in
    training, it is another program than in inference. `torch.fx.Interpreter`, and so `torch.export`, run the graph
    itself.
    """

    execution: Execution | None = None  # none while it is being made
    prologues: dict[str, Prologue]  # by the method that reads them

    def __init__(self, root: nn.Module, graph: fx.Graph, execution: Execution) -> None:
        super().__init__(root, graph)
        self.execution = execution
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedGraphModule:
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
            cls.forward = _running_what_is_derived(cls.forward, self.execution)
        return code

    def _drop_derived(self) -> None:
        # The class is this module's alone. What is derived are its methods.
        cls: Any = type(self)
        for method in [name for name in vars(cls) if name.startswith(_DERIVED)]:
            delattr(cls, method)
        cls.prologues = {}

    # Constant for torch.compile, which would else trace it.
    @torch.compiler.assume_constant_result
    def _derive(self, program: Program, left_out: tuple[str, ...]) -> str:
        """Make the method that runs this program for calls that leave these arguments out, unless it is there.

        Returns:
            Its name.
        """
        cls: Any = type(self)
        method = "_without_".join((f"{_DERIVED}{program}", *left_out))
        if method in vars(cls):
            return method
        graph = self._optimized(program, left_out)
        # What is cut out are methods too; the outer graph calls them as if modules.
        if program == "checkpointed":
            for name, layer in cut_layers(self, graph, f"{method}_layer").items():
                setattr(cls, name, layer)
        if (prologue := cut_prologue(self, graph, f"{method}_prologue")) is not None:
            cls.prologues[method] = prologue
            setattr(cls, f"{method}_prologue", _running(method))
        setattr(cls, method, forward_of(self, graph))
        return method

    def _optimized(self, program: Program, left_out: tuple[str, ...]) -> fx.Graph:
        """A copy of the graph, optimized."""
        assert self.execution is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch's own, about the signature it copies
            derived = fx.GraphModule(self, copy.deepcopy(self.graph))
        if left_out:
            assert self.execution.signature is not None
            Pipeline((LeaveOutInputs(self.execution.signature.omission(left_out)),)).run(derived)
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

    def _forget(self) -> None:
        for prologue in self.prologues.values():
            prologue.forget()


def _running_what_is_derived(plain: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    signature, checkpoints_layers = execution.signature, execution.checkpoint_layers

    def forward(self: AdaptedGraphModule, *args: Any, **kwargs: Any) -> Any:
        program: Program = "inference"
        # Compiled, parameter work is done in each call: there what is best kept for inference would cost more.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            program = "checkpointed" if checkpoints_layers and self.training else "training"
        if signature is None or not signature.has_defaults:
            return getattr(self, self._derive(program, ()))(*args, **kwargs)
        values, left_out = signature.bind(args, kwargs)
        results = getattr(self, self._derive(program, left_out))(*values)
        return signature.omission(left_out).returned(results) if left_out else results

    # torch.compile counts recompilations by code: each module needs its own.
    forward.__code__ = forward.__code__.replace()
    forward = functools.update_wrapper(forward, plain)  # for its signature
    if signature is not None:
        forward.__signature__ = signature.of_method  # type: ignore[attr-defined]
    return forward


def _running(method: str) -> Callable[..., Any]:
    def prologue(self: AdaptedGraphModule) -> Any:
        work = self.prologues[method]
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
            f"A graph is needed, as rewrite, load or torch.export return it; not {type(model).__name__}."
        )
    return run_as(model, replace(execution_of(model), passes=passes))


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
