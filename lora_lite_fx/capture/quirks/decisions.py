"""Export a model that decides by values, where a graph follows one way only.

Three constructs are followed, each so that no call gets a wrong value:

- `if mask.any():` goes the way of the example. The graph asserts in each call that it comes out the same.
- `for index in hit.nonzero():` over a vector of fixed size, as mixtures of experts run the experts that a token chose,
  becomes a loop over all indices. That is the same where the body does nothing for an index without entries. The graph
  is compared with the model to see it, on inputs that leave indices out.
- `torch.div` of sizes is a number, as `//` is.

Needed by Ovis2, which looks whether a prompt has images, by Phi-3 with long contexts, and by mixtures of experts that
loop over the chosen ones, as files from the hub do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import disable_current_modes, pytree
from ...errors import COMPILE_INSTEAD, CaptureError
from ...graph.modes import modes_of
from ..asserted_decisions import assert_decision
from ..comparable import revealed
from ..depth.watched_functions import READ_SIZES
from ..differences import all_agree
from ..outputs import Call, Outputs, has_data, outputs_of_graph, outputs_of_model
from ..refusal import line_of
from .quirk import Quirk, after_undecided

_MOST_INDICES = 1024
_TO_TRUTH: dict[Any, Callable[..., Tensor]] = {
    Tensor.__bool__: lambda value: value,
    Tensor.__contains__: lambda values, item: (values == item).any(),
    Tensor.equal: lambda one, other: (one == other).all(),
    torch.equal: lambda one, other: (one == other).all(),
}
"""Functions that return a truth value to Python, and the tensor that it is the value of."""
_NONZERO = (Tensor.nonzero, torch.nonzero)
_DRAWS = (torch.rand, torch.randn, torch.randint, torch.bernoulli, Tensor.uniform_, Tensor.normal_, Tensor.bernoulli_)
_RESHAPE = (Tensor.squeeze, torch.squeeze, Tensor.flatten, torch.flatten, Tensor.view, Tensor.reshape)


class Decisions:
    """What a model decides on the inputs of a call, for an export that follows it.

    Args:
        model: is run in its mode; it is not changed.
        call: the arguments.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._model, self._call = model, call
        self.watch = _Watch(unrolled=True)
        self._run(call, self.watch)

    def check(self, gm: fx.GraphModule) -> None:
        """Check that loops of a traced graph over all indices do nothing for those that do not occur.

        Raises:
            CaptureError: one does something, or all indices occur in each of the calls that are tried.
        """
        if not self.watch.loops:
            return
        name, way_out = type(self._model).__name__, f"or {COMPILE_INSTEAD}"
        plain = fx.GraphModule(gm, gm.graph)  # what torch.export makes refuses train()
        left_out = dict.fromkeys(self.watch.loops, False)
        for call in (self._call, _of_one_kind(self._call)):
            watch = _Watch(unrolled=False)
            try:
                with revealed(self._model, plain):
                    expected = self._run(call, watch).results
                    actual = outputs_of_graph(plain, self._model, call, modes_of(self._model), by_module=False).results
            except Exception:  # the model does not take tokens of one kind, or decides otherwise for them
                continue
            if not all_agree(expected, actual):
                raise CaptureError(
                    f"{name} loops over the indices that occur at {next(iter(left_out))}, and a loop over all, as a"
                    " graph has it, computes something else. The way out: let the body do nothing for an index without"
                    f" entries, {way_out}."
                )
            left_out |= {where: True for where, some in watch.loops.items() if some}
        if unseen := [where for where, some in left_out.items() if not some]:
            raise CaptureError(
                f"{name} loops over the indices that occur at {unseen[0]}, and all of them do on the example inputs, so"
                " that nothing shows whether a graph may loop over all. The way out: pass example_inputs that leave"
                f" some out, such as fewer tokens, {way_out}."
            )

    def _run(self, call: Call, watch: _Watch) -> Outputs:
        return outputs_of_model(self._model, call, modes_of(self._model), watch=watch)


def _of_one_kind(call: Call) -> Call:
    """Return the call with all tokens the same: few experts are chosen then."""

    def same(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or not leaf.numel():
            return leaf
        return leaf.flatten()[0].expand_as(leaf).clone()

    inputs: Call = pytree.tree_map(same, call)
    return inputs


class _Watch(TorchFunctionMode):
    """Records what a run decides.

    Args:
        unrolled: whether loops over the indices that occur go over all.
    """

    def __init__(self, unrolled: bool) -> None:
        super().__init__()
        self.unrolled = unrolled
        self.taken: list[tuple[str, bool]] = []
        self.loops: dict[str, bool] = {}
        """The lines of loops over indices, and whether one of their runs leaves out some index."""
        self.functions: set[CodeType] = set()
        """The functions that such loops are in."""
        self._indices: dict[int, tuple[Tensor, Tensor]] = {}
        self._drawn: dict[int, tuple[Any, Tensor]] = {}
        """Random numbers, and numbers made of them, with the function that made them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in _TO_TRUTH or _is_truth(func, args)) and (where := _line()) is not None:
            if id(args[0]) in self._drawn:
                raise CaptureError(f"The model decides at random at {where}, as a graph cannot.")
            return self.decide(func, args, where)
        if func is torch.div and not any(isinstance(arg, Tensor) for arg in args) and kwargs.get("rounding_mode"):
            return args[0] // args[1]  # of sizes, which are positive
        if func is Tensor.__format__ and isinstance(index := args[0].item(), int):  # of a constant
            return format(index, *args[1:])
        if func is Tensor.unbind and id(args[0]) in self._indices and args[1:] in ((), (0,)):
            return self.loop(*self._indices[id(args[0])])
        result = func(*args, **kwargs)
        is_number = isinstance(result, Tensor) and not result.dim()
        if is_number and (func in _DRAWS or self.is_drawn(func, args)):
            self._drawn[id(result)] = func, result
        if func in _NONZERO and isinstance(result, Tensor) and args[0].dim() == 1 and type(len(args[0])) is int:
            if len(args[0]) <= _MOST_INDICES:
                with disable_current_modes():
                    self._indices[id(result)] = result, torch.arange(len(args[0]))[:, None]
        elif func in _RESHAPE and id(args[0]) in self._indices:
            with disable_current_modes():
                every = func(self._indices[id(args[0])][1], *args[1:], **kwargs)
            self._indices[id(result)] = result, every
        return result

    def is_drawn(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether a number depends on random numbers; `torch.rand([]) < 0.0` is false, whatever is drawn."""
        if func in (Tensor.__lt__, Tensor.lt) and args[1] == 0.0:
            return self._drawn.get(id(args[0]), (None,))[0] not in (None, torch.rand)
        return any(id(arg) in self._drawn for arg in args)

    def decide(self, func: Any, args: tuple[Any, ...], where: str) -> bool:
        value = bool(func(*args))
        self.taken.append((where, value))
        return value

    def loop(self, found: Tensor, every: Tensor) -> tuple[Tensor, ...]:
        where = str(_line())
        if (frame := _frame()) is not None:
            self.functions.add(frame.f_code)
        self.loops[where] = self.loops.get(where, False) or len(found) < len(every)
        return self.all_of(every, found) if self.unrolled else found.unbind()

    def all_of(self, every: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        # A literal, because a trace knows the values of these.
        return tuple(torch.tensor(value, device=like.device) for value in every.tolist())


def _is_truth(func: Any, args: tuple[Any, ...]) -> bool:
    return func is Tensor.item and args[0].dtype == torch.bool


class _Follow(_Watch):
    """Lets a trace decide as a run did, and asserts in the graph that each call does.

    Args:
        taken: the decisions.
        functions: those with loops over indices that occur. They may skip an index without entries, and
            `Decisions.check` sees that they may as well not: here no tensor in them is empty.
    """

    def __init__(self, taken: list[tuple[str, bool]], functions: Set[CodeType]) -> None:
        super().__init__(unrolled=True)
        self._next = iter(taken)
        self._not_empty = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in READ_SIZES and (frame := _frame()) is not None and frame.f_code in self._not_empty:
            return torch.Size(map(_entries, result)) if isinstance(result, torch.Size) else _entries(result)
        return result

    def decide(self, func: Any, args: tuple[Any, ...], where: str) -> bool:
        # A model may ask more where it is not traced: transformers asks there whether it can do without a mask.
        expected = next((value for before, value in self._next if before == where), None)
        if expected is None:
            raise CaptureError(f"The model decides at {where} while it is traced, and not at this point before.")
        truth = _TO_TRUTH[func](*args) if func in _TO_TRUTH else args[0]
        truth = truth if truth.dtype == torch.bool else truth != 0
        assert_decision(truth, expected, where)
        return expected

    def loop(self, found: Tensor, every: Tensor) -> tuple[Tensor, ...]:
        return self.all_of(every, found)


class _Entries(torch.SymInt):
    """A number of entries that a trace does not know, and that does not equal zero where a model asks."""

    def __eq__(self, other: object) -> Any:
        return not (type(other) is int and other == 0) and super().__eq__(other)

    __hash__ = torch.SymInt.__hash__


def _entries(size: Any) -> Any:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if not isinstance(size, torch.SymInt) or not free_unbacked_symbols(size):
        return size
    return _Entries(size.node)  # type: ignore[no-untyped-call, unused-ignore]


def _frame() -> FrameType | None:
    """Return the frame that called the function of torch which is watched."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename in _BETWEEN or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return frame


def _line() -> str | None:
    """Return the line of the model that is running; None if a function of torch decides within itself."""
    frame = _frame()
    if frame is None or frame.f_code.co_filename.startswith(f"{_TORCH}{os.sep}"):
        return None
    return line_of(frame)


_TORCH = os.path.dirname(torch.__file__)
_BETWEEN = (__file__, os.path.join(_TORCH, "_tensor.py"), os.path.join(_TORCH, "overrides.py"))


@contextmanager
def _decided(model: nn.Module, call: Call) -> Iterator[Decisions]:
    decisions = Decisions(model, call)
    with _Follow(decisions.watch.taken, decisions.watch.functions):
        yield decisions


QUIRK = Quirk(
    lambda model, error: after_undecided(model, error) and has_data(model),
    _decided,
    lambda decisions, gm: decisions.check(gm),
)
