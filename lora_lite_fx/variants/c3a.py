"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution (Chen et al., 2024), https://arxiv.org/abs/2407.19342"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import is_count, override
from ..adapters.maths import wide
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class C3A(Variant):
    """`y = W x + b + C x / d_in`, C of circulant blocks; https://arxiv.org/abs/2407.19342.

    Row j of a block is its kernel shifted right j times. In place of the blocks, which would be a matrix as large as
    `W`, their Fourier transforms are applied. Near the identity at the start, and exactly that with
    `init_weights="zeros"`.

    Args:
        block_size: side of a block, a common divisor of `d_in` and `d_out`. The larger, the fewer parameters.
        block_size_pattern: other sizes by name, as `rank_pattern` of other variants.
        init_weights: how the kernels start. `zeros` loses no gradient.
    """

    block_size: int = 256
    block_size_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    init_weights: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.block_size >= 1, f"block_size={self.block_size} must be at least 1")
        self._make_pairs("block_size_pattern", is_count, "positive integers")

    def overrides(self, name: str) -> dict[str, Any]:
        return super().overrides(name) | override(self, "block_size", "block_size_pattern", name)

    def check(self, site: Site) -> None:
        super().check(site)
        common = math.gcd(site.d_in, site.d_out)
        self._require(
            common % self.block_size == 0,
            f"block_size={self.block_size} does not divide both sides of site {site.name!r} ({site.d_out} x "
            f"{site.d_in}); use {common} or a divisor of it",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        shape = (site.d_out // self.block_size, site.d_in // self.block_size, self.block_size)
        return {"lora_c3a_kernel": ParamSpec(shape, init=self._init(site))}

    def _init(self, site: Site) -> str | Callable[[Tensor], object]:
        if self.init_weights == "zeros":
            return "zeros"
        if self.init_weights == "gaussian":
            return torch.nn.init.normal_
        # The matrix that the kernels make up counts, not the shape in which they are stored.
        bound = math.sqrt(6 / (site.d_in + site.d_out) if self.init_weights == "xavier_uniform" else 1 / site.d_in)
        return partial(torch.nn.init.uniform_, a=-bound, b=bound)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        kernel = wide(p.lora_c3a_kernel)
        # No transform is in half precision, in which `x` may be under autocast though the capture saw it in single.
        # Unflattened first: a cast that has nothing to do returns `x` itself, and a re-capture would take one for the
        # other.
        blocks = x.unflatten(-1, (-1, self.block_size)).type_as(kernel)
        signal = torch.fft.rfft(blocks)
        mixed = torch.einsum("...nk,mnk->...mk", signal, torch.fft.rfft(kernel).conj())
        delta: Tensor = torch.fft.irfft(mixed, n=self.block_size).flatten(-2) / base.site.d_in
        return (y + delta).type_as(y)
