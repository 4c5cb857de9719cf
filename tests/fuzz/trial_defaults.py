"""Trials of kind "defaults": what default targets leave out is said, if it is large or was never trained."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from hypothesis import strategies as st
from torch import nn

import lora_lite_fx as llfx
from tests.fuzz.verdict import Wrong
from tests.support.models import tiny_llama


def _experts(cls: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return cls(**sizes, **heads, moe_intermediate_size=24, num_experts=4, num_local_experts=4, num_experts_per_tok=2)


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "Llama": (tiny_llama, hf.LlamaForCausalLM),
    "Qwen3Moe": (lambda: _experts(hf.Qwen3MoeConfig), hf.Qwen3MoeForCausalLM),
    "Mixtral": (lambda: _experts(hf.MixtralConfig), hf.MixtralForCausalLM),
    "a new classifier of Llama": (lambda: tiny_llama(num_labels=3, pad_token_id=0), hf.LlamaForSequenceClassification),
}
KNOWN_TO_STAY = ("model.embed_tokens", "lm_head")
"""The embedding and a head with weights of its own: the README says that these are adapted only if asked for."""
VARIANTS: dict[str, Callable[..., llfx.Variant]] = {"LoRA": llfx.LoRA, "DoRA": llfx.DoRA, "HRA": llfx.HRA}


@dataclass(frozen=True)
class Defaults:
    """A model, adapted with default targets.

    Args:
        model: a key of `MODELS`.
        variant: a key of `VARIANTS`.
        path: "rewrite" or "adapt".
    """

    model: str
    variant: str = "LoRA"
    path: str = "rewrite"

    def features(self) -> frozenset[str]:
        return frozenset({self.model, self.path}) - {"rewrite"}

    def check(self) -> None:
        model, new = self._model()
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("lora_lite_fx")
        level, propagates = log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                adapted: Any = (llfx.adapt if self.path == "adapt" else llfx.rewrite)(model, VARIANTS[self.variant]())
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagates
        told = " ".join([*heard, *(str(each.message) for each in warned)])
        sites = {row.name for row in llfx.inspect(adapted) if row.adapters}
        left = {
            name: tensor.numel()
            for name, tensor in model.named_parameters()
            if tensor.dim() > 1
            and not name.startswith(KNOWN_TO_STAY)
            and not any(name.startswith(f"{site}.") for site in sites)
        }
        taken = sum(model.get_parameter(f"{site}.weight").numel() for site in sites if "experts" not in site)
        if sum(left.values()) > taken and not any(part in told for name in left for part in name.split(".")[-3:-1]):
            largest = max(left, key=lambda name: left[name])
            raise Wrong("left out in silence", f"{largest}: {sum(left.values())} parameters, adapted are {taken}")
        for name in new:
            if name in left and name.split(".")[0] not in told:
                raise Wrong("untrained weights left out in silence", name)

    def _model(self) -> tuple[nn.Module, set[str]]:
        """Return the model, and the names of its weights that no file has."""
        torch.manual_seed(0)
        config, cls = MODELS[self.model]
        if "classifier" not in self.model:
            return cls(config()), set()
        with tempfile.TemporaryDirectory() as folder:
            hf.LlamaModel(config()).save_pretrained(folder)
            model, info = cls.from_pretrained(folder, num_labels=3, output_loading_info=True)
        return model, set(info["missing_keys"])


@st.composite
def defaults(draw: Any) -> Defaults:
    """Draw a trial."""
    model, variant = draw(st.sampled_from(list(MODELS))), draw(st.sampled_from(list(VARIANTS)))
    return Defaults(model, variant, draw(st.sampled_from(["rewrite", "adapt"])))
