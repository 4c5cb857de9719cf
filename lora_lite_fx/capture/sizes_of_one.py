"""Find the sizes of one by which a model decides, because its graph must refuse them.

torch.export takes each dynamic size for two or more, and answers no where a model asks whether a size is one. The graph
runs on a size of one all the same, and of most models it computes the same. So each graph is tried.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import pytree
from ..graph.regions import has_branches
from .comparable import revealed, varied
from .differences import all_agree
from .graph_calls import values_of_call
from .outputs import Call, has_data, outputs_of_graph, outputs_of_model, written_parameters

Places = dict[str, list[tuple[int, int]]]
"""For each dynamic size, the numbers of the inputs that have it, each with its dimension."""


def sizes_of_one_that_decide(gm: fx.GraphModule, model: nn.Module, call: Call) -> list[tuple[int, int]]:
    """Return the inputs and dimensions with which graph and model compute something else where the size is one.

    What one of the two refuses to run is no matter here.

    Args:
        gm: a graph as torch.export made it.
        model: that it was made of, in the mode of then; it is not changed.
        call: that it was made on.
    """
    if has_branches(gm) or not has_data(model, call):
        return []
    places = _dynamic_sizes(gm, _values(gm, model, call))
    calls = [each for each in (call, varied(call)) if each is not None]

    def is_right(chosen: Places) -> bool:
        return all(_is_right(gm, model, each, chosen) for each in calls)

    if not places or is_right(places):
        return []
    decide = [name for name in places if not is_right({name: places[name]})]
    return [place for name in decide or places for place in places[name]]


def _values(gm: fx.GraphModule, model: nn.Module, call: Call) -> Sequence[Any]:
    arguments = values_of_call(gm.graph, inspect.signature(model.forward), *call)
    values: Sequence[Any] = gm.graph.process_inputs(*arguments)
    return values


def _dynamic_sizes(gm: fx.GraphModule, values: Sequence[Any]) -> Places:
    """Return the dynamic sizes that no other size is computed of, where they are more than one."""
    places: Places = defaultdict(list)
    computed: set[str] = set()
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder", sort=True)):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
            names: list[str] = re.findall(r"[a-z]+\d+", str(size)) if isinstance(size, torch.SymInt) else []
            if names != [str(size)]:
                computed.update(names)
            elif values[number].shape[dim] > 1:
                places[names[0]].append((number, dim))
    return {name: where for name, where in places.items() if name not in computed}


def _is_right(gm: fx.GraphModule, model: nn.Module, call: Call, places: Places) -> bool:
    """Check whether graph and model compute the same where these sizes are one; also if one of the two does not run."""
    values, shrunk = _values(gm, model, call), dict[int, Tensor]()
    for number, dim in (place for where in places.values() for place in where):
        key = id(values[number])
        shrunk[key] = shrunk.get(key, values[number]).narrow(dim, 0, 1).contiguous()
    shown: Call = pytree.tree_map(lambda leaf: shrunk.get(id(leaf), leaf), call)
    writes = written_parameters(gm, model)
    with warnings.catch_warnings(), revealed(model, gm):
        warnings.simplefilter("ignore")  # of what the user did not call
        for in_any_order in (False, True):  # the latter takes longer, and only a difference needs it
            try:
                expected = outputs_of_model(model, shown, model.training, writes, in_any_order=in_any_order)
                actual = outputs_of_graph(gm, model, shown, model.training, False, in_any_order)
            except Exception:
                return True
            if all_agree(expected.results, actual.results):
                return True
    return False
