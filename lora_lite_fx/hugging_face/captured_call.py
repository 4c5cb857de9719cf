"""A call of a model as a graph takes it, and the graph that is captured of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ..capture.asserted_decisions import decisions_on_inputs
from ..capture.capture_model import origin_of
from ..capture.default_dtype import other_default_dtype
from ..capture.export import images_in, take_for_one, take_guards
from ..capture.graph_calls import names_of_results
from ..capture.held_answers import HeldAnswer, held_answers, other_than_held
from ..capture.quirks.layouts import layouts_in
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..rewriting.capture import base_graph
from .call_structure import CACHES, Leaves, Structure, Tree, assemble, cached_layers, differences, disassemble, restore
from .causal_lm import NormalizedCall, caches, join_mask, with_loss
from .config_reads import ConfigValues
from .example_calls import examples
from .sliding_window import cut_windows, uncut_windows


@dataclass(frozen=True)
class CapturedCall:
    """A call as a graph takes it.

    Args:
        path: qualified name of the part of the model that is called; empty for the model.
        normalized: its arguments in normal form.
        structure: the arguments without their leaves.
        leaves: the tensors and integers of the arguments, by name.
    """

    path: str
    normalized: NormalizedCall
    structure: Structure
    leaves: Leaves

    @classmethod
    def of(cls, part: Any, normalized: NormalizedCall) -> CapturedCall:
        """Return a call of `part`, a model or one of its modules, that is in normal form."""
        leaves: Leaves = {}
        names = sorted(normalized.arguments)
        parts = tuple(disassemble(normalized.arguments[name], name, leaves) for name in names)
        return cls(getattr(part, "_path", ""), normalized, Tree(dict, tuple(names), parts), leaves)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The part of the call that all calls of one graph have in common."""
        return self.path, self.structure

    def differs_from(self, other: CapturedCall) -> list[str]:
        """Return in what the signature of a call of the same part differs from that of `other`."""
        return [*differences(other.structure, self.structure)]


@dataclass
class CapturedGraph:
    """A graph of the calls that are like one.

    Args:
        gm: takes the leaves of a call by name, and returns those of the result.
        call: the one that it was captured for.
        example: what of the leaves that it was captured with the capture depends on, see `captured_with`.
        layouts: those leaves of which the graph holds for these values alone.
        guards: raises for other leaves that the graph does not hold for.
        decisions: tells of a module with the tensors of the graph, and of leaves, where the model decides otherwise.
        result: the result without its leaves.
        given: the state of the caller's objects after the call, without its leaves.
        config: what it has of the configs of the model.
        held: the answers of the process that it holds for.
    """

    gm: AdaptedGraphModule
    call: CapturedCall
    example: Any
    layouts: dict[str, Tensor]
    guards: Callable[..., object]
    decisions: Callable[..., str]
    result: Structure
    given: dict[str, Structure]
    config: ConfigValues = field(default_factory=ConfigValues)
    held: tuple[HeldAnswer, ...] = ()

    def change(self) -> str:
        """Return in words what has changed that the graph was captured under; empty if nothing has."""
        assert self.gm.execution is not None
        return (
            self.config.change() or other_default_dtype(self.gm.execution.default_dtype) or other_than_held(self.held)
        )

    def refuses(self, leaves: Leaves) -> str:
        """Return the reason why the graph does not hold for `leaves`; empty if it does."""
        reads_values = not torch.compiler.is_dynamo_compiling()  # the graph itself asserts what depends on them there
        if change := self.change():
            return change
        for name, layout in self.layouts.items() if reads_values else ():
            if not torch.equal(leaves[name], layout):
                return f"{name} is {leaves[name].tolist()}, and was {layout.tolist()}"
        inputs = [leaf for name, leaf in leaves.items() if name not in self.layouts]
        try:
            self.guards(*inputs)
        except AssertionError as error:
            return str(error)
        return self.decisions(self.gm, *inputs) if reads_values else ""

    def run(self, part: Any, call: CapturedCall, return_dict: bool) -> Any:
        """Run the graph for a call that it holds for, and return what `part` would.

        Args:
            return_dict: whether a `ModelOutput` stays one, and is not made a tuple.
        """
        self.config.decide()
        self.gm.training = part.training
        leaves = self.gm(**call.leaves)
        given: dict[str, Any] = {}
        for name, structure in self.given.items():
            if name in call.normalized.given:
                from ..compat.transformers import tell_batch

                given[name] = restore(call.normalized.given[name], structure, leaves)
                tell_batch(given[name])
            else:
                given[name] = assemble(structure, leaves) if call.normalized.keeps_cache else None
        cut_windows(given)
        result = with_loss(part, call.normalized, assemble(self.result, leaves, given))
        return result if return_dict or not hasattr(result, "to_tuple") else result.to_tuple()


def attempts(model: Any, call: CapturedCall, by_values: bool) -> Iterator[tuple[Leaves, tuple[str, ...]]]:
    """Yield examples to capture a call with, and the leaves of which the batch alone is to be dynamic.

    Args:
        model: is called.
        call: to capture.
        by_values: whether the model is known to decide by values, for which the example has to have those of the call.
    """
    windows = origin_of(model).batch_only(made=True)
    images = images_in({name: leaf for name, leaf in call.leaves.items() if not name.startswith(CACHES)})
    for fixed in dict.fromkeys((windows, (*windows, *images))):
        for example in examples(call.structure, call.leaves, by_values):
            yield example, fixed


def capture_call(
    shadow: Any,
    call: CapturedCall,
    example: Leaves,
    fixed: Collection[str],
    verify: bool,
    fuse_loss: bool,
    with_autocast: bool = False,
) -> CapturedGraph:
    """Capture a call of a model.

    Args:
        shadow: a copy of the model without adapters; it is changed.
        call: what is called, and with which structure of arguments.
        example: the leaves to capture it with.
        fixed: the names of those of which the batch alone is to be dynamic.
        verify, fuse_loss: as for `capture`.
        with_autocast: whether the model is to find autocast as it is now.

    Raises:
        CaptureError: the call cannot be captured.
    """
    outcomes: Outcomes = {}
    shadow.__class__ = _flat(type(shadow), call, outcomes, _as_long(call.structure, example))
    example = {name: _outside_autocast(leaf, shadow) for name, leaf in example.items()}
    layouts = layouts_in(example)
    dynamic = {name: _dynamic(name, leaf, name in fixed) for name, leaf in example.items() if name not in layouts}
    with ExitStack() as stack:
        # Leave the modes that the call runs under out of the graph.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if not with_autocast:
            stack.enter_context(torch.autocast(shadow.device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        gm = base_graph(shadow, example, dynamic_shapes=dynamic, fuse_loss=fuse_loss, verify=verify, made=True)
    assert isinstance(gm, AdaptedGraphModule)
    guards, decisions, held = take_guards(gm), decisions_on_inputs(gm), held_answers(gm.graph)
    # A capture may run the model with fewer layers too, which returns fewer caches.
    result, given = outcomes[frozenset(names_of_results(gm.graph))]
    of_example = captured_with(example, fixed)
    return CapturedGraph(gm, call, of_example, layouts, guards, decisions, result, given, held=held)


def _outside_autocast(leaf: Any, model: Any) -> Any:
    """Return a leaf in the type of the model if autocast made it, as it makes caches, because captures go without."""
    device = model.device.type
    if not isinstance(leaf, Tensor) or not torch.is_autocast_enabled(device):
        return leaf
    return leaf.to(model.dtype) if leaf.dtype == torch.get_autocast_dtype(device) else leaf


def captured_with(example: Leaves, fixed: Collection[str]) -> Any:
    """Return what a capture depends on: the shapes of tensors, and the values of numbers and layouts."""
    layouts = {name: layout.tolist() for name, layout in layouts_in(example).items()}
    return [
        layouts.get(name, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf for name, leaf in example.items()
    ], tuple(fixed)


def _dynamic(name: str, leaf: Any, batch_only: bool) -> Any:
    """Return the shape of a leaf for torch.export: as dynamic as can be, but for the heads and widths of caches."""
    if not isinstance(leaf, Tensor):
        return Dim.AUTO
    fixed: Collection[int] = (1, 3) if name.startswith(CACHES) and leaf.dim() == 4 else ()
    if batch_only:
        fixed = range(1, leaf.dim())
    # torch.export specializes sizes of 0 and 1 anyway.
    return [Dim.AUTO if size > 1 and dim not in fixed else Dim.STATIC for dim, size in enumerate(leaf.shape)]


Outcomes = dict[frozenset[str], tuple[Structure, dict[str, Structure]]]
"""The result of runs and the state of the caller's objects after them, without leaves; by the names of the leaves."""


def _as_long(structure: Structure, example: Leaves) -> list[tuple[str, str]]:
    """Return pairs of cached keys or values that are equally long in the example, of layers of one class.

    Args:
        structure: of the call.
        example: its leaves.
    """
    first: dict[type, str] = {}
    pairs: list[tuple[str, str]] = []
    for kind, names in cached_layers(structure):
        for name in (names["keys"], names["values"]):
            other = first.setdefault(kind, name)
            if other != name and _length(example[name]) == _length(example[other]) is not None:
                pairs.append((name, other))
    return pairs


def _length(cached: Tensor) -> int | None:
    return cached.shape[2] if cached.dim() == 4 else None


def _flat(cls: type, call: CapturedCall, outcomes: Outcomes, as_long: Sequence[tuple[str, str]]) -> type:
    """Return a subclass of `cls`, by the same name, that takes leaves of the call and returns leaves of the result.

    Args:
        cls: the class of the model.
        call: what is called.
        outcomes: each run adds its own.
        as_long: pairs of names of cached keys or values that have one length in the calls of the graph.
    """

    def forward(self: Any, **leaves: Any) -> Leaves:
        # With one symbol for each length, layers do not differ by which of them computes what all need.
        for name, other in as_long:
            take_for_one(leaves[name].shape[2], leaves[other].shape[2])
        arguments = assemble(call.structure, leaves)
        join_mask(arguments)
        part = self.get_submodule(call.path)
        with uncut_windows(arguments):
            result = cls.forward(self, **arguments) if part is self else part(**arguments)  # type: ignore[attr-defined]
        found: Leaves = {}
        names = {id(cache): name for name, cache in caches(arguments).items()}
        structure = disassemble(result, "result", found, names)
        given = {name: disassemble(cache, f"after_{name}", found) for name, cache in caches(arguments).items()}
        outcomes[frozenset(found)] = structure, given
        return found

    # All are optional, because a capture passes layouts by itself.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    parameters += [inspect.Parameter(name, kind, default=None) for name in call.leaves]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type(
        cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )
