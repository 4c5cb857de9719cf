"""Many threads run one adapted model in evaluation, also when a call comes that no graph was captured for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.models import tiny_llama

IDS = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([0]), 0)
SIGNATURES: dict[str, Callable[[Any], Any]] = {
    "ids": lambda model: model(IDS, use_cache=False).logits,
    "ids and mask": lambda model: model(IDS, attention_mask=MASK, use_cache=False).logits,
    "labels": lambda model: model(IDS, labels=IDS, use_cache=False).loss,
    "hidden states": lambda model: model(IDS, output_hidden_states=True, use_cache=False).hidden_states[1],
    "a cache": lambda model: model(IDS, use_cache=True).past_key_values.layers[0].keys,
    "generate": lambda model: model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
}


@pytest.mark.broad
@pytest.mark.parametrize(
    "cfg", [pytest.param(llfx.LoRA(r=2), marks=pytest.mark.slow), llfx.DoRA(r=2)], ids=lambda cfg: type(cfg).__name__
)
def test_threads_that_bring_new_signatures_get_what_one_thread_gets(cfg: llfx.Variant) -> None:
    base = hf.LlamaForCausalLM(tiny_llama()).eval()
    model, alone = llfx.adapt(base, cfg), llfx.adapt(base, cfg)
    for each in (model, alone):
        randomise(each, 0)
    with torch.no_grad():
        expected = {name: call(alone) for name, call in SIGNATURES.items()}
    results: list[tuple[str, torch.Tensor]] = []
    errors: list[BaseException] = []
    together = threading.Barrier(2 * len(SIGNATURES))

    def run(name: str) -> None:
        try:
            together.wait(60)
            with torch.no_grad():  # the mode belongs to the thread
                for _ in range(3):
                    results.append((name, SIGNATURES[name](model)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in SIGNATURES for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors, errors
    assert len(results) == 6 * len(SIGNATURES)
    for name, result in results:
        torch.testing.assert_close(result, expected[name], msg=name)
