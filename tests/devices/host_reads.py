"""Note which values of tensors a call reads: on a GPU the process waits for each of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, ops
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = {
    ops.aten._local_scalar_dense.default,
    ops.aten.equal.default,
    ops.aten.nonzero.default,
    ops.aten.masked_select.default,
    ops.aten._unique2.default,
    ops.aten.unique_dim.default,
    ops.aten.unique_consecutive.default,
    ops.aten.repeat_interleave.Tensor,
}
"""Operators that read values, or whose results are as large as some values say."""
_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
"""Methods that read the memory of a tensor on the CPU without an operator."""


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_booleans = func is ops.aten.index.Tensor and any(
            index is not None and index.dtype.itemsize == 1 for index in args[1]
        )
        if func in _OPERATORS or by_booleans:
            self.found.append(_reader())
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self.found.append(_reader())
        return func(*args, **(kwargs or {}))


def _reader() -> str:
    """Return the function that reads: the innermost one that is not torch's or this file's."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if "/torch/" not in frame.filename]
    return own[-1].name


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Yield a list that gets, for each value that the body reads, the name of the function that reads it."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        yield found
