"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., 2023), https://arxiv.org/abs/2306.07280"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import cast, identity_like, through
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..ops.rotated_blocks import rotated_blocks
from ..ops.skew_rotations import cayley_neumann, neumann_rotations, skew
from ..sites.site import Site


@dataclass(frozen=True, kw_only=True)
class InBlocks(Variant):
    """Base class of the variants that turn the input in blocks.

    Args:
        block_size: side of a block.
        blocks: number of blocks, in place of `block_size`; 0 for as many as `block_size` makes.
    """

    block_size: int = 32
    blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.blocks >= 0, f"blocks={self.blocks} must be a number of blocks, or 0")
        self._require(
            self.blocks > 0 or self.block_size >= 2,
            f"block_size={self.block_size} must be at least 2: there rotations begin",
        )

    def check(self, site: Site) -> None:
        super().check(site)
        name, divisor = ("blocks", self.blocks) if self.blocks else ("block_size", self.block_size)
        self._require(
            site.d_in % divisor == 0,
            f"{name}={divisor} does not divide the {site.d_in} inputs of site {site.name!r}; use a divisor",
        )
        size = self.size_at(site)
        self._require(size >= 2, f"{name}={divisor} leaves blocks of {size} input at site {site.name!r}; use fewer")

    def size_at(self, site: Site) -> int:
        """Return the side of a block at `site`."""
        return site.d_in // self.blocks if self.blocks else self.block_size


@register
@dataclass(frozen=True, kw_only=True)
class OFT(InBlocks):
    """`y = W R x + b`, R of orthogonal blocks on the diagonal; https://arxiv.org/abs/2306.07280.

    `x` is rotated, as in OFTv2 (https://arxiv.org/abs/2506.19847): no product with `W`. Identity at the start,
    exactly: `Q = 0`.

    Args:
        block_size: side of a block, a divisor of `d_in`.
        use_cayley_neumann: with skew-symmetric `Q`, whose upper triangle is trained, a block is
            `I - 2 Q + 2 Q^2 - 2 Q^3 + Q^4` if true: cheap, orthogonal only near the start. If false it is
            `(I - Q)^{-1} (I + Q)`, orthogonal always. As in PEFT the two turn in opposite directions, so values trained
            with one mean something else with the other.
        block_share: whether all blocks of a site are the same one.
        coft: whether each `Q` is kept within a distance from zero, `eps` divided by the root of the number of blocks
            (constrained OFT). Beyond it, its length is cut, which gradients do not see. PEFT cuts the parameter too, so
            that steps of training that go beyond end elsewhere there.
        eps: that distance.
    """

    use_cayley_neumann: bool = True
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        b = self.size_at(site)
        return {"lora_oft_R": ParamSpec((1 if self.block_share else site.d_in // b, b * (b - 1) // 2))}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        size = self.size_at(base.site)
        blocks = self._added(p.lora_oft_R, size)
        if self.block_share:
            blocks = blocks.expand(base.site.d_in // size, size, size)

        def turn(x: Tensor) -> Tensor:
            return rotated_blocks(cast(x, blocks), blocks).type_as(x)

        return through(turn, x, base)

    def _added(self, upper: Tensor, size: int) -> Tensor:
        """Return what the rotations add, `R_i^T - I`: near the start it is small, and would be lost next to the ones.

        Blocks act on rows, `x_i R_i^T`.
        """
        if self.use_cayley_neumann and not self.coft:
            return neumann_rotations(upper)
        # In double precision autocast leaves the small products alone.
        q = skew(self._constrained(upper.double()), size)
        return (cayley_neumann(q) if self.use_cayley_neumann else cayley(q)).to(upper.dtype)

    def _constrained(self, upper: Tensor) -> Tensor:
        """Return the upper triangles, cut to the length that `coft` allows; a matrix is the root of two as long."""
        if not self.coft:
            return upper
        bound = self.eps / len(upper) ** 0.5
        lengths = 2**0.5 * torch.linalg.vector_norm(upper.detach(), dim=1, keepdim=True)
        cut: Tensor = upper.detach() * (bound / lengths.clamp_min(bound) - 1)
        return upper + cut


def cayley(q: Tensor) -> Tensor:
    """Return `(I - Q) (I + Q)^{-1} - I` for each of `q (..., b, b)`."""
    solution: Tensor = torch.linalg.solve(identity_like(q) + q, q)
    return -2 * solution
