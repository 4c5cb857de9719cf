"""MiSS: Matrix Shard Sharing, formerly Bone (Kang and Yin, 2024), https://arxiv.org/abs/2409.15371"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class MiSS(WithDropout, WithRank):
    """`y = W x + b + D^T sum_i drop(x)_i`, `x_i` the blocks of r inputs; https://arxiv.org/abs/2409.15371.

    Every r columns of the update are the same matrix, `D^T (d_out, r)`; the last ones may be a part of it. Identity at
    the start, exactly: `D = 0`.

    Args:
        mode: `"balance"`: the form above. `"mini"`: `D` has `mini_r` columns, which are repeated. `"bat"`: `D` is a
            block `D_o (r, r)` for each r outputs, and block o, i of the update is `W_oi D_o + D_o`. That is not of rank
            r, and is formed as a matrix.
        mini_r: for `"mini"`, a divisor of `d_out`. Not used otherwise.
    """

    mode: Literal["balance", "mini", "bat"] = "balance"
    mini_r: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.mini_r >= 1, f"mini_r must be a positive integer, got {self.mini_r}")

    def check(self, site: Site) -> None:
        super().check(site)
        where = f"site {site.name!r} ({site.d_out} x {site.d_in})"
        self.require_rank_at_most(site.d_in, site)
        if self.mode == "mini":
            self._require(site.d_out % self.mini_r == 0, f"mini_r={self.mini_r} does not divide the output of {where}")
        elif self.mode == "bat":
            self._require(
                site.d_in % self.r == 0 and site.d_out % self.r == 0,
                f"mode='bat' needs blocks of r x r, but r={self.r} does not divide {where}",
            )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        shapes = {
            "balance": (self.r, site.d_out),
            "mini": (self.r, self.mini_r),
            "bat": (site.d_out // self.r, self.r, self.r),
        }
        return {"lora_D": ParamSpec(shapes[self.mode])}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        x = cast(self.drop(x, base), p.lora_D)
        if self.mode == "bat":
            blocks = cast(base.weight, p.lora_D).unflatten(0, (-1, self.r)).unflatten(2, (-1, self.r))
            update = torch.einsum("oaib,obc->oaic", blocks, p.lora_D) + p.lora_D[:, :, None]
            return y + F.linear(x, update.flatten(2).flatten(0, 1))
        if missing := -base.site.d_in % self.r:
            x = F.pad(x, (0, missing))
        d = p.lora_D.repeat(1, base.site.d_out // self.mini_r) if self.mode == "mini" else p.lora_D
        return y + F.linear(x.unflatten(-1, (-1, self.r)).sum(-2), d.t())
