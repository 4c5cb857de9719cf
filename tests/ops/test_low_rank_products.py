"""Low-rank adapters: products gathered into one operation, the tensors that it saves, and the arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from variants import flop_counter

import lora_lite_fx as llfx
from lora_lite_fx.ops.low_rank_branch import Branch, flatten, unflatten
from lora_lite_fx.ops.low_rank_products import LowRankProducts
from tests.support.conformance import close, randomise
from tests.support.low_rank_llama import LOW_RANK, adapted_llama, run
from tests.support.programs import PLAIN
from tests.support.selection import broad_after

aten = torch.ops.aten


# The record of a branch.


def test_branches_survive_being_flattened() -> None:
    branches = [Branch(f"weight {i}", None, f"b {i}", f"scale {i}") for i in range(3)]
    assert unflatten(flatten(branches)) == branches
    assert unflatten(flatten([])) == []


def test_each_tensor_of_a_branch_gets_its_own_gradient() -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    x, a, scale = tensor(2, 3, 5), tensor(4, 5), tensor(6)
    branches: list[Branch[Any]] = [
        Branch(tensor(6, 5, grad=False), None, tensor(6, 1), scale),
        Branch(tensor(2, 5, grad=False), tensor(2, grad=False), tensor(2, 3), None),
    ]
    products = LowRankProducts((1, 3), (2.0, 0.5))

    def by_hand() -> list[Tensor]:
        t = F.linear(x, a)
        parts = zip(branches, t.split((1, 3), -1), (2.0, 0.5), strict=True)
        sums = [F.linear(x, s.weight, s.bias) + alpha * F.linear(part, s.b) for s, part, alpha in parts]
        return [t, sums[0] * scale, sums[1]]

    trained = [x, a, *(leaf for leaf in flatten(branches) if leaf is not None and leaf.requires_grad)]
    results = [list(products(x, a, *flatten(branches))), by_hand()]
    losses = [torch.cat([((i + 1) * y).flatten() for i, y in enumerate(ys)]).square().sum() for ys in results]
    assert_close(results[0], results[1], 1e-12)
    ours, expected = (torch.autograd.grad(loss, trained) for loss in losses)
    assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize("of_rows", [False, True], ids=["shared", "a row each"])
@pytest.mark.parametrize(
    ("base", "adapter", "tolerance"),
    [(torch.bfloat16, torch.float32, 2e-2), (torch.float16, torch.float32, 2e-3), (torch.float32, torch.float64, 1e-6)],
    ids=str,
)
def test_an_adapter_may_be_wider_than_its_base(
    base: torch.dtype, adapter: torch.dtype, tolerance: float, of_rows: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(dtype: torch.dtype, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    rows = (2,) if of_rows else ()
    x, a = tensor(base, 2, 3, 5), tensor(adapter, *rows, 4, 5)
    scale = None if of_rows or base is torch.float16 else tensor(adapter, 6)
    branches: list[Branch[Any]] = [
        Branch(tensor(base, 6, 5, grad=False), None, tensor(adapter, *rows, 6, 1), scale),
        Branch(tensor(base, 2, 5, grad=False), tensor(base, 2, grad=False), tensor(adapter, *rows, 2, 3), None),
    ]
    products = LowRankProducts((1, 3), (2.0, 0.5))
    given = flatten(branches)
    results = [products(x, a, *given), products._plain(x, a, branches)]
    with torch.no_grad():
        results.append(products(x, a, *given))
    for t, *ys in results:
        assert (t.dtype, {y.dtype for y in ys}) == (adapter, {base})
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])
    trained = [x, a, *(leaf for leaf in given if leaf is not None and leaf.requires_grad)]
    losses: list[Any] = [sum((y.double() ** 2).mean() for y in ys) for ys in results[:2]]
    first = [torch.autograd.grad(loss, trained, create_graph=True) for loss in losses]
    norms: list[Any] = [sum(of.double().square().sum() for of in each) for each in first]
    second = [torch.autograd.grad(norm, trained) for norm in norms]
    for ours, expected in (first, second):
        assert [of.dtype for of in ours] == [of.dtype for of in trained]
        assert_close(ours, expected, tolerance)


# The same numbers.


def results(model: nn.Module, second: bool = False) -> list[Tensor | None]:
    """Return the output, the gradients of a functional of it, and if `second` the gradients of their norm."""
    parameters = llfx.adapter_parameters(model)
    y = run(model, 3, 4)()
    first = torch.autograd.grad(y.square().mean(), parameters, create_graph=second)
    if not second:
        return [y, *first]
    norm: Any = sum(grad.square().sum() for grad in first)
    return [y, *first, *torch.autograd.grad(norm, parameters, allow_unused=True)]


def assert_close(ours: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-9) -> None:
    for index, (tensor, reference) in enumerate(zip(ours, expected, strict=True)):
        assert (tensor is None) == (reference is None)
        if tensor is not None and reference is not None:
            close(tensor, reference, tolerance, f"result {index}")


@pytest.mark.parametrize("bias", broad_after(1, [True, False]))
@pytest.mark.parametrize("name", broad_after(1, LOW_RANK))
def test_outputs_gradients_and_second_gradients_are_those_of_plain_products(name: str, bias: bool) -> None:
    gm = adapted_llama(name, bias=bias)
    with sdpa_kernel(SDPBackend.MATH):  # because the fused one has no second gradients; norms are in single precision
        assert_close(results(gm, second=True), results(llfx.optimize(gm, PLAIN), second=True), 1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 0, 3, 5), (2, 1, 3, 5)])
def test_inputs_may_have_any_shape(shape: tuple[int, ...]) -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(5, 7)), llfx.LoRA(r=2, target_names=(".",)))
    randomise(gm, 1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = llfx.optimize(gm, PLAIN)(x).detach()
    torch.testing.assert_close(gm(x).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), expected)


@pytest.mark.broad
def test_a_magnitude_of_zero_has_its_gradient() -> None:
    gm = adapted_llama("DoRA")
    magnitudes: list[Any] = [parameter for name, parameter in gm.named_parameters() if name.endswith("lora_m")]
    with torch.no_grad():
        for parameter in magnitudes:
            parameter[::3] = 0
    ours = results(gm)
    assert_close(ours, results(llfx.optimize(gm, PLAIN)))
    of: dict[int, Any] = dict(zip(map(id, llfx.adapter_parameters(gm)), ours[1:], strict=True))
    assert all((of[id(parameter)][::3] != 0).all() for parameter in magnitudes)


# Saved tensors, and arithmetic.


T, IN, OUT, R, BLOCK = 256, 192, 160, 8, 8
LOW = R * (IN + OUT)
# The multiply-adds of a call besides the frozen product: in inference, and in training with the backward pass, in the
# first call after a change of a parameter. The figures are those of each method's cost table.
COSTS: dict[str, tuple[llfx.Variant, int, int]] = {
    "LoRA": (llfx.LoRA(r=R), T * LOW, 3 * T * LOW),
    "DeLoRA": (llfx.DeLoRA(r=R), T * LOW, 3 * T * LOW),
    "DoRA": (llfx.DoRA(r=R), T * LOW, 3 * T * LOW + R * IN * OUT + R * LOW),
    "HRA": (llfx.HRA(r=R), T * LOW, 6 * T * R * IN),
    "OFT": (llfx.OFT(block_size=BLOCK), T * IN * BLOCK, 3 * T * IN * BLOCK + 9 * IN * BLOCK**2),
    "IA3": (llfx.IA3(), 0, 0),
    "RoAd": (llfx.RoAd(group_size=32), 0, 0),
}


def products(call: Callable[[], Any]) -> int:
    """Count the multiply-adds of all products of matrices."""
    with flop_counter() as counter:
        call()
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", broad_after(3, COSTS))
def test_the_arithmetic_is_that_of_the_cost_table(name: str) -> None:
    cfg, inference, training = COSTS[name]
    x = torch.randn(T, IN, requires_grad=True)
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), dataclasses.replace(cfg, target_names=(".",)), (x.detach(),))
    randomise(gm, 1)
    with torch.no_grad(), llfx.frozen(gm.eval()):
        gm(x)
        assert products(lambda: gm(x)) - T * IN * OUT == pytest.approx(inference, rel=0.05)
    gm.train()
    assert products(lambda: gm(x).sum().backward()) - 2 * T * IN * OUT == pytest.approx(training, rel=0.05)


# Compiled.


def test_a_compiled_graph_does_not_form_matrices_that_only_pay_if_they_are_cached() -> None:
    cfg = llfx.HRA(r=R, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),)).eval()
    randomise(gm, 1)
    counts = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        counts.append(products(lambda: graph(*inputs)))
        return graph.forward

    torch.compiler.reset()
    x = torch.randn(1, IN)
    with torch.no_grad():
        close(torch.compile(gm, backend=backend, fullgraph=True)(x), gm(x), 1e-5, "output")
    torch.compiler.reset()
    assert IN * OUT < counts[0] < 2 * IN * OUT


@pytest.mark.broad
def test_more_models_can_be_compiled_than_dynamo_recompiles_one_function() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    x = torch.ones(3, 4)
    for seed in range(torch._dynamo.config.recompile_limit + 2):
        gm = llfx.rewrite(nn.Sequential(nn.Linear(4, 5)), llfx.LoRA(r=2, target_names=(".",)), (x,))
        randomise(gm, seed)
        close(torch.compile(gm, backend=counter, fullgraph=True)(x), gm(x), 1e-6, "output")
    torch.compiler.reset()
    assert counter.frame_count == torch._dynamo.config.recompile_limit + 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", broad_after(2, [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6)]), ids=str)
def test_results_may_be_overwritten(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(inplace=True))
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (torch.ones(shape),)).train()
    randomise(gm, 1)
    x = torch.randn(shape)
    values = []
    for each in (gm, llfx.optimize(gm, PLAIN)):
        each.zero_grad()
        y = each(x)
        y.sum().backward()
        values.append([y.detach(), *(p.grad.clone() for p in llfx.adapter_parameters(each) if p.grad is not None)])
    assert len(values[0]) == 3
    assert_close(values[0], values[1], tolerance=1e-6)
