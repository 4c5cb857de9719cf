"""Observe the inputs of sites while the graph runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ...adapters.maths import wide
from ...adapters.variant import Statistic
from ...graph.provenance import Insertion, insertions, outermost
from ...graph.walk import ancestors
from ...sites.finding import find_sites
from ...sites.site import span
from ..pipeline import GraphPass


class Observer(nn.Module):
    """Lets a site's input through, and adds what `observe` says of it to a running sum: no activation is kept.

    Args:
        observe: takes inputs `(tokens, d_in)` in float32 or wider, returns a tensor.
    """

    def __init__(self, observe: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.observe = observe
        self.total: Tensor | None = None
        self.tokens = 0

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Observe `x (..., d_in)`: the tokens that the 0/1 `mask (batch, length)` marks, if it has their number."""
        inputs = wide(x.detach()).reshape(-1, x.shape[-1])
        if mask is not None and mask.numel() == len(inputs):
            inputs = inputs[mask.reshape(-1).bool()]
        seen = self.observe(inputs)
        self.total = seen if self.total is None else self.total + seen
        self.tokens += len(inputs)
        return x

    @property
    def statistic(self) -> Statistic | None:
        """What has been seen; None before the first input."""
        return None if self.total is None else Statistic(self.total, self.tokens)


@dataclass(frozen=True)
class ObserveInputs(GraphPass):
    """Route the input of each site through observers, around the adapters that are there.

    For a graph that is run on calibration data and thrown away. Safe because observers return what they are given.

    Args:
        observers: by qualified name of the site.
    """

    observers: Mapping[str, Sequence[Observer]]

    def run(self, gm: fx.GraphModule) -> int:
        around: dict[str, list[Insertion]] = defaultdict(list)
        for insertion in insertions(gm.graph):
            around[insertion.site].append(insertion)
        edits = 0
        for site in find_sites(gm):
            for call in site.calls:
                x, y = outermost(around[site.name], call.x, call.y)
                inside, seen = span(x, y), x
                for observer in self.observers.get(site.name, ()):
                    name = f"observer_{edits}"
                    gm.add_submodule(name, observer)
                    with gm.graph.inserting_before(inside[0]):
                        seen = gm.graph.call_module(name, (seen, _mask(x)))
                    edits += 1
                for node in inside:
                    node.replace_input_with(x, seen)
        return edits


def _mask(x: fx.Node) -> fx.Node | None:
    """The input of the graph that marks the padding of the tokens that `x` is computed from, or None."""
    inputs = {node.name: node for node in x.graph.find_nodes(op="placeholder")}
    decodes = any(node.name in ("decoder_input_ids", "labels") for node in ancestors([x]))
    return inputs.get("decoder_attention_mask" if decodes else "attention_mask")
