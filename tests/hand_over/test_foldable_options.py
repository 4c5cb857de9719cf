"""What the tensors of an adapter can say is tried out, whatever its class says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

import lora_lite_fx as llfx
from lora_lite_fx.adapters.frozen_linear import FrozenLinear
from lora_lite_fx.adapters.hyperparameters import WithRank, WithScale
from lora_lite_fx.adapters.variant import ParamSpec
from lora_lite_fx.hand_over.foldable_options import Folding, folding, rank_dims
from lora_lite_fx.sites.site import Site

LORA = Folding(("lora_B", "lora_bias"), is_addition=True, is_open=True, is_padded=True)
NOTHING = Folding()
OF_VARIANTS: dict[str, tuple[llfx.Variant, Folding]] = {
    "LoRA": (llfx.LoRA(), LORA),
    "a large rank": (llfx.LoRA(r=200, alpha=3.0, alpha_pattern={"x": 2.0}, rank_pattern={"y": 3}), LORA),
    "rsLoRA": (llfx.LoRA(rank_stabilized=True), LORA),
    "a bias": (llfx.LoRA(bias=True), LORA),
    "a bank": (llfx.Bank(llfx.LoRA(r=4), 3), LORA),
    "EVA": (llfx.EVA(), LORA),
    "DoRA divides by a norm": (llfx.DoRA(), replace(LORA, is_addition=False)),
    "PiSSA": (llfx.PiSSA(), replace(LORA, scaled=("lora_B", "lora_B0"))),
    "LoHa": (llfx.LoHa(), replace(LORA, scaled=("lora_B1",))),
    "AdaLoRA has another scale than files say": (llfx.AdaLoRA(), Folding(("lora_E",), True, True, False)),
    "GLoRA has no scale": (llfx.GLoRA(), Folding(is_open=True, is_padded=True)),
    "HRA cannot reflect zeros": (llfx.HRA(r=4), Folding(is_open=True)),
    "DeLoRA divides by its rank": (llfx.DeLoRA(), NOTHING),
    "IA3": (llfx.IA3(), NOTHING),
    "OFT": (llfx.OFT(block_size=4), NOTHING),
}


@pytest.mark.parametrize("name", OF_VARIANTS)
def test_variants(name: str) -> None:
    variant, expected = OF_VARIANTS[name]
    assert folding(variant) == expected


@dataclass(frozen=True, kw_only=True)
class Squared(llfx.LoRA):
    """It is not proportional to `lora_B`, and inherits that LoRA is."""

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        return base(x) + self.scale * (x @ p.lora_A.T @ p.lora_B.T) ** 2


@dataclass(frozen=True, kw_only=True)
class Rectified(llfx.LoRA):
    """It is proportional to `lora_B` as long as the factor is positive."""

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        return base(x) + self.scale * (x @ p.lora_A.T @ p.lora_B.T).relu()


@dataclass(frozen=True, kw_only=True)
class ByRank(llfx.LoRA):
    """Its `forward` has another scale than the class says, which another alpha keeps and another rank does not."""

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        return base(x) + self.alpha / self.r**2 * (x @ p.lora_A.T @ p.lora_B.T)


@dataclass(frozen=True, kw_only=True)
class Curved(llfx.LoRA):
    """Its scale is not proportional to alpha, and files of adapters say alpha alone."""

    @property
    def scale(self) -> float:
        return self.alpha**3 / self.r


@dataclass(frozen=True, kw_only=True)
class Doubled(llfx.LoRA):
    """Its output is not the base's where its tensors are zero."""

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        return 2 * base(x) + self.scale * (x @ p.lora_A.T @ p.lora_B.T)


@dataclass(frozen=True, kw_only=True)
class Own(WithScale, WithRank):
    """A class that derives from none of the variants, and says where its scale goes."""

    takes_scale: ClassVar[tuple[str, ...]] = ("down",)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"down": ParamSpec((self.r, site.d_in), init="kaiming"), "up": ParamSpec((site.d_out, self.r))}

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        return base(x) + self.scale * (x @ p.down.T @ p.up.T)


@dataclass(frozen=True, kw_only=True)
class Rankless(WithScale):
    """It has a scale and no rank."""

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_v",)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"lora_v": ParamSpec((site.d_out,))}

    def forward(self, x: Any, base: FrozenLinear, p: Any) -> Any:
        y = base(x)
        return y + self.scale * p.lora_v * y


@dataclass(frozen=True, kw_only=True)
class Silent(Own):
    """It does not say where its scale goes."""

    takes_scale: ClassVar[tuple[str, ...]] = ()


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Squared, NOTHING),
        (Rectified, NOTHING),
        (Curved, NOTHING),
        (Rankless, Folding(("lora_v",), is_addition=True)),
        (ByRank, replace(LORA, is_open=False, is_padded=False)),
        (Doubled, replace(LORA, is_addition=False)),
        (Own, replace(LORA, scaled=("down",))),
        (Silent, NOTHING),
    ],
)
def test_classes_of_users(cls: Any, expected: Folding) -> None:
    assert folding(cls(alpha=6.0)) == expected


def test_dimensions_of_the_rank() -> None:
    site = Site("up", d_in=6, d_out=9)
    assert rank_dims(llfx.LoRA(r=4), site) == {"lora_A": [0], "lora_B": [1]}
    assert rank_dims(llfx.Bank(llfx.LoRA(r=4), 3), site) == {"lora_A": [1], "lora_B": [2]}
    assert rank_dims(llfx.LoRA(r=4, bias=True), site)["lora_bias"] == []
    assert rank_dims(llfx.PiSSA(r=8), site)["lora_A"] == []  # it has all parts of the weight already
    assert rank_dims(llfx.IA3(), site) == {}
