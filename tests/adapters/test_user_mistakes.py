"""Check that each mistake of a new user raises an error of the right class, whose message says how to correct it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as hf
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import shown
from tests.support.models import GatedMLP, Net, tiny_llama
from tests.support.models import ids as net_ids
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


def trainer() -> Any:
    return hf.Trainer(model=llama(), args=hf.TrainingArguments("empty", report_to=[], use_cpu=True))


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


class Parallel(nn.parallel.DistributedDataParallel):
    """The class of distributed training, without the process group that it requires."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with adapters in all file formats. Each test works in a copy of it."""
    path = tmp_path_factory.mktemp("adapters")
    llfx.save(graph(), path / "adapter.safetensors")
    llfx.save_lora_lite(graph(), path / "lite.safetensors")
    llfx.save_peft(graph(), path / "peft")
    chat().save_pretrained(path / "folder")
    model().save_pretrained(path / "whole")
    (path / "empty").mkdir()
    return path


@pytest.fixture(autouse=True)
def in_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


Mistake = tuple[Callable[[], Any], type[Exception], str]

A_VARIANT = "cfg must be a variant such as LoRA(r=8), or a list of them, not "
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

MISTAKES: list[Mistake] = [
    # The config.
    (lambda: anything.rewrite(plain(), "LoRA"), llfx.ConfigError, A_VARIANT + "'LoRA'. Pass a config: llfx.LoRA()."),
    (lambda: anything.rewrite(plain(), "lora"), llfx.ConfigError, A_VARIANT + "'lora'. Pass a config: llfx.LoRA()."),
    (
        lambda: anything.rewrite(plain(), "all-linear"),
        llfx.ConfigError,
        A_VARIANT + f"'all-linear'. The variants are {VARIANTS}.",
    ),
    (
        lambda: anything.rewrite(plain(), "adapter.safetensors"),
        llfx.ConfigError,
        A_VARIANT + "'adapter.safetensors'. It is a file: llfx.load(model, 'adapter.safetensors') loads the adapters"
        " that llfx.save wrote.",
    ),
    (
        lambda: anything.rewrite(plain(), Path("peft")),
        llfx.ConfigError,
        A_VARIANT + "'peft'. It is a folder: llfx.load_peft(model, 'peft') loads the adapter of a PEFT directory.",
    ),
    (
        lambda: anything.rewrite(plain(), PEFT_CFG),
        llfx.ConfigError,
        A_VARIANT + "a LoraConfig. It is a config of PEFT: pass llfx.from_peft_config(cfg).",
    ),
    (
        lambda: anything.wrap(plain(), [CFG, PEFT_CFG]),
        llfx.ConfigError,
        A_VARIANT + "a LoraConfig. It is a config of PEFT: pass llfx.from_peft_config(cfg).",
    ),
    (
        lambda: anything.adapt(model(), {"peft_type": "LORA", "r": 8}),
        llfx.ConfigError,
        A_VARIANT + "{'peft_type': 'LORA', 'r': 8}. It is a config of PEFT: pass llfx.from_peft_config(cfg).",
    ),
    (
        lambda: anything.rewrite(plain(), llfx.LoRA),
        llfx.ConfigError,
        A_VARIANT + "the class LoRA. Pass an instance: LoRA().",
    ),
    (
        lambda: anything.rewrite(plain(), {"r": 8}),
        llfx.ConfigError,
        A_VARIANT + "{'r': 8}. Make a config of these fields: LoRA(**cfg).",
    ),
    (
        lambda: anything.rewrite(plain(), {"chat": CFG}),
        llfx.ConfigError,
        A_VARIANT + "{'chat': <LoRA>}. Adapters with names are not supported yet: pass a list, [*cfg.values()].",
    ),
    (
        lambda: anything.rewrite(plain(), {CFG}),
        llfx.ConfigError,
        A_VARIANT + "{<LoRA>}. A set has no order; pass a list.",
    ),
    (
        lambda: anything.rewrite(plain(), (cfg for cfg in [CFG])),
        llfx.ConfigError,
        A_VARIANT + "a generator. Make a list of it: [*cfg].",
    ),
    (
        lambda: anything.rewrite(model(), model().config),
        llfx.ConfigError,
        A_VARIANT + "a LlamaConfig. It is the config of a model; cfg is the config of the adapters.",
    ),
    (lambda: anything.rewrite(plain(), 8), llfx.ConfigError, A_VARIANT + "8."),
    (lambda: anything.rewrite(plain(), None), llfx.ConfigError, A_VARIANT + "None."),
    (lambda: anything.rewrite(plain(), []), llfx.ConfigError, A_VARIANT + "an empty list."),
    (
        lambda: anything.adapt(model(), "LoRA"),
        llfx.CheckpointError,
        "There is no file 'LoRA' to load adapters from. For new ones pass a config: LoRA(r=8).",
    ),
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
        " torch.compile(model, backend=backend(LoRA(r=8))).",
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
    # The model.
    (
        lambda: anything.rewrite("meta-llama/Llama-3.2-1B", CFG),
        llfx.CaptureError,
        A_MODEL + "'meta-llama/Llama-3.2-1B'. Load the model first:"
        " AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B').",
    ),
    (
        lambda: anything.adapt("whole", CFG),
        llfx.CaptureError,
        A_MODEL + "'whole'. Load the model first: AutoModelForCausalLM.from_pretrained('whole').",
    ),
    (
        lambda: anything.inspect(Path("whole")),
        llfx.CaptureError,
        A_MODEL + "'whole'. Load the model first: AutoModelForCausalLM.from_pretrained('whole').",
    ),
    (
        lambda: anything.rewrite(hf.LlamaForCausalLM, CFG),
        llfx.CaptureError,
        A_MODEL + "the class LlamaForCausalLM. Pass an instance: LlamaForCausalLM.from_pretrained(...).",
    ),
    (lambda: anything.wrap(Net, CFG), llfx.CaptureError, A_MODEL + "the class Net. Pass an instance: Net(...)."),
    (
        lambda: anything.inspect(CFG),
        llfx.CaptureError,
        A_MODEL + "a LoRA. The model comes first, then the config: rewrite(model, LoRA(r=8)).",
    ),
    (
        lambda: anything.rewrite((model(), tokenizer()), CFG),
        llfx.CaptureError,
        A_MODEL + f"(<LlamaForCausalLM>, <{TOKENIZER}>). Pass its element 0, which is the model.",
    ),
    (
        lambda: anything.rewrite(plain().state_dict(), CFG),
        llfx.CaptureError,
        A_MODEL + "an OrderedDict. It holds tensors by name. If they are a state dict, load it into a model:"
        " model.load_state_dict(...).",
    ),
    (
        lambda: anything.adapt(tokenizer(), CFG),
        llfx.CaptureError,
        A_MODEL + f"a {TOKENIZER}. It prepares inputs. Pass the model that takes them.",
    ),
    (
        lambda: anything.adapt(hf.WhisperFeatureExtractor(), CFG),
        llfx.CaptureError,
        A_MODEL + "a WhisperFeatureExtractor. It prepares inputs. Pass the model that takes them.",
    ),
    (
        lambda: anything.adapt(hf.pipeline("text-generation", model=llama(), tokenizer=tokenizer()), CFG),
        llfx.CaptureError,
        A_MODEL + "a TextGenerationPipeline. Pass the model that it holds, its attribute `model`.",
    ),
    (
        lambda: anything.rewrite(trainer(), CFG),
        llfx.CaptureError,
        A_MODEL + "a Trainer. Pass the model that it holds, its attribute `model`.",
    ),
    (
        lambda: anything.rewrite(model().config, CFG),
        llfx.CaptureError,
        A_MODEL + "a LlamaConfig. It describes a model. Make one: AutoModelForCausalLM.from_config(config).",
    ),
    (lambda: anything.rewrite(None, CFG), llfx.CaptureError, A_MODEL + "None."),
    (lambda: anything.rewrite(IDS, CFG), llfx.CaptureError, A_MODEL + "a Tensor."),
    # Models that other libraries have changed.
    *(
        (
            functools.partial(door, with_peft(), CFG),
            llfx.CaptureError,
            "PeftModel cannot be captured: it has layers of PEFT (PEFT's PeftModel). " + PEFT_WAY_OUT,
        )
        for door in (llfx.rewrite, llfx.wrap, llfx.adapt)
    ),
    (
        lambda: anything.adapt(with_peft().get_base_model(), CFG),
        llfx.CaptureError,
        "LlamaForCausalLM cannot be captured: it has layers of PEFT (PEFT's Linear at"
        " 'model.layers.0.self_attn.q_proj'). " + PEFT_WAY_OUT,
    ),
    (
        lambda: anything.merge(with_peft()),
        llfx.AdapterError,
        f"PeftModel has no adapters; {RETURNED}: it has layers of PEFT (PEFT's PeftModel). {PEFT_WAY_OUT}",
    ),
    (
        lambda: chat_with_peft()(input_ids=IDS),
        llfx.AdapterError,
        "PEFT has changed the modules of this adapted model, which do not run: its graphs do. PEFT's adapters would"
        " have no effect. The way out: give adapt all configs, adapt(model, [LoRA(r=8),"
        " llfx.from_peft_config(config)]).",
    ),
    (
        lambda: anything.rewrite(nn.DataParallel(plain()), CFG),
        llfx.CaptureError,
        f"DataParallel cannot be captured: it wraps a model. {SHARDED}: DataParallel(...).",
    ),
    (
        lambda: anything.adapt(Parallel(model()), CFG),
        llfx.CaptureError,
        f"Parallel cannot be captured: it wraps a model. {SHARDED}: Parallel(...).",
    ),
    (
        lambda: anything.adapter_parameters(Parallel(chat())),
        llfx.AdapterError,
        f"Parallel has no adapters; {RETURNED}: it wraps a model. {SHARDED}: Parallel(...).",
    ),
    (
        lambda: anything.rewrite(compiled(Net([GatedMLP], True, False)), CFG),
        llfx.CaptureError,
        f"OptimizedModule cannot be captured: {COMPILED}",
    ),
    (
        lambda: anything.save(compiled(llfx.rewrite(plain(), CFG)), "new.safetensors"),
        llfx.AdapterError,
        f"OptimizedModule has no adapters; {RETURNED}: {COMPILED}",
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
        lambda: anything.load_peft(model(), "someone/adapter"),
        llfx.CheckpointError,
        "someone/adapter is not a directory: nothing is there. If it is a name on the Hugging Face Hub, download it"
        " first: huggingface_hub.snapshot_download('someone/adapter').",
    ),
    # Models without adapters, and models of a wrong class.
    *(
        (functools.partial(use, plain()), llfx.AdapterError, f"Net has no adapters; {USE_RESULT}")
        for use in (llfx.merge, llfx.remove, llfx.adapter_parameters, llfx.adapter_state_dict, llfx.to_peft_config)
    ),
    (
        lambda: anything.save(model(), "new.safetensors"),
        llfx.AdapterError,
        f"LlamaForCausalLM has no adapters; {USE_RESULT}",
    ),
    (
        lambda: anything.merge("adapter.safetensors"),
        llfx.AdapterError,
        "The model must be what rewrite, wrap, adapt or load returned, not 'adapter.safetensors'. Load the model first:"
        " AutoModelForCausalLM.from_pretrained('adapter.safetensors').",
    ),
    (
        lambda: anything.merge(llfx.wrap(plain(), CFG)),
        llfx.AdapterError,
        "Net has no adapters in its graph: wrap put them into its modules. The way out: rewrite in place of wrap.",
    ),
    (
        lambda: anything.adapt(graph(), CFG),
        llfx.AdapterError,
        "adapt takes a model of transformers, not a GraphModule; for other modules there is rewrite. It is a graph, as"
        " rewrite returns it. Adapt the model itself, chat = adapt(model, cfg), and move the adapters:"
        " load_adapter_state_dict(chat, adapter_state_dict(graph)).",
    ),
    (
        lambda: anything.adapt(plain(), CFG),
        llfx.AdapterError,
        "adapt takes a model of transformers, not a Net; for other modules there is rewrite.",
    ),
    (
        lambda: anything.adapt(chat(), CFG),
        llfx.AdapterError,
        "LlamaForCausalLM is adapted already. The way out: pass several configs at once.",
    ),
    (
        lambda: anything.rewrite(chat(), CFG),
        llfx.CaptureError,
        "LlamaForCausalLM is wrapped eagerly already, or adapted. The way out: start from the model that it was made"
        " of, and pass several configs at once.",
    ),
    (
        lambda: anything.optimize(chat()),
        llfx.AdapterError,
        "optimize takes a graph that rewrite, load or torch.export returned, not a LlamaForCausalLM. The graphs of an"
        " adapted model are optimized already.",
    ),
    (
        lambda: anything.optimize(plain()),
        llfx.AdapterError,
        "optimize takes a graph that rewrite, load or torch.export returned, not a Net. Only adapters are optimized:"
        " optimize(rewrite(model, LoRA(r=8))).",
    ),
    # Methods of transformers and PEFT that a graph does not have.
    (
        lambda: graph().generate(IDS),
        AttributeError,
        "A rewritten graph has no generate. llfx.adapt(model, cfg) returns a model of the same class, which has it.",
    ),
    (
        lambda: graph().save_pretrained("folder"),
        AttributeError,
        "A rewritten graph has no save_pretrained. llfx.save(graph, path) and llfx.save_peft(graph, folder) write its"
        " adapters.",
    ),
    (
        lambda: graph().merge_and_unload(),
        AttributeError,
        "A rewritten graph has no merge_and_unload. llfx.merge(graph) returns the model with its adapters folded in.",
    ),
    (
        lambda: graph().disable_adapter(),
        AttributeError,
        "A rewritten graph has no disable_adapter. llfx.remove(graph) returns the model without its adapters, over the"
        " same weights.",
    ),
    (lambda: graph().nonsense, AttributeError, "'GraphModule' object has no attribute 'nonsense'"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_the_error_of_a_mistake_says_how_to_correct_it(
    call: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    files = sorted(tmp_path.rglob("*"))
    with untouched(plain(), model(), graph(), chat(), with_peft()), pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert len(message) < 500
    assert sorted(tmp_path.rglob("*")) == files


def test_the_table_is_large_and_its_messages_have_one_line() -> None:
    assert len(MISTAKES) >= 40
    assert not any("\n" in message for _, _, message in MISTAKES)


# Mistakes in the fields of configs. More of them are in test_variant_arguments.py.

FIELDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: anything.LoRA(8), "LoRA takes its fields by name: write LoRA(r=8)."),
    (lambda: anything.LoRA(lora_alpha=16), "LoRA has no field 'lora_alpha': write alpha=16."),
    (
        lambda: anything.LoRA(target_modules=["q_proj"]),
        "LoRA has no field 'target_modules': write target_names=(r\"(^|\\.)q_proj$\",), regular expressions that are"
        " searched in the qualified name.",
    ),
    (
        lambda: anything.LoRA(target_modules="all-linear"),
        "LoRA has no field 'target_modules': the default roles are every linear of attention and of the feed-forward"
        ' layers, so leave it out, or write target_roles=("attention", "mlp").',
    ),
    (lambda: anything.LoRA(lora_dropout=0.1), "LoRA has no field 'lora_dropout': write dropout=0.1."),
    (
        lambda: anything.LoRA(modules_to_save=["lm_head"]),
        "LoRA has no field 'modules_to_save': only adapters are trained and saved, not whole modules. Remove it, and"
        " name those modules in target_names to adapt them too.",
    ),
]


@pytest.mark.parametrize(("build", "message"), FIELDS, ids=range(len(FIELDS)))
def test_the_error_of_a_field_of_peft_names_our_field(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        build()
    assert str(caught.value) == message


# Values in error messages.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 200, "'" + "x" * 27 + "..." + "x" * 28 + "'"),
        ([nn.Linear(2, 2)] * 9, "[" + "<Linear>, " * 6 + "...]"),
        (nn.Linear(2, 2), "a Linear"),
        (llfx.IA3(), "an IA3"),
        (Path("a/b"), "'a/b'"),
        (llfx.LoRA, "the class LoRA"),
        (None, "None"),
        (2.5, "2.5"),
        ({"a": (1, "b")}, "{'a': (1, 'b')}"),
    ],
)
def test_a_value_is_shortened_in_messages(value: object, text: str) -> None:
    assert shown(value) == text
