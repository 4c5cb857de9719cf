"""Check adapted models: their class, their graphs, their files, and the uses that they refuse."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.models import GatedMLP, Net, one_layer_llama, tiny_llama
from tests.support.selection import broad_after
from tests.support.untouched import untouched

LLAMA = tiny_llama(tie_word_embeddings=True)
IDS = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
EVERYWHERE = llfx.LoRA(r=2, target_names=(".",))  # Includes the tied head.


def base() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(LLAMA).eval()


@functools.cache
def adapted() -> Any:
    model = llfx.adapt(base(), EVERYWHERE)
    randomise(model, 0)
    return model


def test_an_adapted_model_has_the_class_and_the_signature_of_its_base() -> None:
    model = adapted()
    assert isinstance(model, hf.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert inspect.signature(model.forward) == inspect.signature(base().forward)
    assert model.can_generate()


def test_only_the_adapters_train_and_the_weights_are_shared() -> None:
    model = base()
    with untouched(model):
        adapted_model = llfx.adapt(model, llfx.LoRA(r=2))
        adapted_model(IDS, labels=IDS).loss.backward()
        assert torch.equal(adapted_model(IDS).logits, model(IDS).logits)  # The start values change nothing.
    parameters = llfx.adapter_parameters(adapted_model)
    assert {id(p) for p in parameters} == {id(p) for p in adapted_model.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in parameters)
    frozen = {name: p for name, p in adapted_model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == dict(model.named_parameters()).keys()
    assert all(p.data_ptr() == model.get_parameter(name).data_ptr() for name, p in frozen.items())
    adapter_names = llfx.adapter_state_dict(adapted_model).keys()
    assert adapted_model.state_dict().keys() == model.state_dict().keys() | adapter_names


@pytest.mark.broad
def test_files_of_every_kind_bring_the_adapters_back(tmp_path: Path) -> None:
    model, expected = adapted(), adapted()(IDS).logits
    llfx.save(model, tmp_path / "adapter.safetensors")
    model.save_pretrained(tmp_path / "folder")
    llfx.save_peft(model, tmp_path / "peft")
    for path in ("adapter.safetensors", "folder", "peft"):
        assert torch.equal(llfx.adapt(base(), tmp_path / path)(IDS).logits, expected), path
    graph = llfx.load(base(), tmp_path / "adapter.safetensors")
    assert torch.equal(graph(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).logits, expected)
    with pytest.raises(llfx.ConfigError, match="calibration"):
        llfx.adapt(base(), tmp_path / "peft", calibration=[{"input_ids": IDS}])


def test_merge_and_remove_give_eager_models_of_the_class(tmp_path: Path) -> None:
    model = adapted()
    with untouched(model):
        merged, removed = llfx.merge(model), llfx.remove(model)
    assert type(merged) is type(removed) is hf.LlamaForCausalLM
    close(merged(IDS).logits, model(IDS).logits.detach(), 1e-4, "merged")
    assert torch.equal(removed(IDS).logits, base()(IDS).logits)
    assert removed.state_dict().keys() == base().state_dict().keys()
    merged.save_pretrained(tmp_path)  # The head is not tied any more.
    assert torch.equal(hf.LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, merged(IDS).logits)


@pytest.mark.broad
def test_inspect_shows_the_sites_and_the_adapters() -> None:
    rows = {row.name: row for row in llfx.inspect(adapted())}
    assert rows["model.layers.0.self_attn.q_proj"].adapters == ("LoRA",)
    assert rows["lm_head"].roles[0] == "head"
    expected = {row.name: row.roles for row in llfx.inspect(base())}
    assert {name: row.roles for name, row in rows.items()} == expected


@pytest.mark.broad
def test_a_copy_has_adapters_of_its_own() -> None:
    model, expected = adapted(), adapted()(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, expected)
    randomise(twin, 1)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(twin(IDS).logits, expected)


@pytest.mark.broad
def test_a_copy_of_a_module_alone_is_a_module_of_the_same_model() -> None:
    model = copy.deepcopy(adapted())
    expected = model(IDS).logits
    path = "model.layers.0.mlp.up_proj"
    model.set_submodule(path, copy.deepcopy(model.get_submodule(path)))
    assert torch.equal(model(IDS).logits, expected)
    holder = torch.nn.ModuleList([model.get_submodule(path), model])
    twin: Any = copy.deepcopy(holder)
    assert twin[0]._graphs is twin[1]._graphs is not model._graphs


@pytest.mark.broad
@pytest.mark.parametrize(
    ("dtype", "tolerance"), broad_after(1, [(torch.float64, 1e-4), (torch.bfloat16, 5e-2)], several=True)
)
def test_a_cast_makes_new_graphs_and_a_move_to_the_same_place_does_not(dtype: torch.dtype, tolerance: float) -> None:
    """In half precision the adapters are cast too, although an adapter of such a base is made in float32."""
    model = copy.deepcopy(adapted())
    model.to(dtype)
    assert model(IDS).logits.dtype == dtype
    close(model(IDS).logits.float(), adapted()(IDS).logits, tolerance, "logits")
    graphs = model._graphs.captures
    model.to("cpu", dtype)(IDS)
    assert model._graphs.captures == graphs


def test_the_inner_model_and_a_single_module_run_graphs_of_their_own() -> None:
    model, merged = adapted(), llfx.merge(adapted())
    hidden = merged.model(IDS).last_hidden_state
    close(model.model(IDS).last_hidden_state, hidden, 1e-4, "hidden states")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for rows in (x, x[0], x[:1]):
        for module in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp"):
            close(model.get_submodule(module)(rows), merged.get_submodule(module)(rows), 1e-4, module)


@pytest.mark.broad
def test_outputs_that_only_one_mode_has_are_returned() -> None:
    """Check with XLNet, which returns its memories only in evaluation mode."""
    config = hf.XLNetConfig(vocab_size=99, d_model=16, n_layer=1, n_head=2, d_inner=24, mem_len=4)
    eager = hf.XLNetLMHeadModel(config)
    model = llfx.adapt(eager, llfx.LoRA(r=2))
    for training in (True, False):
        actual, expected = (m.train(training)(input_ids=IDS, labels=IDS) for m in (model, eager))
        assert actual.keys() == expected.keys()
        assert ("mems" in actual) != training


@pytest.mark.broad
def test_graphs_are_bounded_and_the_reason_of_each_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = llfx.adapt(base(), llfx.LoRA(r=2), max_graphs=1)

    def messages() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "lora_lite_fx"]
        return [line for line in lines if line.startswith("LlamaForCausalLM: ")]  # Leaves out those of phases.

    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        model(IDS)
        assert not messages()
        with_states = model(IDS, output_hidden_states=True)
    assert len(with_states.hidden_states) == 2
    assert len(model.graphs) == 1
    captured, dropped = messages()
    assert "output_hidden_states: not given before, True now" in captured
    assert "max_graphs" in dropped


class Marked(hf.LlamaForCausalLM):
    """Counts tokens of a kind twice, in the calls that have some: as Ovis 2 looks for each kind of image token."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        for kind in (1, 7):
            if (marked := input_ids == kind).any():
                embedded = embedded.masked_scatter(marked[..., None], 2 * embedded[marked])
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.mark.broad
def test_a_call_for_which_the_model_decides_otherwise_gets_a_graph_of_its_own() -> None:
    model = Marked(tiny_llama(hidden_size=16, intermediate_size=24)).double()
    adapted, wrapped = llfx.adapt(model, llfx.LoRA(r=2)), llfx.wrap(model, llfx.LoRA(r=2))
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    calls = [torch.tensor(ids) for ids in ([[2, 3, 4]], [[7, 3], [4, 7]], [[1, 7, 2, 5]], [[5, 1, 1], [2, 2, 6]])]
    captures = [adapted._graphs.captures]
    for _ in range(2):
        for ids in calls:
            actual, expected = adapted(ids, use_cache=False), wrapped(ids, use_cache=False)
            torch.testing.assert_close(actual.logits, expected.logits)
        captures.append(adapted._graphs.captures)
    assert captures == [1, 4, 4]


@pytest.mark.broad
def test_several_adapters_share_one_model() -> None:
    configs = [llfx.LoRA(r=2), llfx.IA3()]
    model = llfx.adapt(base(), configs)
    wrapped: Any = llfx.wrap(base(), configs)
    randomise(model, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(model))
    close(model(IDS).logits, wrapped(IDS).logits.detach(), 1e-5, "logits")
    hidden = wrapped.model(IDS).last_hidden_state
    close(model.model(IDS).last_hidden_state, hidden.detach(), 1e-5, "the second graph's")


@pytest.mark.broad
def test_calibration_batches_are_arguments_of_calls() -> None:
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    model = llfx.adapt(base(), llfx.EVA(r=2), calibration=batches)
    graph = llfx.rewrite(base(), llfx.EVA(r=2), calibration=batches)
    for name, tensor in llfx.adapter_state_dict(model).items():
        close(tensor.abs(), llfx.adapter_state_dict(graph)[name].abs(), 1e-4, name)
    with pytest.raises(llfx.CaptureError, match="Calibration batch 1 does not fit the captured model"):
        llfx.adapt(base(), llfx.EVA(r=2), calibration=[*batches, {"inputs_embeds": torch.zeros(2, 6, 32)}])


def test_a_pipeline_generates() -> None:
    words = {f"w{i}": i for i in range(99)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", padding_side="left")
    texts = []
    for model in (adapted(), llfx.merge(adapted())):
        generate = hf.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
        results = generate(["w5 w6 w7", "w8"], max_new_tokens=4, do_sample=False)
        texts.append([result[0]["generated_text"] for result in results])
    assert texts[0] == texts[1]


@pytest.mark.broad
def test_a_transform_takes_calls_that_were_made_before_and_refuses_others_by_name() -> None:
    model = llfx.adapt(one_layer_llama().double(), llfx.LoRA(r=2))
    randomise(model, 0)
    ids = torch.randint(3, 32, (3, 5))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        arguments = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        result: Tensor = torch.func.functional_call(model, parameters, (), arguments).loss
        return result

    of_rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    with pytest.raises(llfx.AdapterError, match=r"torch\.func meets the first call of its kind .* torch\.no_grad\(\)"):
        of_rows(parameters, ids)
    with pytest.raises(llfx.AdapterError, match=r"torch\.jit\.trace meets the first call"):
        torch.jit.trace(model, (ids,), strict=False)
    with torch.no_grad():
        loss(parameters, ids[0])
    gradients = of_rows(parameters, ids)
    for index, row in enumerate(ids):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            close(gradients[name][index], gradient, 1e-9, name)


@pytest.mark.broad
def test_torch_compile_compiles_the_graphs() -> None:
    model = adapted()
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(compiled(IDS).logits, model(IDS).logits)


@pytest.mark.broad
@pytest.mark.parametrize("tied", broad_after(1, [True, False]))
def test_embeddings_are_resized_before_and_after_a_call(tied: bool) -> None:
    model = hf.LlamaForCausalLM(tiny_llama(tie_word_embeddings=tied)).eval()
    users, expected = copy.deepcopy(model), copy.deepcopy(model)
    resized = llfx.adapt(users, llfx.LoRA(r=2))
    for size in (105, 110):  # the first before a call
        for each in (resized, expected):
            torch.manual_seed(1)
            each.resize_token_embeddings(size)
        eager: Any = llfx.wrap(copy.deepcopy(expected), llfx.LoRA(r=2))
        randomise(resized, 0)
        llfx.load_adapter_state_dict(eager, llfx.adapter_state_dict(resized))
        ids = IDS.clone()
        ids[0, 0] = size - 1
        close(resized(ids).logits, eager(ids).logits, 1e-5, "logits")
        assert torch.equal(resized.generate(ids, max_new_tokens=3), eager.generate(ids, max_new_tokens=3))
    assert llfx.remove(resized).config.vocab_size == 110
    assert users.config.vocab_size == users.get_output_embeddings().out_features == 99
    with llfx.frozen(resized), pytest.raises(llfx.AdapterError, match="resized inside"):
        resized.resize_token_embeddings(120)


def test_models_and_configs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(llfx.AdapterError, match="there is rewrite"):
        llfx.adapt(Net([GatedMLP], True, False), llfx.LoRA(r=2))
    with pytest.raises(llfx.AdapterError, match="adapted already"):
        llfx.adapt(adapted(), llfx.LoRA(r=2))
    with pytest.raises(llfx.CaptureError, match="already"):
        llfx.rewrite(adapted(), llfx.LoRA(r=2))
    with pytest.raises(llfx.ConfigError, match="max_graphs"):
        llfx.adapt(base(), llfx.LoRA(r=2), max_graphs=0)
    with pytest.raises(llfx.SelectionError):
        llfx.adapt(base(), llfx.LoRA(r=2, target_names=("nowhere",)))
    with pytest.raises(llfx.AdapterError, match=r"'lm_head' has an adapter.*before adapt"):
        adapted().resize_token_embeddings(120)
