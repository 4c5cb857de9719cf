"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning (Chavan et al., 2023), https://arxiv.org/abs/2306.07967"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class GLoRA(WithRank):
    """`y = (W + W * A + B) x + b + b * D + E + W C`, `*` by element; https://arxiv.org/abs/2306.07967.

    Each of the five has one of these forms: a product of `lora` factors of rank r, a `vector` with one number for each
    row, a `constant`, or `none`. C, D and E are at sites that have a bias. The update is formed as a matrix.
    Identity at the start, exactly: all five are zero.

    Args:
        weight_form: the form of A and B.
        coupling_form: the form of C.
        bias_form: the form of D and E.
    """

    by_update: ClassVar[bool] = True

    weight_form: Literal["lora", "vector", "constant", "none"] = "lora"
    coupling_form: Literal["lora", "vector", "none"] = "lora"
    bias_form: Literal["vector", "constant", "none"] = "constant"

    def check(self, site: Site) -> None:
        super().check(site)
        forms = {self.weight_form, *((self.coupling_form, self.bias_form) if site.bias else ())}
        self._require(forms != {"none"}, f"the forms leave nothing to train at site {site.name!r}")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        weight = (site.d_out, site.d_in)
        specs = {**self._specs("A", self.weight_form, weight), **self._specs("B", self.weight_form, weight)}
        if site.bias is not None:
            specs |= self._specs("C", self.coupling_form, (site.d_in, 1))
            specs |= {
                **self._specs("D", self.bias_form, (site.d_out,)),
                **self._specs("E", self.bias_form, (site.d_out,)),
            }
        return specs

    def _specs(self, name: str, form: str, shape: tuple[int, ...]) -> dict[str, ParamSpec]:
        """Return the tensors of one of the five, whose value has this shape or is broadcast to it."""
        if form == "none":
            return {}
        if form == "lora":
            up = ParamSpec((self.r, shape[1]), init="kaiming")
            return {f"lora_{name}d": ParamSpec((shape[0], self.r)), f"lora_{name}u": up}
        ones = (1,) * (len(shape) - 1)
        return {f"lora_{name}": ParamSpec((shape[0], *ones) if form == "vector" else (1,))}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        if self.weight_form != "none":
            update = base.weight * _value(p, "A", self.weight_form) + _value(p, "B", self.weight_form)
            y = y + F.linear(cast(x, update), update)
        if base.bias is not None and self.coupling_form != "none":
            y = y + (base.weight @ _value(p, "C", self.coupling_form)).squeeze(-1)
        if base.bias is not None and self.bias_form != "none":
            y = y + (base.bias * _value(p, "D", self.bias_form) + _value(p, "E", self.bias_form))
        return y


def _value(p: Any, name: str, form: str) -> Tensor:
    """Return one of the five."""
    value: Tensor = (
        getattr(p, f"lora_{name}d") @ getattr(p, f"lora_{name}u") if form == "lora" else getattr(p, f"lora_{name}")
    )
    return value
