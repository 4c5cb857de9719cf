"""Find the arguments of a model that a call of its graph may leave out.

For each set of optional arguments that the model runs without, its own answer is compared with its answer to constants
in their place: ones for a mask. If the two agree, the constants stand for the arguments. If they do not, leaving the
arguments out is an error of the call.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import pytree
from .comparable import revealed, varied
from .depth.stacks import shortened
from .differences import agree
from .forward_signature import signature_of
from .origins.origin import PlainModule
from .outputs import Call, has_data, leaves_by_path, name_of
from .process_state.questions import device_of
from .refusal import in_one_line
from .shared_copy import shared_copy
from .signature import CallSignature, Fill, Omission

# Enough for all models known; every further argument would double the number of sets that are compared.
_MOST_OPTIONAL = 4
# What may stand in the place of an argument, in the order in which it is tried: a mask's ones, then zeros.
_FILLS = (1, 0)

_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_WITHOUT_NAMES = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
_PLAIN = (type(None), bool, int, float, str)


def call_signature(
    origin: PlainModule,
    model: nn.Module,
    call: Call,
    graph: fx.Graph,
    has_constants: bool,
    few_layers: Mapping[str, int],
    made: bool,
) -> CallSignature | None:
    """Find out how the graph of `model` may be called; None if its arguments have no names.

    Args:
        origin: of the model.
        model: what was captured, in evaluation mode; it runs on copies of its buffers.
        call: what it was captured with.
        graph: what it was captured as.
        has_constants: whether arguments that are not tensors were made part of the graph.
        few_layers: how many layers of each stack show what all do, by the name of the stack; empty if not known.
        made: whether the call is not the user's, and so hides nothing by zeros or ones.
    """
    args, kwargs = call
    parameters = dict(signature_of(model).parameters)
    if any(parameter.kind in _WITHOUT_NAMES for parameter in parameters.values()):
        return None
    inputs = dict(zip(parameters, args, strict=False)) | dict(kwargs)
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.kind is not _VAR_KEYWORD}
    for name in inputs.keys() - parameters.keys():  # which the model takes in its **kwargs
        parameters[name] = inspect.Parameter(name, _KEYWORD_ONLY)
    constants = {name: value for name, value in inputs.items() if isinstance(value, _PLAIN)} if has_constants else {}
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    optional = [name for name in tensors if parameters[name].default is None][:_MOST_OPTIONAL]
    omissions: dict[frozenset[str], Omission] = {}
    refusals = dict.fromkeys(optional, "the model has no data, so that a call without it could not be tried")
    if optional and has_data(model, call):
        with shortened(model, few_layers):
            comparison = _Comparison(origin, model, inputs, graph, made)
        omissions, refusals = _tried(comparison, model, optional, bool(few_layers))
    positional = tuple(name for name, parameter in parameters.items() if parameter.kind is not _KEYWORD_ONLY)
    return CallSignature(
        type(model).__name__,
        parameters,
        positional,
        tuple(inputs),
        constants,
        origin.accepted(),
        omissions,
        refusals,
        tensors=frozenset(tensors),
    )


def _tried(
    comparison: _Comparison, model: nn.Module, optional: Sequence[str], of_few_layers: bool
) -> tuple[dict[frozenset[str], Omission], dict[str, str]]:
    """Return what `_Comparison.of` does, found out with few layers if these show what all do.

    The model with all of its layers is asked then for one call, which leaves out the most; and for all calls if it
    answers otherwise.
    """
    omissions, refusals = comparison.of(optional)
    if not omissions or not of_few_layers:
        return omissions, refusals
    comparison.compare_with(model)
    names, omission = max(omissions.items(), key=lambda each: len(each[0]))
    fills = {name: omission.fills[comparison.places[name]].value for name in names}
    with contextlib.suppress(_Differs):
        if comparison.omission(fills) == omission:
            return omissions, refusals
    return comparison.of(optional)


class _Comparison:
    """Compares a model's answers to calls that leave arguments out with those to a constant in their place."""

    def __init__(
        self, origin: PlainModule, model: nn.Module, inputs: Mapping[str, Any], graph: fx.Graph, made: bool
    ) -> None:
        self.compare_with(model)
        padded = _with_padding(model, dict(inputs))
        self.inputs = [padded]
        leaves = (len(pytree.tree_leaves(value)) for value in inputs.values())
        self.places = dict(zip(inputs, itertools.accumulate(leaves, initial=0), strict=False))
        self.values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        self.results = len(pytree.tree_leaves(graph.output_node().args[0]))
        for of_tokens in () if made else (True, False):
            if (others := varied(padded, of_tokens)) is None:
                break
            self.inputs.append(others)
            try:
                self._answer({}, 1)
                break
            except _Differs:  # the model does not take such numbers
                self.inputs.pop()
        self.with_one_mask = len(self.inputs)
        if (other := origin.with_other_mask(padded)) is not None:
            self.inputs.append(other)

    def compare_with(self, model: nn.Module) -> None:
        """Ask a copy of `model` from now on."""
        self.model = shared_copy(model, [name for name, _ in model.named_buffers()])  # a run may write to buffers
        self.answers: dict[tuple[Any, ...], _Answer] = {}

    def of(self, optional: Sequence[str]) -> tuple[dict[frozenset[str], Omission], dict[str, str]]:
        """Return the sets of `optional` that may be left out; and for each that may not be left out alone, why."""
        omissions: dict[frozenset[str], Omission] = {}
        refusals: dict[str, str] = {}
        fills: dict[str, int] = {}
        for name, fill in itertools.product(optional, _FILLS):
            if name in fills:
                continue
            try:
                omissions[frozenset({name})] = self.omission({name: fill})
            except _Differs as reason:
                refusals.setdefault(name, str(reason))
            else:
                fills[name] = fill
                refusals.pop(name, None)
        sets = (itertools.combinations(fills, size) for size in range(2, len(fills) + 1))
        for names in itertools.chain.from_iterable(sets):
            with contextlib.suppress(_Differs):
                omissions[frozenset(names)] = self.omission({name: fills[name] for name in names})
        return omissions, refusals

    def omission(self, fills: Mapping[str, int]) -> Omission:
        """Return what the model computes without the arguments.

        Raises:
            _Differs: the constants do not stand for that.
        """
        for index in range(self.with_one_mask if "attention_mask" in fills else len(self.inputs)):
            short, whole = self._answer(dict.fromkeys(fills), index), self._answer(fills, index)
            self._require_equal(short, whole)
        short, whole = self._answer(dict.fromkeys(fills), 0), self._answer(fills, 0)
        paths = list(whole.results)
        places = {self.places[name]: value for name, value in fills.items()}
        return Omission(
            {place: _fill(self.values, place, value, places.keys()) for place, value in places.items()},
            tuple(paths.index(path) for path in short.results),
            short.spec,
        )

    def _require_equal(self, short: _Answer, whole: _Answer) -> None:
        if len(whole.results) != self.results:
            raise _Differs("the graph returns other results than the model")
        for path, value in short.results.items():
            if path not in whole.results:
                raise _Differs(f"the model then returns {name_of(path)} as well")
            if not agree(value, whole.results[path]):
                raise _Differs(f"the model then computes another {name_of(path)}")

    @torch.no_grad()
    def _answer(self, changes: Mapping[str, int | None], index: int) -> _Answer:
        """Return what the model returns with constants in the place of some arguments, or, with None, without them.

        Args:
            changes: the constants.
            index: of the inputs to change.
        """
        key = (index, *sorted(changes.items()))
        if key not in self.answers:
            inputs = {name: value for name, value in self.inputs[index].items() if name not in changes}
            constants = {name: fill for name, fill in changes.items() if fill is not None}
            filled = {name: torch.full_like(self.inputs[index][name], fill) for name, fill in constants.items()}
            device = device_of(self.model)
            try:
                with revealed(self.model), torch.random.fork_rng(), torch.autocast(device, enabled=False):
                    result = self.model(**copy.deepcopy(inputs), **filled)
            except Exception as error:
                raise _Differs(f"the model then raises {in_one_line(error)}") from error
            self.answers[key] = _Answer(*leaves_by_path(result))
        return self.answers[key]


def _with_padding(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with padding among the tokens: some models look for it where they are given no mask."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or not isinstance(padding, int):
        return inputs
    ids = ids.clone()
    ids[0, -1] = padding
    return {**inputs, "input_ids": ids}


@dataclass(frozen=True)
class _Answer:
    """The results that a model returned, by their path, and the structure around them."""

    results: dict[Any, Any]
    spec: pytree.TreeSpec


class _Differs(Exception):
    """The reason why a constant does not stand for an argument that is left out."""


def _fill(values: Sequence[Any], place: int, value: int, left_out: Collection[int]) -> Fill:
    """Return the constant in the place of an input, with its sizes read off the others.

    The inputs of a captured graph may be of sizes that have nothing to do with each other as far as the graph knows.
    So sizes that were the same in the example are taken for one: tokens and labels are both (batch, length). Should
    they differ in a call, the guards of the graph raise.
    """
    tensor: Tensor = values[place]
    open_sizes = [
        (index, at, size)
        for index, other in enumerate(values)
        if index not in left_out and isinstance(other, Tensor)
        for at, size in enumerate(other.shape)
        if not isinstance(size, int)
    ]

    def size_of(dim: int) -> int | tuple[int, int]:
        size = tensor.shape[dim]
        if isinstance(size, int):
            return size

        def unlikeliness(index: int, at: int) -> tuple[Any, ...]:
            # The batch is counted from the first, other dimensions from the last, so that the mask of an image finds
            # height and width.
            from_last = dim - tensor.dim() + values[index].dim()
            first, second = (dim, from_last) if dim == 0 else (from_last, dim)
            return str(values[index].shape[at]) != str(size), index, at != first, at != second, at

        alike = [(index, at) for index, at, other in open_sizes if size_in_example(other) == size_in_example(size)]
        return min(alike, key=lambda place: unlikeliness(*place), default=size_in_example(size))

    return Fill(value, tuple(map(size_of, range(tensor.dim()))), tensor.dtype, tensor.device)


def size_in_example(size: Any) -> int:
    """Return a size of an input as it was in the example that a graph was captured with."""
    return int(size) if isinstance(size, int) else int(size.node.hint)  # nothing public tells it
