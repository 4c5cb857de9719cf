"""Find out which differences between two adapters are in the values of their tensors alone.

A program has the rank and the scale of its config as constants. The factor between two scales can go into tensors that
the update is proportional to, and zeros can fill up factors of a lower rank. A class says which tensors take its scale.
All is tried out on a small linear, because a subclass may compute something else than the class that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank, WithScale, WithUpdateDropout
from ..adapters.param_spec import AdapterTensors
from ..adapters.registry import to_config
from ..adapters.variant import Variant
from ..errors import ConfigError
from ..graph.insertion import SHARED
from ..sites.site import Site
from .swappable import scale_of

WITHOUT_EFFECT = frozenset(field.name for cls in (Variant, WithDropout, WithUpdateDropout) for field in fields(cls)) | {
    "init_weights",
    "seed",
    "projection_seed",
    "train_A",
}
"""Fields that say where adapters are, how they start and how they train, and not what trained ones compute."""

OF_ALPHA = frozenset({"alpha", "alpha_pattern"})
OF_RANK = frozenset({"r", "rank_pattern", "rank_stabilized"})


@dataclass(frozen=True)
class Folding:
    """What the tensors of an adapter can say, so that the program of one config runs adapters of others.

    Args:
        scaled: the names of the tensors that take the factor between two scales; none if that is not possible.
        is_addition: whether it adds what is proportional to them, and nothing where its tensors are zero.
        is_open: whether the program of another rank computes the same with its tensors as they are.
        is_padded: whether the program of a higher rank does, with zeros up to its own.
    """

    scaled: tuple[str, ...] = ()
    is_addition: bool = False
    is_open: bool = False
    is_padded: bool = False


@torch.no_grad()
def folding(variant: Variant) -> Folding:
    """Return what the tensors of a config can say."""
    known = {field.name for field in fields(variant)}
    plain: dict[str, Any] = {name: () for name in ("rank_pattern", "alpha_pattern") if name in known} | {"slots": None}
    program, adapter = dict(plain), dict(plain)  # the fields of the two, where they are not the config's

    def tried(passes: Callable[[_Trial], bool], *scaled: str) -> bool:
        try:
            return passes(_Trial(replace(variant, **program), replace(variant, **adapter), scaled))
        except Exception:  # of a variant that does not take these sizes, whatever it raises
            return False

    scaled: tuple[str, ...] = ()
    is_addition = False
    if isinstance(variant, WithScale):
        is_addition = tried(_Trial.is_addition, *variant.takes_scale)
        program["alpha"], adapter["alpha"] = 3.0, -5.0
        scaled = variant.takes_scale
        if not scaled or not (tried(_Trial.is_same, *scaled) and tried(_Trial.is_same_padded, *scaled)):
            return Folding()
    if not isinstance(variant, WithRank):
        return Folding(scaled, is_addition)
    program["r"] = 2 * variant.r
    is_open, is_padded = tried(_Trial.is_same, *scaled), tried(_Trial.is_same_padded, *scaled)
    if "rank_stabilized" in known:
        adapter["rank_stabilized"] = not getattr(variant, "rank_stabilized", False)
        is_open = is_open and tried(_Trial.is_same, *scaled)
        is_padded = is_padded and tried(_Trial.is_same_padded, *scaled)
    return Folding(scaled, is_addition, is_open, is_padded)


def rank_dims(config: Variant, site: Site) -> dict[str, list[int]]:
    """Return the dimensions of the tensors of a config that are the rank at a site, by the variant's names."""
    if not isinstance(config, WithRank):
        return {}
    try:
        double = replace(config, r=2 * config.r).tensor_specs(site)
    except ConfigError:
        return {}
    return {
        name: [dim for dim, pair in enumerate(zip(spec.shape, double[name].shape, strict=False)) if pair[0] != pair[1]]
        for name, spec in config.tensor_specs(site).items()
        if name in double
    }


class _Trial:
    """An adapter on a small linear, which the program of another config is to run.

    Args:
        program: the config of the program.
        adapter: that of the adapter.
        scaled: the names of the tensors that take the factor between the scales.
    """

    def __init__(self, program: Variant, adapter: Variant, scaled: tuple[str, ...]) -> None:
        self.program, self.adapter, self.scaled = program, adapter, scaled
        width = max(4, getattr(adapter, "r", 4))
        self.site = Site("site", d_in=3 * width, d_out=4 * width, bias="site.bias")
        self.generator = torch.Generator().manual_seed(0)
        self.x, self.weight, self.bias = map(self._drawn, ((5, 3 * width), (4 * width, 3 * width), (4 * width,)))
        self.tensors = {name: self._tensor(name, spec) for name, spec in adapter.params(self.site).items()}

    def is_same(self) -> bool:
        """Tell whether the program computes what the adapter does, with its tensors as they are but for the scale."""
        own, other = (getattr(config, "scale", 1.0) if self.scaled else 1.0 for config in (self.adapter, self.program))
        return _are_equal(self._output(self.program, self._scaled(own / other)), self._expected())

    def is_same_padded(self) -> bool:
        """Tell whether it does with zeros up to its rank, and with scales as `Swappable` reads them from files."""
        own, other = (scale_of("", config, config, "site") for config in map(to_config, (self.adapter, self.program)))
        return _are_equal(self._output(self.program, self._padded(self._scaled(own / other))), self._expected())

    def is_addition(self) -> bool:
        """Tell whether it adds what is proportional to the tensors that take its scale, and nothing at zero."""
        base = F.linear(self.x, self.weight, self.bias)
        zeros = {name: torch.zeros_like(value) for name, value in self.tensors.items()}
        is_none = torch.equal(self._output(self.adapter, zeros), base)
        reverse = self._output(self.adapter, self._scaled(-2.0)) - base
        return is_none and _are_equal(reverse, -2 * (self._expected() - base))

    def _expected(self) -> Tensor:
        return self._output(self.adapter, self.tensors)

    def _drawn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _tensor(self, name: str, spec: Any) -> Tensor:
        if spec.dtype is not None:  # of indices
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if name.startswith(SHARED):  # as large as the largest site needs it
            return self._drawn(spec.shape[-1:]).expand(spec.shape)
        return self._drawn(spec.shape)

    def _scaled(self, factor: float) -> dict[str, Tensor]:
        return {name: value * factor if name in self.scaled else value for name, value in self.tensors.items()}

    def _padded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        padded = {}
        for name, spec in self.program.params(self.site).items():
            value = tensors[name]
            if spec.shape != value.shape:
                if spec.dtype is not None or name.startswith(SHARED):
                    raise ConfigError(f"{name} has no place for zeros.")
                value = torch.zeros(spec.shape, dtype=value.dtype)
                value[tuple(map(slice, tensors[name].shape))] = tensors[name]
            padded[name] = value
        return padded

    def _output(self, variant: Variant, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what an adapted linear computes in evaluation."""

        def call(value: Tensor, weight: Tensor = self.weight, bias: Tensor = self.bias) -> Tensor:
            return F.linear(value, weight, bias)

        return variant.forward(self.x, FrozenLinear(call, self.weight, self.bias, self.site), AdapterTensors(tensors))


def _are_equal(result: Tensor, expected: Tensor) -> bool:
    return torch.allclose(result, expected, rtol=1e-9, atol=1e-12)
