"""The weight and the bias that adapters at a call make for one around them, see `adapters/beneath.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, fx

from ...adapters.beneath import is_beneath, require_tensors
from ...adapters.dependencies import Dependencies
from ...adapters.frozen_site import FrozenSite
from ...adapters.naming import naming
from ...adapters.placement import Placement
from ...adapters.registry import to_config
from ...adapters.variant import adapter_namespace
from ...capture.function_tracing.trace import fake_like, fake_of, trace
from ...graph.provenance import PASSED, Insertion, Provenance, recorded
from ...sites.site import Site, stored_bias, stored_weight
from .fragment import layout_of


@dataclass(frozen=True)
class PassedTensors:
    """The weight and the bias that an adapter makes of those below it, for the adapters around it, traced.

    Args:
        graph: computes them from those below it and its tensors.
        frozen: the placeholders of the weight and, if there is one, the bias, as the model stores them.
        tensors: the placeholders of the adapter's tensors, by the variant's own names.
        results: the nodes of the new weight and, if there is one, the new bias, as the model stores them.
        dependencies: what the adapter's `forward` read apart from tensors.
    """

    graph: fx.Graph
    frozen: tuple[fx.Node, ...]
    tensors: Mapping[str, fx.Node]
    results: tuple[fx.Node, ...]
    dependencies: Dependencies


def trace_passed(gm: fx.GraphModule, site: Site, placement: Placement) -> PassedTensors:
    """Trace what the adapter `placement` makes of the weight and the bias of `site`."""
    weight, bias = stored_weight(gm, site), stored_bias(gm, site)
    stand_in = fake_of(weight, None)
    adapter = vars(placement.namespace(gm))
    frozen = [stand_in, *([] if bias is None else [fake_like(bias, stand_in)])]
    operands = [*frozen, *(fake_like(tensor, stand_in) for tensor in adapter.values())]

    dependencies = Dependencies()

    def passed(*values: Tensor) -> list[Tensor]:
        below = FrozenSite(site, values[0], None if bias is None else values[1], dependencies=dependencies)
        p = adapter_namespace(dict(zip(adapter, values[len(frozen) :], strict=True)))
        made = below.with_adapter(placement.local, p)
        return [made.weight, *([] if made.bias is None else [made.bias])]

    with naming(placement.local, "forward", site, dict(adapter)):
        graph = trace(passed, operands)
    line = next((node.stack_trace for node in graph.nodes if node.stack_trace), None)
    for node in graph.nodes:  # what forward is called on and what is made of its result is for its sake
        node.stack_trace = node.stack_trace or line
    inputs = list(graph.find_nodes(op="placeholder"))
    results = cast(list[fx.Node], graph.output_node().args[0])
    tensors = dict(zip(adapter, inputs[len(frozen) :], strict=True))
    return PassedTensors(graph, tuple(inputs[: len(frozen)]), tensors, tuple(results), dependencies)


@dataclass(frozen=True)
class Below:
    """An adapter below the one that is inserted, and what it makes of the weight and the bias.

    Args:
        placement: the adapter.
        provenance: the record of its nodes.
        passed: the weight and the bias that it makes, traced.
    """

    placement: Placement
    provenance: Provenance
    passed: PassedTensors


class Traced:
    """What was traced of the adapters below one that is inserted. Sites that cannot be told apart share a trace."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, list[PassedTensors]] = defaultdict(list)

    def at(self, gm: fx.GraphModule, site: Site, placement: Placement) -> PassedTensors:
        """Return the trace of `placement` at `site`, an earlier one if that fits."""
        weight, bias = stored_weight(gm, site), stored_bias(gm, site)
        tensors = vars(placement.namespace(gm))
        operands = [weight, *([] if bias is None else [bias]), *tensors.values()]
        config = json.dumps(to_config(placement.local))
        key = (*map(layout_of, operands), tuple(tensors), site.kind, bias is None, site.bias_rows, config)
        earlier = self._traced[key]
        found = next((each for each in earlier if each.dependencies.hold_at(site)), None)
        if found is None:
            found = trace_passed(gm, site, placement)
            earlier.append(found)
        return found


def beneath(
    gm: fx.GraphModule, site: Site, here: Iterable[Insertion], placement: Placement, traced: Traced
) -> list[Below]:
    """Return the adapters `here`, at one call, that count as a part of the linear for `placement` around them.

    Args:
        gm: the graph.
        site: the site.
        here: the adapters, the innermost first.
        placement: the adapter that is inserted.
        traced: what was traced of others.

    Raises:
        ConfigError: one of them has no weight and bias that could be read.
    """
    below = []
    for insertion in here:
        if is_beneath(insertion.adapter_name, bool(insertion.tensors_replaced), placement.adapter_name):
            inner = Placement.recorded(insertion)
            require_tensors(inner.local, site, type(placement.variant).__name__)
            first = recorded(insertion.nodes[0])
            assert first is not None
            below.append(Below(inner, replace(first, part=PASSED), traced.at(gm, site, inner)))
    return below
