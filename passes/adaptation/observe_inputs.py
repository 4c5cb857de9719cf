"""Observe the inputs of sites while the graph runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ...adapters.accounting import account_for
from ...adapters.calibration_data import Batch, Observe, Statistic
from ...adapters.maths import wide
from ...graph.insertion import surrounding
from ...graph.walk import ancestors
from ...sites.site import span
from ..pipeline import GraphPass


class Observer(nn.Module):
    """A module that returns a site's input unchanged and sums up what `observe` computes of it.

    It keeps the sum only, no activations.

    Args:
        observe: as `observer_of` returns it.
    """

    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self.observe: Callable[..., Any] = observe
        self.takes_batch = _required_arguments(observe) > 1
        self.total: Tensor | None = None
        self.tokens = 0
        self._call: tuple[int, Mapping[str, Any]] = (0, {})

    def begin(self, index: int, arguments: Mapping[str, Any]) -> None:
        """Say which batch the next inputs come from: its number, and what the model is called with."""
        self._call = (index, arguments)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Observe `x (..., d_in)` and return it.

        If `mask (batch, length)` has one entry for each token, only the tokens with a 1 count.
        """
        wide_x = wide(x.detach())
        inputs = wide_x.reshape(-1, x.shape[-1])
        if mask is not None and mask.numel() != len(inputs):
            mask = None
        if mask is not None:
            inputs = inputs[mask.reshape(-1).bool()]
        batch = (Batch(*self._call, wide_x, mask),) if self.takes_batch else ()
        observed: Tensor = self.observe(inputs, *batch)
        self.total = observed if self.total is None else self.total + observed
        self.tokens += len(inputs)
        return x

    @property
    def statistic(self) -> Statistic | None:
        """The sum and the number of tokens so far; None before the first input."""
        return None if self.total is None else Statistic(self.total, self.tokens)


@dataclass(frozen=True)
class ObserveInputs(GraphPass):
    """Route the input of each site through observers, around the adapters that are there.

    The graph is meant for calibration data, and thrown away after it. Safe because observers return their input.

    Args:
        observers: the observers of each site, by its qualified name.
    """

    observers: Mapping[str, Sequence[Observer]]

    def run(self, gm: fx.GraphModule) -> int:
        account = account_for(gm)
        edits = 0
        for site in account.sites:
            if site.name not in self.observers:
                continue
            for call in site.calls:
                _, x, y = surrounding(account.around(site), call.x, call.y)
                frozen, observed = span(x, y), x
                for observer in self.observers[site.name]:
                    name = f"observer_{edits}"
                    gm.add_submodule(name, observer)
                    with gm.graph.inserting_before(frozen[0]):
                        observed = gm.graph.call_module(name, (observed, _mask(x)))
                    edits += 1
                for node in frozen:
                    node.replace_input_with(x, observed)
        return edits


def _mask(x: fx.Node) -> fx.Node | None:
    """Return the input of the graph that marks the padding of the tokens from which `x` is computed, or None."""
    inputs = {node.name: node for node in x.graph.find_nodes(op="placeholder")}
    decodes = any(node.name in ("decoder_input_ids", "labels") for node in ancestors([x]))
    return inputs.get("decoder_attention_mask" if decodes else "attention_mask")


def _required_arguments(function: Callable[..., Any]) -> int:
    """Return the number of positional arguments without a default; one for a built-in function that does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)
