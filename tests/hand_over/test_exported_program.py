"""`export` makes programs of plain tensors, which load where torch alone is, and which the front doors take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import lora_lite_fx as llfx
from tests.support.captured import captured
from tests.support.conformance import calibration, randomise, small
from tests.support.models import GatedMLP, Normed, ids, net, one_layer_llama, tiny_t5
from tests.support.quantized import STORAGES, storages
from tests.support.selection import broad_after, broad_unless, is_distinct, slow_unless

EXAMPLE = {"ids": ids(2, 5)}
SHAPES = ((2, 5), (1, 1), (3, 9))
LORA = llfx.LoRA(r=2, target_names=".")
OF_LLAMA = llfx.LoRA(r=2, target_roles=("attention", "mlp"))


def small_net() -> nn.Module:
    return net(GatedMLP)


def adapted(cfg: Any = LORA, seed: int = 1) -> Any:
    """Return a graph whose adapters have random values."""
    _, graph = captured(small_net, inputs=(EXAMPLE["ids"],))
    gm = llfx.rewrite(graph, cfg, calibration=calibration(cfg, None, (EXAMPLE["ids"],)))
    randomise(gm, seed)
    return gm


def tokens(batch: int, length: int, size: int = 32) -> dict[str, Tensor]:
    """Return text of which the first row is padded on the left."""
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    return {"input_ids": torch.randint(size, (batch, length), generator=generator), "attention_mask": mask}


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def check(program: Any, gm: Any) -> None:
    """Check that a program of the small net computes what a model does, for other sizes than the example's too."""
    module = program.module()
    for shape in SHAPES:
        close(module(ids=ids(*shape)), gm(ids(*shape)))


@pytest.mark.parametrize(
    "cls", broad_unless(lambda cls: cls is llfx.DoRA, slow_unless(is_distinct, llfx.registry().values()))
)
def test_each_variant_is_exported(cls: type[llfx.Variant]) -> None:
    gm = adapted(small(cls))
    program = llfx.export(gm, EXAMPLE)
    check(program, gm)
    assert llfx.adapter_state_dict(gm).keys() <= program.state_dict.keys()
    check(llfx.export(gm, EXAMPLE, bake=True), gm)


LOADS = """
import sys
for name in ("transformers", "lora_lite_fx", "peft"):
    sys.modules[name] = None
import torch
example = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(**example), sys.argv[3])
"""


@pytest.mark.broad
@pytest.mark.parametrize("bake", broad_after(1, [False, True]))
def test_a_file_runs_where_torch_alone_is(bake: bool, tmp_path: Path) -> None:
    _, graph = captured(one_layer_llama)
    gm = llfx.rewrite(graph, llfx.DoRA(r=2, target_roles=("attention", "mlp")))
    randomise(gm, 0)
    path = [tmp_path / name for name in ("m.pt2", "inputs.pt", "outputs.pt")]
    torch.export.save(llfx.export(gm, tokens(2, 6), outputs="logits", bake=bake), path[0])
    torch.save(tokens(3, 9), path[1])
    subprocess.run([sys.executable, "-c", LOADS, *map(str, path)], check=True, timeout=120)
    with torch.no_grad():
        close(torch.load(path[2]), gm(**tokens(3, 9)).logits)


def test_the_front_doors_take_what_was_loaded(tmp_path: Path) -> None:
    gm = adapted()
    torch.export.save(llfx.export(gm, EXAMPLE), tmp_path / "m.pt2")
    loaded: Any = torch.export.load(tmp_path / "m.pt2").module()
    assert str(llfx.adapters(loaded)) == str(llfx.adapters(gm))
    assert len(llfx.inspect(loaded)) == len(llfx.inspect(gm))
    ours, theirs = llfx.adapter_state_dict(loaded), llfx.adapter_state_dict(gm)
    assert list(ours) == list(theirs)
    close(ours, theirs)
    with torch.no_grad():
        close(llfx.merge(loaded)(ids=ids(3, 4)), gm(ids(3, 4)))
        close(llfx.remove(loaded)(ids=ids(3, 4)), llfx.remove(gm)(ids(3, 4)))
    llfx.save(gm, tmp_path / "adapter.safetensors")
    again = llfx.load(llfx.remove(loaded), tmp_path / "adapter.safetensors")
    with torch.no_grad():
        close(again(ids=ids(3, 4)), gm(ids(3, 4)))


def test_only_what_acts_is_exported() -> None:
    gm = adapted()
    llfx.add(gm, {"fr": llfx.IA3(target_names="gate")})
    randomise(gm, 3)
    with llfx.active(gm, []):
        program = llfx.export(gm, EXAMPLE)
        check(program, gm)
    assert not program.state_dict.keys() & llfx.adapter_state_dict(gm).keys()
    with llfx.active(gm, "fr"):
        program = llfx.export(gm, EXAMPLE)
        check(program, gm)
    acting = program.state_dict.keys() & llfx.adapter_state_dict(gm).keys()
    assert acting == {name for name in llfx.adapter_state_dict(gm) if name.endswith("_fr")}
    with llfx.scaled(gm, 0.5):
        program = llfx.export(gm, EXAMPLE, bake=True)
        check(program, gm)


def test_a_model_in_training_is_exported_in_evaluation() -> None:
    _, graph = captured(net, Normed, inputs=(EXAMPLE["ids"],))
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names="lin", dropout=0.5))
    randomise(gm, 1)
    gm.train()
    program = llfx.export(gm, EXAMPLE)
    assert gm.training
    check(program, gm.eval())
    assert not program.graph_signature.buffers_to_mutate


def test_an_example_with_sizes_of_one_leaves_them_open() -> None:
    gm = adapted()
    check(llfx.export(gm, {"ids": ids(1, 1)}), gm)
    check(llfx.export(gm), gm)  # with the sizes of the capture


class Result(NamedTuple):
    first: Tensor
    more: dict[str, Any]


class Nested(nn.Module):
    """Returns tensors in a tuple with names, a dict and a list, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Result:
        y = self.lin(x) if scale is None else self.lin(x) * scale
        return Result(y, {"list": [y + 1, y + 2], "none": None})


def test_outputs_are_named_by_fields_and_keys() -> None:
    x = torch.randn(3, 4)
    gm = llfx.rewrite(Nested(), LORA, {"x": x, "scale": torch.ones(4)})
    randomise(gm, 0)
    with torch.no_grad():
        first, more = gm(x=x, scale=torch.full((4,), 2.0))
        inputs = {"x": x, "scale": torch.full((4,), 2.0)}
        close(llfx.export(gm, inputs, outputs="first").module()(**inputs), first)
        close(llfx.export(gm, inputs).module()(**inputs), (first, *more["list"]))
        close(llfx.export(gm, inputs, outputs=("more.list.1", "first")).module()(**inputs), (more["list"][1], first))
        close(llfx.export(gm, inputs, outputs="more").module()(**inputs), tuple(more["list"]))
    with pytest.raises(llfx.ConfigError, match=r"does not return 'logits'.*it returns first, more.list.0, more.list.1"):
        llfx.export(gm, inputs, outputs="logits")


@pytest.mark.broad
def test_arguments_may_be_left_out() -> None:
    _, graph = captured(one_layer_llama)
    gm = llfx.rewrite(graph, OF_LLAMA)
    randomise(gm, 0)
    with torch.no_grad():
        for names in (("input_ids",), ("input_ids", "attention_mask")):
            example, other = ({name: text[name] for name in names} for text in (tokens(2, 6), tokens(3, 9)))
            close(llfx.export(gm, example, outputs="logits").module()(**other), gm(**other).logits)
        taken = list(llfx.export(gm, tokens(2, 6), outputs="logits").graph_signature.user_inputs)
    assert taken == ["input_ids", "attention_mask"]


@pytest.mark.broad
@pytest.mark.parametrize("front_door", ["adapt", "merge", "load", "merge adapt"])
def test_results_of_all_front_doors(front_door: str, tmp_path: Path) -> None:
    model, graph = captured(one_layer_llama)
    model.eval()
    gm: Any = llfx.adapt(model, OF_LLAMA) if "adapt" in front_door else llfx.rewrite(graph, OF_LLAMA)
    randomise(gm, 0)
    if front_door == "load":
        llfx.save(gm, tmp_path / "adapter.safetensors")
        gm = llfx.load(captured(one_layer_llama)[1], tmp_path / "adapter.safetensors")
    if "merge" in front_door:
        gm = llfx.merge(gm)
    program = llfx.export(gm, tokens(2, 6), outputs="logits")
    with torch.no_grad():
        close(program.module()(**tokens(3, 9)), gm(**tokens(3, 9), use_cache=False).logits)
    if "merge" not in front_door:
        assert llfx.adapter_state_dict(gm).keys() <= program.state_dict.keys()


def test_a_bank_takes_ids() -> None:
    gm = adapted(llfx.Bank(LORA, slots=3))
    program = llfx.export(gm, {**EXAMPLE, "adapter_ids": torch.tensor([0, 2])}).module()
    with torch.no_grad():
        for shape in SHAPES:
            rows = torch.arange(shape[0]) % 3
            close(program(ids=ids(*shape), adapter_ids=rows), gm(ids(*shape), adapter_ids=rows))


@pytest.mark.parametrize("storage", storages("torchao int8"))
def test_a_quantised_base(storage: str) -> None:
    model = STORAGES[storage](nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval())
    gm = llfx.rewrite(model, LORA, (torch.randn(2, 64),))
    randomise(gm, 0)
    program = llfx.export(gm, {"input": torch.randn(2, 64)})
    pointers = {tensor.data_ptr() for tensor in gm.buffers()}
    assert all(tensor.data_ptr() in pointers for tensor in dict(program.named_buffers()).values())  # one storage
    with torch.no_grad():
        x = torch.randn(5, 64)
        close(program.module()(input=x), gm(x))


@pytest.mark.broad
def test_an_encoder_a_decoder_with_one_and_an_image_model() -> None:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=32, **sizes)).eval()
    t5 = T5ForConditionalGeneration(tiny_t5()).double().eval()  # which does not scale its attention
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    of_t5 = [{**tokens(*shape), "decoder_input_ids": tokens(*shape)["input_ids"][:, :3]} for shape in ((2, 6), (3, 9))]
    images = [{"pixel_values": torch.randn(batch, 3, 8, 8)} for batch in (2, 3)]
    text = [tokens(2, 6), tokens(3, 9)]
    for model, (example, other), output in (
        (bert, text, "last_hidden_state"),
        (t5, of_t5, "logits"),
        (vit, images, "logits"),
    ):
        gm = llfx.rewrite(model, LORA, example)
        randomise(gm, 0)
        with torch.no_grad():
            close(llfx.export(gm, example, outputs=output).module()(**other), gm(**other)[output])


@pytest.mark.slow
def test_an_encoder_with_a_decoder_is_served_its_tokens_and_not_labels() -> None:
    base = T5ForConditionalGeneration(tiny_t5()).double()  # which does not scale its attention: float32 is off by 2e-5
    chat = llfx.adapt(base, llfx.LoRA(r=2)).eval()
    randomise(chat, 0)
    program = llfx.export(chat, outputs="logits").module()
    inputs = {**tokens(3, 9), "decoder_input_ids": ids(3, 4)}
    with torch.no_grad():
        close(program(**inputs), chat(**inputs).logits)


def test_a_result_that_comes_out_of_a_dropout() -> None:
    """T5 without a head returns what its last dropout returns."""
    example = {"input": torch.randn(3, 4)}
    gm = llfx.rewrite(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3)), llfx.LoRA(r=2, target_names="."), example).eval()
    randomise(gm, 0)
    x = torch.randn(2, 4)
    with torch.no_grad():
        close(llfx.export(gm, example).module()(input=x), gm(x))


def test_positional_inputs_get_the_names_of_forward() -> None:
    gm = adapted()
    check(llfx.export(gm, (EXAMPLE["ids"],)), gm)
    with pytest.raises(llfx.ConfigError, match=r"inputs does not fit .*\.forward: too many positional arguments"):
        llfx.export(gm, (EXAMPLE["ids"], EXAMPLE["ids"]))


def test_bad_arguments() -> None:
    gm = adapted()
    with pytest.raises(llfx.CallError, match="more is not an argument that this graph has"):
        llfx.export(gm, {**EXAMPLE, "more": ids(2, 5)})
    with pytest.raises(llfx.CallError, match="ids"):
        llfx.export(gm, {})
    for inputs in ({"ids": 3}, ids(2, 5), [ids(2, 5)], (3,)):
        with pytest.raises(llfx.ConfigError, match=r"a dict of the model's arguments, \{'ids': tensor\}"):
            llfx.export(gm, inputs)  # type: ignore[arg-type]
    for model in ("model", None):
        with pytest.raises(llfx.AdapterError):
            llfx.export(model, EXAMPLE)  # type: ignore[arg-type]
    with pytest.raises(llfx.AdapterError, match=r"llfx.export"), llfx.scaled(gm, torch.ones(2)):
        llfx.export(gm, EXAMPLE)
