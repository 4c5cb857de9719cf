"""One site, or one weight that is not a site, as a row of the table."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class SiteRow:
    """One site of a model.

    Args:
        name: qualified name.
        roles: of the site, in the order of `roles.ROLES`; empty if the dataflow leaves a doubt.
        d_in: size of the last dimension of the input.
        d_out: size of the last dimension of the output.
        adapters: names of the variants at it, the innermost first.
        parameters: number of adapter parameters at it that train.
        reasons: for each of its roles, the reason.
        weight: qualified name of the frozen weight.
        dtype: of the weight, such as `"float32"`.
        bias: whether it adds a bias.
        calls: how often the model runs it in one forward pass.
        reads: name of the value in the graph that it reads; sites with the same name read the same value.
        kind: `linear`, `embedding`, `conv`, `experts` or `norm`.
        experts: number of experts in its weight, each with an adapter of its own; 0 if it is not a stack of experts.
        bytes: the memory of the tensors that hold the weight: the parameter, or what a quantized one is computed from.
        bits: the same in bits for each entry of the weight.
    """

    name: str
    roles: tuple[str, ...]
    d_in: int
    d_out: int
    adapters: tuple[str, ...]
    parameters: int
    reasons: dict[str, str] = field(compare=False)
    weight: str
    dtype: str
    bias: bool
    calls: int
    reads: str
    kind: str = "linear"
    experts: int = 0
    bytes: int = 0
    bits: float = 0.0

    @property
    def reason(self) -> str:
        """The reasons for its roles, in one line."""
        return "; ".join(f"{role}: {why}" for role, why in self.reasons.items())

    @property
    def beside_name(self) -> Hashable:
        """All but its name and that of the value that it reads; two sites that agree in this are told together."""
        return replace(self, name="", weight=self.weight.removeprefix(f"{self.name}."), reads="", reasons={})


@dataclass(frozen=True)
class LeftOutRow:
    """One weight that multiplies data and is not a site, so that no adapter can be put there.

    Args:
        name: the name that it would have as a site.
        weight: qualified name of the parameter.
        reason: why it is not a site.
        roles: of the linear that it makes, in the order of `roles.ROLES`; those that are possible, if it is unknown
            what multiplies it.
        kind: the kind of site that it would be.
    """

    name: str
    weight: str
    reason: str
    roles: tuple[str, ...]
    kind: str

    @property
    def beside_name(self) -> Hashable:
        """All but its name; two weights that agree in this are told together."""
        return replace(self, name="", weight=self.weight.removeprefix(f"{self.name}."))
