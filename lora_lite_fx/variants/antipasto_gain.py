"""AntiPaSTO by gains, as lora-lite has it now (Clark, 2026), https://github.com/wassname/lora-lite"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.calibration_data import Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@dataclass(frozen=True, kw_only=True)
class OfDirections(WithRank):
    """Base class of the variants that train what `W` does in some of its directions: `y = W x + b + U C diag(S) P x`.

    `U diag(S) P` is a part of `W` of rank r, or of all its directions if it has fewer, and frozen. `C` is the trained
    core, less the identity. The coefficient `c`, which scales it or what it is made of, steers, also after training: 1
    is as trained, 0 the frozen model, a negative number the other way. It is the frozen tensor
    `lora_shared_coefficient`, which `load_adapter_state_dict` sets between calls.

    Args:
        basis: which part of `W` that is, and `P (r, d_in)`. `"svd"`: the largest singular triplets, or with calibration
            data those of the largest `S_i rms(v_i . x)`. `"corda"` needs data: with the second moment `M` of the inputs
            the largest triplets of `W M^(1/2)`, and `P = V^T M^(-1/2)` (https://arxiv.org/abs/2406.05223). `"asvd"`:
            the same with the diagonal of `M` (https://arxiv.org/abs/2312.05821).
        damping: is added to the eigenvalues of `M`.
        coefficient: `c` at the start.
    """

    r: int = 256
    basis: Literal["svd", "corda", "asvd"] = "svd"
    damping: float = 1e-3
    coefficient: float = 1.0

    ties_to_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.damping > 0, f"damping must be positive, got {self.damping!r}")

    def directions_at(self, site: Site) -> int:
        """Return the number of directions at `site`."""
        return min(self.r, site.d_in, site.d_out)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self.directions_at(site)
        return {
            "lora_U": ParamSpec((site.d_out, r), trainable=False),
            "lora_S": ParamSpec((r,), trainable=False),
            "lora_P": ParamSpec((r, site.d_in), trainable=False),
            "lora_shared_coefficient": ParamSpec((), init=self.coefficient, trainable=False),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        self._require(
            self.basis == "svd", f"basis={self.basis!r} comes from data: give calibration=batches to rewrite or adapt"
        )
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        _keep(p, u, s, vh, s)

    def observer(self, site: Site, weight: Tensor) -> Callable[[Tensor], Tensor]:
        if self.basis == "corda":
            return lambda x: x.t() @ x
        if self.basis == "asvd":
            return lambda x: x.square().sum(0)
        vh = torch.linalg.svd(weight, full_matrices=False).Vh
        return lambda x: F.linear(x, vh).square().sum(0)

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        moment = statistic.total / statistic.tokens
        if self.basis == "svd":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            _keep(p, u, s, vh, s * moment.sqrt())
            return
        if self.basis == "corda":
            values, vectors = torch.linalg.eigh(moment)
        else:
            values, vectors = moment, torch.eye(site.d_in, dtype=moment.dtype, device=moment.device)
        root = (values.clamp_min(0) + self.damping).sqrt()
        u, s, vh = torch.linalg.svd(weight @ (vectors * root) @ vectors.t(), full_matrices=False)
        _keep(p, u, s, vh @ (vectors / root) @ vectors.t(), s)


def gains(g: Tensor, coefficient: Tensor, suppress_only: bool) -> Tensor:
    """Return `ELU(c g)`, by which directions grow; with `suppress_only` none does as long as `c >= 0`."""
    return F.elu(coefficient * (g.clamp(max=0) if suppress_only else g))


def _keep(p: Any, u: Tensor, s: Tensor, rows: Tensor, scores: Tensor) -> None:
    """Keep the directions with the largest scores."""
    which = scores.topk(len(p.lora_S)).indices.sort().values
    for tensor, value in ((p.lora_U, u[:, which]), (p.lora_S, s[which]), (p.lora_P, rows[which])):
        tensor.copy_(value)


@register
@dataclass(frozen=True, kw_only=True)
class AntiPaSTOGain(OfDirections):
    """`y = W x + b + U diag(S ELU(c g)) P x`; https://arxiv.org/abs/2601.07473, with gains in place of `S + d`.

    Each direction of `W` has a gain `1 + ELU(c g)`, which grows in proportion to the trained `g (r,)` and falls to zero
    at most. Identity at the start, exactly: `g = 0`.

    Args:
        suppress_only: whether positive `g` count as zero, so that with `c >= 0` no direction is amplified.
    """

    suppress_only: bool = False

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {**super().params(site), "lora_g": ParamSpec((self.directions_at(site),))}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        added = gains(p.lora_g, p.lora_shared_coefficient, self.suppress_only)
        # The gains scale the small factor, so that nothing of the size of x is computed twice.
        return y + low_rank(x, (p.lora_S * added)[:, None] * p.lora_P, p.lora_U)
