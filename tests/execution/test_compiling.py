"""`compile_layers`: the layers are compiled once for each kind, at any depth, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from tests.adapters.test_switches import fill
from tests.support.captured import captured
from tests.support.compilations import graphs
from tests.support.conformance import close
from tests.support.models import GatedMLP, tiny_llama
from tests.support.selection import broad_after

CONFIGS: list[Any] = [llfx.LoRA(r=2), [llfx.DoRA(r=2), llfx.IA3()], llfx.LoRA(r=2, dropout=0.5), llfx.HRA(r=2)]


pytestmark = pytest.mark.usefixtures("count_from_zero")


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama(num_hidden_layers=layers)).double().eval()


def call(rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    tokens = torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def step(model: Any, arguments: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**arguments).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(compiled: Any, plain: Any, arguments: dict[str, Tensor]) -> None:
    loss, gradients = step(compiled, arguments)
    expected, others = step(plain, arguments)
    close(loss, expected, 1e-10, "loss")
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        close(gradient, others[name], 1e-9, name)


@pytest.mark.broad
@pytest.mark.parametrize(
    ("cfg", "checkpoint_layers"),
    [
        (CONFIGS[0], False),
        *(pytest.param(cfg, kept, marks=pytest.mark.slow) for cfg in CONFIGS[1:] for kept in (False, True)),
    ],
    ids=range(7),
)
def test_a_step_in_both_modes_and_at_another_shape(cfg: Any, checkpoint_layers: bool) -> None:
    _, graph = captured(llama)
    plain: Any = llfx.rewrite(graph, cfg, checkpoint_layers=checkpoint_layers)
    fill(plain)
    compiled: Any = llfx.rewrite(graph, cfg, checkpoint_layers=checkpoint_layers)
    llfx.load_adapter_state_dict(compiled, llfx.adapter_state_dict(plain))
    assert llfx.compile_layers(compiled, backend="aot_eager", fullgraph=True) is compiled
    check_equal(compiled.eval(), plain.eval(), call(2, 6))
    for shape in ((2, 6), (3, 8)):
        check_equal(compiled.train(), plain.train(), call(*shape))
    with torch.no_grad(), llfx.frozen(compiled.eval()), llfx.frozen(plain.eval()):
        close(compiled(**call(3, 8)).logits, plain(**call(3, 8)).logits, 1e-10, "logits in frozen")
    assert graphs() > 0


@pytest.mark.broad
def test_the_number_of_graphs_does_not_grow_with_depth() -> None:
    found = []
    for layers in (3, 6):
        torch.compiler.reset()
        counters.clear()
        gm = llfx.compile_layers(
            llfx.rewrite(captured(llama, layers)[1], llfx.LoRA(r=2)).train(), backend="eager", fullgraph=True
        )
        step(gm, call())
        # The input of the first layer needs no gradient, so that its code is another.
        assert graphs() == 2
        with torch.no_grad(), llfx.frozen(gm.eval()):
            gm(**call())
        gm.train()
        for rows in (3, 4):
            step(gm, call(rows, 6))
        found.append(graphs())
    assert found[0] == found[1]


@pytest.mark.broad
def test_switches_and_hooks_act_and_no_set_is_compiled_twice() -> None:
    configs = {"fr": llfx.LoRA(r=2), "de": llfx.DoRA(r=2)}
    _, graph = captured(llama)
    gm: Any = llfx.rewrite(graph, configs)
    fill(gm)
    plain: Any = llfx.rewrite(graph, configs)
    llfx.load_adapter_state_dict(plain, llfx.adapter_state_dict(gm))
    llfx.compile_layers(gm, backend="eager")
    counted = []
    for _ in range(2):
        for names in ("fr", [], ["fr", "de"]):
            for c in (1.0, 0.5):
                with llfx.active(gm, names), llfx.active(plain, names), llfx.scaled(gm, c), llfx.scaled(plain, c):
                    check_values = gm(**call()).logits, plain(**call()).logits
                    close(*check_values, 1e-10, f"logits of {names} by {c}")
        counted.append(graphs())
    assert counted[0] == counted[1]
    seen: list[Any] = []
    hook = gm.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    gm(**call())
    assert len(seen) == 1
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", broad_after(1, [llfx.LoRA(r=2, alpha=3.0, dropout=0.5), llfx.DoRA(r=2, alpha=3.0)]), ids=["LoRA", "DoRA"]
)
def test_numbers_of_operations_are_constants_and_no_inputs(cfg: Any) -> None:
    """With dynamic sizes torch.compile takes a number for an input, and compiles anew to learn that it is none."""
    gm: Any = llfx.rewrite(captured(llama, 1)[1], cfg).train()
    numbers = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            if isinstance(value, torch.SymFloat) or (isinstance(value, Tensor) and not value.dim()):
                numbers.append(node.name)
        return graph

    step(torch.compile(gm, backend=backend, dynamic=True, fullgraph=True), call())
    assert numbers == []


@pytest.mark.slow
def test_adapted_models_generate_and_train_and_go_back() -> None:
    model: Any = llfx.compile_layers(llfx.adapt(llama(), llfx.LoRA(r=2)), backend="eager", fullgraph=True)
    fill(model)
    plain: Any = llfx.adapt(llama(), llfx.LoRA(r=2))
    llfx.load_adapter_state_dict(plain, llfx.adapter_state_dict(model))
    settings: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = call()["input_ids"]
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    check_equal(model.train(), plain.train(), call())
    model.gradient_checkpointing_enable()
    plain.gradient_checkpointing_enable()
    check_equal(model, plain, call())
    before = graphs()
    assert before > 0
    llfx.compile_layers(model, disable=True)
    check_equal(model, plain, call(4, 7))
    assert graphs() == before


@pytest.mark.broad
def test_the_whole_graph_can_still_be_compiled_and_exported() -> None:
    gm: Any = llfx.rewrite(captured(llama)[1], llfx.LoRA(r=2))
    fill(gm)
    expected = gm(**call()).logits
    llfx.compile_layers(gm, backend="eager")
    whole: Any = torch.compile(gm, backend="eager", fullgraph=True)
    close(whole(**call()).logits, expected, 1e-10, "logits")
    assert graphs() == 1
    exported = torch.export.export(gm, (), call())
    close(exported.module()(**call()).logits, expected, 1e-10, "logits")
    with torch.no_grad():
        y = torch.func.functional_call(gm, dict(gm.named_parameters()), (), call())
    close(y.logits, expected, 1e-10, "logits")


@pytest.mark.broad
def test_what_cannot_be_compiled_is_refused_and_nothing_changes() -> None:
    model = llama(1)
    gm: Any = llfx.rewrite(model, llfx.LoRA(r=2))
    expected = step(gm, call())[0]
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {}, llfx.AdapterError, "compile_layers takes what rewrite, capture, load or adapt returned, not"),
        (llfx.wrap(model, llfx.LoRA(r=2)), {}, llfx.AdapterError, "compile its layers themselves"),
        (flat(), {}, llfx.AdapterError, "no layers"),
        (gm, {"backnd": "eager"}, TypeError, "backnd"),
        (gm, {"mode": "default", "options": {"trace.enabled": False}}, RuntimeError, "Either mode or options"),
    ]
    for target, options, error, message in cases:
        with pytest.raises(error, match=message):
            llfx.compile_layers(target, **options)
    assert torch.equal(step(gm, call())[0], expected)
    assert graphs() == 0


def flat() -> Any:
    """Return a graph without layers."""
    torch.manual_seed(0)
    return llfx.rewrite(GatedMLP(True), llfx.LoRA(r=2, target_names=(".",)))
