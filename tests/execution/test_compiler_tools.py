"""Tracers, compilers and passes of torch take an adapted graph: each gives what the graph gives, or says why not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.net_min_base import _MinimizerBase, _MinimizerSettingBase
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import lora_lite_fx as llfx
from lora_lite_fx.compat.torch import CODE
from tests.support.conformance import close, output, randomise, small
from tests.support.models import Attention, GatedMLP, ids, net
from tests.support.selection import broad_after, slow_after

aten = torch.ops.aten
X = (torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
OTHER = (torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)
VARIANTS = [llfx.LoRA, llfx.DoRA, llfx.HRA]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.drop(self.down(torch.tanh(self.up(x))))
        return y if mask is None else y * mask


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@functools.cache
def base() -> fx.GraphModule:
    torch.manual_seed(0)
    return llfx.capture(Layers().double().eval(), X)


def adapted(cls: Any = llfx.LoRA, **fields: Any) -> fx.GraphModule:
    gm = llfx.rewrite(base(), small(cls, target_names=(".",), **fields)).eval()
    randomise(gm, 1)
    return gm


def rows(gm: nn.Module) -> list[Any]:
    return [(row.name, row.adapters, row.parameters) for row in llfx.inspect(gm)]


# Symbolic tracing.


@pytest.mark.parametrize("cls", broad_after(1, VARIANTS))
def test_a_symbolic_trace_has_the_nodes_and_records_of_the_graph(cls: Any) -> None:
    gm = adapted(cls)
    traced = fx.symbolic_trace(gm)
    expected = output(gm, OTHER).detach()
    close(output(traced, OTHER).detach(), expected, 1e-12, "traced")
    assert rows(traced) == rows(gm)
    calls = [[node.target for node in graph.nodes if node.op == "call_function"] for graph in (traced.graph, gm.graph)]
    assert calls[0] == calls[1]
    close(output(llfx.merge(traced), OTHER).detach(), expected, 1e-10, "merged")
    close(output(llfx.remove(traced), OTHER), output(base(), OTHER), 0, "removed")
    assert llfx.adapter_state_dict(traced).keys() == llfx.adapter_state_dict(gm).keys()
    assert llfx.adapter_parameters(traced)[0] is llfx.adapter_parameters(gm)[0]
    # The mode is that of the trace, and a further adapter goes around those that are there.
    assert not torch.equal(traced.train()(*X), traced(*X))
    further = llfx.rewrite(traced, small(llfx.LoRA, target_names=("up",))).eval()
    assert {row.adapters for row in llfx.inspect(further)} == {(cls.__name__,), (cls.__name__, "LoRA")}
    close(output(gm, OTHER).detach(), expected, 0, "the graph itself, afterwards")


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.inner(x=x) + self.inner(torch.ones_like(x))
        return y


def test_a_module_around_a_graph_is_traced_with_it() -> None:
    outer = Around(adapted())
    traced = fx.symbolic_trace(outer)
    close(output(traced, OTHER).detach(), output(outer, OTHER).detach(), 1e-12, "traced")
    assert "inner.layers.0.up.lora_A" in dict(traced.named_parameters())
    with pytest.raises(llfx.AdapterError, match=r"^Around is around an adapted graph.*use the adapted graph itself"):
        llfx.merge(traced)


def test_a_function_around_a_graph_is_refused() -> None:
    gm = adapted()
    message = (
        r"A graph can be traced by torch\.fx if it is the module that is traced, or a submodule of that; this one is"
        r" neither\. The way out: symbolic_trace\(gm\), or a module that has gm as an attribute\."
    )
    with pytest.raises(llfx.AdapterError, match=f"^{message}$"):
        fx.symbolic_trace(lambda x: gm.forward(x))
    with pytest.raises(NameError, match="module is not installed as a submodule"):  # torch's own
        fx.symbolic_trace(lambda x: gm(x))


def test_arguments_may_be_left_out_in_a_symbolic_trace() -> None:
    model = Block().double().eval()
    mask = torch.rand(2, 5, 8, dtype=torch.float64)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), {"x": X[0], "mask": mask}).eval()
    randomise(gm, 1)
    traced = fx.symbolic_trace(gm)
    close(traced(X[0], mask), gm(X[0], mask), 1e-12, "with the mask")
    without: Any = fx.symbolic_trace(Around(gm))
    close(without(X[0]), 2 * gm(X[0]) + gm(torch.ones_like(X[0])), 1e-12, "without")


def test_a_tracer_with_constants_runs_the_graph_on_them() -> None:
    gm = adapted()

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gm

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.inner(X[0])
            return y

    close(output(fx.symbolic_trace(Constant()), X).detach(), output(gm, X).detach() + X[0], 1e-12, "of a constant")


# make_fx.


@pytest.mark.parametrize("pre_dispatch", broad_after(1, [False, True]))
@pytest.mark.parametrize("cls", broad_after(1, VARIANTS))
def test_make_fx_traces_the_flat_graph_and_what_it_makes_is_known(cls: Any, pre_dispatch: bool) -> None:
    gm = adapted(cls)
    traced = make_fx(gm, pre_dispatch=pre_dispatch)(*X)
    close(output(traced, X).detach(), output(gm, X).detach(), 1e-12, "traced")
    for function in (llfx.inspect, llfx.merge, llfx.adapter_state_dict, lambda gm: llfx.rewrite(gm, llfx.LoRA())):
        with pytest.raises(llfx.AdapterError, match=r"around an adapted graph.*use the adapted graph itself"):
            function(traced)


# Compiled autograd.


def first(result: Any) -> Tensor:
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


@pytest.mark.broad
@pytest.mark.parametrize(
    "block", slow_after(1, [GatedMLP, Attention])
)  # their inputs are computed again in the backward pass
def test_compiled_autograd_gives_the_gradients_of_autograd(block: Any) -> None:
    gm = llfx.rewrite(net(block), llfx.LoRA(r=2, target_names=("blocks",)), (ids(2, 5),)).eval()
    randomise(gm, 1)

    def backward() -> dict[str, Tensor]:
        gm.zero_grad()
        first(gm(ids(2, 5))).square().mean().backward()
        return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}

    expected = backward()
    torch._dynamo.reset()
    # fullgraph, because a break would run the backward pass as autograd does.
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        ours = backward()
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        close(gradient, expected[name], 1e-6, name)


# Passes of others.


def put_after(gm: fx.GraphModule, in_module: bool) -> int:
    """Put an operation of a user's own right after each read of a weight of the base; return how many."""
    count = 0
    for node in gm.graph.find_nodes(op="get_attr"):
        if "custom" in node.meta or not str(node.target).endswith("weight"):
            continue
        with gm.graph.inserting_after(node):
            scaled = gm.graph.call_function(aten.mul.Tensor, (node, 2.0))
        scaled.meta = {"val": node.meta["val"]}
        reader = next(user for user in node.users if user is not scaled)
        if in_module:
            scaled.meta["nn_module_stack"] = reader.meta["nn_module_stack"]
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
        count += 1
    gm.recompile()
    return count


def test_the_code_of_a_graph_is_compiled_when_it_is_read() -> None:
    """No call runs the flat code. It is that of the graph of now, and reading it changes no call."""
    gm = adapted()
    expected, signature = output(gm, OTHER).detach(), inspect.signature(gm.forward)
    assert not {*CODE} & vars(gm).keys()
    before = gm.code
    assert "up.lora_A" in before
    put_after(gm, in_module=False)
    assert not {*CODE} & vars(gm).keys()
    assert gm.code.count("aten.mul.Tensor") == before.count("aten.mul.Tensor") + 4
    changed = output(gm, OTHER).detach()
    close(changed, fx.Interpreter(gm).run(*OTHER).detach(), 1e-12, "after its code was read")
    assert (changed - expected).abs().max() > 1e-3
    assert inspect.signature(gm.forward) == signature
    assert [*signature.parameters] == ["x"]


@pytest.mark.broad
@pytest.mark.parametrize("in_module", broad_after(1, [False, True]))
@pytest.mark.parametrize("cls", broad_after(2, [*VARIANTS, llfx.IA3, llfx.HiRA]))
def test_an_operation_right_after_a_weight_is_run_by_every_program(cls: Any, in_module: bool) -> None:
    gm = adapted(cls)
    before = output(gm, OTHER).detach()
    assert put_after(gm, in_module) == 4
    gm.graph.lint()
    expected = fx.Interpreter(gm).run(*OTHER)
    assert (expected - before).abs().max() > 1e-3
    close(output(gm, OTHER).detach(), expected.detach(), 1e-12, "with gradients")
    with torch.no_grad(), llfx.frozen(gm):
        close(gm(*OTHER), expected.detach(), 1e-10, "frozen")
    checkpointed = llfx.capture(gm, checkpoint_layers=True).train()
    torch.manual_seed(0)
    checkpointed(*OTHER).sum().backward()
    exported = torch.export.export(gm, X, dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    close(output(exported.module(), OTHER).detach(), expected.detach(), 1e-12, "exported")
    if cls in (llfx.DoRA, llfx.HiRA):  # they read the weight as it was, and the base another one
        message = r"^merge needs every adapted site, and 4 of 4 .*'layers.0.up': .* reads 'layers.0.up.weight' itself"
        with pytest.raises(llfx.AdapterError, match=message):
            llfx.merge(gm)
    else:
        close(output(llfx.merge(gm), OTHER).detach(), expected.detach(), 1e-10, "merged")


def split(gm: fx.GraphModule) -> Any:
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    return split_module(gm, gm, lambda node: numbers[node] // 6)


def partitioned(gm: fx.GraphModule) -> Any:
    class Support(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
            return node.op == "call_function" and node.target is not aten.tanh.default

    partitioner = CapabilityBasedPartitioner(gm, Support())
    return partitioner.fuse_partitions(partitioner.propose_partitions())


def with_shapes(gm: fx.GraphModule) -> Any:
    ShapeProp(gm).propagate(*X)
    assert all("tensor_meta" in node.meta for node in gm.graph.nodes if node.target is aten.linear.default)
    return gm


def minimized(gm: fx.GraphModule) -> Any:
    class Minimizer(_MinimizerBase):
        def run_a(self, module: Any, inputs: Any, report_idx: int = -1) -> Any:
            return module(*inputs)

        def run_b(self, module: Any, inputs: Any, report_idx: int = -1) -> Any:
            result = module(*inputs)
            return result + 1 if any(node.target is aten.tanh.default for node in module.graph.nodes) else result

    def equal(first: Any, second: Any, names: Any) -> tuple[float, bool]:
        pairs = zip(leaves(first), leaves(second), strict=True)
        return 0.0, all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))

    found = Minimizer(gm, X, equal, _MinimizerSettingBase(traverse_method="sequential")).minimize()
    assert {node.target for node in found} == {aten.tanh.default}
    return gm


def leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def unflattened(gm: fx.GraphModule) -> Any:
    return torch.export.unflatten(torch.export.export(gm, X))


def transformed(gm: fx.GraphModule) -> Any:
    return fx.Transformer(gm).transform()


PASSES: list[Callable[[fx.GraphModule], Any]] = [
    split,
    partitioned,
    with_shapes,
    minimized,
    unflattened,
    transformed,
]


@pytest.mark.parametrize("run", broad_after(2, PASSES), ids=lambda run: run.__name__)
@pytest.mark.parametrize("cls", [llfx.LoRA, llfx.HRA])
def test_passes_of_torch_run_on_an_adapted_graph(cls: Any, run: Callable[[fx.GraphModule], Any]) -> None:
    gm = adapted(cls)
    expected = output(gm, X).detach()
    result = run(gm)
    close(first(result(*X)).detach(), expected, 1e-12, run.__name__)
    if run is partitioned:
        with pytest.raises(llfx.AdapterError, match=r"cannot be taken out .*: remove or merge before that pass"):
            llfx.remove(result)
    elif run is not split and run is not unflattened:  # these two leave modules in modules
        close(output(llfx.remove(result), X).detach(), output(base(), X).detach(), 1e-12, "removed")
