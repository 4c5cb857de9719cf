"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank, WithScale
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LowRank(WithDropout, WithScale, WithRank):
    """Base class of the variants of LoRA: factors `A (r, d_in)` and `B (d_out, r)`, and the scale of `B A`.

    Args:
        rank_stabilized: scale by `alpha / sqrt(r)` instead of `alpha / r` (https://arxiv.org/abs/2312.03732).
        train_A: whether `A` is trained; if not, it stays at its start (LoRA-FA, https://arxiv.org/abs/2308.03303).
    """

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_B", "lora_bias")

    rank_stabilized: bool = False
    train_A: bool = True

    @property
    def scale(self) -> float:
        """Return the factor `s` of `B A`."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.d_in), init="kaiming", trainable=self.train_A),
            "lora_B": ParamSpec((site.d_out, self.r)),
        }

    def branch(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        """Return `s B A drop(x)`."""
        return self.scale * low_rank(self.drop(x, base), p.lora_A, p.lora_B)


@dataclass(frozen=True, kw_only=True)
class FromNothing(LowRank):
    """Base class of the variants of LoRA that need neither the weight nor data to start: `A` is drawn, `B = 0`.

    Args:
        init_weights: how `A` is drawn: `kaiming_uniform`, of numbers up to `1 / sqrt(d_in)`; or `gaussian`, with the
            standard deviation `1 / r`.
    """

    init_weights: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        drawn = ParamSpec((self.r, site.d_in), init=how_drawn(self.init_weights, self.r), trainable=self.train_A)
        return {**super().params(site), "lora_A": drawn}


def how_drawn(init_weights: str, r: int) -> str | Callable[[Tensor], object]:
    """Return the start of a factor `A (r, d_in)` that `init_weights` names, for a `ParamSpec`."""
    return partial(torch.nn.init.normal_, std=1 / r) if init_weights == "gaussian" else "kaiming"


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(FromNothing):
    """`y = W x + b + s B A drop(x)`, `s = alpha / r`; https://arxiv.org/abs/2106.09685, equation 3.

    Identity at the start, exactly: `B = 0`.

    Args:
        bias: whether to train a bias `c (d_out,)` of `B` too, from zero: `y = W x + b + s (B A drop(x) + c)`.
    """

    bias: bool = False

    def __post_init__(self) -> None:
        self._require(
            not isinstance(self.bias, str),
            f"bias={self.bias!r} is PEFT's way to choose the model's biases to train, which Full(weight=False,"
            " ...) does here; leave it out, or write bias=True for a trained bias of B",
        )
        super().__post_init__()

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        bias = {"lora_bias": ParamSpec((site.d_out,))} if self.bias else {}
        return {**super().params(site), **bias}

    def low_rank_change(self, p: Any) -> tuple[Tensor, Tensor] | None:
        return None if self.bias else (p.lora_A, self.scale * p.lora_B)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        bias = p.lora_bias if self.bias else None
        return y + self.scale * low_rank(self.drop(x, base), p.lora_A, p.lora_B, bias)
