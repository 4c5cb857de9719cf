"""The frozen linear that a variant adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..sites.site import Site


@dataclass(frozen=True, eq=False)  # torch.compile hashes the object before its fields are set
class FrozenLinear:
    """The frozen linear that a variant adapts: `base(x)` is `x W^T + b`, or the product of another kind of site.

    Args:
        call: computes `base(x)` for `x (..., d_in)`.
        weight: the frozen `W (d_out, d_in)`, whatever its layout in the model.
        bias: the frozen `b (d_out,)`, or None.
        site: the site, with its roles.
        training: whether the model is in training mode; for dropout.
    """

    call: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    site: Site
    training: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output `(..., d_out)` of the frozen linear for `x (..., d_in)`."""
        return self.call(x)
