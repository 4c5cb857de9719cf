"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al., 2022), https://arxiv.org/abs/2205.05638"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..registry import register
from ..site import Site
from ..variant import FrozenLinear, ParamSpec, Variant


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Variant):
    """`y = g * (W x + b)`; at sites with the role `down`, `y = W (g * x) + b`; https://arxiv.org/abs/2205.05638.

    Gates the keys, the values and the *input* of the down-projection. Identity at the start, exactly: `g = 1`.
    `r` and `alpha` are not used.
    """

    default_roles: ClassVar[tuple[str, ...]] = ("key", "value", "down")
    bounded_rank: ClassVar[bool] = False

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {"lora_g": ParamSpec((site.d_in if _gates_input(site) else site.d_out,), init="ones")}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        if _gates_input(base.site):
            return base((x * p.lora_g).type_as(x))
        y = base(x)
        return (y * p.lora_g).type_as(y)


def _gates_input(site: Site) -> bool:
    return "down" in site.roles
