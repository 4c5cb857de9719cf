"""The input of a site whose kind does not form it as a tensor `(..., d_in)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError


class SiteInput:
    """The input of a site that is not a tensor `(..., d_in)`. It can be cast, dropped out, and multiplied.

    Args:
        kind: the kind of site.
        value: the tensor that the model passes.
        dtype: the dtype that the input would have as a tensor.
        who: the words that name variant and site in errors.
        kept: the factors of dropout, if elements were dropped.
    """

    def __init__(self, kind: Any, value: Tensor, dtype: torch.dtype, who: str, kept: Tensor | None = None) -> None:
        self.kind, self.value, self.dtype, self.who, self.kept = kind, value, dtype, who, kept

    def to(self, dtype: torch.dtype) -> SiteInput:
        """Return the input in another dtype."""
        cast: SiteInput = self.kind.cast(self, dtype)
        return cast

    def type_as(self, other: Tensor) -> SiteInput:
        """Return the input in the dtype of `other`."""
        return self.to(other.dtype)

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return torch.matmul(self, matrix)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x = next(arg for arg in args if isinstance(arg, SiteInput))
        if args[0] is x and func is F.linear:
            return x.kind.linear(*args, **(kwargs or {}))
        if args[0] is x and func is torch.matmul:
            return x.kind.linear(x, args[1].mT)
        if args[0] is x and func is F.dropout:
            return x.kind.dropout(*args, **(kwargs or {}))
        return x._refuse(func.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    def _refuse(self, used: str) -> NoReturn:
        """Raise the error for a use of the input that its kind of site does not have."""
        raise ConfigError(
            f"{self.who}, which is {self.kind.article}: it uses its input for more ({used}) than products with"
            f" matrices, and {self.kind.why}."
        )
