"""Variants as a user would write them, most of them not affine; registered only while a test runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_fx import FrozenLinear, ParamSpec, Variant
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site


@contextmanager
def registered(*classes: type[Variant]) -> Iterator[None]:
    """Register variants for a while, so that tests that run over the registry do not see them."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setitem(_REGISTRY, cls.__name__, cls)
        yield


def _normal(tensor: Tensor) -> None:
    """Fill with what depends on the shape alone, never with the zeros that hide a mistake."""
    generator = torch.Generator().manual_seed(tensor.numel())
    tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class Bottlenecked(Variant):
    """Has the two matrices of a bottleneck."""

    r: int = 2

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((self.r, site.d_in), _normal), "lora_B": ParamSpec((site.d_out, self.r), _normal)}


@dataclass(frozen=True, kw_only=True)
class Gate(Bottlenecked):
    """`y = (W x + b) (1 + B tanh(A x))`: a gate that reads the input."""

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        return (y * (1 + F.linear(torch.tanh(F.linear(x, p.lora_A)), p.lora_B))).type_as(y)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Bottlenecked):
    """`y = W x + b + B gelu(A x)`. It says itself that it is not affine."""

    affine: ClassVar[bool] = False

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        return (y + F.linear(F.gelu(F.linear(x, p.lora_A)), p.lora_B)).type_as(y)


@dataclass(frozen=True, kw_only=True)
class Computed(Bottlenecked):
    """Computes what `FUNCTIONS` has under a name."""

    function: str = ""

    FUNCTIONS: ClassVar[dict[str, Callable[[Tensor, FrozenLinear, Any], Tensor]]] = {}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        # Every tensor is read, because a tensor that nothing reads is another mistake.
        y: Tensor = self.FUNCTIONS[self.function](x, base, p) + 0 * (p.lora_A.sum() + p.lora_B.sum())
        return y


@dataclass(frozen=True, kw_only=True)
class HeadRotation(Variant):
    """Turns the output of each of two heads by a matrix."""

    def params(self, site: Site) -> dict[str, ParamSpec]:
        size = site.d_out // 2
        return {"lora_R": ParamSpec((2, size, size), _normal)}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        turned: Tensor = torch.einsum("...hi,hij->...hj", y.unflatten(-1, (2, -1)).type_as(p.lora_R), p.lora_R)
        return turned.flatten(-2).type_as(y)
