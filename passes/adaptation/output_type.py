"""Keep the type of a site's output under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from ...capture.function_tracing.trace import run_on_fixed_sizes
from ...graph.tensors import HALF


def keep_type_under_autocast(graph: fx.Graph, base: fx.Node, operands: Sequence[Tensor]) -> None:
    """Cast the output of a traced `forward` to the type of the frozen output, if autocast makes it wider.

    A trace has the casts that the types of its capture need. Autocast narrows products and leaves sums as they are: a
    parameter that scales the output widens it again. The eager wrapper sees that when it runs, and casts.

    Args:
        graph: of the fragment.
        base: the node that stands for the call of the frozen linear.
        operands: fake tensors for the placeholders of the graph.
    """
    device = operands[0].device.type
    if not torch.amp.is_autocast_available(device):
        return
    frozen_type = base.meta["val"].dtype
    half = frozen_type if frozen_type in HALF else torch.bfloat16
    types: dict[str, torch.dtype] = {}
    # A failure has a better place to come up: the first call under autocast.
    with suppress(Exception), torch.autocast(device, half), torch.no_grad():
        run_on_fixed_sizes(_Types(fx.GraphModule({}, graph), types).run, operands)
    output = graph.output_node()
    result = output.all_input_nodes[0]
    if types.get(result.name) != types.get(base.name):
        with graph.inserting_before(output):
            cast = graph.create_node("call_function", torch.ops.aten.type_as.default, (result, base), name="type_as")
        cast.meta = dict(result.meta)
        output.replace_input_with(result, cast)


class _Types(fx.Interpreter):
    """Runs a graph and notes in `types` those of its values, by the names of the nodes."""

    def __init__(self, gm: fx.GraphModule, types: dict[str, torch.dtype]) -> None:
        super().__init__(gm)
        self.types = types

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.types[node.name] = value.dtype
        return value
