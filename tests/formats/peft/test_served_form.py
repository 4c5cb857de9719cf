"""Adapters as servers of LoRA take them: the files, what is refused by which rule, and the dict for a rollout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.formats.peft.server_rules import SERVERS
from tests.support.selection import broad_after, broad_unless, slow_after
from tests.support.served_causal_models import SIZES, causal, logits, tensors_at_random

EVERYWHERE: Any = {"target_names": (r"_proj$",)}
ATTENTION: Any = {"target_names": (r"(q|k|v|o)_proj$",)}
OF_LOW_RANK: dict[str, llfx.Variant] = {
    "LoRA": llfx.LoRA(r=4, alpha=7, rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 3.0}, **EVERYWHERE),
    "PiSSA": llfx.PiSSA(r=4, alpha=6, **EVERYWHERE),
    "rsLoRA": llfx.LoRA(r=9, alpha=7, rank_stabilized=True, **ATTENTION),
    "OLoRA": llfx.OLoRA(r=4, alpha=6, **EVERYWHERE),
    "LoRAXS": llfx.LoRAXS(r=4, alpha=6, **EVERYWHERE),
    "HRA": llfx.HRA(r=4, **ATTENTION),
    "AdaLoRA": llfx.AdaLoRA(r=4, **EVERYWHERE),
}
OF_FULL_RANK: dict[str, llfx.Variant] = {
    "DoRA": llfx.DoRA(r=4, **EVERYWHERE),
    "IA3": llfx.IA3(**EVERYWHERE),
    "OFT": llfx.OFT(block_size=8, **EVERYWHERE),
    "LoRA with a bias": llfx.LoRA(r=4, bias=True, **EVERYWHERE),
    "Full": llfx.Full(target_names=("q_proj$",)),
}


@cache
def llama() -> tuple[Any, Any]:
    """Return a tiny Llama and its graph."""
    model = causal("llama")
    return model, llfx.capture(model)


def adapted(graph: Any, cfg: Any) -> Any:
    gm = llfx.rewrite(graph, cfg)
    tensors_at_random(gm)
    return gm


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("target", broad_after(1, SERVERS))
@pytest.mark.parametrize("name", broad_after(1, slow_after(6, OF_LOW_RANK)))
def test_the_files_hold_plain_lora_of_one_rank(name: str, target: str, tmp_path: Path) -> None:
    model, graph = llama()
    gm = adapted(graph, OF_LOW_RANK[name])
    llfx.save_peft(gm, tmp_path, target=target)
    config, tensors = contents(tmp_path)
    assert config["lora_alpha"] == config["r"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]}
    again = llfx.load_peft(graph, tmp_path)
    torch.testing.assert_close(logits(again), logits(gm), atol=2e-5, rtol=0)
    in_peft = PeftModel.from_pretrained(causal("llama"), tmp_path)
    torch.testing.assert_close(logits(in_peft), logits(gm), atol=2e-5, rtol=0)
    assert float((logits(gm) - logits(model)).abs().max()) > 0.1


@pytest.mark.parametrize("target", broad_after(1, SERVERS))
def test_the_dict_is_what_the_files_hold(target: str, tmp_path: Path) -> None:
    gm = adapted(llama()[1], OF_LOW_RANK["LoRA"])
    llfx.save_peft(gm, tmp_path, target=target)
    config, tensors = contents(tmp_path)
    sent = llfx.adapter_state_dict(gm, target)
    assert sent.keys() == tensors.keys()
    assert all(torch.equal(sent[key], tensor) for key, tensor in tensors.items())
    assert json.loads(json.dumps(llfx.to_peft_config(gm, target=target))) == config


@pytest.mark.broad
def test_the_dict_follows_training_and_switches() -> None:
    model, graph = llama()
    gm = adapted(graph, {"policy": llfx.LoRA(r=2, **ATTENTION), "other": llfx.LoRA(r=2, **ATTENTION)})
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    before = llfx.adapter_state_dict(gm, "vllm", adapter="policy")[key].clone()
    for name, tensor in gm.named_parameters():
        if "lora_B" in name:
            tensor.data.mul_(2)
    torch.testing.assert_close(llfx.adapter_state_dict(gm, "vllm", adapter="policy")[key], 2 * before)
    with pytest.raises(llfx.ConfigError, match="adapter='policy'"):
        llfx.adapter_state_dict(gm, "vllm")
    own = llfx.adapter_state_dict(gm, adapter="policy")
    assert len(own) == len(llfx.adapter_state_dict(gm)) / 2
    chat = llfx.adapt(model, llfx.LoRA(r=2, **ATTENTION))
    assert set(llfx.adapter_state_dict(chat, "vllm")) == set(llfx.adapter_state_dict(gm, "vllm", adapter="policy"))


@pytest.mark.broad
def test_several_adapters_are_written_into_folders(tmp_path: Path) -> None:
    gm = adapted(llama()[1], {"fr": llfx.LoRA(r=2, **ATTENTION), "it": llfx.PiSSA(r=3, **ATTENTION)})
    llfx.save_peft(gm, tmp_path, target="vllm")
    assert [contents(tmp_path / name)[0]["r"] for name in ("fr", "it")] == [8, 8]
    with llfx.active(gm, "it"):
        expected = logits(gm)
    torch.testing.assert_close(logits(llfx.load_peft(llama()[1], tmp_path / "it")), expected, atol=2e-5, rtol=0)


def test_ranks_are_filled_up_to_what_the_server_takes(tmp_path: Path) -> None:
    vllm = SERVERS["vllm"]
    assert [vllm.rank_for(rank) for rank in (1, 2, 8, 9, 257, 512, 513)] == [1, 8, 8, 16, 320, 512, None]
    assert SERVERS["sglang"].rank_for(600) == SERVERS["openvino"].rank_for(600) == 600
    wide = llfx.rewrite(
        nn.Sequential(nn.Linear(600, 600)), llfx.LoRA(r=600, target_names=("0",)), (torch.ones(1, 600),)
    )
    with pytest.raises(llfx.AdapterError, match=r"ranks up to 512, and '0' has 600"):
        llfx.save_peft(wide, tmp_path / "a", target="vllm")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("target", broad_after(1, SERVERS))
@pytest.mark.parametrize("name", broad_unless(lambda name: name in ("DoRA", "LoRA with a bias"), OF_FULL_RANK))
def test_any_other_change_is_refused(name: str, target: str, tmp_path: Path) -> None:
    gm = adapted(llama()[1], OF_FULL_RANK[name])
    with pytest.raises(llfx.AdapterError, match=name.split()[0]) as caught:
        llfx.save_peft(gm, tmp_path / "a", target=target)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_sglang_gets_zeros_for_what_it_computes_together(tmp_path: Path) -> None:
    gm = adapted(llama()[1], llfx.LoRA(r=4, target_names=(r"1\.self_attn\.q_proj$", r"0\.mlp\.up_proj$")))
    llfx.save_peft(gm, tmp_path, target="sglang")
    config, tensors = contents(tmp_path)
    start = "base_model.model.model.layers."
    pairs = {key.removeprefix(start).rpartition(".lora_")[0]: key for key in tensors}
    assert pairs.keys() == {"0.mlp.up_proj", "0.mlp.gate_proj"} | {f"1.self_attn.{x}_proj" for x in "qkv"}
    zeros = {name for name in pairs if not tensors[f"{start}{name}.lora_B.weight"].any()}
    assert zeros == {"0.mlp.gate_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"}
    assert tensors[f"{start}1.self_attn.k_proj.lora_B.weight"].shape == (16, 4)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {name.rpartition(".")[2] for name in pairs}
    torch.testing.assert_close(logits(llfx.load_peft(llama()[1], tmp_path)), logits(gm), atol=1e-5, rtol=0)
    assert len(llfx.adapter_state_dict(gm, "vllm")) == 4


def test_heads_and_embeddings(tmp_path: Path) -> None:
    graph = llama()[1]
    both = adapted(
        graph, llfx.LoRA(r=8, target_names=("lm_head", "embed_tokens"), target_kinds=("linear", "embedding"))
    )
    for target in ("vllm", "sglang"):
        assert {key.rpartition("model.")[2] for key in llfx.adapter_state_dict(both, target)} == {
            "embed_tokens.lora_embedding_A",
            "embed_tokens.lora_embedding_B",
            "lm_head.lora_A.weight",
            "lm_head.lora_B.weight",
        }
    with pytest.raises(llfx.AdapterError, match=r"'model\.embed_tokens', which is an embedding"):
        llfx.save_peft(both, tmp_path / "a", target="openvino")
    llfx.save_peft(adapted(graph, llfx.LoRA(r=8, target_names=("lm_head",))), tmp_path / "b", target="openvino")


@pytest.mark.broad
def test_what_a_server_would_leave_out_is_refused(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99))
    gm = llfx.rewrite(gpt2, llfx.LoRA(r=2, target_roles=("attention",)))
    with pytest.raises(llfx.AdapterError, match=r"SGLang .* leaves out .*'transformer\.h\.0\.attn\.c_attn'.*layers"):
        llfx.save_peft(gm, tmp_path / "a", target="sglang")
    llfx.save_peft(gm, tmp_path / "b", target="vllm")
    for module, server in (("visual.blocks.0.qkv", "vllm"), ("model.vision_tower.layers.0.q_proj", "sglang")):
        assert SERVERS[server].leaves_out(module) == "it has adapters for the language model alone"
    assert "o_proj" in SERVERS["sglang"].leaves_out("model.layers.0.self_attn.q_a_proj")
    sizes = {key: value for key, value in SIZES.items() if key != "tie_word_embeddings"}
    experts = llfx.rewrite(
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)),
        llfx.LoRA(r=2, target_kinds=("experts",), target_names=("experts",)),
    )
    for target, rules in SERVERS.items():
        with pytest.raises(llfx.AdapterError, match=rf"{rules.name} has LoRA for linears.*a stack of experts"):
            llfx.save_peft(experts, tmp_path / "c", target=target)


def test_openvino_would_apply_an_adapter_to_modules_of_longer_names(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fc1 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc1(torch.relu(self.fc(x)))
            return y

    graph = llfx.capture(Net(), (torch.ones(2, 8),))
    with pytest.raises(llfx.AdapterError, match="'fc' to 'fc1' too"):
        llfx.save_peft(llfx.rewrite(graph, llfx.LoRA(r=2, target_names=("fc$",))), tmp_path / "a", target="openvino")
    llfx.save_peft(llfx.rewrite(graph, llfx.LoRA(r=2, target_names=("fc1$",))), tmp_path / "b", target="openvino")


def test_bad_input(tmp_path: Path) -> None:
    model, graph = llama()
    gm = adapted(graph, OF_LOW_RANK["LoRA"])
    with pytest.raises(llfx.ConfigError, match="'vllm', 'sglang', 'openvino', and not 'tgi'"):
        llfx.save_peft(gm, tmp_path / "a", target="tgi")
    with pytest.raises(llfx.ConfigError, match="leave as_lora=True out"):
        llfx.save_peft(gm, tmp_path / "a", target="vllm", as_lora=True)
    with pytest.raises(llfx.AdapterError, match="no adapters"):
        llfx.adapter_state_dict(model, "vllm")
    with pytest.raises(llfx.ConfigError, match="'de'"):
        llfx.adapter_state_dict(gm, adapter="de")
    bank = llfx.rewrite(graph, llfx.Bank(llfx.LoRA(r=2, **ATTENTION), slots=2))
    with pytest.raises(llfx.AdapterError, match="take_slot"):
        llfx.save_peft(bank, tmp_path / "a", target="vllm")
    llfx.adapter_parameters(gm)[0].data[0, 0] = float("nan")
    with pytest.raises(llfx.CheckpointError, match="NaN"):
        llfx.save_peft(gm, tmp_path / "a", target="vllm")
    assert not (tmp_path / "a").exists()


def test_vllm_reads_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers: Any = pytest.importorskip("vllm.lora.peft_helper", exc_type=ImportError)
    models: Any = pytest.importorskip("vllm.lora.lora_model", exc_type=ImportError)
    monkeypatch.setattr(models, "PIN_MEMORY", torch.cuda.is_available())  # it pins without asking for a driver
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}
    for cfg in (*OF_LOW_RANK.values(), llfx.LoRA(r=8, target_names=("lm_head",))):
        gm = adapted(llama()[1], cfg)
        llfx.save_peft(gm, tmp_path, target="vllm")
        helper = helpers.PEFTHelper.from_local_dir(str(tmp_path), 64)
        helper.validate_legal(helpers.LoRAConfig(max_lora_rank=helper.r))
        read = models.LoRAModel.from_local_checkpoint(str(tmp_path), modules, helper, lora_model_id=1, device="cpu")
        changes, _ = llfx.to_lora(gm)
        state = llfx.adapter_state_dict(changes)
        assert {f"{name}.lora_{x}" for name in read.loras for x in "AB"} == state.keys()
        for name, layer in read.loras.items():
            assert layer.scaling == 1
            expected = state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
            torch.testing.assert_close(layer.lora_b.double() @ layer.lora_a.double(), expected, atol=1e-5, rtol=0)
