"""HRA: Householder Reflection Adaptation (Yuan et al., 2024), https://arxiv.org/abs/2405.17484"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank
from ..adapters.maths import cast, identity_like, through
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class HRA(WithRank):
    """`y = W R x + b`, `R = H_0 H_1 ... H_{r-1}`, `H_i = I - 2 u_i u_i^T / ||u_i||^2`; https://arxiv.org/abs/2405.17484.

    In compact-WY form the product of reflections is `R = I - U^T S^{-1} U`, `S = striu(U U^T) + diag(U U^T) / 2`: two
    thin products on `x` with a small one between them, no `d_in x d_in` matrix. The rows of `U` may have any length.

    Identity at the start to rounding: vectors are equal in pairs, and each pair of reflections cancels. `r` must be
    even.

    Args:
        orthogonal: orthogonalize the vectors first, by Gram-Schmidt: `R = I - 2 V^T V`, the reflection of the whole
            space that they span. It is the identity nowhere, so neither at the start: the frozen model loses r
            directions of each input at once. Any r up to `d_in`; the start is drawn without pairs, which would span
            only r / 2.
    """

    orthogonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.orthogonal or self.r % 2 == 0,
            f"r={self.r} must be even: vectors start in pairs whose reflections cancel",
        )

    def check(self, site: Site) -> None:
        super().check(site)
        if self.orthogonal:
            self.require_rank_at_most(site.d_in, site)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {"lora_U": ParamSpec((self.r, site.d_in))}

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        # The length of a vector changes nothing but its learning rate; drawn as in the reference code, where the
        # vectors are columns.
        repeats = 1 if self.orthogonal else 2
        drawn = torch.nn.init.kaiming_uniform_(p.lora_U.new_empty(site.d_in, self.r // repeats), a=math.sqrt(5))
        p.lora_U.copy_(drawn.t().repeat_interleave(repeats, dim=0))

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        # In double precision the small system is exact enough at any rank, and autocast leaves it alone. To normalize
        # the rows as well would change nothing, and save two more copies of them for the backward pass.
        u, exact = p.lora_U, p.lora_U.double()
        gram = F.linear(exact, exact)
        if self.orthogonal:
            # The rows of L^{-1} U are what Gram-Schmidt makes of those of U; of them, S = I / 2.
            u = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, exact, upper=False).to(u.dtype)
            inverse = 2 * identity_like(gram)
        else:
            s = gram.triu() - torch.diag_embed(gram.diagonal() / 2)
            inverse = torch.linalg.solve_triangular(s, identity_like(s), upper=True)
        inverse = inverse.to(u.dtype)

        def turn(x: Tensor) -> Tensor:
            wide_x = cast(x, u)
            # Negate the small factor: that is cheaper than negating the result.
            return (wide_x + F.linear(F.linear(F.linear(wide_x, u), -inverse), u.t())).type_as(x)

        return through(turn, x, base)
