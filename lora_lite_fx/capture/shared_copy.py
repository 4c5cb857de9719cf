"""Copy a model without copying its weights, and let the functions on the copy read the copy.

`copy.deepcopy` copies no functions. One that was put on a module (`module.forward = ...`, a hook) may hold parts of the
model, and would go on to call those of the original.
"""

from __future__ import annotations

import copy
import dis
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..compat.torch_modules import buffers_of, parameters_of
from ..errors import CaptureError
from ..graph.copies import prepare_copy
from ..graph.tensors import tensor_of
from ..storage.dequantized import put_decompression_aside, share_dequantized

_HOLDERS = (FunctionType, MethodType, functools.partial, list, tuple, dict)
"""What may hold a part of a model, and is replaced on the copy then."""


def shared_copy(model: nn.Module, own: Sequence[str] = ()) -> Any:
    """Return a copy of `model` whose frozen parameters and buffers are new objects over the same storage.

    In the place of each quantized linear the copy has a `DequantizedLinear` over its tensors, whose weight is a value
    that every capture can follow. Functions that were put on modules, as a `forward`, call the modules of the copy.

    Args:
        model: left as it is; ties between its tensors are kept in the copy.
        own: qualified names of tensors that the copy gets as copies of its own, trainable as they are.
    """
    owned = {id(tensor_of(model, name)) for name in own}
    memo: dict[int, Any] = {}
    prepare_copy(model, memo)
    share_dequantized(model, memo)
    for module in model.modules():
        for tensor in (*parameters_of(module).values(), *buffers_of(module).values(), *module.__dict__.values()):
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            if id(tensor) in owned:
                memo[id(tensor)] = copy.deepcopy(tensor)
            elif isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
            else:
                memo[id(tensor)] = tensor.detach()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied with its weights shared, {error}."
            " Remove attributes that cannot be copied (locks, open files, generators) before rewriting."
        ) from error
    _rebind_functions(copied, memo)
    put_decompression_aside(copied)
    return copied


def _rebind_functions(copied: nn.Module, memo: Mapping[int, Any]) -> None:
    """Replace the functions on modules of `copied` that reach parts of its original by ones that reach its own."""
    rebinding = _Rebinding(memo)
    for module in copied.modules():
        attributes = vars(module)
        for name, value in [*attributes.items()]:
            is_registry = isinstance(value, dict)
            if (is_registry and not value) or not rebinding.reaches(value):  # most registries of hooks are empty
                continue
            if is_registry:  # of hooks: what else holds the registry has to see the change
                value.update({key: rebinding.of(each) for key, each in value.items()})
            else:
                attributes[name] = rebinding.of(value)


class _Rebinding:
    """Finds and replaces what reaches originals: functions by their closures, defaults and the globals that they read.

    Args:
        memo: of `copy.deepcopy`: the copies by the identities of what they are copies of.
    """

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self.memo = memo
        self.made: dict[int, FunctionType] = {}
        self.known: dict[int, tuple[Any, bool]] = {}  # with the values, so that no other gets the identity of one

    def reaches(self, value: Any) -> bool:
        """Return whether `value` is an original, or holds one."""
        if isinstance(value, (nn.Module, Tensor)):
            return id(value) in self.memo
        if not isinstance(value, _HOLDERS):
            return False
        if id(value) not in self.known:
            self.known[id(value)] = value, False  # for what holds itself
            self.known[id(value)] = value, any(map(self.reaches, _held(value)))
        return self.known[id(value)][1]

    def of(self, value: Any) -> Any:
        """Return `value`, or what takes its place if it reaches an original."""
        if not self.reaches(value):
            return value
        if isinstance(value, FunctionType):
            return self.made.get(id(value)) or self._function(value)
        if isinstance(value, MethodType):
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: self.of(each) for name, each in value.keywords.items()}
            return functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if isinstance(value, dict):
            return {key: self.of(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [*map(self.of, value)] if isinstance(value, list) else tuple(map(self.of, value))
        return self.memo[id(value)]

    def _function(self, function: FunctionType) -> FunctionType:
        read = globals_read(function)
        cells = [(cell, CellType()) for cell in function.__closure__ or ()]
        # A function that reads an original by a global name has the globals of now, with the copy under that name.
        is_global = any(map(self.reaches, read.values()))
        globals_ = {**function.__globals__} if is_global else function.__globals__
        made = FunctionType(function.__code__, globals_, function.__name__, None, tuple(own for _, own in cells))
        self.made[id(function)] = made  # first, because a function may hold itself
        if is_global:
            globals_ |= {name: self.of(value) for name, value in read.items()}
        for before, cell in cells:
            for value in contents_of(before):
                cell.cell_contents = self.of(value)
        made.__defaults__ = function.__defaults__ and tuple(map(self.of, function.__defaults__))
        made.__kwdefaults__ = function.__kwdefaults__ and {
            name: self.of(value) for name, value in function.__kwdefaults__.items()
        }
        vars(made).update(vars(function))
        return made


def _held(value: Any) -> Iterable[Any]:
    """Return what `value` holds, that it may call or read."""
    if isinstance(value, FunctionType):
        contents = [each for cell in value.__closure__ or () for each in contents_of(cell)]
        return (
            *contents,
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *globals_read(value).values(),
        )
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    return value.values() if isinstance(value, dict) else value


def contents_of(cell: CellType) -> list[Any]:
    """Return what a cell contains, or nothing while its variable has no value."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def globals_read(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads, by name; of functions those alone that have the same globals."""
    globals_ = function.__globals__
    found = {name: globals_[name] for name in _names_read(function.__code__) if name in globals_}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, FunctionType) or value.__globals__ is globals_
    }


@functools.lru_cache(maxsize=256)
def _names_read(code: CodeType) -> frozenset[str]:
    """Return the names of the globals that a function reads, and functions inside it."""
    own = {str(each.argval) for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    return frozenset(own.union(*(_names_read(each) for each in code.co_consts if isinstance(each, CodeType))))
