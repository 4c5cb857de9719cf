"""A variant on one model: all that the properties look at, made when one first asks for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ..adapters.state import adapter_state_dict, load_adapter_state_dict
from ..adapters.variant import Variant
from ..execution.optimize import optimize
from ..passes import Pipeline
from ..rewriting.adapted_linear import AdaptedLinear
from ..rewriting.capture import capture
from ..rewriting.eager import wrap
from ..rewriting.rewrite import rewrite
from .comparisons import TOLERANCES, difference, perturb, snapshot

T = TypeVar("T")


class Skip(Exception):
    """A property does not apply, or cannot be looked at; the message says why."""


@dataclass
class Trial:
    """A variant on one model.

    Args:
        variants: the variant; or several, the innermost first.
        model: the model, in evaluation mode.
        example_inputs: positional arguments to capture it with; None for symbolic tracing.
        inputs: positional arguments of other shapes, which all is compared on.
        label: says which model it is.
        seed: of start values and changes to them.
        start: how far the start may be from the identity; None if anything is right.
        tolerance: how far results may be apart; None follows from the dtypes.
    """

    variants: Sequence[Variant]
    model: nn.Module
    example_inputs: tuple[Any, ...] | None
    inputs: tuple[Any, ...]
    label: str = "the model"
    seed: int = 0
    start: float | None = None
    tolerance: float | None = None
    _made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = snapshot(self.model)

    def changes(self) -> str:
        """Say what of the model has changed since the trial began; empty if nothing has."""
        return difference(self._before, snapshot(self.model))

    @property
    def base(self) -> fx.GraphModule:
        """The captured model."""
        return self._once("capture", lambda: capture(self.model, self.example_inputs))

    @property
    def started(self) -> fx.GraphModule:
        """The graph with adapters at their start."""
        return self._once("rewrite", lambda: self.rewrite(self.variants))

    @property
    def adapted(self) -> fx.GraphModule:
        """The graph with adapters away from their start."""
        return self._once("moved", lambda: self.moved(capture(self.started)))

    @property
    def plain(self) -> fx.GraphModule:
        """The same without optimizing passes."""
        return self._once("plain", lambda: optimize(copy.deepcopy(self.adapted), Pipeline(())))

    @property
    def wrapped(self) -> nn.Module:
        """The eager wrapper with the values of `adapted`."""
        return self._once("wrap", lambda: self.wrap(self.variants, adapter_state_dict(self.adapted)))

    def rewrite(self, variants: Sequence[Variant]) -> fx.GraphModule:
        """Return the graph with these adapters at their start, which depends on the seed alone."""
        torch.manual_seed(self.seed)
        return rewrite(self.base, variants, calibration=self._calibration(variants))

    def moved(self, gm: T) -> T:
        """Return a model whose adapters have been moved away from their start."""
        perturb(gm, self.seed)  # type: ignore[arg-type]
        return gm

    def wrap(self, variants: Sequence[Variant], values: dict[str, Tensor]) -> nn.Module:
        """Return the eager wrapper with these adapters and their values."""
        wrapped = wrap(self.base, variants, calibration=self._calibration(variants))
        load_adapter_state_dict(wrapped, values)
        return wrapped

    def allowed(self) -> float:
        """Return how far results may be apart, by the least exact dtype of the model and the adapters."""
        if self.tolerance is not None:
            return self.tolerance
        tensors = [*self.model.parameters(), *adapter_state_dict(self.started).values()]
        return max(TOLERANCES.get(tensor.dtype, 0.0) for tensor in tensors)

    @staticmethod
    def sites_of(wrapped: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
        """Yield the linears that `wrap` has wrapped, by name; other kinds of sites take no vectors."""
        for name, module in wrapped.named_modules():
            if isinstance(module, AdaptedLinear) and module.site.kind.vector_dims:
                yield name, module

    def vectors(self, module: AdaptedLinear, *shape: int, seed: int = 0) -> Tensor:
        """Return random inputs `(*shape, d_in)` of a site."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        size = (*shape, module.site.d_in)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(module.frozen_weight().dtype)

    def in_dtype(self, dtype: torch.dtype) -> Trial:
        """Return the trial on a copy of the model in another dtype, traced because that is quicker than exporting."""
        model = copy.deepcopy(self.model).to(dtype)
        return Trial(self.variants, model, None, self.inputs, self.label, self.seed, self.start)

    def _calibration(self, variants: Sequence[Variant]) -> list[Any] | None:
        """Return calibration data, if a variant starts from data."""
        if all(type(variant).observer is Variant.observer for variant in variants):
            return None
        return [self.inputs] if self.example_inputs is None else [self.example_inputs, self.inputs]

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` makes, made once. After a failure, which the first property to ask reports, skip."""
        if name not in self._made:
            self._made[name] = Skip(f"{name} failed before")
            self._made[name] = make()
        made: T = self._made[name]
        if isinstance(made, Skip):
            raise made
        return made
