"""Check that what is not a model to be adapted raises an error whose message says what to pass instead."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lora_lite_fx as llfx
from tests.adapters.test_mistakes_in_arguments import MISTAKES as OF_ARGUMENTS
from tests.adapters.test_mistakes_in_configs import MISTAKES as OF_CONFIGS
from tests.support.mistakes import (
    A_MODEL,
    CFG,
    COMPILED,
    IDS,
    PEFT_WAY_OUT,
    RETURNED,
    SHARDED,
    TOKENIZER,
    USE_RESULT,
    Mistake,
    anything,
    chat,
    chat_with_peft,
    check_mistake,
    graph,
    llama,
    model,
    plain,
    tokenizer,
    with_peft,
)
from tests.support.models import GatedMLP, Net
from tests.support.selection import broad_after


def trainer() -> Any:
    return hf.Trainer(model=llama(), args=hf.TrainingArguments("empty", report_to=[], use_cpu=True))


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


class Parallel(nn.parallel.DistributedDataParallel):
    """The class of distributed training, without the process group that it requires."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


MISTAKES: list[Mistake] = [
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
        "adapt takes a model of transformers or diffusers, not a GraphModule; for other modules there is rewrite."
        " It is a graph, as rewrite returns it. adapt(graph), without a config, runs its adapters in a model."
        " Or adapt the model itself, chat = adapt(model, cfg), and move the adapters:"
        " load_adapter_state_dict(chat, adapter_state_dict(graph)).",
    ),
    (
        lambda: anything.adapt(plain(), CFG),
        llfx.AdapterError,
        "adapt takes a model of transformers or diffusers, not a Net; for other modules there is rewrite.",
    ),
    (
        lambda: anything.adapt(chat(), CFG),
        llfx.AdapterError,
        "LlamaForCausalLM is adapted already. The way out: llfx.add(model, {'name': cfg}) gives it a further adapter;"
        " or pass several configs at once.",
    ),
    (
        lambda: anything.rewrite(chat(), CFG),
        llfx.CaptureError,
        "LlamaForCausalLM is wrapped eagerly already, or adapted. The way out: start from the model that it was made"
        " of, and pass several configs at once. Or, to give an adapted model a further adapter:"
        " llfx.add(model, {'name': cfg}).",
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
        " adapters; llfx.merge(graph).save_pretrained(folder) writes the model of transformers that it was captured"
        " from, with them.",
    ),
    (
        lambda: graph().merge_and_unload(),
        AttributeError,
        "A rewritten graph has no merge_and_unload. llfx.merge(graph) returns the model with its adapters folded in.",
    ),
    (
        lambda: graph().disable_adapter(),
        AttributeError,
        "A rewritten graph has no disable_adapter. `with llfx.active(graph, []):` is a scope without adapters.",
    ),
    (
        lambda: graph().set_adapter("fr"),
        AttributeError,
        "A rewritten graph has no set_adapter. llfx.set_adapter(graph, name) lets one adapter act and train.",
    ),
    (
        lambda: graph().get_base_model(),
        AttributeError,
        "A rewritten graph has no get_base_model. llfx.remove(graph) returns the model without its adapters.",
    ),
    (
        lambda: graph().peft_config,
        AttributeError,
        "A rewritten graph has no peft_config. llfx.to_peft_config(graph, adapter=name) returns what"
        " adapter_config.json of an adapter holds.",
    ),
    (
        lambda: chat().merge_adapter(),
        AttributeError,
        "An adapted model has no merge_adapter. llfx.merge(model) returns the model with its adapters folded in.",
    ),
    (
        lambda: chat().add_weighted_adapter(["default"], [1.0], "sum"),
        AttributeError,
        "An adapted model has no add_weighted_adapter. llfx.combine(model, {name: weight, ...}, name) adds a sum of"
        " adapters.",
    ),
    # Functions of PEFT that the package does not have.
    (
        lambda: anything.get_peft_model(plain(), CFG),
        AttributeError,
        "module 'lora_lite_fx' has no attribute 'get_peft_model'. llfx.adapt(model, cfg) returns a model of the same"
        " class, llfx.rewrite(model, cfg) a graph.",
    ),
    (
        lambda: anything.LoraConfig(r=8),
        AttributeError,
        "module 'lora_lite_fx' has no attribute 'LoraConfig'. A config is named as its method, llfx.LoRA(r=8); adapt"
        " and rewrite take PEFT's own, too.",
    ),
    (
        lambda: anything.AutoPeftModelForCausalLM,
        AttributeError,
        "module 'lora_lite_fx' has no attribute 'AutoPeftModelForCausalLM'. llfx.load_peft(model, path) returns a graph"
        " with the adapter; llfx.adapt(model, path) a model.",
    ),
    (lambda: anything.nonsense, AttributeError, "module 'lora_lite_fx' has no attribute 'nonsense'"),
    (lambda: graph().nonsense, AttributeError, "'GraphModule' object has no attribute 'nonsense'"),
]


@pytest.mark.parametrize("mistake", broad_after(2, MISTAKES), ids=range(len(MISTAKES)))
def test_the_error_of_a_mistake_says_how_to_correct_it(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_mistake(mistake, tmp_path, monkeypatch)


def test_the_tables_are_large() -> None:
    """A table that is cut short by mistake would leave the tests above green."""
    assert len(MISTAKES) + len(OF_ARGUMENTS) + len(OF_CONFIGS) >= 90
