"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (Gao et al., 2024), https://arxiv.org/abs/2405.03003"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import is_count, override
from ..adapters.maths import cast, wide
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class FourierFT(Variant):
    """`y = W x + b + D x`, `D = scaling * Re(IDFT2(C))`; https://arxiv.org/abs/2405.03003, equations 2 to 4.

    `C (d_out, d_in)` is zero but for trained coefficients at random frequencies. `D` is as large as `W` and computed
    anew in each call. As in the paper the coefficients start at random, so the start is *not* the identity, unless
    `spectrum="zeros"`: then exactly.

    Args:
        n_frequency: the number of coefficients; all that there are at a site with fewer.
        n_frequency_pattern: other numbers by name, as `rank_pattern` of other variants.
        scaling: of `D`. Not zero, where every gradient would be zero.
        seed: of the frequencies, which are the same at sites of the same size, and PEFT's.
        spectrum: the start of the coefficients: standard `normal`, or `zeros`.
    """

    by_update: ClassVar[bool] = True

    n_frequency: int = 1000
    n_frequency_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    scaling: float = 150.0
    seed: int = 777
    spectrum: Literal["normal", "zeros"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.n_frequency >= 1, f"n_frequency must be positive, got {self.n_frequency!r}")
        self._make_pairs("n_frequency_pattern", is_count, "positive integers")
        self._require(self.scaling != 0, "scaling=0 would leave every gradient zero; use another number, such as 150")
        self._require(0 <= self.seed < 2**64, f"seed is a number from 0, got {self.seed!r}")

    def overrides(self, name: str) -> dict[str, Any]:
        return super().overrides(name) | override(self, "n_frequency", "n_frequency_pattern", name)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        size = site.d_in * site.d_out
        count = min(self.n_frequency, size)

        def draw(index: Tensor) -> None:
            generator = torch.Generator().manual_seed(self.seed)
            index.copy_(torch.randperm(size, generator=generator, device="cpu")[:count])

        return {
            "lora_spectrum": ParamSpec((count,), torch.nn.init.normal_ if self.spectrum == "normal" else "zeros"),
            # Of the coefficients in `C`, row by row.
            "lora_index": ParamSpec((count,), draw, trainable=False, dtype=torch.int64),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        d_in, d_out = base.site.d_in, base.site.d_out
        coefficients = wide(p.lora_spectrum)
        c = coefficients.new_zeros(d_out * d_in).scatter(0, p.lora_index, coefficients)
        delta = cast(self.scaling * torch.fft.ifft2(c.unflatten(0, (d_out, d_in))).real, p.lora_spectrum)
        return y + F.linear(cast(x, delta), delta)
