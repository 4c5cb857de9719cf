"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (Liu et al., 2023), https://arxiv.org/abs/2311.06243"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import which_kept
from ..adapters.maths import cast, through
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..ops.rotated_blocks import times_blocks
from ..sites.site import Site
from .oft import InBlocks, cayley


@register
@dataclass(frozen=True, kw_only=True)
class BOFT(InBlocks):
    """`y = s * (W R x) + b`, `R = B_0 B_1 ... B_{m-1}`, each B orthogonal; https://arxiv.org/abs/2311.06243.

    A butterfly factor `B_i` turns groups of `block_size` inputs, each by `(I - Q)^{-1} (I + Q)` with Q the
    skew-symmetric part of what is trained. A group of `B_0` is a block on the diagonal; one of `B_i` is two half
    blocks that stand `2^i` half blocks apart. So m factors connect `2^(m-1) block_size` inputs. The bias is not scaled.
    Identity at the start, exactly: `Q = 0`, `s = 1`.

    Args:
        butterfly_factors: m. `2^(m-1) block_size` must divide `d_in`. With one, this is `OFT` (exact) with a scale.
        dropout: probability that a block leaves its inputs as they are, in training.
    """

    block_size: int = 4
    butterfly_factors: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.butterfly_factors >= 1, f"butterfly_factors={self.butterfly_factors} must be at least 1")
        self._require(0 <= self.dropout < 1, f"dropout is a probability below 1, got {self.dropout!r}")
        if not self.blocks:
            self._require_even(self.block_size)

    def _require_even(self, size: int) -> None:
        self._require(
            self.butterfly_factors == 1 or size % 2 == 0,
            f"block_size={size} must be even for more than one factor: they connect half blocks",
        )

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            self.butterfly_factors <= site.d_in.bit_length(),
            f"butterfly_factors={self.butterfly_factors} is too many for the {site.d_in} inputs of site {site.name!r}",
        )
        size = self.size_at(site)
        self._require_even(size)
        connected = size * 2 ** (self.butterfly_factors - 1)
        self._require(
            site.d_in % connected == 0,
            f"block_size={size} times 2^(butterfly_factors - 1) is {connected}, which does not divide the "
            f"{site.d_in} inputs of site {site.name!r}",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        b = self.size_at(site)
        return {
            "lora_boft_R": ParamSpec((self.butterfly_factors, site.d_in // b, b, b)),
            "lora_boft_s": ParamSpec((site.d_out,), init="ones"),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        trained = p.lora_boft_R.double()
        turns = cayley((trained - trained.mT) / 2).to(p.lora_boft_R.dtype)
        if self.dropout:
            turns = turns * which_kept(turns.new_ones(*turns.shape[:2], 1, 1), self.dropout, base)

        def turn(x: Tensor) -> Tensor:
            rotated = cast(x, turns)
            for i in reversed(range(self.butterfly_factors)):
                rotated = rotated + _turned(rotated, turns[i], 2**i)
            return rotated.type_as(x)

        y = through(turn, x, base)
        result: Tensor = p.lora_boft_s * y
        if base.bias is not None:
            result = result + (1 - p.lora_boft_s) * base.bias
        return result.type_as(y)


def _turned(x: Tensor, blocks: Tensor, apart: int) -> Tensor:
    """Return groups of two half blocks, `apart` half blocks from each other, times `blocks`, in their places."""
    size = blocks.shape[-1]
    halves = (2, size // 2) if size % 2 == 0 else (1, size)
    grouped = x.unflatten(-1, (-1, halves[0], apart, halves[1])).transpose(-3, -2)
    turned = times_blocks(grouped.flatten(-2).flatten(-3, -2), blocks)
    in_places: Tensor = turned.unflatten(-1, halves).unflatten(-3, (-1, apart)).transpose(-3, -2)
    return in_places.flatten(-4)
