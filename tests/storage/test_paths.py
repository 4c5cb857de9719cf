"""Quantized bases on the further paths: export, compilers, files, PEFT's files, Trainer, inspection."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.storage.test_dequantized import CFG, Net, X, adapted, base, result
from tests.storage.test_merge import IDS, KINDS, logits, moved, quantized_llama
from tests.support.quantized import dequantized, quantized, storages
from tests.support.selection import slow_unless


@pytest.mark.broad
@pytest.mark.parametrize("storage", storages("nf4 twice"))
def test_an_exported_program_comes_back_from_its_file(storage: str) -> None:
    gm = adapted("exported", base(storage)).eval()
    program = torch.export.export(gm, X, dynamic_shapes=((torch.export.Dim.AUTO,) * 2,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    close(loaded(*X), gm(*X), 1e-6, "loaded")
    close(llfx.remove(loaded)(*X), llfx.remove(gm)(*X), 1e-6, "without adapters")


@pytest.mark.broad
@pytest.mark.parametrize("storage", storages("torchao int4"))
def test_the_compiled_graph_has_the_same_results_and_gradients(storage: str) -> None:
    torch._dynamo.reset()
    gm = adapted("exported", base(storage))
    expected = result(gm)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    x = X[0].clone().requires_grad_()
    y = compiled(x)
    names = llfx.adapter_state_dict(gm)
    gradients = torch.autograd.grad(y.square().sum(), [x, *(gm.get_parameter(name) for name in names)])
    for name, actual in zip(["output", "input", *names], [y, *gradients], strict=True):
        close(actual, expected[name], 1e-5, name)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["torchao int8", "torchao int4", "torchao float8"])
def test_ahead_of_time_compilation_computes_the_same(storage: str, tmp_path: Path) -> None:
    gm = adapted("exported", base(storage)).eval()
    program = torch.export.export(gm, X)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    close(torch._inductor.aoti_load_package(package)(*X), gm(*X).detach(), 1e-5, "compiled")


@pytest.mark.broad
@pytest.mark.parametrize("storage", storages("int8"))
def test_the_backends_model_computes_what_the_graph_does(storage: str) -> None:
    torch._dynamo.reset()
    model = base(storage)
    gm = adapted("exported", model)
    carrier = llfx.backend(CFG, inner="aot_eager").adapt(model, *X)
    llfx.load_adapter_state_dict(carrier, llfx.adapter_state_dict(gm))
    close(torch.compile(carrier, backend="lora_lite_fx")(*X), gm(*X), 1e-5, "carrier")


def test_a_quantized_model_that_is_compiled_as_it_is_is_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(base("nf4"), backend=llfx.backend(CFG, inner="eager"))
    with pytest.raises(llfx.AdapterError, match=r"carries no adapters.*adapt\(model"):
        compiled(*X)


@pytest.mark.broad
def test_a_file_tells_another_base_by_its_dequantized_weights(tmp_path: Path) -> None:
    model = base("nf4 twice")
    gm = adapted("traced", model)
    llfx.save(gm, tmp_path / "file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = llfx.load(base("nf4 twice"), tmp_path / "file")
        llfx.load(dequantized(model), tmp_path / "file")
    close(loaded(*X), gm(*X), 0, "loaded")
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="made for other weights than the model's, at 5 of 5 sites"):
        llfx.load(quantized("nf4 twice", Net()), tmp_path / "file")


@pytest.mark.parametrize("storage", storages("nf4", "torchao int4"))
def test_inspect_tells_the_memory_that_the_weights_take(storage: str) -> None:
    model = base(storage)
    table = llfx.inspect(model)
    assert table.total == llfx.inspect(dequantized(model)).total
    bits = {row.name: row.bits for row in table}
    exact = {"nf4": 4.5, "fp4": 4.5, "int8": 9.0, "torchao float8": 9.0}  # with the scales
    assert bits["layers.0.0"] == exact.get(storage, bits["layers.0.0"])
    assert {row.dtype for row in table} == {"float32"}
    assert "bits" in str(table).splitlines()[0]
    assert "bits" not in str(llfx.inspect(dequantized(model)))


NOT_IN_PEFT = "compressed 4"  # PEFT asks its linears for a weight


@pytest.mark.broad
@pytest.mark.parametrize(
    "kind", slow_unless(lambda kind: kind == "nf4", [kind for kind in KINDS if kind != NOT_IN_PEFT])
)
def test_peft_on_the_same_base_computes_and_trains_the_same(kind: str, tmp_path: Path) -> None:
    import peft

    model = quantized_llama(kind, tmp_path / "base").train()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj", "q_proj"])
    oracle: Any = peft.get_peft_model(quantized_llama(kind, tmp_path / "base").train(), config)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    oracle.save_pretrained(tmp_path / "peft")
    gm = llfx.load_peft(model, tmp_path / "peft").train()
    ours, theirs = gm(input_ids=IDS, labels=IDS).loss, oracle(input_ids=IDS, labels=IDS).loss
    close(ours, theirs, 1e-5, "loss")
    ours.backward()
    theirs.backward()
    gradients = {name.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
                 for name, p in oracle.named_parameters() if p.grad is not None}  # fmt: skip
    assert gradients.keys() == llfx.adapter_state_dict(gm).keys()
    for name, expected in gradients.items():
        close(cast(Tensor, gm.get_parameter(name).grad), expected, 1e-5, name)
    llfx.save_peft(gm, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == {"q_proj", "up_proj"}
    assert not written.get("target_parameters")
    again: Any = peft.PeftModel.from_pretrained(quantized_llama(kind, tmp_path / "base").train(), tmp_path / "ours")
    close(logits(again.train()), logits(gm), 1e-5, "PEFT with our file")


@pytest.mark.broad
def test_a_trainer_trains_an_adapted_quantized_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = quantized_llama("nf4", tmp_path / "base")
    chat = llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up",)))
    before = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(chat).items()}
    frozen = {name: p.clone() for name, p in chat.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=chat, args=arguments, train_dataset=rows).train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in llfx.adapter_state_dict(chat).items())
    assert all(torch.equal(frozen[name], p) for name, p in chat.named_parameters() if name in frozen)
    assert type(llfx.remove(chat).model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)


def test_adapters_in_float32_on_a_half_precision_base() -> None:
    half = (X[0].repeat(1, 2).bfloat16(),)
    four = quantized("nf4", nn.Sequential(nn.Linear(64, 64)))  # which computes in the type of its input
    outputs = []
    for model in (four, dequantized(four).bfloat16()):
        gm = moved(llfx.rewrite(model, llfx.LoRA(r=2, target_names="0"), half))
        assert {tensor.dtype for tensor in llfx.adapter_state_dict(gm).values()} == {torch.float32}
        outputs.append(gm(*half))
    close(outputs[0], outputs[1], 1e-2, "output")


@pytest.mark.broad
@pytest.mark.parametrize("storage", storages("nf4"))
def test_planned_memory_computes_the_same(storage: str) -> None:
    gm = adapted("exported", base(storage))
    names = [name for name, parameter in gm.named_parameters() if parameter.requires_grad]
    planned: Any = llfx.plan_memory(llfx.optimize(cast(fx.GraphModule, gm)), "balanced")
    for _ in range(2):  # the first call makes the plan
        found = []
        for model in (gm, planned):
            model.zero_grad()
            y = model(*X)
            y.square().sum().backward()
            found.append([y, *(model.get_parameter(name).grad for name in names)])
        assert all(map(torch.equal, *found))
    assert llfx.memory_plan(planned)
