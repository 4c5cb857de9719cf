"""What the tests of users' mistakes share: models, adapters in files, sentences, and the check of a mistake."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as hf

import lora_lite_fx as llfx
from tests.support.models import GatedMLP, Net, tiny_llama
from tests.support.untouched import untouched

CFG = llfx.LoRA(r=2)
anything: Any = llfx  # takes arguments of wrong types, as a user without a type checker may pass them
IDS = torch.ones(2, 6, dtype=torch.long)
PEFT_CFG = peft.LoraConfig(r=2, target_modules=["q_proj"])


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny_llama())


@functools.cache
def plain() -> Net:
    torch.manual_seed(0)
    return Net([GatedMLP], bias=True, tied=False)


@functools.cache
def model() -> Any:
    return llama()


@functools.cache
def graph() -> Any:
    return llfx.rewrite(plain(), CFG)


@functools.cache
def chat() -> Any:
    return llfx.adapt(llama(), CFG)


@functools.cache
def with_peft() -> Any:
    return peft.get_peft_model(llama(), PEFT_CFG)


@functools.cache
def chat_with_peft() -> Any:
    return peft.get_peft_model(llfx.adapt(llama(), CFG), PEFT_CFG)


@functools.cache
def tokenizer() -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a")


TOKENIZER = type(tokenizer()).__name__  # depends on the version of transformers


@functools.cache
def _files() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with adapters in all file formats. Each test works in a copy of it."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    llfx.save(graph(), path / "adapter.safetensors")
    llfx.save_lora_lite(graph(), path / "lite.safetensors")
    llfx.save_peft(graph(), path / "peft")
    chat().save_pretrained(path / "folder")
    model().save_pretrained(path / "whole")
    (path / "empty").mkdir()
    return folder


Mistake = tuple[Callable[[], Any], type[Exception], str]


def check_mistake(mistake: Mistake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a mistake raises its error, with a message of one line, and changes neither models nor files.

    Args:
        mistake: a call, the class of its error, and the whole message.
        folder: an empty folder, in which the call runs among adapters in all file formats.
        monkeypatch: changes to that folder.
    """
    call, error, message = mistake
    shutil.copytree(_files().name, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    files = sorted(folder.rglob("*"))
    with untouched(plain(), model(), graph(), chat(), with_peft()), pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert len(message) < 500
    assert "\n" not in message
    assert sorted(folder.rglob("*")) == files


A_VARIANT = "cfg must be a variant such as LoRA(r=8), a list of them, or a dict of such by names, not "
A_MODEL = "The model must be a torch.nn.Module or an ExportedProgram, not "
RETURNED = "it is not what rewrite, wrap, adapt or load returned"
USE_RESULT = f"{RETURNED}: they leave their argument as it is, so use their result."
VARIANTS = ", ".join(sorted(llfx.registry()))
PEFT_WAY_OUT = (
    "Pass the model without them, model.unload(), or with them folded in, model.merge_and_unload(). To keep training"
    " that adapter, write it by model.save_pretrained(folder), and read it by llfx.load_peft(base_model, folder)."
)
SHARDED = "Pass the model inside, model.module, and wrap the result"
COMPILED = "torch.compile returned it. Pass the model that was compiled, and compile the result."
TUPLE_OR_DICT = "example_inputs must be a tuple of positional or a dict of keyword arguments, not "
