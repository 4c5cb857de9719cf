"""The names by which transformers, PEFT, diffusers and trainers ask an adapted model for its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.rewriting.named import acting_now
from tests.adapters.test_switches import fill
from tests.support.models import tiny_llama

PROMPT = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama()).eval()


def adapted_by(spec: Any) -> Any:
    model = llfx.adapt(base(), spec)
    fill(model)
    return model


def trained(model: Any) -> set[str]:
    """Return the names of the adapters of which a parameter requires a gradient."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.rpartition("_")[2] for name in names}


def gradients_of(model: Any) -> list[Any]:
    """Return the gradients of all parameters that have one, and forget them."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    model.zero_grad(set_to_none=True)
    return found


def sorted_by_size(tensors: list[Any]) -> list[Any]:
    return sorted(tensors, key=lambda tensor: float(tensor.norm()))


@pytest.mark.broad
def test_adapters_are_set_disabled_and_enabled_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    model = adapted_by(
        {
            "fr": llfx.LoRA(r=2, alpha=4, target_names=("q_proj",)),
            "de": llfx.LoRA(r=3, alpha=3, target_names=("v_proj",)),
        }
    )
    theirs = peft.get_peft_model(
        base(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), adapter_name="fr"
    )
    theirs.add_adapter("de", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["v_proj"]))
    values = llfx.adapter_state_dict(model)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            path, _, end = name.removeprefix("base_model.model.").partition(".lora_")
            factor, adapter = end.removesuffix(".weight").split(".")
            parameter.data = values[f"{path}.lora_{factor}_{adapter}"].clone()
    for names in ("fr", "de"):
        model.set_adapter(names)
        theirs.set_adapter(names)
        assert model.active_adapters() == theirs.active_adapters == [names]
        assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        loss, expected = (each(PROMPT, labels=PROMPT).loss for each in (model, theirs))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        gradients = gradients_of(model), gradients_of(theirs)
        assert len(gradients[0]) == len(gradients[1])
        torch.testing.assert_close(*map(sorted_by_size, gradients))
        torch.testing.assert_close(model.merge_and_unload()(PROMPT).logits, theirs(PROMPT).logits)
    with model.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(model(PROMPT).logits, theirs(PROMPT).logits)
    assert model.active_adapter == "de"
    model.disable_adapters()
    assert torch.equal(model(PROMPT).logits, base()(PROMPT).logits)
    model.enable_adapters()
    assert model.active_adapters() == ["de"]
    model.set_adapters(["fr", "de"], [0.5, 2.0])
    with llfx.active(model, ["fr", "de"]), llfx.scaled(model, {"fr": 0.5, "de": 2.0}):
        expected = model(PROMPT).logits
    torch.testing.assert_close(model(PROMPT).logits, expected)


@pytest.mark.broad
def test_each_row_of_a_batch_has_its_own_adapter_as_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_by({"fr": llfx.LoRA(r=2), "de": llfx.LoRA(r=3, alpha=3, target_names=("v_proj",))})
    llfx.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "fr", "fr").eval()
    theirs.load_adapter(tmp_path / "de", "de")
    prompt = torch.randint(1, 20, (4, 5))
    names = ["de", "__base__", "fr", "de"]
    expected = theirs(prompt, adapter_names=names).logits
    torch.testing.assert_close(model(prompt, adapter_names=names).logits, expected)
    with llfx.by_row(model, ["de", None, "fr", "de"]):
        torch.testing.assert_close(model(prompt).logits, expected)
    settings: Any = {"max_new_tokens": 4, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    torch.manual_seed(0)
    assert model.active_adapters() == ["fr", "de"]
    for beams in (1, 2):
        together = model.generate(prompt, num_beams=beams, adapter_names=names, do_sample=False, **settings)
        for row, name in enumerate(names):
            own = dict(settings, attention_mask=settings["attention_mask"][:1], num_beams=beams, do_sample=False)
            with llfx.active(model, [] if name == "__base__" else name):
                alone = model.generate(prompt[row : row + 1], **own)[0]
            assert torch.equal(together[row][: len(alone)], alone)
    assert model.generate(prompt, num_return_sequences=2, do_sample=True, adapter_names=names, **settings).shape[0] == 8
    with pytest.raises(llfx.CallError, match=r"3 coefficients of an adapter, .* 4 rows"):
        model(prompt, adapter_names=["fr", "de", "fr"])
    with pytest.raises(llfx.ConfigError, match="no adapter 'it'"):
        model(prompt, adapter_names=["fr", "de", "fr", "it"])


def test_the_adapters_that_act_and_train_after_each_door_are_those_of_the_table(tmp_path: Path) -> None:
    """Check the table of docs/ladder/many_adapters.md."""
    lora = llfx.LoRA(r=2, target_names="q_proj")

    def acting(model: Any) -> list[str]:
        return list(acting_now(model) or ())

    def graph() -> Any:
        gm = llfx.rewrite(base(), {"fr": lora, "de": lora})
        assert (acting(gm), trained(gm)) == (["fr", "de"], {"fr", "de"})
        return gm

    llfx.save(graph(), tmp_path / "fr", adapter="fr")
    gm = graph()
    llfx.active(gm, "fr")
    assert (acting(gm), trained(gm)) == (["fr"], {"fr", "de"})
    further = llfx.rewrite(gm, {"it": lora})
    assert (acting(further), trained(further)) == (["fr", "it"], {"fr", "de", "it"})
    loaded = llfx.load(gm, tmp_path / "fr", name="it")
    assert (acting(loaded), trained(loaded)) == (["fr"], {"fr", "de", "it"})
    assert acting(llfx.load(base(), tmp_path / "fr", name="it")) == ["it"]
    llfx.add(gm, {"it": lora})
    llfx.combine(gm, {"fr": 1.0, "de": 1.0}, "sum")
    assert (acting(gm), trained(gm)) == (["fr"], {"fr", "de", "it", "sum"})
    llfx.delete(gm, ["it", "sum"])
    assert (acting(gm), trained(gm)) == (["fr"], {"fr", "de"})
    llfx.set_adapter(gm, "de")
    assert (acting(gm), trained(gm)) == (["de"], {"de"})
    chat = adapted_by({"fr": lora, "de": lora})
    chat.load_adapter(tmp_path / "fr", "it")
    assert (acting(chat), trained(chat)) == (["fr", "de"], {"fr", "de"})
    chat.set_adapters(["fr", "it"], [0.5, 1.0])
    assert (acting(chat), trained(chat)) == (["fr", "it"], {"fr", "it"})
    chat.add_adapter(lora, "es")
    assert (acting(chat), trained(chat)) == (["es"], {"es"})


def test_a_model_without_its_adapters_is_one_of_the_plain_class() -> None:
    model = adapted_by({"fr": llfx.LoRA(r=2), "de": llfx.IA3()})
    expected = base()(PROMPT).logits
    for plain in (model.unload(), model.get_base_model()):
        assert type(plain) is LlamaForCausalLM
        assert torch.equal(plain(PROMPT).logits, expected)
    with llfx.active(model, "de"):
        expected = model(PROMPT).logits
    merged = model.merge_and_unload(adapter_names=["de"])
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(merged(PROMPT).logits, expected)
    assert model.active_adapters() == ["fr", "de"]


def test_adapters_are_added_loaded_and_deleted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_by({"fr": llfx.LoRA(r=2)})
    before = model(PROMPT).logits
    model.generate(PROMPT, max_new_tokens=2, attention_mask=torch.ones_like(PROMPT), pad_token_id=0)
    kept = len(model.graphs)
    llfx.save_peft(model, tmp_path / "peft")
    llfx.save(model, tmp_path / "file")
    for index, path in enumerate(("peft", "file")):
        model.load_adapter(tmp_path / path, f"it{index}")
        assert torch.equal(model(PROMPT).logits, before)  # it does not act yet
        assert trained(model) == {"fr"}
        model.set_adapter(f"it{index}")
        torch.testing.assert_close(model(PROMPT).logits, before)
        model.set_adapter("fr")
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["o_proj"]), "new")
    assert model.active_adapters() == ["new"]
    assert trained(model) == {"new"}
    model.load_adapter(tmp_path / "peft", "trained", is_trainable=True)
    assert trained(model) == {"new", "trained"}
    model.delete_adapter("trained")
    torch.testing.assert_close(model(PROMPT).logits, base()(PROMPT).logits)
    fill(model, seed=1)
    assert not torch.equal(model(PROMPT).logits, base()(PROMPT).logits)
    assert len(model.graphs) == kept  # nothing was captured again
    model.set_adapter("it0")
    model.delete_adapter(["fr", "new"])
    assert {name.rpartition("_")[2] for name in llfx.adapter_state_dict(model)} == {"it0", "it1"}
    assert not any(name.endswith(("_fr", "_new")) for name in model.state_dict())
    torch.testing.assert_close(llfx.merge(model)(PROMPT).logits, model(PROMPT).logits)
    with pytest.raises(llfx.ConfigError, match="an adapter 'it0' already"):
        model.load_adapter(tmp_path / "peft", "it0")
    with pytest.raises(llfx.ConfigError, match="2 adapters and 1 weights"):
        model.set_adapters(["it0", "it1"], [1.0])


@pytest.mark.slow
def test_a_later_capture_has_the_adapters_of_then() -> None:
    model = adapted_by({"fr": llfx.LoRA(r=2), "de": llfx.IA3()})
    llfx.add(model, {"it": llfx.VeRA(r=2)})
    fill(model, seed=2)
    llfx.delete(model, "de")
    llfx.active(model, "it")
    expected = model(PROMPT).logits
    model._graphs.drop()
    torch.testing.assert_close(model(PROMPT).logits, expected)


@pytest.mark.broad
def test_the_model_of_a_graph_follows_its_switches() -> None:
    model = base()
    gm = llfx.rewrite(model, {"fr": llfx.LoRA(r=2), "de": llfx.IA3()})
    fill(gm)
    llfx.active(gm, "de")
    adapted = llfx.adapt(gm)
    torch.testing.assert_close(adapted(PROMPT).logits, gm(input_ids=PROMPT).logits)
