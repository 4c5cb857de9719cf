"""Check that arguments in another order, inputs and paths raise errors that say how to correct them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import lora_lite_fx as llfx
from tests.support.mistakes import (
    A_VARIANT,
    CFG,
    IDS,
    TUPLE_OR_DICT,
    Mistake,
    anything,
    check_mistake,
    graph,
    model,
    plain,
    tokenizer,
)
from tests.support.models import ids as net_ids

MISTAKES: list[Mistake] = [
    # The arguments in another order.
    *(
        (
            functools.partial(door, CFG, model()),
            llfx.ConfigError,
            A_VARIANT + "a LlamaForCausalLM. It is a model, which comes first: rewrite(model, LoRA(r=8)).",
        )
        for door in (anything.rewrite, anything.wrap, anything.adapt)
    ),
    (
        lambda: anything.backend(model()),
        llfx.ConfigError,
        "backend takes the config of the adapters, and a LlamaForCausalLM is a model. The call is"
        " backend(LoRA(r=8)).adapt(model, *inputs).",
    ),
    (
        lambda: anything.save("adapter.safetensors", graph()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a GraphModule. The call is save(model, path).",
    ),
    (
        lambda: anything.load("adapter.safetensors", plain()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a Net. The call is load(model, path).",
    ),
    (
        lambda: anything.load_peft("peft", model()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a LlamaForCausalLM. The call is load_peft(model, path).",
    ),
    (
        lambda: anything.save_peft("peft", graph()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a GraphModule. The call is save_peft(model, path).",
    ),
    (
        lambda: anything.load_lora_lite("lite.safetensors", plain()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a Net. The call is load_lora_lite(model, path).",
    ),
    (
        lambda: anything.save_lora_lite("lite.safetensors", graph()),
        llfx.CheckpointError,
        "The path must be a string or a Path, not a GraphModule. The call is save_lora_lite(model, path).",
    ),
    (
        lambda: anything.load_adapter_state_dict(graph(), "adapter.safetensors"),
        llfx.CheckpointError,
        "state_dict must map names to tensors, as adapter_state_dict returns it; it is 'adapter.safetensors'. A file is"
        " loaded by load(model, path).",
    ),
    # Inputs and data.
    (
        lambda: anything.rewrite(plain(), CFG, net_ids(2, 5)),
        llfx.CaptureError,
        TUPLE_OR_DICT + "Tensor; for one tensor write example_inputs=(x,).",
    ),
    (
        lambda: anything.adapt(model(), CFG, IDS),
        llfx.CaptureError,
        TUPLE_OR_DICT + "Tensor; for one tensor write example_inputs=(x,).",
    ),
    (
        lambda: anything.rewrite(model(), CFG, tokenizer()(["a b"], return_tensors="pt")),
        llfx.CaptureError,
        TUPLE_OR_DICT + "BatchEncoding; write example_inputs=dict(batch).",
    ),
    (
        lambda: anything.rewrite(model(), CFG, "a b"),
        llfx.CaptureError,
        TUPLE_OR_DICT + "str; a tokenizer makes them of a text:"
        ' example_inputs=dict(tokenizer(text, return_tensors="pt")).',
    ),
    (
        lambda: anything.inspect(plain(), [net_ids(2, 5)]),
        llfx.CaptureError,
        TUPLE_OR_DICT + "list; write example_inputs=tuple(inputs).",
    ),
    (
        lambda: anything.rewrite(model(), CFG, dict(tokenizer()(["a b"]))),
        llfx.CaptureError,
        "example_inputs: input_ids is a list of numbers, and the model takes a tensor. A tokenizer makes tensors with"
        ' return_tensors="pt".',
    ),
    (
        lambda: anything.rewrite(model(), llfx.EVA(r=2), calibration={"input_ids": IDS}),
        llfx.ConfigError,
        "calibration must hold batches, and is {'input_ids': <Tensor>}. For one batch write calibration=[batch].",
    ),
    (
        lambda: anything.wrap(plain(), llfx.EVA(r=2), calibration=net_ids(2, 5)),
        llfx.ConfigError,
        "calibration must hold batches, and is a Tensor. For one batch write calibration=[batch].",
    ),
    (
        lambda: anything.adapt(model(), llfx.EVA(r=2), calibration=tokenizer()(["a b"], return_tensors="pt")),
        llfx.ConfigError,
        "calibration must hold batches, and is a BatchEncoding. For one batch write calibration=[batch].",
    ),
    (
        lambda: anything.rewrite(model(), llfx.EVA(r=2), calibration="a b"),
        llfx.ConfigError,
        "calibration must hold batches, and is 'a b'. For one batch write calibration=[{\"input_ids\": ids}].",
    ),
    # Paths.
    (
        lambda: anything.load(model(), "nowhere.safetensors"),
        llfx.CheckpointError,
        "nowhere.safetensors is not a file: nothing is there. load reads the file that save wrote.",
    ),
    (
        lambda: anything.load(model(), "peft"),
        llfx.CheckpointError,
        "peft is not a file but a directory. It is a PEFT directory: llfx.load_peft(model, 'peft').",
    ),
    (
        lambda: anything.load(model(), "folder"),
        llfx.CheckpointError,
        "folder is not a file but a directory. An adapted model was saved there: pass the file in it,"
        " 'folder/model.safetensors'.",
    ),
    (
        lambda: anything.load(model(), "whole"),
        llfx.CheckpointError,
        "whole is not a file but a directory. It holds a whole model: AutoModelForCausalLM.from_pretrained('whole').",
    ),
    (
        lambda: anything.load(model(), "empty"),
        llfx.CheckpointError,
        "empty is not a file but a directory. load reads the file that save wrote.",
    ),
    (
        lambda: anything.load(model(), "peft/adapter_model.safetensors"),
        llfx.CheckpointError,
        "peft/adapter_model.safetensors was not written by lora_lite_fx.save: its metadata has no 'lora_lite_fx'. It is"
        " part of a PEFT directory: llfx.load_peft(model, 'peft').",
    ),
    (
        lambda: anything.load(model(), "lite.safetensors"),
        llfx.CheckpointError,
        "lite.safetensors was not written by lora_lite_fx.save: its metadata has no 'lora_lite_fx'. It is a file of"
        " lora-lite: llfx.load_lora_lite(model, 'lite.safetensors').",
    ),
    (
        lambda: anything.load_peft(model(), "adapter.safetensors"),
        llfx.CheckpointError,
        "adapter.safetensors is a file, and load_peft reads a directory. llfx.load(model, 'adapter.safetensors') loads"
        " a file that save wrote.",
    ),
    (
        lambda: anything.load_peft(model(), "peft/adapter_model.safetensors"),
        llfx.CheckpointError,
        "peft/adapter_model.safetensors is a file, and load_peft reads a directory. Pass the PEFT directory that it is"
        " in, 'peft'.",
    ),
    (
        lambda: anything.load_peft(model(), "not/here/adapter"),
        llfx.CheckpointError,
        "not/here/adapter: nothing is there, neither a file nor a directory. A repository on the Hugging Face Hub is"
        " named owner/name.",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_the_error_of_a_mistake_says_how_to_correct_it(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_mistake(mistake, tmp_path, monkeypatch)
