"""A model is built without data, adapted, divided, and filled by each process with its parts of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.device_mesh import init_device_mesh

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import VOCABULARY
from tests.support.conformance import close, randomise
from tests.support.models import tiny_llama
from tests.support.ranks import on_ranks
from tests.support.selection import slow_unless

accelerate = pytest.importorskip("accelerate")
CONFIGS: dict[str, llfx.Variant] = {
    "LoRA": llfx.LoRA(r=2),
    "DoRA": llfx.DoRA(r=2),  # starts from the weight
    "VeRA": llfx.VeRA(r=4),  # shares tensors between sites
    "LoRA, tied": llfx.LoRA(r=2),
}
INPUTS = {"input_ids": (ids := torch.arange(14).reshape(2, 7)), "attention_mask": torch.ones_like(ids)}
INPUTS["labels"] = ids.clone()


def config(**changes: Any) -> Any:
    return tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY, **changes)


def without_data(cfg: llfx.Variant, **changes: Any) -> Any:
    """Return an adapted graph whose parameters have no memory."""
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.LlamaForCausalLM(config(**changes)).double()
    model.tie_weights()  # ties are lost on the way
    return llfx.rewrite(model, cfg)


def base(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config(**changes)).double()


def fill_from(folder: Path) -> Any:
    reader = HuggingFaceStorageReader(str(folder))
    return lambda tensors: load_distributed(tensors, storage_reader=reader)


def build(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, cfg in CONFIGS.items():
        is_tied = "tied" in name
        gm = llfx.shard(without_data(cfg, tie_word_embeddings=is_tied), init_device_mesh("cpu", (2,)))
        llfx.materialize(gm, fill_from(folder / ("tied" if is_tied else "untied")))
        start = {key: whole(tensor).clone() for key, tensor in llfx.adapter_state_dict(gm).items()}
        randomise_whole(gm, start)
        loss = gm.train()(**INPUTS).loss
        loss.backward()
        gradients = {key: whole(p.grad).clone() for key, p in gm.named_parameters() if p.grad is not None}
        llfx.save(gm, folder / f"{name}.adapter")
        found[name] = {"start": start, "loss": loss.item(), "gradients": gradients}
    return found


def build_others(rank: int, folder: Path) -> dict[str, float]:
    """Fill a tensor parallel graph, and a stage of a pipeline; return their losses at the start."""
    cfg = CONFIGS["DoRA"]
    gm = llfx.materialize(llfx.parallelize(without_data(cfg), init_device_mesh("cpu", (2,))), fill_from(folder))
    found = {"parallel": gm(**INPUTS).loss.item()}
    stage = llfx.materialize(llfx.split(without_data(cfg), 2)[rank], fill_from(folder))
    sent = stage(**INPUTS).detach() if rank == 0 else torch.empty(2, 7, 32, dtype=torch.float64)
    dist.broadcast(sent, 0)
    return found if rank == 0 else {**found, "stages": stage(sent, **INPUTS)[0].item()}


@pytest.mark.slow
def test_tensor_parallel_graphs_and_stages_are_filled(tmp_path: Path) -> None:
    model = base()
    model.save_pretrained(tmp_path)
    first, last = on_ranks(build_others, 2, tmp_path)
    assert {**first, **last} == pytest.approx({"parallel": (loss := model(**INPUTS).loss.item()), "stages": loss})
    assert first["parallel"] == pytest.approx(loss)


def randomise_whole(gm: Any, start: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {
        name: tensor + torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 10
        for name, tensor in start.items()
    }
    llfx.load_adapter_state_dict(gm, values)


@pytest.mark.slow
def test_processes_fill_their_parts_and_train_like_one(tmp_path: Path) -> None:
    bases = {is_tied: base(tie_word_embeddings=is_tied) for is_tied in (False, True)}
    for is_tied, model in bases.items():
        model.save_pretrained(tmp_path / ("tied" if is_tied else "untied"))
    results = on_ranks(build, 2, tmp_path)
    for name, cfg in CONFIGS.items():
        model = bases["tied" in name]
        gm = llfx.rewrite(model, cfg).train()
        first = results[0][name]["start"]
        assert first.keys() == llfx.adapter_state_dict(gm).keys()
        randomise_whole(gm, first)
        loss = gm(**INPUTS).loss
        loss.backward()
        gradients = {key: p.grad for key, p in gm.named_parameters() if p.grad is not None}
        for found in (each[name] for each in results):
            assert all(torch.equal(tensor, first[key]) for key, tensor in found["start"].items())
            assert found["loss"] == pytest.approx(loss.item(), abs=1e-6)
            assert found["gradients"].keys() == gradients.keys()
            for key, gradient in gradients.items():
                close(found["gradients"][key], gradient, 1e-9, key)
        loaded = llfx.adapter_state_dict(llfx.load(model, tmp_path / f"{name}.adapter"))
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in llfx.adapter_state_dict(gm).items())


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "DoRA", ["LoRA", "DoRA", "VeRA"]))
def test_a_graph_without_data_is_filled_in_one_process(name: str) -> None:
    model = base(tie_word_embeddings=True)
    gm = without_data(CONFIGS[name], tie_word_embeddings=True)
    weights = model.state_dict()

    def load(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        for key, tensor in tensors.items():
            tensor.copy_(weights[key])

    llfx.materialize(gm, load)
    start = llfx.adapter_state_dict(gm)
    expected = llfx.rewrite(model, CONFIGS[name])
    close(gm(**INPUTS).logits, model(**INPUTS).logits, 1e-6, "the start is the base")
    if name == "DoRA":
        weight = weights["model.layers.0.self_attn.q_proj.weight"]
        close(start["model.layers.0.self_attn.q_proj.lora_m"], weight.norm(dim=1), 1e-9, "norms of the rows")
    if name == "LoRA":
        assert start["model.layers.0.self_attn.q_proj.lora_A"].std() > 0
    randomise(gm, 1)
    llfx.load_adapter_state_dict(expected, llfx.adapter_state_dict(gm))
    close(gm(**INPUTS).logits, expected(**INPUTS).logits, 1e-9, "logits")
    assert torch.equal(gm.get_parameter("lm_head.weight"), gm.get_parameter("model.embed_tokens.weight"))


@pytest.mark.broad
def test_what_load_leaves_out_is_an_error() -> None:
    gm = without_data(CONFIGS["LoRA"])

    def load(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "norm" not in key:
                tensor.zero_()

    with pytest.raises(llfx.AdapterError, match=r"left 5 of the frozen tensors without values, as model\.layers\.0"):
        llfx.materialize(gm, load)


@pytest.mark.broad
def test_buffers_without_data_and_graphs_with_data_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config())
    with pytest.raises(llfx.AdapterError, match=r"the buffer model\.rotary_emb\.inv_freq is on the device 'meta'"):
        llfx.materialize(llfx.rewrite(model, CONFIGS["LoRA"]), lambda tensors: None)
    with pytest.raises(llfx.AdapterError, match="takes a graph that rewrite made of a model on the device 'meta'"):
        llfx.materialize(llfx.rewrite(base(), CONFIGS["LoRA"]), lambda tensors: None)


class CountsWithoutGradients(torch.nn.Module):
    """Makes a tensor on the device of its input in a region, whose operators a graph keeps in a graph of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            numbers = torch.arange(x.shape[1], device=x.device).to(x.dtype).sin()
        y: Tensor = self.fc(x)
        return y * numbers[None, :, None]


def test_the_regions_of_a_graph_make_their_tensors_on_the_new_device() -> None:
    with torch.device("meta"):
        gm = llfx.rewrite(CountsWithoutGradients(), llfx.LoRA(r=2, target_names="fc"), (torch.ones(2, 3, 4),))
    model, x = CountsWithoutGradients(), torch.randn(2, 5, 4)
    weights = model.state_dict()
    llfx.materialize(gm, lambda tensors: [tensor.copy_(weights[key]) for key, tensor in tensors.items()])
    for _ in range(2):
        close(gm(x), model(x), 1e-6, "the start is the base")
