"""The description of a tensor that a variant adds: shape, start, and whether it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParamSpec:
    """One tensor that a variant adds to a site.

    A name that begins with `lora_shared_` is one tensor for all the sites of the adapter, registered at the root of
    the model; its spec must be the same at each of them.

    Args:
        shape: its shape.
        init: how it starts: `"zeros"`, `"ones"`, `"kaiming"` (uniform, a = sqrt(5)), a number to fill with, or a
            function that fills a tensor in place.
        trainable: a parameter if true, else a frozen buffer. Both are saved with the adapter.
        dtype: of the tensor, for indices; None means the adapter's own.
    """

    shape: tuple[int, ...]
    init: str | float | Callable[[Tensor], object] = "zeros"
    trainable: bool = True
    dtype: torch.dtype | None = None

    def repeated(self, count: int) -> ParamSpec:
        """Return the spec of `count` such tensors as one, `(count, *shape)`, each started by itself."""

        def fill_each(tensor: Tensor) -> None:
            for part in tensor:
                self.fill(part)

        return dataclasses.replace(self, shape=(count, *self.shape), init=fill_each)

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor, allocated and not yet filled: a Parameter if trainable."""
        tensor = torch.empty(self.shape, dtype=self.dtype or dtype, device=device)
        return torch.nn.Parameter(tensor) if self.trainable else tensor

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Write the start values into `tensor`, in place."""
        if callable(self.init):
            self.init(tensor)
        elif self.init == "kaiming":
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        elif isinstance(self.init, str):
            tensor.fill_({"zeros": 0.0, "ones": 1.0}[self.init])
        else:
            tensor.fill_(self.init)
