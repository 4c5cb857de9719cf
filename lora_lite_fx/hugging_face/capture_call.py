"""Capture a call of a model: choose examples of its arguments, and make a graph of the model's run on one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ..capture.asserted_decisions import decisions_on_inputs
from ..capture.capture_model import origin_of
from ..capture.export import double_batch_of_one, images_in, take_for_one, take_guards
from ..capture.graph_calls import names_of_results
from ..capture.inputs.labels import problem_type_of
from ..capture.model_record import ModelRecord
from ..capture.process_state.held_answers import held_answers, other_than_held
from ..capture.quirks.layouts import layouts_in
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..rewriting.capture import base_graph
from .caches import BATCH, LENGTH, PAST, caches, uncut_windows
from .call_structure import CACHES, Leaves, Structure, assemble, cached_layers, disassemble
from .captured_call import CapturedCall, CapturedGraph
from .causal_lm import join_mask
from .config_reads import ConfigValues, recorded_reads
from .written_by_calls import warn_of_writes

# Examples.


def attempts(model: Any, call: CapturedCall, by_values: bool, seen: list[Any]) -> Iterator[tuple[Leaves, list[str]]]:
    """Yield examples to capture a call with, and the leaves of which the batch alone is to be dynamic.

    Those come first with which the graph takes most other lengths and batches. With `by_values`, all have the values of
    the call, by which the model is known to decide. Those in `seen` are left out, and what is yielded is added to it.
    """
    windows = origin_of(model).batch_only(made=True)
    images = images_in({name: leaf for name, leaf in call.leaves.items() if not name.startswith(CACHES)})
    normal = None if by_values else _normal_example(call.structure, call.leaves)
    for fixed in ([*windows], [*windows, *images]):
        for example in (normal, _grown(call.leaves), call.leaves):
            if example is not None and (of_example := captured_with(example, fixed)) not in seen:
                seen.append(of_example)
                yield example, fixed


def captured_with(example: Leaves, fixed: Collection[str]) -> Any:
    """Return what a capture depends on: the shapes of tensors, and the values of numbers and layouts."""
    layouts = {name: layout.tolist() for name, layout in layouts_in(example).items()}
    return [
        layouts.get(name, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf for name, leaf in example.items()
    ], tuple(fixed)


def _normal_example(structure: Structure, leaves: Leaves) -> Leaves | None:
    """Return some tokens after some cached ones; None if the call has leaves that the normal form does not have."""
    counters = {
        names[part]: names.get("cumulative_length", "")
        for _, names in cached_layers(structure)
        for part in ("keys", "values")
    }
    tokens = {"input_ids": 2, "inputs_embeds": 3, "position_ids": 2, "labels": 2}
    example: Leaves = {}
    for name, leaf in leaves.items():
        dim = leaf.dim() if isinstance(leaf, Tensor) else None
        if tokens.get(name) == dim and dim is not None:
            example[name] = leaf.new_zeros((BATCH, LENGTH, *leaf.shape[2:]))
        elif dim == 2 and name in ("attention_mask", "cached_mask"):
            example[name] = leaf.new_ones((BATCH, LENGTH if name == "attention_mask" else PAST))
        elif (name, dim) == ("logits_to_keep", 1):
            example[name] = torch.arange(2, device=leaf.device)
        elif name in counters and "_layers_" in name and name.startswith(CACHES) and dim == 4:
            seen = leaves.get(counters[name], leaf.shape[2])
            # A layer that has dropped tokens is shown as one that has dropped one.
            held = PAST - (seen > leaf.shape[2]) if isinstance(seen, int) else 0
            if not held:
                return None
            example[name] = leaf.new_zeros((BATCH, leaf.shape[1], held, leaf.shape[3]))
        elif name.endswith("cumulative_length") and isinstance(leaf, int):
            example[name] = PAST
        elif name.endswith("sliding_window_tensor"):
            example[name] = leaf
        else:
            return None
    return example if any(f"{cache}_layers_0_keys" in example for cache in CACHES) else None


def _grown(leaves: Leaves) -> Leaves:
    """Return the call with a batch of one shown twice, and with a second token in caches that hold one."""
    grown = dict(leaves)
    for name, leaf in leaves.items():
        if name.startswith(CACHES) and "cross" not in name:
            if name.endswith(("_keys", "_values")) and leaf.dim() == 4 and leaf.shape[2] == 1:
                grown[name] = torch.cat([leaf, leaf], dim=2)
            elif name.endswith("cumulative_length") and isinstance(leaf, int) and leaf == 1:
                grown[name] = 2
    return double_batch_of_one(grown) or grown


# The capture.


Outcomes = dict[frozenset[str], tuple[Structure, dict[str, Structure]]]
"""The result of runs and the state of the caller's objects after them, without leaves; by the names of the leaves."""


def capture_call(
    model: Any,
    copied: Callable[[], Any],
    call: CapturedCall,
    example: Leaves,
    fixed: Collection[str],
    verify: bool,
    fuse_loss: bool,
) -> CapturedGraph:
    """Capture a call of a model. A model that asks for autocast finds it as it is now, others find none.

    Args:
        model, copied: the model, and a function that returns a copy of it without adapters.
        call, example: what is called, and the leaves to capture it with.
        fixed: the names of those of which the batch alone is to be dynamic.
        verify, fuse_loss: as for `capture`.

    Raises:
        CaptureError: the call cannot be captured.
    """
    labels = call.leaves.get("labels")
    for with_autocast in (False, True):
        shadow, decided = copied(), None
        made_from = ModelRecord.of(shadow)  # before reads are recorded, of which these are none
        if labels is not None and (problem := problem_type_of(shadow.config, labels)):
            shadow.config.problem_type = shadow.config.problem_type or problem
            decided = model.config, problem
        with recorded_reads(shadow) as reads:
            graph = _capture(shadow, made_from, call, example, fixed, verify, fuse_loss, with_autocast)
        if not other_than_held(graph.held):
            break
    if verify:
        warn_of_writes(shadow, example, model.training)
    graph.config = ConfigValues.of(model, reads, decided)
    return graph


def _capture(
    shadow: Any,
    made_from: ModelRecord | None,
    call: CapturedCall,
    example: Leaves,
    fixed: Collection[str],
    verify: bool,
    fuse_loss: bool,
    with_autocast: bool,
) -> CapturedGraph:
    """Capture a call of a copy of the model, which is changed."""
    outcomes: Outcomes = {}
    of_example = captured_with(example, fixed)
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
        gm = base_graph(
            shadow,
            example,
            dynamic_shapes=dynamic,
            fuse_loss=fuse_loss,
            verify=verify,
            made=True,
            made_from=made_from,
        )
    assert isinstance(gm, AdaptedGraphModule)
    guards, decisions, held = take_guards(gm), decisions_on_inputs(gm), held_answers(gm.graph)
    # A capture may run the model with fewer layers too, which returns fewer caches.
    result, given = outcomes[frozenset(names_of_results(gm.graph))]
    return CapturedGraph(gm, call, of_example, layouts, guards, decisions, result, given, held)


def _outside_autocast(leaf: Any, model: Any) -> Any:
    """Return a leaf in the type of the model if autocast made it, as it makes caches, because captures go without."""
    device = model.device.type
    if not isinstance(leaf, Tensor) or not torch.is_autocast_enabled(device):
        return leaf
    return leaf.to(model.dtype) if leaf.dtype == torch.get_autocast_dtype(device) else leaf


def _dynamic(name: str, leaf: Any, batch_only: bool) -> Any:
    """Return the shape of a leaf for torch.export: as dynamic as can be, but for the heads and widths of caches."""
    if not isinstance(leaf, Tensor):
        return Dim.AUTO
    fixed: Collection[int] = (1, 3) if name.startswith(CACHES) and leaf.dim() == 4 else ()
    if batch_only:
        fixed = range(1, leaf.dim())
    # torch.export specializes sizes of 0 and 1 anyway.
    return [Dim.AUTO if size > 1 and dim not in fixed else Dim.STATIC for dim, size in enumerate(leaf.shape)]


def _as_long(structure: Structure, example: Leaves) -> list[tuple[str, str]]:
    """Return pairs of cached keys or values that are equally long in the example, of layers of one class."""
    first: dict[type, str] = {}
    pairs: list[tuple[str, str]] = []
    for kind, names in cached_layers(structure):
        for name in (names["keys"], names["values"]):
            other = first.setdefault(kind, name)
            cached = [example[each] for each in (name, other)]
            if other != name and all(t.dim() == 4 for t in cached) and cached[0].shape[2] == cached[1].shape[2]:
                pairs.append((name, other))
    return pairs


def _flat(cls: type, call: CapturedCall, outcomes: Outcomes, as_long: list[tuple[str, str]]) -> type:
    """Return a subclass of `cls`, by the same name, that takes leaves of the call and returns leaves of the result.

    Each run adds to `outcomes`. The pairs `as_long` have one length in all calls of the graph.
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
    return with_forward(cls, forward, call.leaves, default=None)


def with_forward(cls: type, forward: Any, names: Iterable[str], default: Any = inspect.Parameter.empty) -> type:
    """Return a subclass of `cls`, by the same name, whose `forward` takes arguments of these names."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(name, kind, default=default) for name in names]
    forward.__signature__ = inspect.Signature([inspect.Parameter("self", kind), *arguments])
    members = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)
