"""Count the memory that is alive, whoever holds it: the oracle of what a forward pass keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the memory of each tensor that an operator returns in the body."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage)
        return result

    def count(self, besides: Iterable[Tensor] = ()) -> int:
        """Return the bytes of what is alive now, without the memory of some tensors, as of the parameters."""
        known = {tensor.untyped_storage().data_ptr() for tensor in besides}
        storages = [reference() for reference in self._seen.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None and storage.data_ptr() not in known)
