"""One short test for each front door, for someone who has just installed: `python -m pytest -m smoke`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from lora_lite_fx.adapters import registry
from lora_lite_fx.testing import check
from tests.support.captured import captured
from tests.support.conformance import randomise
from tests.support.models import GatedMLP, Net, ids, net, one_layer_llama

pytestmark = pytest.mark.smoke

LORA = llfx.LoRA(r=2, target_roles=("attention", "mlp"))
IDS = torch.arange(3, 15).reshape(2, 6)
TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
EXAMPLE = (ids(2, 5),)


def llama(cfg: Any = LORA, seed: int = 0) -> tuple[Any, Any]:
    """Return a language model, and its graph with adapters that do something."""
    model, graph = captured(one_layer_llama)
    gm = llfx.rewrite(graph, cfg)
    randomise(gm, seed)
    return model, gm


def small_net() -> Net:
    return net(GatedMLP)


def small(cfg: Any = llfx.LoRA(r=2, target_names=(".",))) -> tuple[Net, Any]:  # noqa: B008
    """Return a model of one block, and its graph with adapters that do something."""
    model, graph = captured(small_net, inputs=EXAMPLE)
    gm = llfx.rewrite(graph, cfg)
    randomise(gm, 0)
    return model, gm


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**TOKENS).logits
    return result


def test_rewrite_trains_the_adapters_alone() -> None:
    model = one_layer_llama()
    gm = llfx.rewrite(model, LORA)
    torch.testing.assert_close(logits(gm), logits(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(llfx.adapter_parameters(gm), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = gm(**TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_capture_and_wrap_and_verify() -> None:
    model, gm = llama()
    graph = llfx.capture(model)
    torch.testing.assert_close(logits(graph), logits(model))
    wrapped = llfx.wrap(graph, LORA)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    torch.testing.assert_close(logits(gm), logits(wrapped))
    assert llfx.verify(graph, model, TOKENS).ok


def test_adapt_generates() -> None:
    model = one_layer_llama().eval()
    chat = llfx.adapt(model, LORA)
    settings: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(chat.generate(IDS, **settings), model.generate(IDS, **settings))
    randomise(chat, 0)
    wrapped: Any = llfx.wrap(model, LORA)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(chat))
    assert torch.equal(chat.generate(IDS, **settings), wrapped.generate(IDS, **settings))


def test_own_files(tmp_path: Path) -> None:
    _, gm = llama()
    llfx.save(gm, tmp_path / "adapter.safetensors")
    again = llfx.load(captured(one_layer_llama)[1], tmp_path / "adapter.safetensors")
    assert torch.equal(logits(again), logits(gm))


def test_files_of_peft(tmp_path: Path) -> None:
    model, gm = llama()
    llfx.save_peft(gm, tmp_path)
    assert torch.equal(logits(llfx.load_peft(captured(one_layer_llama)[1], tmp_path)), logits(gm))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model, tmp_path)), logits(gm))
    assert set(llfx.to_peft_config(gm)["target_modules"]) >= {"q_proj", "down_proj"}
    assert isinstance(llfx.from_peft_config(peft.LoraConfig(r=2, target_modules=["q_proj"])), llfx.LoRA)


def test_files_of_lora_lite(tmp_path: Path) -> None:
    _, gm = llama()
    llfx.save_lora_lite(gm, tmp_path / "lite.safetensors")
    again = llfx.load_lora_lite(captured(one_layer_llama)[1], tmp_path / "lite.safetensors")
    torch.testing.assert_close(logits(again), logits(gm))


def test_merge_and_remove() -> None:
    model, gm = llama(llfx.DoRA(r=2))
    torch.testing.assert_close(logits(llfx.merge(gm)), logits(gm), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(llfx.remove(gm)), logits(llfx.capture(model, verify=False)))


def test_compile() -> None:
    _, gm = small()
    compiled: Any = torch.compile(gm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*EXAMPLE), gm(*EXAMPLE))
    layers: Any = llfx.compile_layers(small()[1], backend="eager")
    torch.testing.assert_close(layers(*EXAMPLE), gm(*EXAMPLE))


def test_export(tmp_path: Path) -> None:
    _, gm = small()
    torch.export.save(torch.export.export(gm, EXAMPLE), tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(*EXAMPLE), gm(*EXAMPLE))
    _, language_model = llama(llfx.DoRA(r=2, target_roles=("attention", "mlp")))
    inputs = {name: TOKENS[name] for name in ("input_ids", "attention_mask")}
    torch.export.save(llfx.export(language_model, inputs, outputs=("logits",)), tmp_path / "plain.pt2")
    plain = torch.export.load(tmp_path / "plain.pt2").module()
    torch.testing.assert_close(plain(**inputs), logits(language_model))
    torch.testing.assert_close(llfx.bake(language_model)(**inputs).logits, logits(language_model))


def test_inspect_and_program_and_trainable_parameters() -> None:
    _, gm = llama()
    rows = {row.name: row for row in llfx.inspect(gm)}
    assert rows["model.layers.0.self_attn.q_proj"].roles[0] == "query"
    assert rows["model.layers.0.self_attn.q_proj"].adapters == ("LoRA",)
    assert "share_siblings" in str(llfx.inspect(gm, passes=True))
    assert "linear" in llfx.program(gm, "training").code
    assert [row.variant for row in llfx.adapters(gm)] == ["LoRA"]
    torch.testing.assert_close(logits(llfx.optimize(gm)), logits(gm))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_layer_llama().config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["sites"]}
    assert "layers.0.mlp.down_proj" in names


def test_adapters_by_name() -> None:
    model, gm = llama({"fr": LORA, "de": llfx.IA3()})
    both = logits(gm)
    with llfx.active(gm, "fr"), llfx.scaled(gm, 0.0):
        torch.testing.assert_close(logits(gm), logits(model))
    with llfx.active(gm, "fr"):
        alone = logits(gm)
    with llfx.by_row(gm, ["fr", None]):
        rows = logits(gm)
    torch.testing.assert_close(rows[0], alone[0])
    torch.testing.assert_close(rows[1], logits(model)[1])
    with torch.no_grad(), llfx.frozen(gm):
        torch.testing.assert_close(gm(**TOKENS).logits, both)
    llfx.combine(gm, {"fr": 0.5}, "half")
    llfx.delete(gm, "de")
    llfx.add(gm, {"it": llfx.HRA(r=2)})
    with llfx.active(gm, "half"):
        halved = logits(gm)
    with llfx.active(gm, "fr"), llfx.scaled(gm, 0.5):
        torch.testing.assert_close(logits(gm), halved)
    llfx.set_adapter(gm, "fr")
    torch.testing.assert_close(logits(gm), alone)


def test_a_bank(tmp_path: Path) -> None:
    model, gm = llama(llfx.Bank(LORA, slots=3))

    def of_slot(slot: int) -> Tensor:
        with torch.no_grad():
            result: Tensor = gm(**TOKENS, adapter_ids=torch.tensor([slot, -1])).logits
        return result

    torch.testing.assert_close(of_slot(2)[1], logits(model)[1])
    torch.testing.assert_close(of_slot(2)[0], logits(llfx.take_slot(gm, 2))[0])
    llfx.save_slot(gm, 2, tmp_path / "slot.safetensors")
    llfx.load_slot(gm, 0, tmp_path / "slot.safetensors")
    assert torch.equal(of_slot(0), of_slot(2))
    llfx.put_slot(gm, 1, llfx.take_slot(gm, 0))
    assert torch.equal(of_slot(1), of_slot(2))
    llfx.reset_slot(gm, 2)
    torch.testing.assert_close(of_slot(2), logits(model))


def test_an_adapter_becomes_another() -> None:
    _, gm = llama(llfx.DoRA(r=2))
    lora, _ = llfx.to_lora(gm)
    torch.testing.assert_close(logits(lora), logits(gm), atol=1e-4, rtol=1e-4)
    room = llama(llfx.LoRA(r=16))[1]
    llfx.swap(room, llama(seed=1)[1])
    torch.testing.assert_close(logits(room), logits(llama(seed=1)[1]))
    doubled = llfx.reconfigure(llama()[1], alpha=2 * LORA.alpha)
    torch.testing.assert_close(logits(doubled), logits(llama(llfx.LoRA(r=2, alpha=2 * LORA.alpha))[1]))


def test_a_variant_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(llfx.registry()))

    @llfx.register
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(llfx.LoRA):
        """As LoRA."""

    assert llfx.registry()["Own"] is Own
    torch.testing.assert_close(logits(llama(Own(r=2))[1]), logits(llama(llfx.LoRA(r=2))[1]))


def test_the_backend_of_torch_compile() -> None:
    model = small_net()
    backend = llfx.backend(llfx.LoRA(r=2, target_names=(".",)), inner="eager")
    marked: Any = backend.adapt(model, *EXAMPLE)
    randomise(marked, 0)
    compiled: Any = torch.compile(marked, backend="lora_lite_fx")
    wrapped = llfx.wrap(model, llfx.LoRA(r=2, target_names=(".",)), EXAMPLE)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(marked))
    torch.testing.assert_close(compiled(*EXAMPLE), wrapped(*EXAMPLE))


def test_less_memory_and_a_fused_loss() -> None:
    _, graph = captured(one_layer_llama)
    expected = llama()[1](**TOKENS).loss
    settings: tuple[dict[str, Any], ...] = ({"checkpoint_layers": True}, {"memory": "balanced"}, {"fuse_loss": True})
    for setting in settings:
        gm = llfx.rewrite(graph, LORA, **setting).train()
        randomise(gm, 0)
        torch.testing.assert_close(gm(**TOKENS).loss, expected)
    planned = llfx.plan_memory(llama()[1], 0.9)
    planned(**TOKENS).loss.backward()
    assert llfx.memory_plan(planned)


def test_check_of_a_variant() -> None:
    report = check(llfx.LoRA(r=2, target_names=(".",)), small_net().double(), None, EXAMPLE, skip=("stacks",))
    assert report.ok
    assert report["training"].outcome == "passed"


def test_trainer_takes_an_adapted_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    chat = llfx.adapt(one_layer_llama(), LORA)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    options: Any = {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    before = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(chat).items()}
    transformers.Trainer(chat, arguments, train_dataset=rows).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in llfx.adapter_state_dict(chat).items())
