"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al., 2022), https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.patterns import occurs
from ..adapters.registry import register
from ..adapters.variant import Variant, as_tuple
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Variant):
    """`y = g * (W x + b)`; at sites with the role `down`, `y = W (g * x) + b`; https://arxiv.org/abs/2205.05638.

    Gates the keys, the values and the *input* of the down-projection. A convolution is gated by channels. Identity at
    the start, exactly: `g = 1`.

    Args:
        feedforward_names: regular expressions, searched in the qualified name, of the sites that are gated at their
            input, instead of those with the role `down`.
    """

    by_update: ClassVar[bool] = True

    feedforward_names: str | Sequence[str] | None = None

    default_roles: ClassVar[tuple[str, ...]] = ("key", "value", "down")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names("feedforward_names")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        inputs = site.kind.input_channels(site.d_in)
        return {"lora_g": ParamSpec((inputs if self.gates_input(site) else site.d_out,), init="ones")}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        if self.gates_input(base.site):
            if base.site.kernel:  # whose input has no entry for each of `d_in`
                update = base.weight * (self._by_weight(p.lora_g, base.site) - 1)
                return base(x) + F.linear(cast(x, update), update)
            return base(x * p.lora_g)
        gated: Tensor = base(x) * p.lora_g
        return gated

    @staticmethod
    def _by_weight(gate: Tensor, site: Site) -> Tensor:
        """Return a gate of the input channels of a convolution as factors of its weight, `(d_out, d_in)`."""
        rows: Tensor = gate.unflatten(0, (-1, site.channels)).repeat_interleave(math.prod(site.kernel), dim=1)
        return rows.repeat_interleave(site.d_out // len(rows), dim=0)

    def gates_input(self, site: Site) -> bool:
        """Return whether the gate is at the input of `site`."""
        if self.feedforward_names is None:
            return "down" in site.roles
        return occurs(as_tuple(self.feedforward_names), site.name)
