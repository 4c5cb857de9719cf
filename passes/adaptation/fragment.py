"""Trace an adapted site: the variant's own `forward` becomes a small graph, which `InsertAdapter` splices in.

`forward` runs once on stand-ins without data, as `torch.export` would run it. A `Fragment` is the graph of that run.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx, nn

from ...adapters.contract import operands_of
from ...adapters.dependencies import Dependencies, Remembered
from ...adapters.forward_run import Operands, run_forward
from ...adapters.naming import naming
from ...adapters.placement import Placement
from ...adapters.registry import to_config
from ...capture.function_tracing.trace import fake_input, fake_like, fake_of, run_on_fixed_sizes, trace
from ...errors import ConfigError
from ...graph.tensors import HALF
from ...sites.matching import Call
from ...sites.site import Site, stored_bias, stored_weight
from ..normalize.follow_mode import ModesDiffer, follow_mode
from .plain_products import normalize_products


@dataclass(frozen=True)
class Fragment:
    """A variant's `forward` at a site, traced.

    Args:
        graph: computes the output of the adapted site from its operands.
        inputs: the placeholders of the graph.
        base: the node that stands for the call of the frozen linear.
        base_input: the node that the frozen linear is called on.
        result: the node that `forward` returns.
        replaced: the nodes that replace the frozen weight and bias in the call, by these names.
        dependencies: what `forward` read apart from its operands. With other values it may compute something else.
    """

    graph: fx.Graph
    inputs: Operands[fx.Node]
    base: fx.Node
    base_input: fx.Node
    result: fx.Node
    replaced: Mapping[str, fx.Node]
    dependencies: Dependencies


def fragment_at(
    gm: fx.GraphModule, site: Site, placement: Placement, call: Call, known: Remembered[Fragment]
) -> Fragment:
    """Return the fragment for `call` of `site`: one of those that are known, or a new one.

    Raises:
        ConfigError: as `trace_fragment`.
    """
    example, fixed = site.kind.example(stored_weight(gm, site))
    has_shape = isinstance(call.x.meta.get("val"), Tensor)
    # Without a shape it is the input of fewest dimensions, because each dimension of any size costs time.
    x = fake_input(call.x, example, fixed) if has_shape else fake_of(example, fixed, min((0, *site.kind.other_ranks)))

    def run() -> tuple[Dependencies, Fragment]:
        if not has_shape:
            _require_same_for_other_ranks(gm, site, placement)
        fragment = trace_fragment(gm, site, placement, x, call.routing)
        return fragment.dependencies, fragment

    return known.at((has_shape, layout_of(x), *layouts_at(gm, site, placement)), site, run)


def layouts_at(gm: fx.GraphModule, site: Site, placement: Placement) -> tuple[Hashable, ...]:
    """Return what a trace of an adapter depends on, besides its input and what `forward` reads of the site."""
    weight, bias = stored_weight(gm, site), stored_bias(gm, site)
    tensors = vars(placement.namespace(gm))
    operands = [weight, *([] if bias is None else [bias]), *tensors.values()]
    config = json.dumps(to_config(placement.local))
    return (*map(layout_of, operands), tuple(tensors), site.kind, bias is None, site.bias_rows, config)


def layout_of(tensor: Tensor) -> Hashable:
    """Return what a trace depends on of an operand: all but its values."""
    # As text, because comparing symbols would add guards.
    return str(tuple(tensor.shape)), str(tensor.stride()), tensor.dtype, tensor.device, type(tensor)


_same_for_other_ranks: Remembered[None] = Remembered()


def _require_same_for_other_ranks(gm: fx.GraphModule, site: Site, placement: Placement) -> None:
    """Check that `forward` runs the same operations for inputs of other numbers of dimensions than the usual one.

    A graph without shapes, from symbolic tracing, does not know that number. The traces that are compared have fixed
    sizes, which takes a third of the time. A check that passed is remembered, as rehearsals are.

    Raises:
        ConfigError: it does not.
    """
    if site.kind.other_ranks:
        operands = operands_of(placement.local, site, gm)
        _same_for_other_ranks.at(operands, site, partial(_compare_other_ranks, gm, site, placement))


def _compare_other_ranks(gm: fx.GraphModule, site: Site, placement: Placement) -> tuple[Dependencies, None]:
    example, _ = site.kind.example(stored_weight(gm, site))

    def traced(more: int) -> tuple[list[str | None], Dependencies]:
        trace_of = _trace(gm, site, placement, fake_of(example, None, more))
        return [node.format_node() for node in trace_of.graph.nodes], trace_of.dependencies

    usual, dependencies = traced(0)
    for more in site.kind.other_ranks:
        try:
            same = traced(more)[0] == usual
        except Exception:  # whatever forward raises where it takes the input apart
            same = False
        if not same:
            raise ConfigError(
                f"{type(placement.variant).__name__}.forward at {site.name!r} depends on how many dimensions its input"
                " has, and a graph that was captured without example inputs does not know. The way out: pass"
                " example_inputs; or count dimensions from the last, as x.shape[-1], x.unflatten(-1, (heads, -1)) and"
                " y.flatten(-2)."
            )
    return dependencies, None


@dataclass(frozen=True)
class _Trace:
    """A trace of `forward` as it is written, the stand-ins that it ran on, and what it read apart from them.

    The graph returns the output, and the tensors that replace the frozen ones of the names `replaced`.
    """

    graph: fx.Graph
    stand_ins: Operands[Tensor]
    replaced: tuple[str, ...]
    dependencies: Dependencies


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
        ConfigError: `forward` does with `x` what this kind of site cannot, or breaks a rule of `run_forward`.
    """
    traced = _trace(gm, site, placement, x, routing)
    graph, stand_ins = traced.graph, traced.stand_ins
    inputs = stand_ins.filled_with(graph.find_nodes(op="placeholder"))
    (base,) = inputs.factor.users
    normalize_products(graph, inputs.x, base, {*inputs.frozen(), *inputs.tensors.values()})
    graph.eliminate_dead_code()
    _keep_type_under_autocast(graph, base, stand_ins.in_order())
    (base_input,) = [n for n in base.all_input_nodes if n not in (inputs.factor, *inputs.routing)]
    result, *tensors = cast(list[fx.Node], graph.output_node().args[0])
    replaced = dict(zip(traced.replaced, tensors, strict=True))
    return Fragment(graph, inputs, base, base_input, result, replaced, traced.dependencies)


def _trace(
    gm: fx.GraphModule, site: Site, placement: Placement, x: Tensor, routing: tuple[fx.Node, ...] = ()
) -> _Trace:
    """Trace `forward` for `trace_fragment`, whose arguments these are.

    Raises:
        ConfigError: `forward` runs other operations in training than in evaluation.
    """
    weight, bias = stored_weight(gm, site), stored_bias(gm, site)
    dtype = x.dtype if x.dtype.is_floating_point else weight.dtype
    stand_ins = Operands(
        x=x,
        weight=fake_like(weight, x),
        bias=fake_like(bias, x) if bias is not None else None,
        tensors={name: fake_like(tensor, x) for name, tensor in vars(placement.namespace(gm)).items()},
        routing=tuple(fake_input(node) for node in routing),
        factor=fake_like(site.kind.factor(weight).to(dtype), x),
    )
    dependencies = Dependencies()
    names: dict[str, None] = {}  # of the tensors that are replaced

    def trace_in(training: bool) -> fx.Graph:
        def run(*values: Tensor) -> list[Tensor]:
            operands = stand_ins.filled_with(values)
            y, replaced = run_forward(placement.local, site, operands, training, dependencies)
            names.update(dict.fromkeys(replaced))
            return [y, *replaced.values()]

        with naming(placement.local, "forward", site, {"x": x, **stand_ins.tensors}):
            return trace(run, stand_ins.in_order())

    graph = trace_in(training=True)
    if dependencies.training:
        try:
            follow_mode(graph, trace_in(training=False))
        except ModesDiffer as error:
            raise ConfigError(
                f"{type(placement.variant).__name__}.forward at {site.name!r} runs other operations in training than in"
                f" evaluation, from {error.node.target} on, and one graph cannot follow both. The way out: run the same"
                " in both modes, with base.training as a factor, x + base.training * noise in place of"
                " `if base.training: x = x + noise`; or F.dropout(x, rate, base.training)."
            ) from error
    graph.eliminate_dead_code()  # views of the weight that were not needed
    return _Trace(graph, stand_ins, tuple(names), dependencies)


def _keep_type_under_autocast(graph: fx.Graph, base: fx.Node, operands: Sequence[Tensor]) -> None:
    """Cast the output of a traced `forward` to the type of the frozen output, if autocast makes it wider.

    A trace has the casts that the types of its capture need. Autocast narrows products and leaves sums as they are: a
    parameter that scales the output widens it again. The eager wrapper sees that when it runs, and casts.

    Args:
        graph: of the fragment.
        base: the node that stands for the call of the frozen linear.
        operands: fake tensors for the placeholders of the graph.
    """
    device, frozen_type = operands[0].device.type, base.meta["val"].dtype
    if not torch.amp.is_autocast_available(device):
        return
    # A module without parameters has the one attribute that the graph may read, its mode.
    interpreter = fx.Interpreter(nn.Module(), garbage_collect_values=False, graph=graph)
    half = frozen_type if frozen_type in HALF else torch.bfloat16
    # A failure has a better place to come up: the first call under autocast.
    with suppress(Exception), torch.autocast(device, half), torch.no_grad():
        run_on_fixed_sizes(interpreter.run, operands)
    output = graph.output_node()
    result = output.all_input_nodes[0]
    types = [getattr(interpreter.env.get(node), "dtype", None) for node in (base, result)]
    if types[0] != types[1]:
        with graph.inserting_before(output):
            narrow = graph.create_node("call_function", torch.ops.aten.type_as.default, (result, base), name="type_as")
        narrow.meta = dict(result.meta)
        output.replace_input_with(result, narrow)
