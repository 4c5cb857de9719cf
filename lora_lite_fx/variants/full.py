"""Full: train the weight and bias of a site themselves, from a copy. PEFT calls that `modules_to_save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..errors import CallError
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class Full(Variant):
    """`y = W' x + b'`, where `W'` and `b'` start as copies of the frozen `W` and `b`. Identity at the start, exactly.

    For what must be trained whole beside adapters, such as a new head of a classifier:
    `[Full(target_names="score"), LoRA(r=8)]`. It costs what the frozen site costs, and `merge` gives `W'` and `b'`
    themselves. A weight that is tied to `W` stays as it is: a head that shares the embedding's weight keeps the frozen
    one.

    Without names and roles it trains the head. `Full(target_kinds="norm")` trains the norms, which is LN-tuning
    (https://arxiv.org/abs/2312.11420). `Full(weight=False, target_names=".")` trains the biases of all sites that have
    one, which is BitFit (https://arxiv.org/abs/2106.10199).

    Args:
        weight: whether to train the weight.
        bias: whether to train the bias, where there is one.
    """

    weight: bool = True
    bias: bool = True
    target_kinds: str | Sequence[str] = ("linear", "embedding", "conv", "grouped_conv", "norm")

    default_roles: ClassVar[tuple[str, ...]] = ("head",)
    by_update: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.weight or self.bias, "weight=False and bias=False leave nothing to train")

    def selects(self, site: Site) -> bool:
        if not self.weight and site.bias is None:
            return False
        by_default = self.target_names is None and "linear" in self.target_kinds
        return (site.kind.has_roles or not by_default) and super().selects(site)

    def check(self, site: Site) -> None:
        super().check(site)
        part = site.kind.rows if self.weight else site.bias_rows
        self._require(not site.experts, f"{site.name!r} is {site.kind.article}, which cannot be trained whole")
        self._require(
            part is None,
            f"{site.name!r} is a part of {site.weight!r} and cannot be trained apart from the linears that the rest is",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        specs = {}
        if self.weight:
            specs["lora_weight"] = ParamSpec(site.kind.stored_shape(site.d_out, site.d_in))
        if self.bias and site.bias is not None:
            specs["lora_bias"] = ParamSpec((site.d_out,))
        return specs

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        if self.weight:
            p.lora_weight.copy_(site.kind.stored(weight, p.lora_weight))

    def init_bias(self, site: Site, bias: Tensor, p: Any) -> None:
        if self.bias:
            p.lora_bias.copy_(bias)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        trains_bias = self.bias and base.site.bias is not None
        if trains_bias and base.bias is None:
            raise CallError(
                f"The bias of {base.site.name!r} was taken away, and Full trains one in its place. The way out: zeros"
                " in its place, which leave the trained one; or take it away in the model, and adapt that again."
            )
        weight = base.site.kind.matrix(p.lora_weight) if self.weight else None
        bias = p.lora_bias if trains_bias else None
        return base(x, weight=weight, bias=bias)
