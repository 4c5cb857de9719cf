"""The frozen linear that a variant adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..sites.site import Site


@dataclass(frozen=True, eq=False)  # torch.compile hashes the object before its fields are set
class FrozenLinear:
    """The frozen linear that a variant adapts: `base(x)` is `x W^T + b`, or the product of another kind of site.

    Where adapters are below the variant, `base(x)` is what they compute, and `weight` and `bias` are what they make of
    the frozen ones, see `beneath.py`.

    Args:
        call: computes `base(x)` for `x (..., d_in)`; it takes `weight` and `bias` in place of the frozen ones.
        weight: the frozen `W (d_out, d_in)`, whatever its layout in the model.
        bias: the frozen `b (d_out,)`, or None.
        site: the site, with its roles.
        training: whether the model is in training mode; for dropout.
    """

    call: Callable[..., Tensor]
    weight: Tensor
    bias: Tensor | None
    site: Site
    training: bool = False

    def __call__(self, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the output `(..., d_out)` of the frozen linear for `x (..., d_in)`.

        Args:
            x: the input.
            weight: `(d_out, d_in)`, to be multiplied with in place of the frozen one. It is rounded to its type.
            bias: `(d_out,)`, to be added in place of the frozen one, where there is one.
        """
        given = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
        return self.call(x, **given)
