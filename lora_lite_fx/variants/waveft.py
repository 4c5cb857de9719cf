"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (Bilican et al., 2025), https://arxiv.org/abs/2505.12532"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import is_count, override
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class WaveFT(Variant):
    """`y = W x + b + D x`, `D = scaling * IDWT2(C)`; https://arxiv.org/abs/2505.12532.

    `C` is zero but for trained coefficients at random places, and the inverse wavelet transform has one level. `D` is
    as large as `W` and computed anew in each call. Identity at the start, exactly: the coefficients are zero.

    Args:
        n_frequency: the number of coefficients; all that there are at a site with fewer.
        n_frequency_pattern: other numbers by name, as `rank_pattern` of other variants.
        scaling: of `D`. Not zero, where every gradient would be zero.
        wavelet: Daubechies' with so many vanishing moments; `db1` is Haar's. `sym2` and `sym3` are those of the same
            number. Its filter has twice that length, and `C` is larger than `W` by the length less two.
        use_idwt: whether `C` is transformed; if not, `D = scaling * C`.
        seed: of the places, which are the same at sites of the same size, and PEFT's.
    """

    by_update: ClassVar[bool] = True

    n_frequency: int = 2592
    n_frequency_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    scaling: float = 25.0
    wavelet: Literal["db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10", "sym2", "sym3"] = "db1"
    use_idwt: bool = True
    seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.n_frequency >= 1, f"n_frequency must be positive, got {self.n_frequency!r}")
        self._make_pairs("n_frequency_pattern", is_count, "positive integers")
        self._require(self.scaling != 0, "scaling=0 would leave every gradient zero; use another number, such as 25")
        self._require(0 <= self.seed < 2**64, f"seed is a number from 0, got {self.seed!r}")

    def overrides(self, name: str) -> dict[str, Any]:
        return super().overrides(name) | override(self, "n_frequency", "n_frequency_pattern", name)

    @property
    def _taps(self) -> int:
        """Return the length of the wavelet's filter."""
        return 2 * int(self.wavelet.lstrip("dbsym"))

    def _sides(self, site: Site) -> tuple[int, int]:
        """Return the sides of `C`, which are even where it is transformed."""
        if not self.use_idwt:
            return site.d_out, site.d_in
        rows, columns = (side + self._taps - 2 for side in (site.d_out, site.d_in))
        return rows + rows % 2, columns + columns % 2

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        size = site.d_in * site.d_out
        count = min(self.n_frequency, size)
        rows, columns = self._sides(site)

        def draw(index: Tensor) -> None:
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(size, generator=generator, device="cpu")[:count]
            row = places // site.d_in + (rows - site.d_out) // 2
            index.copy_(row * columns + places % site.d_in + (columns - site.d_in) // 2)

        filters = {"lora_filter": ParamSpec((self._taps,), _fill_filter, trainable=False)} if self.use_idwt else {}
        return {
            "lora_spectrum": ParamSpec((count,)),
            # Of the coefficients in `C`, row by row.
            "lora_index": ParamSpec((count,), draw, trainable=False, dtype=torch.int64),
            **filters,
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        d_in, d_out = base.site.d_in, base.site.d_out
        rows, columns = self._sides(base.site)
        coefficients = p.lora_spectrum.double()  # because autocast leaves convolutions in double precision alone
        c = coefficients.new_zeros(rows * columns).scatter(0, p.lora_index, coefficients).unflatten(0, (rows, columns))
        if self.use_idwt:
            c = _inverse(c, p.lora_filter.double())[:d_out, :d_in]
        delta = cast(self.scaling * c, p.lora_spectrum)
        return y + F.linear(cast(x, delta), delta)


def _inverse(c: Tensor, low: Tensor) -> Tensor:
    """Return the inverse wavelet transform of `c`, whose quarters are its bands, for the filter `low`."""
    taps = len(low)
    high = torch.stack([(-1) ** k * low[taps - 1 - k] for k in range(taps)])
    filters = torch.stack([low, high])
    rows, columns = c.shape
    bands = c.unflatten(1, (2, columns // 2)).unflatten(0, (2, rows // 2)).transpose(1, 2).flatten(0, 1)
    # As in PEFT, the right half has the high frequencies along rows, and the lower half those along columns.
    kernels = torch.einsum("jf,ig->ijfg", filters, filters).flatten(0, 1)[:, None]
    delta: Tensor = F.conv_transpose2d(bands[None], kernels, stride=2, padding=taps - 2)
    return delta[0, 0]


def _fill_filter(low: Tensor) -> None:
    """Fill in Daubechies' low-pass filter, by factorizing the polynomial that its number of moments asks for."""
    moments = len(low) // 2
    # The roots y of sum_k binom(moments - 1 + k, k) y^k, as eigenvalues; each is a pair of roots z + 1 / z = 2 - 4 y.
    terms = torch.tensor([math.comb(moments - 1 + k, k) for k in range(moments)], dtype=torch.float64)
    companion = torch.diag(torch.ones(max(moments - 2, 0), dtype=torch.float64), -1)[: moments - 1, : moments - 1]
    if moments > 1:
        companion[:, -1] = -terms[:-1] / terms[-1]
    y = torch.linalg.eigvals(companion) if moments > 1 else torch.zeros(0, dtype=torch.complex128)
    half = 1 - 2 * y
    root = half + (half**2 - 1).sqrt()
    inside = torch.where(root.abs() < 1, root, 1 / root)
    polynomial = torch.ones(1, dtype=torch.complex128)
    for zero in [*[-1.0] * moments, *inside.tolist()]:
        polynomial = F.pad(polynomial, (0, 1)) - zero * F.pad(polynomial, (1, 0))
    real = polynomial.real
    low.copy_(real * (2**0.5 / real.sum()))
