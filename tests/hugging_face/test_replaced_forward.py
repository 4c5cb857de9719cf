"""Trainers replace `forward` on the instance and pass arguments of their own: neither is part of a graph."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.models import one_layer_llama

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))


def base() -> Any:
    torch.manual_seed(0)
    return one_layer_llama().eval()


@functools.cache
def adapted() -> Any:
    model = llfx.adapt(base(), llfx.LoRA(r=2, target_names=(".",)))
    randomise(model, 0)
    return model


def with_fused_head(model: Any) -> Any:
    """Replace `forward` as TRL does: by one that calls the one before, or the model without its head."""
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused: bool = False, **kwargs: Any) -> Any:
        if fused:
            return self.base_model(*args, **kwargs).last_hidden_state @ self.lm_head.weight.t()
        return before(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.broad
def test_a_replaced_forward_runs_the_graphs_and_is_not_captured() -> None:
    model = copy.deepcopy(adapted())
    expected = adapted()(IDS).logits
    with_fused_head(model)
    assert torch.equal(model(IDS).logits, expected)
    generated = model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, adapted().generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0))
    with pytest.raises(llfx.AdapterError, match="leaves out the adapter of 'lm_head'"):
        model(IDS, fused=True)
    assert model.model(IDS).last_hidden_state.shape == (2, 6, 16)  # called by the user, who wants this part
    twin = copy.deepcopy(model)
    randomise(twin, 1)
    assert not torch.equal(twin(IDS).logits, expected)
    assert "forward" not in vars(llfx.merge(model))


@pytest.mark.broad
def test_a_forward_that_was_replaced_before_adapt_is_left_to_the_user_with_a_warning() -> None:
    patched = with_fused_head(base())
    with pytest.warns(UserWarning, match=r"replaced on the instance .*with_fused_head"):
        model = llfx.adapt(patched, llfx.LoRA(r=2, target_names=(".",)))
    llfx.load_adapter_state_dict(model, llfx.adapter_state_dict(adapted()))
    close(model(IDS).logits, adapted()(IDS).logits.detach(), 1e-6, "logits")
    assert "forward" in vars(patched)


@pytest.mark.broad
def test_numbers_that_vary_from_call_to_call_share_one_graph() -> None:
    """Check the count of a batch's tokens in a loss that a graph computes, and lengths for flash attention."""
    config: Any = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 3
    model = llfx.adapt(hf.LlamaForTokenClassification(config).eval(), llfx.LoRA(r=2))
    eager = llfx.remove(model)
    for count in (3, 5, torch.tensor(7)):
        actual, expected = (m(IDS, labels=IDS % 3, num_items_in_batch=count).loss for m in (model, eager))
        close(actual, expected.detach(), 1e-6, f"loss by {count}")
    assert model._graphs.captures == 2  # One for the examples that adapt makes.
    model = adapted()
    before = model._graphs.captures
    for length in (5, 6):
        ids = IDS[:1, :length]
        positions = torch.cat([torch.arange(3), torch.arange(length - 3)])[None]
        ends = torch.tensor([0, 3, length], dtype=torch.int32)
        flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length - 3, "max_length_k": length - 3}
        actual = model(ids, position_ids=positions, use_cache=False, **flash).logits
        texts = [model(ids[:, :3]).logits, model(ids[:, 3:]).logits]
        close(actual, torch.cat(texts, dim=1).detach(), 1e-5, "logits of packed texts")
    assert model._graphs.captures == before + 1


@pytest.mark.broad
def test_stop_strings_stay_with_generate() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:32]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = adapted().generate(IDS[:1], **options)[0, 6:].tolist()
    stop = [tokenizer.decode([tokens[2]])]
    stopped = adapted().generate(IDS[:1], **options, stop_strings=stop, tokenizer=tokenizer)
    assert stopped[0, 6:].tolist() == tokens[: tokens.index(tokens[2]) + 1]
