"""Run a model on stand-ins without data, and record the operators that it calls, as the steps of a program.

A run of all layers costs some milliseconds a layer, where `torch.export` takes some hundred. The record has all that a
graph depends on: each operator, its literals, what it reads and what it returns, also the values of constants. It has
the comparisons of sizes too, because a graph holds for those sizes alone for which they come out the same.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.torch import FakeTensor, FakeTensorMode, TorchDispatchMode, disable_current_modes, exporting, pytree
from ...graph.calls_and_traces import tracing
from ...graph.copies import prepare_copy
from ..autograd_functions import telling_functions
from ..quirks.all_quirks import without_data
from ..quirks.quirk import Call
from .dropouts import Dropout, WithoutDropouts
from .known_operators import KnownOperators
from .program import NotRepeated, Part, Read, Result, Step, input_name
from .watched_functions import WatchedFunctions, literal, literals

_MOST_VALUES = 1 << 20
"""A constant of more values than this is not compared by value."""


@dataclass(frozen=True)
class Run:
    """The record of a run.

    Args:
        steps: the operators that were called, and comparisons of sizes.
        results: the leaves of what the model returned.
        returned: what these are leaves of.
    """

    steps: list[Step]
    results: list[Result]
    returned: pytree.TreeSpec


class StandIn:
    """A copy of a model over tensors without data, which can be run to record its operators.

    Args:
        model: left as it is.
        stacks: names of the containers whose members are marked in the record.
        known: the operators of stand-ins before.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, int], known: KnownOperators) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._known = known
        memo: dict[int, Any] = {}
        prepare_copy(model, memo)
        for module in model.modules():
            for tensor in module.__dict__.values():
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = tensor
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._names: dict[int, str] = {}
        for name, tensor in named:
            if id(tensor) not in memo:
                memo[id(tensor)] = fake = self._mode.from_tensor(tensor, static_shapes=True)
                self._names[id(fake)] = name
        self.model = copy.deepcopy(model, memo)
        self._inside: list[Part] = []
        for stack in stacks:
            for member, layer in enumerate(self.model.get_submodule(stack).children()):
                self._mark(layer, (stack, member))

    def _mark(self, layer: nn.Module, name: tuple[str, int]) -> None:
        def enter(*_: Any) -> None:
            self._inside.append(name)

        def leave(*_: Any) -> None:
            self._inside.pop()

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    @tracing()  # modules ask whether something traces, which is said for all threads
    def run(
        self,
        call: Call,
        sizes: Mapping[int, Sequence[int]] = MappingProxyType({}),
        dropouts: list[Dropout] | None = None,
    ) -> Run:
        """Call the model, and return the record.

        Args:
            call: its arguments.
            sizes: other sizes for tensors of it, by their number among its leaves.
            dropouts: gets the dropouts, which are left out of the run then.
        """
        leaves, spec = pytree.tree_flatten(call)
        self._inside.clear()
        record = _Record(self._names, self._inside)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[number] = self._like(leaf, sizes.get(number))
                record.name(leaves[number], input_name(number))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with (
            torch.enable_grad(),
            exporting(),
            without_data(self.model, self._mode),
            _Operators(record, functools.partial(self._known.call, self._mode)),
            WatchedFunctions(record.event),
            telling_functions(record.function),
            nullcontext() if dropouts is None else WithoutDropouts(dropouts),
        ):
            returned = self.model(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(returned)
        return Run(record.steps, [record.result(leaf) for leaf in leaves], spec)

    def _like(self, tensor: Tensor, size: Sequence[int] | None) -> Tensor:
        """Return a tensor without data that is like this one but for its size."""
        if size is None or list(size) == list(tensor.shape):
            return self._mode.from_tensor(tensor, static_shapes=True)
        with self._mode:
            return torch.empty(size, dtype=tensor.dtype, device=tensor.device)


class _Record:
    """The steps of a run, and where each tensor comes from."""

    def __init__(self, names: Mapping[int, str], inside: list[Part]) -> None:
        self.steps: list[Step] = []
        self._inside = inside
        self._origins: dict[int, Read] = {key: (name, 0) for key, name in names.items()}
        self._kept: list[Tensor] = []  # so that no two have one id

    def name(self, tensor: Tensor, name: str) -> None:
        self._origins[id(tensor)] = (name, 0)
        self._kept.append(tensor)

    def add(self, what: Hashable, values: Any, call: Callable[[Hashable], Any]) -> Any:
        """Add a step, and return its result.

        Args:
            what: it does.
            values: of its arguments, tensors among them.
            call: runs it. Gets what its arguments look like.
        """
        reads: list[Read] = []
        arguments = self._described(values, reads)
        results = call(arguments)
        outcome: list[Hashable] = []
        leaves = [results] if isinstance(results, Tensor) else pytree.tree_leaves(results)
        for index, result in enumerate(leaves):
            if not isinstance(result, Tensor):
                outcome.append(literal(result))
            elif (origin := self._origins.get(id(result))) is not None:
                outcome.append("an argument")
                reads.append(origin)
            else:
                outcome.append(_like(result))
                self._origins[id(result)] = (len(self.steps), index)
                self._kept.append(result)
        self.steps.append(Step((what, arguments, tuple(outcome)), tuple(reads), tuple(self._inside)))
        return results

    def result(self, leaf: Any) -> Result:
        """Return a leaf of what the model returns, as a record."""
        reads: list[Read] = []
        what = self._described(leaf, reads)
        return Result(what, reads[0] if reads else None)

    def event(self, what: Hashable) -> None:
        """Add a step that is about sizes."""
        self.steps.append(Step(what, (), tuple(self._inside), about_sizes=True))

    def function(self, function: Any, args: Any) -> None:
        """Add a step for a call of an autograd function, whose operators do not tell its backward pass."""
        self.event((f"{function.__module__}.{function.__qualname__}", id(function), literals(args)))

    def _described(self, value: Any, reads: list[Read]) -> Hashable:
        if isinstance(value, (tuple, list)):  # before tensors, of which it takes longer to ask
            return tuple([self._described(item, reads) for item in value])
        if isinstance(value, dict):
            return tuple([(key, self._described(item, reads)) for key, item in value.items()])
        if not isinstance(value, Tensor):
            return literal(value)
        if (origin := self._origins.get(id(value))) is None:
            return _constant(value)
        reads.append(origin)
        return _like(value)


def _like(tensor: Tensor) -> Hashable:
    return tensor.dtype, str(tensor.shape), str(tensor.stride()), tensor.device


def _constant(tensor: Tensor) -> Hashable:
    """Return a key for the value of a tensor that the model has beside its parameters and buffers, or makes itself."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() > _MOST_VALUES:
        raise NotRepeated(f"it reads a tensor of shape {tuple(tensor.shape)} whose values are not known")
    return value_key(tensor)


def value_key(tensor: Tensor) -> Hashable:
    """Return a key that tensors of equal type and values have in common."""
    with disable_current_modes():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return "constant", tensor.dtype, tuple(tensor.shape), tensor.device, hashlib.sha256(data).hexdigest()


class _Operators(TorchDispatchMode):
    """Records operators."""

    supports_higher_order_operators = True

    def __init__(self, record: _Record, call: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record, self._call = record, call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # which autograd asks for; a graph has no such step
            return args[0].device
        kwargs = kwargs or {}
        call = functools.partial(self._call, func, args, kwargs)
        return self._record.add(str(func), (args, kwargs, torch.is_grad_enabled()), call)
