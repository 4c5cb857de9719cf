"""Each module of an adapted model has its own mode, in graphs captured before and after it changes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.models import tiny_llama

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
LORA = llfx.LoRA(r=2, dropout=0.3, target_roles=("query", "down"))


def build() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny_llama(num_hidden_layers=2, attention_dropout=0.3)).eval()


@functools.cache
def adapted_once() -> tuple[Any, Any]:
    model = build()
    adapted = llfx.adapt(model, LORA)
    randomise(adapted, 0)
    wrapped: Any = llfx.wrap(model, LORA)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    return adapted, wrapped


def seen(model: Any, **inputs: Any) -> list[Tensor]:
    """Return logits, gradients, and the next random number."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = model(input_ids=IDS, **inputs).logits
    if torch.is_grad_enabled():
        logits.sin().sum().backward()
    grads = [p.grad for p in llfx.adapter_parameters(model)]
    values = [logits, *(torch.zeros(()) if grad is None else grad for grad in grads), torch.rand(1)]
    return [value.detach().clone() for value in values]


def require_same(adapted: Any, wrapped: Any, **inputs: Any) -> list[Tensor]:
    expected = seen(wrapped, **inputs)
    torch.testing.assert_close(seen(adapted, **inputs), expected, rtol=1e-4, atol=1e-5)
    return expected


CHANGES: dict[str, dict[str, bool]] = {
    "the model without its head": {"": True, "model": False},
    "one layer": {"": True, "model.layers.1": False},
    "attention that stays on": {"": False, "model.layers.0.self_attn": True},
    "a site that stays on": {"": False, "model.layers.1.mlp.down_proj": True},
}


def put(models: tuple[Any, ...], modes: dict[str, bool]) -> None:
    for model in models:
        for path, mode in modes.items():
            model.get_submodule(path).train(mode)


@pytest.mark.broad
def test_modules_follow_their_own_modes_in_graphs_captured_before_and_after() -> None:
    models = adapted_once()
    found = []
    for modes in CHANGES.values():
        put(models, modes)
        found.append(require_same(*models)[0])
        with torch.no_grad(), llfx.frozen(models[0]):
            require_same(*models)
    assert all(not torch.equal(one, other) for one in found for other in found if one is not other)
    captures = len(models[0].graphs)
    for modes in CHANGES.values():
        put(models, modes)
        require_same(*models, output_hidden_states=True)
    assert len(models[0].graphs) == captures + 1


@pytest.mark.broad
def test_generation_runs_each_layer_in_its_mode() -> None:
    adapted, wrapped = adapted_once()
    put((adapted, wrapped), CHANGES["attention that stays on"])
    texts = []
    for model in (adapted, wrapped):
        torch.manual_seed(5)
        texts.append(
            model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        )
    for actual, expected in zip(*(text.logits for text in texts), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_copy_has_the_modes_of_the_model_and_of_a_graph() -> None:
    model = build().train()
    model.model.layers[0].eval()
    adapted = llfx.adapt(model, LORA)
    modes = {name: module.training for name, module in model.named_modules()}
    own = {name: module.training for name, module in adapted.named_modules()}
    assert {name: own[name] for name in modes} == modes
    assert {own[name] for name in own if name.startswith("model.layers.0")} == {False}
    twin = copy.deepcopy(adapted)
    assert {name: module.training for name, module in twin.named_modules()} == own
    gm: Any = llfx.rewrite(model, LORA)
    gm.eval()
    gm.model.layers[1].self_attn.train()
    other = llfx.adapt(gm)
    assert other.model.layers[1].self_attn.training
    assert not other.model.layers[1].mlp.down_proj.training
    assert not other.training
    torch.testing.assert_close(seen(other)[0], seen(gm)[0])


@pytest.mark.broad
def test_compiled_and_exported_calls_have_the_modes_of_modules() -> None:
    adapted, wrapped = adapted_once()
    torch._dynamo.reset()
    compiled: Any = torch.compile(adapted, backend="aot_eager")
    for name in ("attention that stays on", "the model without its head"):
        put((adapted, wrapped), CHANGES[name])
        expected = seen(wrapped)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected[0], rtol=1e-4, atol=1e-5)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = adapted

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.of(input_ids=ids, use_cache=False).logits
            return result

    put((adapted, wrapped), CHANGES["attention that stays on"])
    module = Logits()
    module(IDS)
    module.training = False  # and not its parts
    program = torch.export.export(module, (IDS,))
    torch.manual_seed(3)
    actual = program.module()(IDS)
    torch.testing.assert_close(actual, seen(wrapped, use_cache=False)[0], rtol=1e-4, atol=1e-5)
