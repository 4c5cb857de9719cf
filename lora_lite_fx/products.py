"""Products: the kinds of sites.

A site computes `y = P(x, W) + b`, a product that is linear in a matrix `W (d_out, d_in)`. Kinds differ in what `P` is:
an embedding picks columns of `W`, a convolution applies it to patches, experts have a `W` each. A variant is written
for a plain linear and sees no difference: what it gets as `x` stands for the site's input, and `F.linear(x, M)` is
`P(x, M)` for any matrix `M (m, d_in)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError

KINDS = ("linear", "embedding", "conv", "experts")
"""The kinds of sites, as `Variant.target_kinds` names them."""


@dataclass(frozen=True)
class Product:
    """What a site does with its input and its matrix. This class is the plain linear; the others derive from it.

    Args:
        transposed: whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does.
        rows: of the stored weight, where the site is a part of it: the first and the one after the last; None for all.
    """

    transposed: bool = False
    rows: tuple[int, int] | None = None

    kind: ClassVar[str] = "linear"
    article: ClassVar[str] = "a linear"

    # The weight as a matrix.

    def matrix(self, stored: Tensor) -> Tensor:
        """The weight as the model stores it, as `(d_out, d_in)`; of experts, as `(experts, d_out, d_in)`."""
        part = stored if self.rows is None else stored[slice(*self.rows)]
        return part.mT if self.transposed else part

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`; rows of other sites are those of `like`."""
        part = matrix.mT.contiguous() if self.transposed else matrix
        return part if self.rows is None else torch.cat([like[: self.rows[0]], part, like[self.rows[1] :]])

    # The product in the model's own layout.

    def factor(self, stored: Tensor) -> Tensor:
        """The tensor that `multiply` takes: the weight in the layout of the operator."""
        return self.matrix(stored)

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        """The product without a bias, as one operator; `routing` is what else it takes."""
        return F.linear(x, factor)

    @property
    def routed(self) -> bool:
        """Whether `multiply` takes more than two tensors."""
        return False

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """An input, for graphs that know no shapes, and which of its dimensions are fixed."""
        return stored.new_empty(2, 3, self.matrix(stored).shape[-1]), (2,)

    # The product as a variant sees it: the last dimension of input and output is the matrix's.

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Any:
        """What a variant gets as `x`. `dtype` is that of the matrix; `who` names variant and site in errors."""
        return x

    def result(self, y: Tensor, x: Any) -> Any:
        """`y`, in the model's layout, as a variant gets it from `base(x)`."""
        return y

    def leave(self, y: Any) -> Tensor:
        """What a variant returns, in the model's layout."""
        return y

    def identity(self, d_in: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The input whose products with `M` are the columns of `M`, one for each of its `d_in` entries."""
        return torch.eye(d_in, dtype=dtype, device=device)


class SiteInput:
    """The input of a site that is no tensor `(..., d_in)`: it can be cast, dropped out, and multiplied.

    Args:
        product: the kind of site.
        value: the tensor that the model passes.
        dtype: that the input has, or would have.
        who: names the variant and the site.
        kept: what the input is multiplied with, if elements were dropped.
    """

    def __init__(self, product: Any, value: Tensor, dtype: torch.dtype, who: str, kept: Tensor | None = None) -> None:
        self.product, self.value, self.dtype, self.who, self.kept = product, value, dtype, who, kept

    def to(self, dtype: torch.dtype) -> SiteInput:
        """The input in another dtype."""
        return self.product.cast(self, dtype)

    def type_as(self, other: Tensor) -> SiteInput:
        """The input in the dtype of `other`."""
        return self.to(other.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x = next(arg for arg in args if isinstance(arg, SiteInput))
        if args[0] is x and func is F.linear:
            return x.product.linear(*args, **(kwargs or {}))
        if args[0] is x and func is F.dropout:
            return x.product.dropout(*args, **(kwargs or {}))
        return x._refuse(func.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    def _refuse(self, used: str) -> NoReturn:
        raise ConfigError(
            f"{self.who}, which is {self.product.article}: it does more with its input ({used}) than to multiply it"
            f" with matrices, and {self.product.why}."
        )


@dataclass(frozen=True)
class Lookup(Product):
    """An embedding, `W` stored as `(d_in, d_out)`: one row for each of `d_in` ids.

    The input is one-hot, never formed: a dropped element is a dropped id.

    Args:
        padding: the id whose row gets no gradient, or -1.
    """

    padding: int = -1

    kind: ClassVar[str] = "embedding"
    article: ClassVar[str] = "an embedding"
    why: ClassVar[str] = "an embedding's input are ids"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t().contiguous()

    def factor(self, stored: Tensor) -> Tensor:
        return stored

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return F.embedding(x, factor, self.padding if self.padding >= 0 else None)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return torch.zeros(2, 3, dtype=torch.long, device=stored.device), ()

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, dtype, who)

    def result(self, y: Tensor, x: Any) -> Tensor:
        return y if x.kept is None else x.kept[..., None] * y

    def identity(self, d_in: int, dtype: torch.dtype, device: torch.device) -> SiteInput:
        return SiteInput(self, torch.arange(d_in, device=device), dtype, "")

    def cast(self, x: SiteInput, dtype: torch.dtype) -> SiteInput:
        """The same ids: their one is a one in any dtype."""
        kept = None if x.kept is None else x.kept.to(dtype)
        return SiteInput(self, x.value, dtype, x.who, kept)

    def dropout(self, x: SiteInput, p: float = 0.5, training: bool = True, inplace: bool = False) -> SiteInput:
        """Each id dropped or scaled, as its one is."""
        ones = torch.ones_like(x.value, dtype=x.dtype) if x.kept is None else x.kept
        return SiteInput(self, x.value, x.dtype, x.who, F.dropout(ones, p, training))

    def linear(self, x: SiteInput, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x M^T + bias`: rows of `M^T`."""
        y = self.result(self.multiply(x.value, matrix.t()), x)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Convolution(Product):
    """`Conv1d` or `Conv2d` with one group: `W` stored as `(d_out, channels, *kernel)`, applied to patches.

    The patches are never formed: a product with `M (m, d_in)` is a convolution to m channels.

    Args:
        kernel: the size of the kernel.
        stride, padding, dilation: as `F.conv2d` takes them.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    kind: ClassVar[str] = "conv"
    article: ClassVar[str] = "a convolution"
    why: ClassVar[str] = "the patches that a convolution multiplies are never formed"

    @property
    def _channels(self) -> int:
        """The dimension of the channels, counted from the last: there may be no batch."""
        return -1 - len(self.kernel)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def factor(self, stored: Tensor) -> Tensor:
        return stored

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        convolve: Callable[..., Tensor] = F.conv1d if len(self.kernel) == 1 else F.conv2d
        return convolve(x, factor, None, self.stride, self.padding, self.dilation)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        sizes = [k * d + 7 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return stored.new_empty(2, stored.shape[1], *sizes), (1,)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, x.dtype, who)

    def result(self, y: Tensor, x: Any) -> Tensor:
        return y.movedim(self._channels, -1)

    def leave(self, y: Tensor) -> Tensor:
        return y.movedim(-1, self._channels)

    def cast(self, x: SiteInput, dtype: torch.dtype) -> SiteInput:
        """The same in another dtype."""
        return SiteInput(self, x.value.to(dtype), dtype, x.who)

    def dropout(self, x: SiteInput, p: float = 0.5, training: bool = True, inplace: bool = False) -> SiteInput:
        """Elements dropped, as all the patches see them."""
        return SiteInput(self, F.dropout(x.value, p, training), x.dtype, x.who)

    def linear(self, x: SiteInput, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """A convolution to as many channels as `matrix` has rows, with these last."""
        y = self.multiply(x.value, matrix.unflatten(1, (-1, *self.kernel)))
        y = self.result(y, x)
        return y if bias is None else y + bias
