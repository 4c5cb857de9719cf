"""TinyLoRA: Learning to Reason in 13 Parameters (Morris et al., 2026), https://arxiv.org/abs/2602.04118"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import cast, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(WithDropout, WithRank):
    """`y = W x + b + B R A drop(x)`, `R = sum_i v_i P_i`; https://arxiv.org/abs/2602.04118, as in PEFT.

    `A = sqrt(S) V^T` and `B = U sqrt(S)` are those of the r largest singular triplets of `W`, or of all if it has
    fewer. They are frozen, and so are the random `P_i (r, r)`, which differ from site to site. Trained is `v (u,)`.
    Identity at the start, exactly: `v = 0`.

    Args:
        u: the length of `v`.
        tied: whether all sites have one `v`; if not, each has its own.
        projection_seed: of the `P_i`, together with the name of the site.
    """

    r: int = 2
    u: int = 64
    tied: bool = False
    projection_seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.u >= 1, f"u must be positive, got {self.u}")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = min(self.r, site.d_in, site.d_out)

        def draw(projections: Tensor) -> None:
            # A generator takes 32 bits of this, whatever the name and the seed are.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.projection_seed} {site.name}".encode()))
            projections.copy_(torch.empty(projections.shape, device="cpu").normal_(0, r**-0.5, generator=generator))

        return {
            "lora_A": ParamSpec((r, site.d_in), trainable=False),
            "lora_B": ParamSpec((site.d_out, r), trainable=False),
            "lora_P": ParamSpec((self.u, r, r), draw, trainable=False),
            "lora_shared_tinylora_v" if self.tied else "lora_v": ParamSpec((self.u,)),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        r = len(p.lora_A)
        root = s[:r].sqrt()
        p.lora_A.copy_(root[:, None] * vh[:r])
        p.lora_B.copy_(u[:, :r] * root)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        v = p.lora_shared_tinylora_v if self.tied else p.lora_v
        # Element by element, because autocast would narrow a product of matrices.
        core = (v[:, None, None] * p.lora_P).sum(0)
        inside = F.linear(cast(self.drop(x, base), p.lora_A), p.lora_A)  # (..., r)
        return y + low_rank(inside, core, p.lora_B)
