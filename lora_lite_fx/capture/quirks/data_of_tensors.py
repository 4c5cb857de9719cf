"""Read `x.detach()` for `x.data`, of which a trace knows neither the origin nor the writes.

Both have the storage of `x` and no gradient. They differ in what autograd notices of writes, and a graph has these as
operators.

Needed by CogVideoX, which fills a part of a table by `table.data[:, 6:].copy_(positions)`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .quirk import Quirk, where_mentioned


class DataIsDetached(TorchFunctionMode):
    """Reads `x.detach()` for `x.data`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **kwargs or {})


QUIRK = Quirk(where_mentioned(".data"), lambda model, call: DataIsDetached())
