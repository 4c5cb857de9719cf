"""Methods of papers as a user writes them: by the formula, without a cast or a helper of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import lora_lite_fx as llfx


@dataclass(frozen=True, kw_only=True)
class _LowRank(llfx.WithDropout, llfx.WithScale, llfx.WithRank):
    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {
            "lora_A": llfx.ParamSpec((self.r, site.d_in), init="kaiming"),
            "lora_B": llfx.ParamSpec((site.d_out, self.r)),
        }


@dataclass(frozen=True, kw_only=True)
class PlainLoRA(_LowRank):
    """`y = W x + alpha / r B A drop(x)`"""

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) + (self.drop(x, base) @ p.lora_A.T) @ p.lora_B.T * (self.alpha / self.r)


@dataclass(frozen=True, kw_only=True)
class PlainXS(_LowRank):
    """LoRA-XS: `y = W x + B R A x`, R trained."""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_R": llfx.ParamSpec((self.r, self.r))}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) + torch.einsum("...d,rd->...r", x, p.lora_A) @ p.lora_R @ p.lora_B.mT


@dataclass(frozen=True, kw_only=True)
class PlainGate(llfx.Variant):
    """`y = (W x) g`"""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,), init="ones")}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) * p.lora_g


@dataclass(frozen=True, kw_only=True)
class PlainInputGate(llfx.Variant):
    """`y = W (g x)`"""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_in,), init="ones")}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(p.lora_g * x)


@dataclass(frozen=True, kw_only=True)
class PlainDataGate(llfx.Variant):
    """`y = (1 + tanh(w x)) W x`"""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_w": llfx.ParamSpec((1, site.d_in))}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) * (1 + torch.tanh(x @ p.lora_w.T))


@dataclass(frozen=True, kw_only=True)
class PlainBottleneck(_LowRank):
    """`y = W x + B gelu(A x)`"""

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return F.linear(F.gelu(F.linear(x, p.lora_A)), p.lora_B) + base(x)


@dataclass(frozen=True, kw_only=True)
class PlainMoRA(llfx.WithRank):
    """`y = W x + expand(M compress(x))`, M square."""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_M": llfx.ParamSpec((self.r, self.r))}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        y = base(x)
        padded = F.pad(x, (0, -x.shape[-1] % self.r))
        mixed = padded.unflatten(-1, (-1, self.r)).sum(-2) @ p.lora_M.T
        return y + mixed.repeat_interleave(-(-y.shape[-1] // self.r), -1)[..., : y.shape[-1]]


@dataclass(frozen=True, kw_only=True)
class PlainRotation(llfx.Variant):
    """`y = R (W x)`, R turns pairs of outputs."""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_R": llfx.ParamSpec((2, 2), init="zeros")}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        turn = torch.matrix_exp(p.lora_R - p.lora_R.T)
        return (base(x).unflatten(-1, (-1, 2)) @ turn).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class PlainWeight(_LowRank):
    """`y = W x + (W * B A) x + B^T B W x`, products with the frozen weight."""

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) + x @ (base.weight * (p.lora_B @ p.lora_A)).T + x @ base.weight.T @ p.lora_B @ p.lora_B.T


PLAIN: tuple[type[llfx.Variant], ...] = (
    PlainLoRA,
    PlainXS,
    PlainGate,
    PlainInputGate,
    PlainDataGate,
    PlainBottleneck,
    PlainMoRA,
    PlainRotation,
    PlainWeight,
)
