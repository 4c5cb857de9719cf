"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., 2023), https://arxiv.org/abs/2306.07280"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import cast, identity_like
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class OFT(Variant):
    """`y = W R x + b`, R of orthogonal blocks on the diagonal; https://arxiv.org/abs/2306.07280.

    `x` is rotated, as in OFTv2 (https://arxiv.org/abs/2506.19847): no product with `W`. Identity at the start,
    exactly: `Q = 0`.

    Args:
        block_size: side of a block, a divisor of `d_in`.
        use_cayley_neumann: with skew-symmetric `Q`, whose upper triangle is trained, a block is
            `I - 2 Q + 2 Q^2 - 2 Q^3 + Q^4` if true: cheap, orthogonal only near the start. If false it is
            `(I - Q)^{-1} (I + Q)`, orthogonal always. As in PEFT the two turn in opposite directions, so values trained
            with one mean something else with the other.
    """

    block_size: int = 32
    use_cayley_neumann: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.block_size >= 2, f"block_size={self.block_size} must be at least 2: there rotations begin")

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            site.d_in % self.block_size == 0,
            f"block_size={self.block_size} does not divide the {site.d_in} inputs of site {site.name!r}; use a divisor",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        b = self.block_size
        return {"lora_oft_R": ParamSpec((site.d_in // b, b * (b - 1) // 2))}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        # In double precision autocast leaves the small products alone.
        q = skew(p.lora_oft_R.double(), self.block_size)
        turn = _cayley_neumann(q) if self.use_cayley_neumann else cayley(q)
        turn = turn.to(p.lora_oft_R.dtype)
        wide_x = cast(x, turn)
        turned = times_blocks(wide_x.unflatten(-1, (-1, self.block_size)), turn)
        return base((wide_x + turned.flatten(-2)).type_as(x))


# Blocks act on rows, `x_i R_i^T`, and are given as what they add, `R_i^T - I`: near the start it is small, and in half
# precision it would be lost next to the ones.


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return each row of `x (..., n, b)` times its own block `(n, b, b)`."""
    return torch.einsum("...nk,nkc->...nc", x, blocks)


def cayley(q: Tensor) -> Tensor:
    """Return `(I - Q) (I + Q)^{-1} - I` for each of `q (..., b, b)`."""
    solution: Tensor = torch.linalg.solve(identity_like(q) + q, q)
    return -2 * solution


def _cayley_neumann(q: Tensor) -> Tensor:
    """Return `2 Q + 2 Q^2 + 2 Q^3 + Q^4`."""
    result = q
    for _ in range(3):
        result = 2 * q + q @ result
    return result


def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices `(n, size, size)` from upper triangles by rows, `(n, size (size - 1) / 2)`."""
    row, column = torch.triu_indices(size, size, 1, device=upper.device)
    filled = upper.new_zeros(upper.shape[0], size * size).index_copy(1, row * size + column, upper)
    matrix: Tensor = filled.unflatten(1, (size, size))
    return matrix - matrix.mT
