"""AntiPaSTO (Clark, 2026), https://arxiv.org/abs/2601.07473"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.calibration_data import Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank
from ..adapters.maths import identity_like, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..ops.skew_rotations import skew
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class AntiPaSTO(WithRank):
    """`y = W_res x + b + U' diag(S + d) V'^T x`, `W = W_res + U diag(S) V^T`; https://arxiv.org/abs/2601.07473.

    `U, S, V` are r singular triplets of `W`, or as many as it has: the largest, or with calibration data those of the
    largest `S_i * mean |v_i . x|`. `d` is trained, and so are the block-diagonal Cayley rotations that turn one basis
    into `V'` or `U'`. The residual is not formed: the frozen triplets are subtracted in activation space, see `PiSSA`.

    Near identity at the start: `d` is drawn from N(4e-4, 4e-4), which breaks the symmetry of its sign.

    Args:
        block_size: size of the blocks that are rotated; it must divide `r`.
        max_rotation_angle: smooth bound of the angles, in radians, below pi.
        rotate_basis: which basis is rotated: `"V"` (inputs), `"U"` (outputs), or `"none"`.
    """

    r: int = 256
    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: Literal["V", "U", "none"] = "V"

    ties_to_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.block_size >= 2, f"block_size must be at least 2, got {self.block_size}")
        self._require(self.r % self.block_size == 0, f"r={self.r} must be a multiple of block_size={self.block_size}")
        self._require(
            0 < self.max_rotation_angle < math.pi,
            f"max_rotation_angle must be between 0 and pi, got {self.max_rotation_angle}",
        )

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            self._rank_at(site) > 0,
            f"block_size={self.block_size} is larger than site {site.name!r} allows ({site.d_out} x {site.d_in})",
        )

    def _rank_at(self, site: Site) -> int:
        """Return the number of triplets at `site`, a multiple of `block_size`."""
        there = min(site.d_in, site.d_out)
        return min(self.r, there - there % self.block_size)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self._rank_at(site)
        angles = self.block_size * (self.block_size - 1) // 2
        rotation = {} if self.rotate_basis == "none" else {"lora_rot_T": ParamSpec((r // self.block_size, angles))}
        return {
            "lora_U": ParamSpec((site.d_out, r), trainable=False),
            "lora_S": ParamSpec((r,), trainable=False),
            "lora_Vh": ParamSpec((r, site.d_in), trainable=False),
            "lora_delta_s": ParamSpec((r,), init=lambda tensor: tensor.normal_(4e-4, 4e-4)),
            **rotation,
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        self._keep(p, torch.linalg.svd(weight, full_matrices=False), slice(self._rank_at(site)))

    def observer(self, site: Site, weight: Tensor) -> Callable[[Tensor], Tensor]:
        vh = torch.linalg.svd(weight, full_matrices=False).Vh
        return lambda x: F.linear(x, vh).abs().sum(0)

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        triplets = torch.linalg.svd(weight, full_matrices=False)
        scores = triplets[1] * statistic.total
        self._keep(p, triplets, scores.topk(self._rank_at(site)).indices.sort().values)

    @staticmethod
    def _keep(p: Any, triplets: tuple[Tensor, Tensor, Tensor], which: slice | Tensor) -> None:
        u, s, vh = triplets
        for tensor, value in ((p.lora_U, u[:, which]), (p.lora_S, s[which]), (p.lora_Vh, vh[which])):
            tensor.copy_(value)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        u, vh = p.lora_U, p.lora_Vh
        if self.rotate_basis == "V":
            vh = self._rotated(vh, p)
        elif self.rotate_basis == "U":
            u = self._rotated(u.t(), p).t()
        # The singular values scale the small factors, so that nothing of the size of x is computed twice.
        adapted = low_rank(x, (p.lora_S + p.lora_delta_s)[:, None] * vh, u)
        return y + (adapted - low_rank(x, p.lora_S[:, None] * p.lora_Vh, p.lora_U))

    def _rotated(self, basis: Tensor, p: Any) -> Tensor:
        """Return `basis (r, d)` with each block of rows turned by `(I - X)^{-1} (I + X)` of a skew-symmetric `X`."""
        # Compute in double precision, because autocast leaves it alone. If it rounded one basis and not the other, the
        # start would not be the identity.
        angles = p.lora_rot_T.double()
        bound = 2 * math.tan(self.max_rotation_angle / 2)
        # Half the angle from each side of the difference with the transpose.
        half = bound * torch.tanh(angles / (2 * bound)) / 2
        size = self.block_size
        x = skew(half, size)
        identity = identity_like(x)
        rotations = torch.linalg.solve(identity - x, identity + x)
        rotated: Tensor = rotations @ basis.double().unflatten(0, (-1, size))
        return rotated.flatten(0, 1).to(basis.dtype)
