"""Low-rank adapters: products gathered into one operation, the tensors that it saves, and the arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from variants import flop_counter

import lora_lite_fx as llfx
from lora_lite_fx.ops.low_rank_products import Branch, LowRankProducts, flatten, unflatten
from lora_lite_fx.passes import OPTIMIZATIONS
from lora_lite_fx.rewriting.base_graph import base_graph
from tests.execution.test_programs import PLAIN, derived
from tests.support.conformance import close, randomise
from tests.support.untouched import saved_bytes

aten = torch.ops.aten
TRAINING = OPTIMIZATIONS.of("training")
EVERYWHERE: dict[str, Any] = {"target_names": ("_proj$",)}
LOW_RANK = {
    "LoRA": llfx.LoRA(r=2, alpha=4.0, **EVERYWHERE),
    "DoRA": llfx.DoRA(r=2, alpha=4.0, **EVERYWHERE),
    "DeLoRA": llfx.DeLoRA(r=2, **EVERYWHERE),
    "HRA": llfx.HRA(r=2, **EVERYWHERE),
}


def tokens(*shape: int, seed: int = 0) -> dict[str, Any]:
    return {"input_ids": torch.randint(64, shape, generator=torch.Generator().manual_seed(seed)), "use_cache": False}


@functools.cache
def base(dtype: torch.dtype = torch.float64, bias: bool = False) -> tuple[Any, fx.GraphModule]:
    """Return two layers with norms, gates and grouped attention, and their graph."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=bias, mlp_bias=bias))
    model.to(dtype)
    return model, base_graph(model, tokens(2, 5))


def adapted(name: str, **which: Any) -> fx.GraphModule:
    gm = llfx.rewrite(base(**which)[1], LOW_RANK[name]).train()
    randomise(gm, 1)
    return gm


def gathered(gm: fx.GraphModule) -> list[Any]:
    return [node for node in gm.graph.nodes if isinstance(node.target, LowRankProducts)]


def run(model: nn.Module, *shape: int) -> Callable[..., Tensor]:
    return lambda: model(**tokens(*shape)).logits


# The graph.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "DeLoRA"])
def test_a_layer_has_four_gathered_products(name: str, bias: bool) -> None:
    gm = derived(adapted(name, bias=bias), TRAINING)
    products = gathered(gm)
    assert [len(node.target.ranks) for node in products] == 2 * [3, 1, 2, 1]
    # Autograd saves nothing before the first adapter. All other inputs follow from tensors that the base saves.
    assert [node.target.recipe is not None for node in products] == [False, *7 * [True]]
    # DoRA scales the sum without the bias, so that a site with a bias is not scaled in the operation.
    scaled = [node.args[-1] is not None for node in products]
    assert set(scaled) == {name == "DoRA" and not bias}


def test_in_inference_all_low_rank_variants_run_the_same_operations() -> None:
    counts = {}
    for name in LOW_RANK:
        gm = derived(adapted(name), OPTIMIZATIONS.of("inference"))
        nodes = list(gm.graph.nodes)
        first = next(index for index, node in enumerate(nodes) if node.op == "placeholder")
        assert [len(node.target.ranks) for node in gathered(gm)] == 2 * [3, 1, 2, 1]
        targets = (type(n.target) if isinstance(n.target, LowRankProducts) else n.target for n in nodes[first:])
        counts[name] = Counter(target for target in targets if target is not aten.type_as.default)
    assert counts["LoRA"] == counts["DoRA"] == counts["DeLoRA"] == counts["HRA"]


def test_a_scaled_result_that_the_caller_could_overwrite_is_not_saved() -> None:
    gm = llfx.rewrite(base()[1], llfx.DoRA(r=2, target_names=("lm_head", "down_proj"))).train()
    randomise(gm, 1)
    scaled = {str(node.args[-4]): node.args[-1] is not None for node in gathered(derived(gm, TRAINING))}
    assert scaled.pop("lm_head_weight") is False
    assert list(scaled.values()) == [True, True]
    loss = run(gm, 2, 3)().div_(2.0).sum()
    loss.backward()


def test_heads_of_grouped_attention_are_not_repeated() -> None:
    gm = adapted("LoRA")
    attention = derived(gm, TRAINING).graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert [node.kwargs["enable_gqa"] for node in attention] == [True, True]
    assert all(node.args[1].target is not aten.reshape.default for node in attention)
    (*_, node) = derived(gm, PLAIN).graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert node.args[1].target is aten.reshape.default


def test_a_mask_is_converted_once_for_all_layers() -> None:
    inputs = {**tokens(3, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])}
    gm = llfx.rewrite(base()[0], LOW_RANK["LoRA"], inputs)
    randomise(gm, 1)
    for program in ("training", "inference"):
        graph = derived(gm, OPTIMIZATIONS.of(program)).graph
        assert len(graph.find_nodes(op="call_function", target=aten.where.Scalar)) == 1
        attention = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        assert len({node.args[3] for node in attention}) == 1
    for keep in (torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with keep:
            assert torch.equal(
                gm(**inputs).logits, llfx.optimize(gm, OPTIMIZATIONS.without("convert_mask_once"))(**inputs).logits
            )


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LOW_RANK)
def test_outputs_gradients_and_second_gradients_are_those_of_plain_products(name: str, bias: bool) -> None:
    gm = adapted(name, bias=bias)
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


def test_a_magnitude_of_zero_has_its_gradient() -> None:
    gm = adapted("DoRA")
    magnitudes: list[Any] = [parameter for name, parameter in gm.named_parameters() if name.endswith("lora_m")]
    with torch.no_grad():
        for parameter in magnitudes:
            parameter[::3] = 0
    ours = results(gm)
    assert_close(ours, results(llfx.optimize(gm, PLAIN)))
    of: dict[int, Any] = dict(zip(map(id, llfx.adapter_parameters(gm)), ours[1:], strict=True))
    assert all((of[id(parameter)][::3] != 0).all() for parameter in magnitudes)


# Saved tensors, and arithmetic.


@pytest.mark.parametrize(("name", "most"), [("LoRA", 1.05), ("DeLoRA", 1.05), ("HRA", 1.05), ("DoRA", 1.4)])
def test_hardly_more_is_saved_than_by_the_frozen_base(name: str, most: float) -> None:
    model = copy.deepcopy(base(dtype=torch.float32)[0]).requires_grad_(False).train()
    model.enable_input_require_grads()
    gm = adapted(name, dtype=torch.float32)
    plain = llfx.optimize(gm, PLAIN)
    assert all(run(case, 1, 2)().requires_grad for case in (model, gm, plain))
    of_base, ours, of_plain = (saved_bytes(case, tokens(64, 8)) for case in (model, gm, plain))
    assert of_base < ours <= most * of_base
    assert of_plain > 1.3 * ours


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


@pytest.mark.parametrize("name", COSTS)
def test_the_arithmetic_is_that_of_the_cost_table(name: str) -> None:
    cfg, inference, training = COSTS[name]
    x = torch.randn(T, IN, requires_grad=True)
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), dataclasses.replace(cfg, target_names=(".",)), (x.detach(),))
    randomise(gm, 1)
    with torch.no_grad():
        gm.eval()(x)
        assert products(lambda: gm(x)) - T * IN * OUT == pytest.approx(inference, rel=0.05)
    gm.train()
    assert products(lambda: gm(x).sum().backward()) - 2 * T * IN * OUT == pytest.approx(training, rel=0.05)


def test_shared_bases_are_not_multiplied_into_a_matrix_for_each_site() -> None:
    cfg = llfx.RandLoRA(r=R, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),)).eval()
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 0
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), llfx.LoRA(r=128, target_names=(".",)), (torch.randn(3, IN),))
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 1


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
