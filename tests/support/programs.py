"""Adapted models of small blocks, and the programs that the passes derive from them."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite_fx as llfx
from lora_lite_fx.graph.copies import copy_graph
from lora_lite_fx.graph.insertion import is_inserted
from lora_lite_fx.passes import OPTIMIZATIONS, GraphPass, PassReport, Pipeline
from tests.support.conformance import calibration, randomise, small
from tests.support.models import Attention, Case, Conv1DMLP, GatedMLP, Normed, SharedLinear, ids

PLAIN = Pipeline(())


SINGLY = OPTIMIZATIONS.without("gather_products", "recompute_inputs")


PAIR = (Attention, GatedMLP)


MIXED = (Attention, GatedMLP, Conv1DMLP, SharedLinear, Normed)


def derived(gm: fx.GraphModule, passes: Pipeline = SINGLY) -> fx.GraphModule:
    """Return a copy of `gm` whose graph the passes have changed, so that products can be counted."""
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    passes.run(result)
    return result


def after(gm: fx.GraphModule, graph_pass: GraphPass) -> tuple[fx.GraphModule, PassReport]:
    """Return a copy of `gm` that one pass has changed, and the report of the pass."""
    result = derived(gm, PLAIN)
    (report,) = Pipeline((graph_pass,)).run(result)
    return result, report


def count(gm: fx.GraphModule, target: Any) -> int:
    """Count the calls of `target` in the graph."""
    return len(gm.graph.find_nodes(op="call_function", target=target))


def reasons(report: PassReport) -> list[str]:
    """Return the declined candidates as text."""
    return [str(declined) for declined in report.declined]


def edits(gm: fx.GraphModule, passes: Pipeline = OPTIMIZATIONS) -> dict[str, int]:
    """Run the passes on `gm` and return the number of edits that each one made."""
    return {report.name: report.edits for report in passes.run(gm)}


def in_calls(gm: fx.GraphModule) -> Counter[Any]:
    """Count the operators of the adapters that run in each call: those after the graph's inputs."""
    nodes = list(gm.graph.nodes)
    first = next(index for index, node in enumerate(nodes) if node.op == "placeholder")
    return Counter(node.target for node in nodes[first:] if is_inserted(node) and node.op == "call_function")


@functools.cache
def base(
    exported: bool = True, dtype: torch.dtype = torch.float64, blocks: tuple[type[nn.Module], ...] = MIXED
) -> tuple[Case, nn.Module, fx.GraphModule]:
    """Return a model of `blocks`, its description, and its captured graph, which rewriting does not change."""
    case = Case(blocks, bias=True, tied=False, dtype=dtype, exported=exported, seed=3)
    model = case.build()
    return case, model, llfx.capture(model, case.example_inputs)


def adapted(cfg: Any, *, seed: int = 1, **options: Any) -> fx.GraphModule:
    """Return the graph of `base(**options)` with random adapters of `cfg`."""
    case, _, graph = base(**options)
    gm = llfx.rewrite(graph, cfg, calibration=calibration(cfg, case.example_inputs, (ids(2, 4),)))
    randomise(gm, seed)
    return gm


class Count(TorchDispatchMode):
    """Count the operators that run."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(function: Callable[[], Any]) -> Counter[str]:
    """Count the operators that run in `function`."""
    count = Count()
    with count:
        function()
    return count.calls


@functools.cache
def adapted_pair(variant: str) -> fx.GraphModule:
    """Return the adapted graph of `PAIR` with the variant of that name. Copy it before changing it."""
    cfg = small(llfx.registry()[variant], size=2, alpha=2.0, exclude_names=("head",), target_names=(".",))
    return adapted(cfg, blocks=PAIR)


def pair(cls: type[llfx.Variant]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return an optimized graph and the plain one, over the same tensors, in evaluation mode."""
    gm = copy.deepcopy(adapted_pair(cls.__name__))
    return gm, llfx.optimize(gm, PLAIN)


X = (ids(2, 5),)
