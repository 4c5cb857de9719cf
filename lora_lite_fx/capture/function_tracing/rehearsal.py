"""Run a user's function as it is, and watch the operators that it calls.

`Watch` refuses writes to tensors that the function may only read. A `Stage` runs a function on stand-ins without data,
and refuses also what a graph could not do in its place. The errors are raised inside the function, so that the line at
fault is in the traceback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...compat.torch import (
    LOCAL_SCALAR_DENSE,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    TorchDispatchMode,
    disable_current_modes,
    pytree,
)
from ...errors import ConfigError
from ...graph.calls_and_traces import tracing
from ...graph.writes import written_arguments
from ..quiet_torch import failures_unlogged

T = TypeVar("T")

_LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class Refused(ConfigError):
    """A function does what it may not. The message is a predicate: whoever called the function puts its name before."""


class Watch(TorchDispatchMode):
    """Refuse writes in place to some tensors and to what shares memory with them.

    Args:
        read_only: the tensors, by the names that the function knows them by.
    """

    def __init__(self, read_only: Mapping[str, Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = [(name, _storage(tensor)) for name, tensor in read_only.items() if tensor is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written_arguments(func, args, kwargs):
            self._check_write(func, tensor)
        return func(*args, **kwargs)

    def _check_write(self, func: Any, tensor: Tensor) -> None:
        storage = _storage(tensor)
        for name, read_only in self._storages:
            if storage is not None and storage is read_only:
                raise Refused(
                    f"writes to {name} in place ({func.name().partition('::')[2].partition('.')[0]}), which it may only"
                    " read. The way out: an operation that returns a new tensor, such as t * 2 in place of t.mul_(2) or"
                    " t *= 2"
                )


def _storage(tensor: Tensor) -> object:
    """Return the object that is the memory of `tensor`; None for a tensor that has no memory of its own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class _Rehearsal(Watch):
    """Refuse also tensors that are not made from the stand-ins, and note the operators that run in `record`."""

    def __init__(self, read_only: Mapping[str, Tensor | None]) -> None:
        super().__init__(read_only)
        self.record: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asks what is known, and is asked once or more by what torch keeps
            return func(*args, **kwargs)
        if func is LOCAL_SCALAR_DENSE:
            raise _reads_values()
        values = pytree.tree_leaves((args, kwargs))
        for value in values:
            # A number becomes a tensor in places (`t[0] = 1`), and is a number again in the graph.
            if type(value) in (Tensor, torch.nn.Parameter) and not (func in _LIFTED and value.dim() == 0):
                raise _constant(value, made_inside=func in _LIFTED)
        self.record.append(f"{func}({', '.join(map(_described, values))})")
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _reads_values() from error


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _constant(value: Tensor, made_inside: bool) -> Refused:
    """Return the error for a tensor that is neither made from the stand-ins nor one of them."""
    with disable_current_modes():
        small = value.numel() <= 4 and not value.is_meta
        shown = str(value.tolist()) if small else f"of shape {tuple(value.shape)}"
    made = "in it" if made_inside else "outside of it"
    why = f"uses a tensor made {made} ({shown}), which would not move with the model"
    if value.dim() == 0:
        return Refused(f"{why}. The way out: a Python number in its place")
    spec = f'"lora_c": ParamSpec({tuple(value.shape)}, init=lambda t: t.copy_(...), trainable=False)'
    return Refused(f"{why}. The way out: Python numbers; or a tensor of the variant, p.lora_c, with {spec} in params")


def _reads_values() -> Refused:
    return Refused(
        "depends on the values of a tensor in Python (an if, a loop, a size, .item(), .numpy()), which a graph cannot."
        " The way out: torch.where in place of an if, and a field of the config in place of a number"
    )


class Stage:
    """Stand-ins without data, and a place to run functions on them."""

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._mode = FakeTensorMode(shape_env=ShapeEnv())

    def like(self, tensor: Tensor) -> Tensor:
        """Return a stand-in of the shape, dtype and device of `tensor`."""
        return self._mode.from_tensor(tensor.detach(), static_shapes=True)

    def make(self, build: Callable[[], T]) -> T:
        """Return what `build` returns, with stand-ins for the tensors that it makes."""
        with self._mode:
            return build()

    @tracing()  # what torch logs is switched for all threads
    def run(self, function: Callable[[], T], read_only: Mapping[str, Tensor | None]) -> tuple[T, list[str]]:
        """Run `function` on stand-ins, and return its result and a line for each operator that it called.

        Args:
            function: reads stand-ins of this stage.
            read_only: those that `function` may not write to, by name.

        Raises:
            Refused: `function` writes to these, uses other tensors, or depends on values.
        """
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # else a second run lacks the casts of the first one
        try:
            with failures_unlogged(), torch.enable_grad(), self._mode, _Rehearsal(read_only) as watch:
                return function(), watch.record
        except GuardOnDataDependentSymNode as error:
            raise _reads_values() from error
        except RuntimeError as error:
            if ".numpy() is not supported" in str(error):
                raise _reads_values() from error
            raise
        finally:
            torch.set_autocast_cache_enabled(caches)


def first_difference(one: Sequence[str], other: Sequence[str]) -> tuple[str, str] | None:
    """Return the first lines in which two records of `Stage.run` differ, or None."""
    pairs = itertools.zip_longest(one, other, fillvalue="nothing")
    return next((pair for pair in pairs if pair[0] != pair[1]), None)
