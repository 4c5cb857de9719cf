"""Checks of the model and the example inputs that a user passes: what is wrong with them, and what would be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ...errors import CaptureError, is_instance_of, shown
from ...graph.sharded import is_stage

_PREPARES_INPUTS = ("PreTrainedTokenizerBase", "ProcessorMixin", "FeatureExtractionMixin", "ImageProcessingMixin")
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: object) -> None:
    """Raise `CaptureError` unless `model` is a module that can be captured; the message says what to pass instead."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"The model must be a torch.nn.Module or an ExportedProgram, not {shown(model)}.{_hint(model)}"
        )
    if reason := wrapper_hint(model):
        raise CaptureError(f"{type(model).__name__} cannot be captured: {reason}")
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        parts = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
        way_out = (
            f"adapt the part that is meant, such as model.{parts[0]}" if parts else "adapt the module that has one"
        )
        raise CaptureError(
            f"{type(model).__name__} has no forward(): other methods call its parts. The way out: {way_out}."
        )


def model_hint(model: object) -> str:
    """Return a sentence on what to pass in place of `model`, after a space; empty if nothing is known."""
    return (f" {hint}" if (hint := wrapper_hint(model)) else "") if isinstance(model, nn.Module) else _hint(model)


def wrapper_hint(model: nn.Module) -> str:
    """Return what is around or inside `model` that a graph cannot have, and the way out; empty for other modules."""
    name = type(model).__name__
    if is_instance_of(model, "torch", "OptimizedModule"):
        return "torch.compile returned it. Pass the model that was compiled, and compile the result."
    if is_instance_of(model, "torch", "ScriptModule"):
        return "it is TorchScript, which is compiled already. Pass the model that it was made from."
    if is_instance_of(model, "torch", *_PARALLEL):
        return f"it wraps a model. Pass the model inside, model.module, and wrap the result: {name}(...)."
    if is_instance_of(model, "torch", "FSDPModule"):
        return (
            "its parameters are sharded. The way out: do this before fully_shard; or, to go on with trained adapters,"
            " save(model, path) in all processes, and load(base, path) in one that has the whole base."
        )
    if is_stage(model):
        return "it is a stage of a pipeline. The way out: do this before split."
    if unmade := [path for path, tensor in model.named_parameters() if is_lazy(tensor)]:
        return f"its parameter {unmade[0]} gets its shape in the first call. The way out: call the model once before."
    if divided := [path for path, tensor in model.named_parameters() if is_instance_of(tensor, "torch", "DTensor")]:
        return (
            f"its parameters are DTensors ({divided[0]}, ...), as tensor parallelism makes them, which torch.export"
            " does not take. The way out: adapt the model without tp_plan or parallelize_module, and divide the"
            " result by llfx.parallelize(model) or llfx.shard(model). What changes a graph comes before that."
        )
    for path, module in model.named_modules():
        if is_instance_of(module, "peft"):
            where = f"PEFT's {type(module).__name__}" + (f" at {path!r}" if path else "")
            return (
                f"it has layers of PEFT ({where}). Pass the model without them, model.unload(), or with them folded in,"
                " model.merge_and_unload(). To keep training that adapter, write it by model.save_pretrained(folder),"
                " and read it by llfx.load_peft(base_model, folder)."
            )
    return ""


def _hint(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        name = os.fspath(value)
        return f" Load the model first: AutoModelForCausalLM.from_pretrained({name!r})."
    if isinstance(value, type):
        name = value.__name__
        made = f"{name}.from_pretrained(...)" if hasattr(value, "from_pretrained") else f"{name}(...)"
        return f" Pass an instance: {made}."
    if is_instance_of(value, "lora_lite_fx", "Variant"):
        return " The model comes first, then the config: rewrite(model, LoRA(r=8))."
    if isinstance(value, (tuple, list)):
        index = next((i for i, element in enumerate(value) if isinstance(element, nn.Module)), None)
        return "" if index is None else f" Pass its element {index}, which is the model."
    if isinstance(value, Mapping) and any(isinstance(element, Tensor) for element in value.values()):
        return " It holds tensors by name. If they are a state dict, load it into a model: model.load_state_dict(...)."
    if is_instance_of(value, "transformers", *_PREPARES_INPUTS):
        return " It prepares inputs. Pass the model that takes them."
    if is_instance_of(value, "transformers", "PreTrainedConfig"):
        return " It describes a model. Make one: AutoModelForCausalLM.from_config(config)."
    if isinstance(getattr(value, "model", None), nn.Module):
        return " Pass the model that it holds, its attribute `model`."
    return ""


def check_inputs(inputs: object, name: str = "example_inputs") -> None:
    """Raise `CaptureError` unless `inputs`, given as `name`, is a tuple of positional or a dict of keyword values."""
    if isinstance(inputs, dict):
        texts = [name for name in ("input_ids", "attention_mask", "labels") if isinstance(inputs.get(name), list)]
        if texts:
            raise CaptureError(
                f"{name}: {texts[0]} is a list of numbers, and the model takes a tensor. A tokenizer makes"
                ' tensors with return_tensors="pt".'
            )
    elif not isinstance(inputs, tuple):
        raise CaptureError(
            f"{name} must be a tuple of positional or a dict of keyword arguments,"
            f" not {type(inputs).__name__}; {_input_hint(inputs)}."
        )


def _input_hint(inputs: object) -> str:
    if isinstance(inputs, str):
        return 'a tokenizer makes them of a text: example_inputs=dict(tokenizer(text, return_tensors="pt"))'
    if isinstance(inputs, Mapping):
        return "write example_inputs=dict(batch)"
    if isinstance(inputs, list):
        return "write example_inputs=tuple(inputs)"
    return "for one tensor write example_inputs=(x,)"


def graph_hint(model: object) -> str:
    """Return what to do with a graph where a model is needed; empty for anything else."""
    if not isinstance(model, fx.GraphModule):
        return ""
    return (
        " It is a graph, as rewrite returns it. adapt(graph), without a config, runs its adapters in a model. Or adapt"
        " the model itself, chat = adapt(model, cfg), and move the adapters: load_adapter_state_dict(chat,"
        " adapter_state_dict(graph))."
    )
