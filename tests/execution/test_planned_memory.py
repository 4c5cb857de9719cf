"""Check planned memory: the numbers of the plain graph to the bit, the bytes that the plan says, what is refused."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from live_bytes import LiveBytes
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.execution.cut_program import call
from lora_lite_fx.execution.measured_layer import Recorder, obstacle
from lora_lite_fx.passes import OPTIMIZATIONS
from tests.execution.test_checkpointing import MODELS, VOCABULARY, InPlace, assert_same, llama, step, t5, tokens
from tests.support.captured import captured
from tests.support.conformance import randomise, small
from tests.support.models import WIDTH, ResidualMLP, tiny_llama
from tests.support.selection import broad_after, slow_after, slow_unless

LORA = llfx.LoRA(r=3, dropout=0.2)


def plain_llama() -> Any:
    """Return a Llama without dropout, whose layers can keep a third."""
    return transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY))


@functools.cache
def trained(build: Callable[[], Any], cfg: llfx.Variant = LORA) -> Any:
    plain = llfx.rewrite(captured(build)[1], cfg)
    randomise(plain, 1)
    return plain.train()


def planned(gm: Any, memory: Any) -> Any:
    """Return the same graph over the same tensors, with planned memory."""
    return llfx.plan_memory(llfx.optimize(gm), memory)


def kept(gm: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that are alive between a forward pass and the backward pass."""
    step(gm, inputs)  # which makes the plan
    with LiveBytes() as live:
        loss = gm(**inputs).loss
    assert loss.requires_grad
    return int(live.count())


# The same numbers.


@pytest.mark.parametrize(
    "build", broad_after(1, slow_unless((llama, t5).__contains__, MODELS)), ids=lambda build: build.__name__
)
@pytest.mark.parametrize("memory", slow_unless(("balanced",).__contains__, ["balanced", 0.92]))
def test_outputs_and_gradients_are_those_of_the_plain_graph(build: Callable[[], Any], memory: Any) -> None:
    plain = trained(build)
    ours = planned(plain, memory)
    for inputs in (tokens(), tokens(2, 7)):  # the first call makes the plan
        for seed in range(2):
            assert_same(step(ours, inputs, seed), step(plain, inputs, seed))
    plans = llfx.memory_plan(ours)
    if build is t5:
        assert plans[0].reason == "the graph overwrites tensors"  # its scores += bias
    else:
        assert any(plan.dropped for plan in plans)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(step(ours, tokens()), step(plain, tokens()))
    assert_same(step(ours.eval(), tokens()), step(plain.eval(), tokens()))
    plain.train()


@pytest.mark.broad
@pytest.mark.parametrize(
    "cls",
    slow_after(
        1, slow_unless((llfx.DoRA, llfx.OFT).__contains__, [llfx.DoRA, llfx.HRA, llfx.OFT, llfx.IA3, llfx.VeRA])
    ),
    ids=lambda cls: cls.__name__,
)
def test_every_form_of_adapter_computes_the_same(cls: type[llfx.Variant]) -> None:
    plain = trained(plain_llama, small(cls))
    ours = planned(plain, 0.6)
    for _ in range(2):
        assert_same(step(ours, tokens()), step(plain, tokens()))
    assert all(plan.dropped for plan in llfx.memory_plan(ours))


@pytest.mark.slow
def test_an_adapted_model_computes_the_same() -> None:
    model = llama()
    plain, ours = llfx.adapt(model, LORA).train(), llfx.adapt(model, LORA).train()
    randomise(plain, 1)
    randomise(ours, 1)
    llfx.plan_memory(ours, "balanced")
    for _ in range(2):
        assert_same(step(ours, tokens()), step(plain, tokens()))
    assert [plan.layers for plan in llfx.memory_plan(ours)] == [("model.layers.0",), ("model.layers.1",)]
    ours.gradient_checkpointing_enable()
    assert_same(step(ours, tokens()), step(plain, tokens()))


@pytest.mark.broad
def test_banks_compute_the_same() -> None:
    plain = llfx.rewrite(captured(plain_llama)[1], llfx.Bank(llfx.LoRA(r=3), slots=3)).train()
    randomise(plain, 1)
    ours = planned(plain, 0.7)
    for ids in ([0, 2, -1, 1], [1, 1, 0, -1]):
        inputs = {**tokens(), "adapter_ids": torch.tensor(ids)}
        assert_same(step(ours, inputs), step(plain, inputs))
    with llfx.by_row(ours, inputs["adapter_ids"]):
        assert_same(step(ours, tokens()), step(plain, inputs))


@pytest.mark.broad
def test_each_set_of_adapters_has_plans() -> None:
    plain = llfx.rewrite(captured(plain_llama)[1], {"a": llfx.LoRA(r=3), "b": llfx.DoRA(r=2)}).train()
    randomise(plain, 1)
    ours = planned(plain, "balanced")
    for names in (["a"], ["b"], ["a", "b"]):
        with llfx.active(ours, names), llfx.active(plain, names):
            assert_same(step(ours, tokens()), step(plain, tokens()))
    with llfx.scaled(ours, {"a": 0.3}), llfx.scaled(plain, {"a": 0.3}):
        assert_same(step(ours, tokens()), step(plain, tokens()))


@pytest.mark.broad
def test_a_fused_loss_is_the_same() -> None:
    plain = llfx.rewrite(captured(plain_llama)[1], llfx.LoRA(r=3), fuse_loss=True).train()
    randomise(plain, 1)
    ours = planned(plain, 0.6)
    for _ in range(2):
        found = []
        for gm in (plain, ours):
            gm.zero_grad()
            gm(**tokens()).loss.backward()
            found.append([p.grad.clone() for p in gm.parameters() if p.grad is not None])
        for expected, actual in zip(*found, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.broad
def test_gradients_of_gradients_are_the_same() -> None:
    plain = trained(plain_llama, llfx.LoRA(r=2))
    ours = planned(plain, 0.5)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # others have no second derivative
        for _ in range(2):
            results = []
            for gm in (plain, ours):
                trainable = [p for p in gm.parameters() if p.requires_grad]
                first = torch.autograd.grad(gm(**tokens()).loss, trainable, create_graph=True)
                results.append(torch.autograd.grad(torch.stack([(g * g).sum() for g in first]).sum(), trainable))
            for expected, actual in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.broad
def test_a_backward_pass_can_be_run_twice() -> None:
    plain = trained(plain_llama, llfx.LoRA(r=2))
    ours = planned(plain, 0.5)
    torch.manual_seed(0)
    loss = ours(**tokens()).loss
    trainable = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, trainable, retain_graph=True)
    for expected, actual in zip(first, torch.autograd.grad(loss, trainable), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.broad
@pytest.mark.parametrize("memory", ["balanced", 0.5])
def test_a_call_without_a_backward_pass_keeps_nothing(memory: Any) -> None:
    ours = planned(trained(plain_llama, llfx.DoRA(r=2)), memory)
    step(ours, tokens())  # which makes the plan
    with LiveBytes() as live:
        for _ in range(2):
            loss = ours(**tokens()).loss
        assert live.count() > 10 * loss.nbytes
        del loss
    assert live.count([*ours.parameters(), *ours.buffers()]) == 0


def test_accumulated_gradients_of_two_calls_in_flight_are_the_same() -> None:
    plain = trained(llama)
    ours = planned(plain, "balanced")
    step(ours, tokens())
    found = []
    for gm in (plain, ours):
        gm.zero_grad()
        torch.manual_seed(0)
        losses = [gm(**tokens(2, length)).loss for length in (5, 9)]
        torch.stack(losses).sum().backward()
        found.append([p.grad for p in gm.parameters() if p.grad is not None])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)


def test_deep_copies_and_other_executions_keep_the_setting() -> None:
    ours = planned(trained(llama), "balanced")
    for gm in (copy.deepcopy(ours), llfx.optimize(ours, OPTIMIZATIONS.without("share_siblings"))):
        step(gm, tokens())
        assert llfx.memory_plan(gm)


# The bytes.


@pytest.mark.broad
@pytest.mark.parametrize("memory", broad_after(1, ["balanced", 0.9, 0.5, 0.25]))
def test_the_plan_says_the_bytes_that_are_kept(memory: Any) -> None:
    inputs = tokens(4, 40)
    plain = trained(plain_llama, llfx.LoRA(r=2))
    ours = planned(plain, memory)
    freed = kept(plain, inputs) - kept(ours, inputs)
    plans = llfx.memory_plan(ours)
    assert [plan.layers for plan in plans] == [("model.layers.0",), ("model.layers.1",)]
    said = sum(plan.fast - plan.bytes_per_token for plan in plans) * inputs["input_ids"].numel()
    assert freed == pytest.approx(said, rel=0.1)
    assert freed > 0
    # What is kept in all: the layers, and what stands around them, which no plan changes.
    everything = planned(plain, 1.0)
    step(everything, inputs)
    fast = sum(plan.bytes_per_token for plan in llfx.memory_plan(everything)) * inputs["input_ids"].numel()
    around = kept(plain, inputs) - fast
    assert kept(ours, inputs) == pytest.approx(around + fast - said, rel=0.1)


@pytest.mark.broad
def test_a_part_and_a_number_of_bytes_are_the_most_that_a_layer_keeps() -> None:
    plain = trained(plain_llama, llfx.LoRA(r=2))
    half = planned(plain, 0.5)
    step(half, tokens())
    for plan in llfx.memory_plan(half):
        assert plan.bytes_per_token <= 0.5 * plan.fast
        assert 0 < plan.cost < 0.5
        assert sum(plan.kept.values()) == pytest.approx(plan.bytes_per_token)
        assert sum(plan.kept.values()) + sum(plan.dropped.values()) >= plan.fast - 1e-3
    number = int(max(plan.fast for plan in llfx.memory_plan(half)) * 0.8)
    ours = planned(plain, number)
    step(ours, tokens())
    assert all(0.5 * number < plan.bytes_per_token <= number for plan in llfx.memory_plan(ours))


def test_balanced_drops_what_is_cheap_alone() -> None:
    ours = planned(trained(plain_llama, llfx.LoRA(r=2)), "balanced")
    step(ours, tokens(4, 40))
    first, second = llfx.memory_plan(ours)
    assert "model.layers.1.mlp.act_fn: silu" in second.dropped
    assert all(plan.cost <= 0.08 for plan in (first, second))
    assert str(first).splitlines()[0].startswith("model.layers.0: keep ")


def test_of_gate_and_up_one_can_be_computed_again_alone() -> None:
    plain = trained(plain_llama, llfx.LoRA(r=2))
    assert "low_rank_products" in str(llfx.program(plain, "training").graph)  # both sites are one operation
    ours = planned(plain, 0.75)
    for _ in range(2):
        assert_same(step(ours, tokens(4, 40)), step(plain, tokens(4, 40)))
    _, second = llfx.memory_plan(ours)
    gathered = [
        [name for name in rows if "gate_proj" in name or "up_proj" in name] for rows in (second.kept, second.dropped)
    ]
    assert [len(names) for names in gathered] == [1, 1]


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ours = planned(trained(llama), "balanced")
    with caplog.at_level("INFO", "lora_lite_fx"):
        step(ours, tokens())
    assert [r.message for r in caplog.records if r.message.startswith("planned the memory of a kind of layer: keep ")]


# What may not be computed again.


@torch.library.custom_op("lora_lite_fx_tests::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    """Draw random numbers, without a tag that says so."""
    return torch.randn(x.shape, dtype=x.dtype)


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.sigmoid(y * noise(y.detach())) * torch.sin(y)
        y = torch.nn.functional.dropout(y.exp(), 0.3, self.training)
        result: Tensor = x + self.down(y)
        return result


@pytest.mark.parametrize("memory", ["balanced", 0.8])
def test_random_numbers_are_not_drawn_again(memory: Any) -> None:
    x = torch.randn(3, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Noisy() for _ in range(3)))
    plain = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (x,), verify=False).train()
    randomise(plain, 1)
    ours = planned(plain, memory)
    for seed in range(3):
        assert_same(step(ours, (x,), seed), step(plain, (x,), seed))
    assert any(plan.dropped for plan in llfx.memory_plan(ours))


class AddsInPlace(nn.Module):
    """A layer that adds to the result of a site in place, which a symbolic trace records as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y += torch.tanh(x[:, :1])
        result: Tensor = x + self.down(torch.sin(y) * y)
        return result


def test_layers_of_symbolic_traces_that_write_keep_all() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(AddsInPlace() for _ in range(3)))
    plain = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",))).train()
    randomise(plain, 1)
    ours = planned(plain, "balanced")
    x = torch.randn(3, WIDTH)
    for _ in range(2):
        assert_same(step(ours, (x,)), step(plain, (x,)))
    assert "overwrites" in llfx.memory_plan(ours)[0].reason


def test_lazy_conjugates_are_kept() -> None:
    class Conjugates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.fft(torch.tanh(self.up(x)))
            w = torch.exp(z * 0.1) * 0.1
            result: Tensor = x + self.down((z.conj() * w * z).real)
            return result

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Conjugates() for _ in range(3))), torch.randn(3, WIDTH)
    plain = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (x,)).train()
    randomise(plain, 1)
    for memory in ("balanced", 0.7, 0.5):
        ours = planned(plain, memory)
        for _ in range(2):
            assert_same(step(ours, (x,)), step(plain, (x,)))
        assert any(plan.dropped for plan in llfx.memory_plan(ours))


@pytest.mark.broad
@pytest.mark.parametrize("writes_input", [True, False])
def test_graphs_that_overwrite_tensors_keep_all(writes_input: bool) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = llfx.rewrite(InPlace(writes_input), llfx.LoRA(r=2, target_names=(".",)), (x,)).train()
    randomise(plain, 1)
    ours = planned(plain, "balanced")
    assert_same(step(ours, (x,)), step(plain, (x,)))
    assert [str(plan) for plan in llfx.memory_plan(ours)] == [
        "layers.0 and 2 more: keep what autograd keeps, because the graph overwrites tensors"
    ]


def test_layers_with_batch_norm_keep_all() -> None:
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.SiLU()) for _ in range(2))
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks), torch.randn(5, WIDTH)
    plain = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (x,)).train()
    randomise(plain, 1)
    ours = planned(copy.deepcopy(plain), "balanced")
    for _ in range(2):
        assert_same(step(ours, (x,)), step(plain, (x,)))
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    assert llfx.memory_plan(ours)


def graph_of(function: Any) -> fx.Graph:
    exported: Any = torch.export.export(function, (torch.ones(3), torch.ones(3)), strict=False)
    graph: fx.Graph = exported.graph
    return graph


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return torch.sin(self.function(x.cos(), *others))


def test_attention_costs_its_two_products() -> None:
    operands = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    counts = []
    for attention in (nn.functional.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT).softmax(-1) @ v):
        traced = torch.export.export(Function(attention), operands)
        recorder = Recorder(traced.graph, 0)
        recorder.run(*operands)
        counts.append(sum(recorder.flops.values()))
    assert counts[0] == counts[1] > 0


def test_layers_with_effects_are_not_planned() -> None:
    assert obstacle(graph_of(Function(torch.mul))) == ""
    assert obstacle(graph_of(Function(lambda x, y: x.mul_(y)))) == "mul_ overwrites a tensor"
    graph = graph_of(Function(torch.mul))
    product = next(node for node in graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    product.target = math.prod
    assert obstacle(graph) == ""
    product.target = copy.copy
    assert obstacle(graph) == "copy may have effects that nothing tells of"
    product.target = call
    assert obstacle(graph) == "it calls the module cos, which may change its own state"


def test_a_step_of_the_optimizer_before_the_backward_pass_is_an_error() -> None:
    ours = planned(trained(plain_llama, llfx.LoRA(r=2)), 0.5)
    ours = copy.deepcopy(ours)
    for _ in range(2):  # in the call that makes the plan, and in one that follows it
        loss = ours(**tokens()).loss
        with torch.no_grad():
            for parameter in ours.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match="was overwritten after the forward pass"):
            loss.backward()


# Compilers, and what is refused.


@pytest.mark.broad
def test_torch_compile_decides_itself() -> None:
    plain = trained(plain_llama, llfx.LoRA(r=2))
    ours = planned(plain, "balanced")
    compiled: Any = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(step(compiled._orig_mod, tokens()), step(plain, tokens()))
    loss = compiled(**tokens()).loss
    torch.testing.assert_close(loss, plain(**tokens()).loss)
    torch.compiler.reset()


def test_compiled_layers_are_not_planned() -> None:
    ours = planned(trained(plain_llama, llfx.LoRA(r=2)), "balanced")
    llfx.compile_layers(ours, backend="eager")
    step(ours, tokens())
    with pytest.raises(llfx.AdapterError, match="There is no memory plan"):
        llfx.memory_plan(ours)
    torch.compiler.reset()


MEMORY = (
    "memory is 'fast', 'balanced', a part of what 'fast' keeps as 0.5, or a number of bytes that a layer may keep for"
    " each token as 20_000, not {}."
)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("small", MEMORY.format("'small'")),
        (0, MEMORY.format("0")),
        (-0.5, MEMORY.format("-0.5")),
        (True, MEMORY.format("<bool>")),
        (float("nan"), MEMORY.format("nan")),
        (["balanced"], MEMORY.format("['balanced']")),
        (1.5, "memory=1.5: a part is at most 1.0, and a number of bytes is an int."),
    ],
)
def test_other_values_are_refused(memory: Any, message: str) -> None:
    with pytest.raises(llfx.ConfigError) as error:
        llfx.rewrite(nn.Linear(2, 2), LORA, memory=memory)
    assert str(error.value) == message


@pytest.mark.broad
def test_memory_and_checkpointed_layers_are_one_or_the_other() -> None:
    message = "memory='balanced' plans what layers keep, and checkpoint_layers=True lets them keep nothing but"
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.rewrite(llama(), LORA, memory="balanced", checkpoint_layers=True)
    adapted = llfx.adapt(llama(), LORA)
    adapted.gradient_checkpointing_enable()
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.plan_memory(adapted)


def test_less_than_a_layer_can_keep_is_refused_with_the_least() -> None:
    ours = planned(trained(plain_llama, llfx.LoRA(r=2)), 10)
    with pytest.raises(
        llfx.ConfigError, match=r"memory=10: a layer keeps at least [\d_]+ bytes for each token here, 0\.\d"
    ):
        ours(**tokens())
    ours = planned(trained(plain_llama, llfx.LoRA(r=2)), 0.001)
    with pytest.raises(llfx.ConfigError, match=r"memory=0\.001: a layer keeps at least"):
        ours(**tokens())


def test_models_without_layers_and_other_models_are_refused() -> None:
    with pytest.raises(llfx.AdapterError, match="memory='balanced': the model has no layers, of which a plan says"):
        llfx.rewrite(nn.Linear(WIDTH, WIDTH), LORA, memory="balanced")
    with pytest.raises(llfx.AdapterError, match="plan_memory takes what rewrite, capture, load or adapt returned, not"):
        llfx.plan_memory(nn.Linear(2, 2))
    with pytest.raises(llfx.AdapterError, match="There is no memory plan"):
        llfx.memory_plan(trained(llama))


@pytest.mark.broad
def test_layers_of_other_shapes_have_plans_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(6, WIDTH), *(ResidualMLP(bias=False) for _ in range(3)), nn.Linear(WIDTH, 4))
    x = torch.randn(5, 6)
    plain = llfx.rewrite(model, LORA)
    randomise(plain, 1)
    ours = llfx.plan_memory(copy.deepcopy(plain), "balanced").train()
    plain.train()
    for _ in range(2):
        assert_same(step(ours, (x,)), step(plain, (x,)))
    assert {layer for plan in llfx.memory_plan(ours) for layer in plan.layers} == set("01234")
