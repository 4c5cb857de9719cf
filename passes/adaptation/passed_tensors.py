"""The weight and the bias that adapters at a call make for one around them, see `adapters/beneath.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor, fx

from ...adapters.beneath import is_beneath, require_tensors
from ...adapters.dependencies import Dependencies, Remembered
from ...adapters.frozen_site import FrozenSite
from ...adapters.naming import naming
from ...adapters.param_spec import AdapterTensors
from ...adapters.placement import Placement
from ...capture.function_tracing.trace import fake_like, fake_of, trace
from ...graph.insertion import PASSED, Insertion
from ...sites.site import Site, stored_bias, stored_weight
from .fragment import layouts_at


@dataclass(frozen=True)
class PassedTensors:
    """The nodes of a trace: the weight and the bias that an adapter makes of those below it, for those around it.

    Args:
        frozen: the placeholders of the weight and, if there is one, the bias, as the model stores them.
        tensors: the placeholders of the adapter's tensors, by the variant's own names.
        results: the nodes of the new weight and, if there is one, the new bias, as the model stores them.
    """

    frozen: tuple[fx.Node, ...]
    tensors: Mapping[str, fx.Node]
    results: tuple[fx.Node, ...]


def trace_passed(gm: fx.GraphModule, site: Site, placement: Placement) -> tuple[Dependencies, PassedTensors]:
    """Trace what the adapter `placement` makes of the weight and the bias of `site`; say what its `forward` read."""
    weight, bias = stored_weight(gm, site), stored_bias(gm, site)
    stand_in = fake_of(weight, None)
    adapter = vars(placement.namespace(gm))
    frozen = [stand_in, *([] if bias is None else [fake_like(bias, stand_in)])]
    operands = [*frozen, *(fake_like(tensor, stand_in) for tensor in adapter.values())]

    dependencies = Dependencies()

    def passed(*values: Tensor) -> list[Tensor]:
        below = FrozenSite(site, values[0], None if bias is None else values[1], dependencies=dependencies)
        p = AdapterTensors(dict(zip(adapter, values[len(frozen) :], strict=True)))
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
    return dependencies, PassedTensors(tuple(inputs[: len(frozen)]), tensors, tuple(results))


@dataclass(frozen=True)
class Below:
    """An adapter below the one that is inserted, and what it makes of the weight and the bias.

    Args:
        placement: the adapter.
        insertion: the record for its nodes.
        passed: the weight and the bias that it makes, traced.
    """

    placement: Placement
    insertion: Insertion
    passed: PassedTensors


def beneath(
    gm: fx.GraphModule, site: Site, here: Iterable[Insertion], placement: Placement, known: Remembered[PassedTensors]
) -> list[Below]:
    """Return the adapters `here`, at one call, that count as a part of the linear for `placement` around them.

    Args:
        gm: the graph.
        site: the site.
        here: the adapters, the innermost first.
        placement: the adapter that is inserted.
        known: what was traced of others.

    Raises:
        ConfigError: one of them has no weight and bias that could be read.
    """
    below = []
    for insertion in here:
        if is_beneath(insertion.adapter_name, bool(insertion.tensors_replaced), placement.adapter_name):
            inner = Placement.recorded(insertion)
            require_tensors(inner.local, site, type(placement.variant).__name__)
            passed = known.at(layouts_at(gm, site, inner), site, partial(trace_passed, gm, site, inner))
            below.append(Below(inner, replace(insertion, part=PASSED), passed))
    return below
