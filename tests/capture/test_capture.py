"""Check that a captured graph keeps its model's values, shapes, modes, dtypes and signature."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

import lora_lite_fx as llfx
from tests.support.conformance import (
    calibration,
    close,
    output,
    randomise,
    representatives,
    rewrite_and_wrap,
    small,
    unchanged,
)
from tests.support.models import GatedMLP, Normed, ResidualMLP, ids, net, tiny_t5
from tests.support.selection import broad_after, broad_unless, is_typical, slow_after, slow_unless

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
CAUSAL: dict[str, Any] = {
    "llama": hf.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gemma2": hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0),
    "opt": hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
}
BERT = hf.BertConfig(**{**SMALL, "num_hidden_layers": 1})
VARIANTS = list(representatives().values())


def causal(name: str, dtype: torch.dtype = torch.float32, layers: int = 1) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CAUSAL[name])
    config.num_hidden_layers = layers
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@functools.cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, fx.GraphModule]:
    """Return `causal(name, dtype)` and its graph, cached because no test changes them and capturing is slow."""
    model = causal(name, dtype)
    return model, llfx.capture(model)


def tokens(batch: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    data = torch.randint(99, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(data)
    if padding:
        mask[0, :padding] = 0
    return {"input_ids": data, "attention_mask": mask, "labels": data.clone()}


# Hugging Face models.


@pytest.mark.parametrize("name", broad_after(1, slow_unless(("llama", "gpt2").__contains__, CAUSAL)))
def test_a_causal_model_is_captured_in_its_training_signature_and_equals_eager_at_other_shapes(
    name: str,
) -> None:
    model = causal(name, layers=2)
    with unchanged(model):
        gm = llfx.capture(model)
        assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == [
            "input_ids",
            "attention_mask",
            "labels",
        ]
        for batch in (tokens(1, 9), tokens(4, 3), tokens(2, 40, padding=5)):
            for training in (False, True):
                expected_model = copy.deepcopy(model).train(training)
                torch.manual_seed(1)
                expected = expected_model(**batch, use_cache=False)
                torch.manual_seed(1)
                actual = gm.train(training)(**batch)
                assert type(actual) is type(expected)
                assert torch.equal(actual.logits, expected.logits)
                assert torch.equal(actual.loss, expected.loss)


@pytest.mark.broad
def test_heads_with_labels_of_other_shapes_are_captured_with_their_loss() -> None:
    batch = tokens(2, 6)
    heads: list[tuple[Any, Tensor]] = [
        (hf.BertForMaskedLM, batch["labels"]),
        (hf.BertForSequenceClassification, torch.tensor([0, 1])),
        (hf.BertForTokenClassification, batch["labels"] % 2),
    ]
    for cls, labels in heads:
        torch.manual_seed(0)
        model = cls(BERT).eval()
        actual = llfx.capture(model)(**{**batch, "labels": labels})
        expected = model(**{**batch, "labels": labels})
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.logits, expected.logits)
    encoder = hf.BertModel(BERT).eval()
    batch.pop("labels")
    assert torch.equal(llfx.capture(encoder)(**batch).pooler_output, encoder(**batch).pooler_output)


@pytest.mark.broad
def test_an_encoder_decoder_is_captured_with_its_loss() -> None:
    config = tiny_t5(d_model=32, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    model = hf.T5ForConditionalGeneration(config).eval()
    batch = tokens(2, 6)
    close(llfx.capture(model)(**batch).logits, model(**batch).logits, 1e-6, "logits")


@pytest.mark.broad
def test_a_vision_model_is_captured_on_images_made_from_its_config() -> None:
    config = hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    model = hf.ViTForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(5, 3, 16, 16), "labels": torch.tensor([0, 1, 1, 0, 1])}
    assert torch.equal(llfx.capture(model)(**batch).logits, model(**batch).logits)


def two_sites(cls: type[llfx.Variant]) -> llfx.Variant:
    """Return a config for two sites of a layer of Llama or GPT-2, neither of them square."""
    return small(cls, target_names=("k_proj", "c_attn", "down_proj", r"mlp\.c_proj"))


def data_for(cls: type[llfx.Variant]) -> list[dict[str, torch.Tensor]] | None:
    """Return calibration data for a variant that starts from data, and None for the others."""
    return [tokens(2, 5)] if calibration(small(cls), None, ()) else None


@pytest.mark.parametrize("name", slow_unless(("llama",).__contains__, ["llama", "gpt2"]))
@pytest.mark.parametrize("cls", broad_unless(lambda cls: cls is llfx.LoRA, VARIANTS), ids=lambda cls: cls.__name__)
def test_adapted_language_models_equal_the_eager_wrapper(name: str, cls: type[llfx.Variant]) -> None:
    model, graph = captured(name, torch.float64)
    with unchanged(model):
        gm, wrapped = rewrite_and_wrap(graph, two_sites(cls), data_for(cls))
        randomise(gm, 0)
        randomise(wrapped, 0)
        batch = tokens(2, 11, padding=3)

        def call(module: nn.Module) -> Callable[..., Any]:
            return lambda *_: module(**batch)

        for training in (True, False):
            expected = output(call(wrapped.train(training)), ())
            close(output(call(gm.train(training)), ()), expected, 1e-10, "logits")
        close(output(call(llfx.merge(gm)), ()), output(call(gm), ()), 1e-6, "merged logits")  # Its norms are float32.


# Shapes.


def test_a_batch_of_one_in_the_example_stays_dynamic() -> None:
    model = net(GatedMLP)
    gm = llfx.capture(model, (ids(1, 5),))
    assert torch.equal(gm(ids(4, 9)), model(ids(4, 9)))


def test_example_inputs_may_be_one_tensor_passed_twice() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            difference: Tensor = self.fc(a) - 2 * self.fc(b)
            return difference

    model, x = Difference(), torch.randn(2, 3)
    gm = llfx.capture(model, (x, x))
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(gm(a, b), model(a, b))


def test_keyword_example_inputs_and_other_output_structures_are_kept() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
            return {"y": self.fc(x) * scale, "both": (x, scale)}

    gm = llfx.rewrite(Named(), llfx.LoRA(r=2, target_names="fc"), {"x": torch.randn(2, 3), "scale": torch.ones(2, 1)})
    result = gm(x=torch.randn(7, 3), scale=torch.ones(7, 1))
    assert result["y"].shape == (7, 4)
    assert len(result["both"]) == 2


def test_without_dynamic_shapes_other_shapes_are_refused() -> None:
    gm = llfx.rewrite(net(GatedMLP), llfx.LoRA(r=2), (ids(2, 5),), dynamic_shapes=None)
    with pytest.raises(Exception, match=r"(?i)guard|shape|expected"):
        gm(ids(3, 5))


# Modes.


@pytest.mark.parametrize("example_inputs", broad_after(1, [(ids(2, 5),), None]), ids=["exported", "traced"])
def test_training_updates_the_graphs_own_batch_statistics_and_not_the_models(example_inputs: Any) -> None:
    model = net(Normed, ResidualMLP)
    eager = copy.deepcopy(model).train()
    with unchanged(model):
        gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."), example_inputs).train()
        for seed in range(3):
            close(
                output(gm, (ids(3, 4, seed=seed),), seed),
                output(eager, (ids(3, 4, seed=seed),), seed),
                1e-6,
                "train",
            )
    for name, buffer in eager.named_buffers():
        close(gm.get_buffer(name).float(), buffer.float(), 1e-6, name)
    close(output(gm.eval(), (ids(3, 4),)), output(eager.eval(), (ids(3, 4),)), 1e-6, "eval")
    assert gm.get_buffer("blocks.0.norm.num_batches_tracked") == 3


def test_dropout_that_ignores_the_mode_also_runs_in_evaluation() -> None:
    class AlwaysNoisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 50)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, training=True)

    for example_inputs in (None, (torch.randn(2, 6),)):
        gm = llfx.capture(AlwaysNoisy(), example_inputs).eval()
        assert (gm(torch.randn(9, 6)) == 0).any()


def test_the_graph_has_the_models_mode() -> None:
    assert llfx.capture(net(ResidualMLP).train(), (ids(2, 5),)).training
    assert not llfx.capture(net(ResidualMLP).eval(), (ids(2, 5),)).training


# Dtypes.


@pytest.mark.broad
@pytest.mark.parametrize("cls", slow_unless(is_typical, VARIANTS), ids=lambda cls: cls.__name__)
def test_a_bfloat16_model_gets_float32_adapters_and_computes_in_bfloat16(cls: type[llfx.Variant]) -> None:
    model, graph = captured("llama", torch.bfloat16)
    gm, wrapped = rewrite_and_wrap(graph, two_sites(cls), data_for(cls))
    assert all(t.dtype == torch.float32 for t in llfx.adapter_state_dict(gm).values() if t.is_floating_point())
    randomise(gm, 0)
    randomise(wrapped, 0)
    batch = tokens(2, 7)
    assert gm(**batch).logits.dtype == model(**batch).logits.dtype
    assert torch.equal(gm(**batch).logits, wrapped(**batch).logits)
    gm(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in llfx.adapter_parameters(gm))


@pytest.mark.broad
@pytest.mark.parametrize("cls", slow_unless(is_typical, VARIANTS), ids=lambda cls: cls.__name__)
def test_a_float32_capture_runs_under_autocast_as_the_eager_wrapper_does(cls: type[llfx.Variant]) -> None:
    gm, wrapped = rewrite_and_wrap(captured("llama")[1], two_sites(cls), data_for(cls))
    randomise(gm, 0)
    randomise(wrapped, 0)
    batch = tokens(2, 7)
    grads: list[tuple[Tensor, list[Any]]] = []
    for adapted in (gm, wrapped):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = adapted(**batch)
        result.loss.backward()
        grads.append((result.logits, [p.grad for p in llfx.adapter_parameters(adapted)]))
    assert torch.equal(grads[0][0], grads[1][0])
    for ours, theirs in zip(grads[0][1], grads[1][1], strict=True):
        close(ours, theirs, 1e-2, "gradient")


def test_the_adapters_dtype_can_be_chosen() -> None:
    gm = llfx.rewrite(net(GatedMLP), llfx.LoRA(r=2, dtype=torch.float64, target_names="."))
    assert {t.dtype for t in llfx.adapter_state_dict(gm).values()} == {torch.float64}
    assert gm(ids(2, 3)).dtype == torch.float32


# torch.compile.


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, slow_after(4, VARIANTS)), ids=lambda cls: cls.__name__)
def test_the_rewritten_graph_compiles_whole_and_once_for_all_shapes(cls: type[llfx.Variant]) -> None:
    _, graph = captured("llama")
    gm = llfx.rewrite(graph, two_sites(cls), calibration=data_for(cls))
    randomise(gm, 0)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 9), (3, 12), (5, 31), (8, 4)):
        inputs = tokens(batch, length)
        close(compiled(**inputs).logits, gm(**inputs).logits, 1e-5, "logits")  # OFT's sum is rounded once less by hand
    assert counter.frame_count == 1


def test_a_graph_that_counts_elements_is_compiled() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) / x.numel()
            return y

    gm = llfx.rewrite(Mean(), llfx.LoRA(r=2, target_names="linear"), (torch.randn(3, 4),))
    randomise(gm, 0)
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for rows in (3, 5, 6):
        close(compiled(torch.ones(rows, 4)), gm(torch.ones(rows, 4)), 1e-6, f"{rows} rows")


@pytest.mark.broad
def test_the_compiled_graph_follows_the_mode() -> None:
    gm = llfx.rewrite(llfx.capture(net(ResidualMLP), (ids(2, 5),)), llfx.LoRA(r=2, dropout=0.5, target_names="."))
    randomise(gm, 0)
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for training in (True, False, True):
        gm.train(training)
        close(output(compiled, (ids(3, 4),)), output(gm, (ids(3, 4),)), 1e-6, f"training={training}")


def test_buffers_are_saved_where_the_model_saves_them() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.register_buffer("saved", torch.ones(3))
            self.register_buffer("shift", torch.ones(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lin(x) * self.saved + self.shift
            return y

    model = Buffers()
    for inputs in (None, (torch.ones(2, 3),)):
        gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=("lin",)), inputs)
        for graph in (llfx.capture(model, inputs), llfx.remove(gm), llfx.merge(gm), llfx.remove(copy.deepcopy(gm))):
            assert graph.state_dict().keys() == model.state_dict().keys()
        assert "shift" in dict(gm.named_buffers())
        gm.load_state_dict({**gm.state_dict(), **model.state_dict()})


@pytest.mark.parametrize("name", broad_after(2, ["graph", "code", "meta", "execution", "host"]))
@pytest.mark.parametrize("inputs", [None, (torch.ones(2, 3),)], ids=["traced", "exported"])
def test_names_that_a_graph_module_needs_are_refused_at_the_root_alone(name: str, inputs: Any) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.add_module(name, nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, name)(self.lin(x))
            return y

    cfg = llfx.LoRA(r=2, target_names=(".",))
    with pytest.raises(llfx.CaptureError) as caught:
        llfx.rewrite(Named(), cfg, inputs)
    assert str(caught.value) == (
        f"Named has {name!r} at its root, and a graph module has an attribute of that name, so the graph could not read"
        " it. The way out: rename it, or capture a module that holds the model, such as nn.Sequential(model): there it"
        f" is '0.{name}'."
    )
    held = nn.Sequential(Named())
    gm = llfx.rewrite(held, cfg, inputs)
    assert torch.equal(gm(torch.ones(2, 3)), held(torch.ones(2, 3)))
