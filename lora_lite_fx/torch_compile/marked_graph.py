"""Graphs of models that carry their adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from ..adapters.placement import placements
from ..errors import AdapterError
from ..graph.provenance import Provenance, recorded
from ..graph.tensors import tensor_of
from ..sites.finding import find_sites
from .carrier import (
    MARK,
    MarkedSite,
    no_linear,
    said_by,
)
from .dynamo_call import running_call
from .dynamo_graph import (
    Compiled,
    Compiler,
    set_flag,
    to_aten,
    to_inputs,
)
from .insertion import insert_marked, mode_flags

# Models that carry their adapters: everything is said by the marks in the graph.


def has_marks(gm: fx.GraphModule) -> bool:
    """Whether a module of `gm` carries adapters."""
    return bool(gm.graph.find_nodes(op="call_function", target=MARK))


def compile_carried(gm: fx.GraphModule, inputs: list[Any], inner: Compiler) -> Compiled:
    """A graph compiled with the adapters that its marks ask for."""
    if not has_marks(gm):
        call = running_call()
        if call is not None and call.model is not None and not placements(call.model):
            raise AdapterError(
                f"{type(call.model).__name__} carries no adapters, so there are none to insert. The way out:"
                " compile an adapted model, or pass backend=lora_lite_fx.backend(cfg)."
            )
        return inner(gm, inputs)
    aten = to_aten(gm, inputs, {})
    carried = _take_marks_out(aten, inputs)
    insert_marked(aten, carried)
    training = {one.site: one.training for one in carried}
    for node in mode_flags(aten):
        set_flag(aten, node, training[cast(Provenance, recorded(node)).site])
    constants, stand_ins = to_inputs(aten, inputs)
    compiled = inner(aten, [*inputs, *stand_ins])
    return lambda *inputs: compiled(*inputs, *constants)


def _take_marks_out(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[MarkedSite]:
    """Remove the marks of `gm`, name the sites behind them as they say, and return what they say."""
    real = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    marked = [(site, call, mark) for site in find_sites(gm) for call in site.calls if (mark := _mark_behind(call.x))]
    found: dict[tuple[str, str], MarkedSite] = {}
    for site, call, mark in marked:
        nodes, training, said = cast(tuple[list[fx.Node], bool, str], mark.args[1:])
        key = (json.loads(said)["site"], site.weight)
        if key not in found:
            tensors = [real[node] if node in real else tensor_of(gm, str(node.target)) for node in nodes]
            # Several models with a site of that name may run in one graph.
            taken = sum(name == key[0] for name, _ in found)
            found[key] = said_by(said, tensors, training, f"{key[0]}_{taken + 1}" if taken else key[0])
        call.node.meta["nn_module_stack"] = {"": (found[key].site, nn.Module)}
    for mark in gm.graph.find_nodes(op="call_function", target=MARK):
        if all(mark is not other for _, _, other in marked):
            raise no_linear(json.loads(mark.args[3])["site"])
        mark.replace_all_uses_with(mark.args[0])
        gm.graph.erase_node(mark)
    return list(found.values())


def _mark_behind(node: fx.Node) -> fx.Node | None:
    """The mark that `node` is, or a cast or view of."""
    while node.target is not MARK:
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return node
