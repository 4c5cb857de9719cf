"""Small graphs in which a test itself says which nodes belong to an adapter, to meet one condition of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_lite_fx.graph.insertion import Insertion, record
from lora_lite_fx.passes import GraphPass, PassReport
from tests.support.programs import after

IN, OUT, RANK = 6, 5, 2


class Site(nn.Module):
    """A frozen linear, and tensors for an adapter of it; a test says what is computed of them.

    Args:
        compute: what `forward` does, from the module and its inputs.
        dtype: of all tensors.
    """

    def __init__(self, compute: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.weight = nn.Parameter(torch.randn(OUT, IN, dtype=dtype), requires_grad=False)
        self.a = nn.Parameter(torch.randn(RANK, IN, dtype=dtype))
        self.b = nn.Parameter(torch.randn(OUT, RANK, dtype=dtype))
        self.a2 = nn.Parameter(torch.randn(RANK, IN, dtype=dtype))
        self.b2 = nn.Parameter(torch.randn(OUT, RANK, dtype=dtype))
        self.back = nn.Parameter(torch.randn(IN, RANK, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(OUT, dtype=dtype))
        self.row = nn.Parameter(torch.rand(OUT, dtype=dtype) + 0.5)

    def forward(self, *inputs: Any) -> Any:
        return self.compute(self, *inputs)


def exported(
    compute: Callable[..., Any], *inputs: Any, base: str = "", dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """Return the graph of a `Site` that computes `compute`, in which all nodes but the base's are an adapter's.

    Args:
        compute: see `Site`.
        inputs: of the graph.
        base: names of the nodes that are not the adapter's, apart from the frozen weight and the inputs.
        dtype: see `Site`.
    """
    gm: Any = torch.export.export(Site(compute, dtype), inputs).module()
    not_adapters = {"weight", *base.split()}
    for call, node in enumerate(gm.graph.nodes):
        if node.op in ("get_attr", "call_function") and node.name not in not_adapters:
            record(node, Insertion("site", 0, 0, call, ()))
    result: fx.GraphModule = gm
    return result


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random input of the site, of this shape and then its width."""
    return torch.randn(*(shape or (3,)), IN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def check(
    gm: fx.GraphModule, graph_pass: GraphPass, *inputs: Any, edits: int | None = None, backward: bool = True
) -> PassReport:
    """Check that the graph computes the same after the pass, gradients included, and return the pass's report.

    Args:
        gm: the graph.
        graph_pass: the pass.
        inputs: of the graph. They are copied, because the graph may write to them.
        edits: the number of edits that the pass must make, if that is to be checked.
        backward: whether the graph can be differentiated.
    """
    changed, report = after(gm, graph_pass)
    results = [_outputs_and_gradients(each, inputs, backward) for each in (gm, changed)]
    torch.testing.assert_close(*reversed(results), equal_nan=True)
    if edits is not None:
        assert report.edits == edits, report
    return report


def _outputs_and_gradients(
    gm: fx.GraphModule, inputs: tuple[Any, ...], backward: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    gm.zero_grad()
    torch.manual_seed(0)
    with torch.set_grad_enabled(backward):
        outputs = gm(*(value.clone() for value in inputs))
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = sum((tensor.float().sin().sum() for tensor in tensors), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    gradients = {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}
    return [tensor.detach() for tensor in tensors], gradients
