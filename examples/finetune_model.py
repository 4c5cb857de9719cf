"""The model and the config of `finetune.py`, which other examples use too."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
import transformers
from finetune_options import location

import lora_lite_fx as llfx

OTHER_FIELDS: dict[str, dict[str, Any]] = {
    # The usual strength, 15, destroys the default model in the first step, at every learning rate that was tried.
    "DeLoRA": {"lambda0": 3.0},
    "C3A": {"block_size": 192, "init_weights": "zeros"},  # The usual 256 does not divide the default model's widths.
    "FourierFT": {"spectrum": "zeros"},
}


def config(variant: type[llfx.Variant], rank: int, alpha: float | None = None, **targets: Any) -> llfx.Variant:
    """Return a config of `variant` with that rank and alpha, twice the rank if None, of which it takes what it has."""
    names = {field.name for field in dataclasses.fields(variant)}
    sizes = {"r": rank, "alpha": 2 * rank if alpha is None else alpha}
    fields: dict[str, Any] = {name: value for name, value in sizes.items() if name in names}
    return variant(**fields, **targets, **OTHER_FIELDS.get(variant.__name__, {}))


def load_base(
    model: str | None = None, dtype: str = "float32", device: str = "cpu", quantise: str | None = None
) -> transformers.PreTrainedModel:
    """Load the pretrained model, as the options of these names say."""
    place = location(model)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
    if quantise is not None:
        base = quantised(base, quantise)
    base.to(device)
    return base  # type: ignore[no-any-return]


def quantised(model: transformers.PreTrainedModel, kind: str) -> transformers.PreTrainedModel:
    """Return the model with all linears but the head quantized, one after the other.

    A model of the hub is loaded so by `from_pretrained(..., quantization_config=BitsAndBytesConfig(...))`.
    """
    library: Any = importlib.import_module("bitsandbytes")
    for parent in list(model.modules()):
        for name, dense in list(parent.named_children()):
            if not isinstance(dense, torch.nn.Linear) or dense is model.get_output_embeddings():
                continue
            sizes = (dense.in_features, dense.out_features, dense.bias is not None)
            if kind == "nf4":
                linear = library.nn.Linear4bit(*sizes, quant_type="nf4").to(dense.weight.dtype)
            else:
                linear = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            linear.load_state_dict(dense.state_dict())
            setattr(parent, name, linear.to("cpu"))
    return model.requires_grad_(False)
