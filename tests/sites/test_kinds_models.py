"""Embeddings, patch convolutions and experts of real models, compared with dense weights and with PEFT."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from tests.support.conformance import check_file, check_merge, check_remove, close, gradients, output, randomise, small
from tests.support.selection import broad_after
from tests.support.untouched import untouched

SMALL: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GATE_UP, DOWN = (f"model.layers.0.mlp.experts.sites.{name}_proj" for name in ("gate_up", "down"))
MODELS: dict[str, tuple[Any, str, list[str]]] = {
    "mixtral": (transformers.MixtralConfig(**SMALL, **HEADS, **EXPERTS), "experts", [GATE_UP, DOWN]),
    "gpt_oss": (transformers.GptOssConfig(**SMALL, **HEADS, **EXPERTS, head_dim=8), "experts", [GATE_UP, DOWN]),
    "gpt2": (
        transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        "embedding",
        ["transformer.wte", "transformer.wpe"],
    ),
    "vit": (
        transformers.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_channels=2,
        ),
        "conv",
        ["vit.embeddings.patch_embeddings.projection"],
    ),
}


@functools.cache
def model_and_base(name: str) -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    config = MODELS[name][0]
    auto: Any = transformers.AutoModelForImageClassification if name == "vit" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, llfx.capture(model)


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(4, 2, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 0, 1])}
    ids = torch.randint(30, (2, 11), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def run(model: nn.Module, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of the loss."""
    model.zero_grad()
    result = model(**inputs(name))
    result.loss.backward()
    return result.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def run_without_gradient(model: nn.Module, name: str) -> Tensor:
    """Return the logits."""
    logits: Tensor = model(**inputs(name)).logits
    return logits


def as_stored(kind: str, name: str, update: Tensor, like: Tensor) -> Tensor:
    """Return a matrix `(d_out, d_in)` in the layout of the weight."""
    return (update.mT if kind == "embedding" or name == "gpt_oss" else update).reshape(like.shape)


@pytest.mark.parametrize("name", broad_after(1, MODELS))
def test_lora_is_the_model_with_its_update_added_to_the_weights(name: str) -> None:
    model, base = model_and_base(name)
    _, kind, names = MODELS[name]
    with untouched(model):
        gm = llfx.rewrite(base, llfx.LoRA(r=2, alpha=6, target_kinds=(kind,)))
    assert [row.name for row in llfx.inspect(gm, kinds=()) if row.adapters] == names
    logits, _ = run(gm, name)
    expected, _ = run(copy.deepcopy(model), name)
    close(logits, expected, 1e-6, "start")

    randomise(gm, 0)
    reference = copy.deepcopy(model)
    if name == "gpt2":  # the head keeps the frozen weight
        reference.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    state = llfx.adapter_state_dict(gm)
    weights = {site.name: site.weight for site in find_sites(gm)}
    with torch.no_grad():
        for site in names:
            weight = reference.get_parameter(weights[site])
            weight += as_stored(kind, name, 3 * state[f"{site}.lora_B"] @ state[f"{site}.lora_A"], weight)
    logits, grads = run(gm, name)
    expected, dense = run(reference, name)
    close(logits, expected, 1e-5, "logits")
    assert grads.keys() == state.keys()
    for site in names:  # dL/dB = s dL/dW A^T, dL/dA = s B^T dL/dW
        like = state[f"{site}.lora_B"] @ state[f"{site}.lora_A"]
        grad = dense[weights[site]]
        grad = grad.mT if kind == "embedding" or name == "gpt_oss" else grad.reshape(like.shape)
        a, b = state[f"{site}.lora_A"], state[f"{site}.lora_B"]
        close(grads[f"{site}.lora_B"], 3 * grad @ a.mT, 1e-5, f"gradient of {site}.lora_B")
        close(grads[f"{site}.lora_A"], 3 * b.mT @ grad, 1e-5, f"gradient of {site}.lora_A")


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, MODELS))
@pytest.mark.parametrize("cls", [llfx.DoRA, llfx.PiSSA, llfx.IA3], ids=lambda cls: cls.__name__)
def test_merged_weights_run_in_the_model_itself(name: str, cls: type[llfx.Variant]) -> None:
    model, base = model_and_base(name)
    gm = llfx.rewrite(
        base, [small(cls, 2, target_kinds=(MODELS[name][1],)), llfx.LoRA(r=2, target_roles=("attention",))]
    )
    randomise(gm, 1)
    merged = llfx.merge(gm).eval()
    logits, _ = run(gm.eval(), name)
    with torch.no_grad():
        close(merged(**inputs(name)).logits, logits, 1e-5, "merged")
    if name != "gpt2":  # because merging splits its tied weight
        dense = copy.deepcopy(model)
        dense.load_state_dict(dict(merged.named_parameters()), strict=False)
        with torch.no_grad():
            close(dense(**inputs(name)).logits, logits, 1e-5, "dense")
    removed = llfx.remove(gm)
    assert str(removed.graph) == str(base.graph)


def test_default_targets_reach_no_experts_and_no_embeddings() -> None:
    _, base = model_and_base("mixtral")
    rows = [row.name for row in llfx.inspect(llfx.rewrite(base, llfx.LoRA(r=2)), kinds=()) if row.adapters]
    assert {name.rsplit(".", 1)[-1] for name in rows} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.broad
def test_experts_in_bfloat16_get_adapters_of_any_rank_and_dtype() -> None:
    """Use bfloat16, because its grouped product only takes rows whose size is a multiple of 16 bytes."""
    model = copy.deepcopy(model_and_base("mixtral")[0]).bfloat16()
    gm = llfx.rewrite(model, llfx.LoRA(r=3, target_kinds=("experts",), rank_pattern={"down": 8}))
    randomise(gm, 0)
    assert {parameter.dtype for parameter in llfx.adapter_parameters(gm)} == {torch.float32}
    logits, grads = run(gm, "mixtral")
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    merged = run_without_gradient(llfx.merge(gm).eval(), "mixtral")
    frozen = run_without_gradient(model, "mixtral")
    error, change = (logits - merged).abs().max(), (logits - frozen).abs().max()
    assert error < 0.1 * change, f"{error} of {change}"


def test_experts_are_saved_and_loaded(tmp_path: Path) -> None:
    _, base = model_and_base("mixtral")
    gm = llfx.rewrite(base, llfx.LoRA(r=2, target_kinds=("linear", "experts"), target_names=("mlp", "q_proj"))).eval()
    randomise(gm, 2)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    loaded = llfx.load(base, tmp_path / "adapter.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("mixtral")).logits, gm(**inputs("mixtral")).logits)
    llfx.save_peft(gm, tmp_path / "peft")  # experts by `target_parameters`
    loaded = llfx.load_peft(base, tmp_path / "peft").eval()
    with torch.no_grad():
        close(loaded(**inputs("mixtral")).logits, gm(**inputs("mixtral")).logits, 1e-6, "from PEFT's files")


# PEFT.


class Mixed(nn.Module):
    """One site of each kind that PEFT has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(1, 4, (2, 3), padding="same", bias=False)
        self.lin = nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Any:
        h = torch.tanh(self.conv1(self.embed(ids).transpose(1, 2)))
        return self.lin(self.conv2(h.unsqueeze(1)).mean((2, 3)))


SITES = ["embed", "conv1", "conv2", "lin"]
IDS = (torch.randint(10, (3, 8), generator=torch.Generator().manual_seed(0)),)
PEFT_NAMES = {"lora_A": ("lora_A", "lora_embedding_A"), "lora_B": ("lora_B", "lora_embedding_B")}


@functools.cache
def mixed() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = Mixed().double()
    return model, llfx.capture(model, (IDS[0][:2],))


def in_peft(dora: bool) -> Any:
    """Return the model adapted by PEFT, with random values."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=SITES, use_dora=dora)
    theirs = peft.get_peft_model(copy.deepcopy(mixed()[0]), config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.1
    return theirs


@pytest.mark.parametrize("cls", [llfx.LoRA, llfx.DoRA], ids=lambda cls: cls.__name__)
def test_peft_computes_the_same(cls: type[llfx.Variant], tmp_path: Path) -> None:
    theirs = in_peft(cls is llfx.DoRA)
    theirs.save_pretrained(tmp_path / "theirs")
    _, base = mixed()
    ours = llfx.load_peft(base, tmp_path / "theirs")
    y, grads = gradients(ours, IDS)
    expected_y, expected = gradients(theirs, IDS)
    close(y, expected_y, 1e-12, "output")
    assert len(grads) == len(expected)
    for name, grad in grads.items():
        site, _, ours_name = name.rpartition(".")
        keys = PEFT_NAMES.get(ours_name, ("lora_magnitude_vector",))
        (theirs_grad,) = (
            value for key, value in expected.items() if any(f".{site}.{prefix}." in key for prefix in keys)
        )
        close(grad, theirs_grad.reshape(grad.shape), 1e-11, f"gradient of {name}")
    merged, expected_merged = llfx.merge(ours), copy.deepcopy(theirs).merge_and_unload()
    for name, parameter in merged.named_parameters():
        close(parameter, expected_merged.get_parameter(name), 1e-12, f"merged {name}")

    llfx.save_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(mixed()[0]), tmp_path / "ours").double()
    close(back(*IDS), expected_y, 1e-6, "loaded by PEFT")
    assert sorted(llfx.to_peft_config(ours)["target_modules"]) == sorted(SITES)


@pytest.mark.parametrize("name", broad_after(1, ["mixtral", "gpt_oss"]))
def test_peft_computes_the_same_of_experts(name: str) -> None:
    """Compare with `target_parameters`, where all experts share `A (experts r, d_in)` and `B (d_out, r experts)`."""
    model, base = model_and_base(name)
    ours = llfx.rewrite(base, llfx.LoRA(r=2, alpha=6, target_kinds=("experts",)))
    randomise(ours, 0)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    wrappers = [module for module in theirs.modules() if isinstance(module, peft.tuners.lora.layer.ParamWrapper)]
    at = {f"model.layers.0.mlp.experts.sites.{wrapper.parameter_name}": wrapper for wrapper in wrappers}
    assert at.keys() == {GATE_UP, DOWN}
    state = llfx.adapter_state_dict(ours)

    def in_their_layout(which: str, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if which == "A" else tensor.permute(1, 2, 0).flatten(1)

    factors = {
        (site, which): getattr(wrapper, f"lora_{which}")["default"].weight
        for site, wrapper in at.items()
        for which in "AB"
    }
    with torch.no_grad():
        for (site, which), factor in factors.items():
            factor.copy_(in_their_layout(which, state[f"{site}.lora_{which}"]))
    logits, grads = run(ours, name)
    expected, _ = run(theirs, name)
    close(logits, expected, 1e-5, "logits")
    assert len(grads) == len(factors)
    for (site, which), factor in factors.items():
        close(
            in_their_layout(which, grads[f"{site}.lora_{which}"]), factor.grad, 1e-5, f"gradient of {site}.lora_{which}"
        )


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (llfx.LoRA(r=2, bias=True, target_kinds=("embedding",)), "PEFT has no bias at an embedding"),
        (
            llfx.PiSSA(r=2, target_kinds=("conv",)),
            "has it for linear only, and 'conv1' is a convolution",
        ),
    ],
)
def test_saving_to_peft_refuses_adapters_that_its_files_cannot_hold(
    variant: llfx.Variant, message: str, tmp_path: Path
) -> None:
    gm = llfx.rewrite(mixed()[1], variant)
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.save_peft(gm, tmp_path, as_lora=False)


def test_pissa_at_convolutions_is_saved_as_the_lora_that_it_is(tmp_path: Path) -> None:
    _, base = mixed()
    gm = llfx.rewrite(base, llfx.PiSSA(r=2, target_kinds=("conv",)))
    randomise(gm, 1)
    llfx.save_peft(gm, tmp_path)
    close(output(llfx.load_peft(base, tmp_path), IDS), output(gm, IDS), 1e-9, "output")


def test_saving_to_peft_refuses_dilated_convolutions(tmp_path: Path) -> None:
    gm = llfx.rewrite(
        nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), llfx.LoRA(r=2, target_kinds=("conv",)), (torch.randn(2, 4, 9),)
    )
    with pytest.raises(llfx.ConfigError, match="PEFT has no dilation there, and '0' is a convolution"):
        llfx.save_peft(gm, tmp_path)


def test_lora_lite_files_refuse_other_kinds(tmp_path: Path) -> None:
    gm = llfx.rewrite(mixed()[1], llfx.LoRA(r=2, target_kinds=("embedding",)))
    with pytest.raises(llfx.ConfigError, match="lora-lite adapts ordinary linear modules, and site 'embed' is not one"):
        llfx.save_lora_lite(gm, tmp_path / "x.safetensors")


@pytest.mark.broad
def test_the_mixed_model_conforms() -> None:
    model, base = mixed()
    cfg = llfx.DoRA(r=2, target_kinds=("linear", "embedding", "conv"), target_names=(".",))
    gm = llfx.rewrite(base, cfg)
    randomise(gm, 0)
    check_merge(gm, base, IDS, 1e-9)
    check_remove(gm, base, model)
    check_file(gm, base, IDS)
