"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., 2024), https://arxiv.org/abs/2405.15179"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site

_BOUND, _DEVIATION = 0.02, 0.1  # of the bank and of the logits at the start, PEFT's


@register
@dataclass(frozen=True, kw_only=True)
class VBLoRA(WithDropout, WithRank):
    """`y = W x + b + B A drop(x)`, `A` and `B` composed of vectors of one bank; https://arxiv.org/abs/2405.15179.

    Rows of `A` and columns of `B` are cut into pieces of `vector_length`. A piece is the sum of the `topk` vectors of
    the bank with the largest logits, by their softmax. The bank, which all sites of the adapter share, and the logits
    are trained. The start is *not* the identity, only near it: vectors are drawn from up to 0.02.

    Args:
        num_vectors: the number of vectors in the bank.
        vector_length: the size of a vector, a common divisor of `d_in` and `d_out` at all sites.
        topk: how many vectors make a piece.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "topk"):
            self._require(getattr(self, name) >= 1, f"{name} must be positive, got {getattr(self, name)}")
        self._require(
            self.topk <= self.num_vectors, f"topk={self.topk} is more than the {self.num_vectors} vectors of the bank"
        )

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            site.d_in % self.vector_length == 0 and site.d_out % self.vector_length == 0,
            f"vector_length={self.vector_length} does not divide both sides of site {site.name!r} ({site.d_out} x"
            f" {site.d_in})",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        drawn = partial(torch.nn.init.normal_, std=_DEVIATION)
        pieces_in, pieces_out = site.d_in // self.vector_length, site.d_out // self.vector_length
        return {
            "lora_logits_A": ParamSpec((self.r, pieces_in, self.num_vectors), init=drawn),
            "lora_logits_B": ParamSpec((pieces_out, self.r, self.num_vectors), init=drawn),
            "lora_shared_vblora_bank": ParamSpec(
                (self.num_vectors, self.vector_length), init=partial(torch.nn.init.uniform_, a=-_BOUND, b=_BOUND)
            ),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        a = self._composed(p.lora_logits_A, p.lora_shared_vblora_bank).flatten(1)
        b = self._composed(p.lora_logits_B, p.lora_shared_vblora_bank).transpose(1, 2).flatten(0, 1)
        return y + low_rank(self.drop(x, base), a, b)

    def _composed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return the pieces `(..., vector_length)` for `logits (..., num_vectors)`."""
        largest, which = logits.topk(self.topk, dim=-1)
        pieces: Tensor = (largest.softmax(-1)[..., None] * bank[which]).sum(-2)
        return pieces
