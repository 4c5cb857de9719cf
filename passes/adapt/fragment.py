"""Trace an adapted site: the variant's own `forward` becomes a small graph, which `InsertAdapter` splices in.

`forward` runs once on stand-ins without data, as `torch.export` would run it. A `Fragment` is the graph of that run.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, fx

from ...adapters.adapted_site import FrozenSite
from ...adapters.placement import Placement
from ...adapters.registry import to_config
from ...adapters.variant import adapter_namespace
from ...capture.tracing import fake_input, fake_like, trace
from ...errors import ConfigError
from ...sites.site import Call, Site, stored_bias, stored_weight
from ..normalize.follow_mode import follow_mode
from .output_type import keep_type_under_autocast
from .plain_products import normalize_products

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """The operands of an adapted site: stand-ins while it is traced, and the placeholders of its fragment.

    Args:
        x: the input that the model passes.
        weight: the frozen weight as the model stores it.
        bias: the frozen bias as the model stores it, or None.
        tensors: the adapter's tensors, by the variant's own names.
        routing: the other inputs of the product, see `Call.routing`.
        factor: the frozen weight once more, in the layout of the operator. Only `base(x)` reads it, so that the call
            of the frozen linear can be told from other uses of the weight.
    """

    x: T
    weight: T
    bias: T | None
    tensors: Mapping[str, T]
    routing: tuple[T, ...]
    factor: T

    def in_order(self) -> list[T]:
        """Return all operands that there are, as one list."""
        bias = [] if self.bias is None else [self.bias]
        return [self.x, self.weight, *bias, *self.tensors.values(), *self.routing, self.factor]

    def not_data(self) -> set[T]:
        """Return the frozen tensors and those of the adapter."""
        return {self.weight, *({self.bias} if self.bias is not None else ()), *self.tensors.values()}

    def filled_with(self, values: Iterable[S]) -> Operands[S]:
        """Return the same operands with other values, which come in the order of `in_order`."""
        rest = iter(values)
        return Operands(
            x=next(rest),
            weight=next(rest),
            bias=None if self.bias is None else next(rest),
            tensors={name: next(rest) for name in self.tensors},
            routing=tuple(next(rest) for _ in self.routing),
            factor=next(rest),
        )


@dataclass(frozen=True)
class Fragment:
    """A variant's `forward` at a site, traced.

    Args:
        graph: computes the output of the adapted site from its operands.
        inputs: the placeholders of the graph.
        base: the node that stands for the call of the frozen linear.
        base_input: the node that the frozen linear is called on.
        result: the node that `forward` returns.
        reads_site: whether `forward` looked at its site. If so, it may compute something else at another site.
    """

    graph: fx.Graph
    inputs: Operands[fx.Node]
    base: fx.Node
    base_input: fx.Node
    result: fx.Node
    reads_site: bool


class Fragments:
    """The fragments of one adapter. Calls that `forward` cannot tell apart share one."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, Fragment] = {}

    def at(self, gm: fx.GraphModule, site: Site, placement: Placement, call: Call) -> Fragment:
        """Return the fragment for `call` of `site`, and trace it if no earlier one fits.

        Raises:
            ConfigError: as `trace_fragment`.
        """
        x = fake_input(call.x, *site.kind.example(stored_weight(gm, site)))
        config = json.dumps(to_config(placement.local))
        key = (str(x.shape), x.dtype, site.kind, site.d_out, site.bias is None, site.bias_rows, config)
        key_of_site = (*key, placement.local.trace_key(site))
        fragment = self._traced.get(key) or self._traced.get(key_of_site)
        if fragment is None:
            fragment = trace_fragment(gm, site, placement, x, call.routing)
            self._traced[key_of_site if fragment.reads_site else key] = fragment
        return fragment


def trace_fragment(
    gm: fx.GraphModule, site: Site, placement: Placement, x: Tensor, routing: tuple[fx.Node, ...] = ()
) -> Fragment:
    """Trace the variant's `forward` at `site`, in training and, if it looks at the mode, in evaluation.

    Args:
        gm: has the tensors of the site and of the adapter.
        site: the site.
        placement: the adapter there.
        x: a stand-in for the input of the site.
        routing: the nodes of the other inputs of the product.

    Raises:
        ConfigError: `forward` does not call `base` exactly once, or does with `x` what this kind of site cannot.
    """
    weight, bias = stored_weight(gm, site), stored_bias(gm, site)
    dtype = x.dtype if x.dtype.is_floating_point else weight.dtype
    adapter = vars(placement.namespace(gm))
    stand_ins = Operands(
        x=x,
        weight=fake_like(weight, x),
        bias=fake_like(bias, x) if bias is not None else None,
        tensors={name: fake_like(tensor, x) for name, tensor in adapter.items()},
        routing=tuple(fake_input(node) for node in routing),
        factor=fake_like(site.kind.factor(weight).to(dtype), x),
    )
    looked_at: set[str] = set()

    def adapted(operands: Operands[Tensor], training: bool) -> Tensor:
        frozen = FrozenSite(site, operands.weight, operands.bias, training, looked_at)
        return frozen.adapted(
            lambda value: site.kind.multiply(value, operands.factor, *operands.routing),
            [(placement.local, adapter_namespace(operands.tensors))],
            operands.x,
            *operands.routing,
        )

    def trace_in(training: bool) -> fx.Graph:
        return trace(lambda *values: adapted(stand_ins.filled_with(values), training), stand_ins.in_order())

    graph = trace_in(training=True)
    if "training" in looked_at:
        follow_mode(graph, trace_in(training=False))
    graph.eliminate_dead_code()  # views of the weight that were not needed
    inputs = stand_ins.filled_with(graph.find_nodes(op="placeholder"))
    calls = list(inputs.factor.users)
    if len(calls) != 1:
        raise ConfigError(
            f"{type(placement.variant).__name__}.forward must call base(...) exactly once;"
            f" it called it {len(calls)} times."
        )
    normalize_products(graph, inputs.x, calls[0], inputs.not_data())
    graph.eliminate_dead_code()
    keep_type_under_autocast(graph, calls[0], stand_ins.in_order())
    (base_input,) = [n for n in calls[0].all_input_nodes if n not in (inputs.factor, *inputs.routing)]
    (result,) = graph.output_node().all_input_nodes
    return Fragment(graph, inputs, calls[0], base_input, result, "site" in looked_at)
