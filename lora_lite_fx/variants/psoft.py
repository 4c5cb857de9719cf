"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (Wu et al., 2025), https://openreview.net/forum?id=FSHrinMArK"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import identity_like, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..ops.skew_rotations import cayley_neumann, skew
from ..sites.site import Site
from .oft import cayley


@register
@dataclass(frozen=True, kw_only=True)
class PSOFT(WithDropout, WithRank):
    """`y = W x + b + B (diag(v) R diag(u) - I) A drop(x)`; https://openreview.net/forum?id=FSHrinMArK.

    `B A` is the part of `W` in its r largest singular triplets, `A = V^T` and `B = U S`, both frozen. So what `W` does
    in that subspace is turned by the orthogonal `R (r, r)`, and scaled by `u` and `v`. Identity at the start, exactly.

    Args:
        orthogonal: whether `R = (I + Q) (I - Q)^{-1}` of a skew-symmetric `Q`, whose upper triangle is trained; if not,
            `R` is trained itself.
        use_cayley_neumann: whether `R` is `I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4` instead: cheap, orthogonal only near the
            start.
        scale_in: whether `u` is trained.
        scale_out: whether `v` is trained.
        symmetric: whether `A = sqrt(S) V^T` and `B = U sqrt(S)`, as of PiSSA.
    """

    r: int = 32
    orthogonal: bool = True
    use_cayley_neumann: bool = False
    scale_in: bool = True
    scale_out: bool = True
    symmetric: bool = False

    ties_to_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.r >= 2 or not self.orthogonal, f"r={self.r} must be at least 2: there rotations begin")

    def check(self, site: Site) -> None:
        super().check(site)
        self.require_rank_at_most(min(site.d_in, site.d_out), site)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self.r
        rotation = ParamSpec((r * (r - 1) // 2,)) if self.orthogonal else ParamSpec((r, r), init=torch.nn.init.eye_)
        scales = {"lora_in": self.scale_in, "lora_out": self.scale_out}
        return {
            "lora_A": ParamSpec((r, site.d_in), trainable=False),
            "lora_B": ParamSpec((site.d_out, r), trainable=False),
            "lora_R": rotation,
            **{name: ParamSpec((r,), init="ones") for name, wanted in scales.items() if wanted},
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        # In single precision, as PEFT does: its files lack the factors, and signs of singular vectors are the
        # algorithm's.
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        u, s, vh = u[:, : self.r], s[: self.r], vh[: self.r]
        of_a, of_b = (s.sqrt(), s.sqrt()) if self.symmetric else (torch.ones_like(s), s)
        p.lora_A.copy_(of_a[:, None] * vh)
        p.lora_B.copy_(u * of_b)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        # In double precision autocast leaves the small matrix alone.
        added = self._added(p.lora_R.double())
        if self.scale_in or self.scale_out:
            identity = identity_like(added)
            added = added + identity
            added = added * p.lora_in if self.scale_in else added
            added = (p.lora_out[:, None] * added if self.scale_out else added) - identity
        return y + low_rank(self.drop(x, base), p.lora_A, p.lora_B @ added.to(p.lora_R.dtype))

    def _added(self, trained: Tensor) -> Tensor:
        """Return `R - I`."""
        if not self.orthogonal:
            return trained - identity_like(trained)
        q = skew(trained[None], self.r)[0]
        return cayley_neumann(q) if self.use_cayley_neumann else cayley(-q)
