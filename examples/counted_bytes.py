"""Count the bytes that a step keeps and moves, on tensors with data or without: the counts are the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Kept:
    """A tensor that autograd keeps.

    Without its history, because an operation that saves its own result would hold itself, which no collector sees.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def kept_bytes(run: Any, modules: Iterable[nn.Module], given: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Return the bytes that autograd keeps after a forward pass, and what the pass returns.

    What is saved for a value that is detached goes with that value, and does not count.

    Args:
        run: does the forward pass.
        modules: their parameters and buffers do not count.
        given: tensors that do not count either, such as inputs.
    """
    given = [*given, *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    alive = weakref.WeakSet[_Kept]()

    def pack(tensor: Tensor) -> _Kept:
        alive.add(kept := _Kept(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = run()
    storages = {storage._cdata: storage for kept in alive for storage in [kept.tensor.untyped_storage()]}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known), result


class MovedBytes(TorchDispatchMode):
    """Adds up the bytes that each operator of the body reads and writes, if each reads and writes all once.

    Operators that return views or numbers move nothing. Caches may hold some of it back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        memory = {tensor.untyped_storage()._cdata for tensor in read}
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if writes or any(tensor.untyped_storage()._cdata not in memory for tensor in made):
            self.total += sum(tensor.numel() * tensor.itemsize for tensor in (*read, *made))
        return result
