"""Banks in adapted models: `adapter_ids` of calls and of `generate`, and PEFT's adapters in one batch as an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite_fx as llfx
from tests.hugging_face.test_named_adapters import adapted_by, base
from tests.support.conformance import close
from tests.support.selection import broad_after

PROMPT = torch.randint(1, 20, (4, 5), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([2, -1, 0, 2])


@pytest.mark.parametrize("how", broad_after(1, [{}, {"num_beams": 2, "num_return_sequences": 2}]), ids=str)
def test_a_mixed_batch_generates_what_each_row_does_alone(how: dict[str, Any]) -> None:
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2), slots=3))
    settings: Any = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False, **how}
    mixed = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), adapter_ids=IDS, **settings)
    alone = [
        model.generate(row[None], attention_mask=torch.ones_like(row[None]), adapter_ids=slot[None], **settings)
        for row, slot in zip(PROMPT, IDS, strict=True)
    ]
    assert torch.equal(mixed, torch.cat(alone))
    assert not torch.equal(mixed, base().generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings))


@pytest.mark.broad
def test_a_mixed_batch_samples_what_each_adapter_does() -> None:
    """Compare with batches of the same shape in which all rows have one slot: the draws of a row are the same there."""
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2), slots=3))

    def sampled(ids: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        settings: Any = {"min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": True, "top_k": 0}
        tokens: torch.Tensor = model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), adapter_ids=ids, temperature=0.8, **settings
        )
        return tokens

    mixed = sampled(IDS)
    for row, slot in enumerate(IDS.tolist()):
        assert torch.equal(mixed[row], sampled(torch.full_like(IDS, slot))[row])
    assert not torch.equal(mixed, sampled(torch.full_like(IDS, -1)))


@pytest.mark.broad
def test_rows_are_those_of_pefts_mixed_batch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2, alpha=3.0), slots=3))
    for slot in range(3):
        llfx.save_peft(llfx.take_slot(model, slot), tmp_path / str(slot))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "0", "0").eval()
    for slot in (1, 2):
        theirs.load_adapter(tmp_path / str(slot), str(slot))
    names = ["__base__" if slot < 0 else str(slot) for slot in IDS.tolist()]
    close(model(PROMPT, adapter_ids=IDS).logits, theirs(PROMPT, adapter_names=names).logits, 1e-5, "logits")


@pytest.mark.broad
def test_slots_are_loaded_while_the_model_serves(tmp_path: Path) -> None:
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2), slots=3))
    expected = model(PROMPT, adapter_ids=torch.full((4,), 2)).logits
    graphs = len(model.graphs)
    llfx.save_slot(model, 2, tmp_path / "adapter.safetensors")
    llfx.load_slot(model, 0, tmp_path / "adapter.safetensors")
    assert torch.equal(model(PROMPT, adapter_ids=torch.zeros(4, dtype=torch.long)).logits, expected)
    llfx.reset_slot(model, 0)
    close(
        model(PROMPT, adapter_ids=torch.zeros(4, dtype=torch.long)).logits, base()(PROMPT).logits, 1e-6, "a new start"
    )
    assert len(model.graphs) == graphs


@pytest.mark.broad
def test_training_through_the_adapted_model() -> None:
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2), slots=3)).train()
    optimizer = llfx.SlotOptimizer(model, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    before = {name: value.clone() for name, value in llfx.adapter_state_dict(model).items()}
    loss = model(PROMPT, labels=PROMPT, adapter_ids=IDS).loss
    loss.backward()
    optimizer.step(IDS)
    optimizer.zero_grad()
    assert model(PROMPT, labels=PROMPT, adapter_ids=IDS).loss < loss
    for name, value in llfx.adapter_state_dict(model).items():
        assert torch.equal(value[1], before[name][1])
        assert not torch.equal(value[2], before[name][2])


@pytest.mark.broad
def test_a_call_without_ids_is_an_error() -> None:
    model = adapted_by(llfx.Bank(llfx.LoRA(r=2), slots=3))
    missing = "adapter_ids is missing: the model has a bank"
    with pytest.raises(llfx.CallError, match=missing):
        model(PROMPT)
    with pytest.raises(llfx.CallError, match=missing):
        model.generate(PROMPT, max_new_tokens=2)
    with model.disable_adapter():
        assert torch.equal(model(PROMPT).logits, base()(PROMPT).logits)
