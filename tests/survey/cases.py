"""Which models are tried: of each model type the class that does most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from .changes import CHANGES
from .diffusers_cases import DIFFUSERS, diffuser
from .tiny import tiny_model
from .user_inputs import USER_INPUTS, with_calls

# The auto classes, those first whose classes hold most of a model.
_AUTO = {
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "multimodal": "MULTIMODAL_LM",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "masked": "MASKED_LM",
    "causal": "CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "ctc": "CTC",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "base": "",
}
FAMILIES = (*_AUTO, "timm", "diffusers")

FIRST = [
    "llama",
    "bert",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_next",
    "mamba",
    "falcon_mamba",
    "glm4v",
    "llava",
    "llava_next",
    "llava_onevision",
    "smolvlm",
    "idefics3",
    "idefics2",
    "idefics",
    "florence2",
    "clip",
    "siglip",
    "siglip2",
    "blip-2",
    "wav2vec2-bert",
    "wavlm",
    "swin",
    "swinv2",
    "switch_transformers",
    "longcat_flash",
    "phimoe",
    "rwkv",
    "gemma3n",
    "mamba2",
    "jamba",
    "bamba",
    "zamba2",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
    "instructblip",
    "olmo_hybrid",
    "mllama",
    "mistral3",
    "gemma3",
    "paligemma",
    "internvl",
    "kimi_linear",
    "deepseek_v32",
    "apertus",
    "doge",
    "gpt_oss",
    "t5gemma",
    "whisper",
    "wav2vec2",
    "hubert",
    "vit",
    "beit",
    "dinov2",
    "convnext",
    "resnet",
    "data2vec-vision",
    "t5",
    "bart",
    "mbart",
    "pegasus",
    "led",
    "longformer",
    "big_bird",
    "reformer",
    "xlnet",
    "deberta-v2",
    "roberta",
    "distilbert",
    "mpnet",
    "modernbert",
    "eurobert",
    "glm4",
    "phi3",
    "qwen2",
    "mistral",
    "gemma2",
    "layoutlmv3",
]


@dataclass(frozen=True)
class Case:
    """A model to try.

    Args:
        family: of the table.
        name: the model type.
        model: its class.
    """

    family: str
    name: str
    model: str

    @property
    def key(self) -> str:
        return f"{self.family} {self.name}"

    def builder(self) -> Callable[[], Any]:
        if self.family == "timm":
            return lambda: _timm(self.model)
        if self.family == "diffusers":
            return lambda: diffuser(self.model)
        return lambda: _of_transformers(self.name, self.model)


def cases(every_class: bool = False) -> list[Case]:
    """Return the models of transformers: of each model type the first class in the order of the families, or all."""
    found: list[Case] = []
    types: set[str] = set()
    for family, name in _AUTO.items():
        mapping = f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES"
        for model_type, classes in getattr(modeling_auto, mapping).items():
            if every_class or model_type not in types:
                found.append(Case(family, model_type, classes if isinstance(classes, str) else classes[0]))
            types.add(model_type)
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted(found, key=lambda case: order.get(case.name, len(order)))


_SMALL = "test atto femto pico nano xxs xx_small xxtiny mini xs x_small tiny _s0 _b0 small 18 _s_ _s xsmall 26 32 34"


def timm_cases() -> list[Case]:
    """Return the models of timm: of each family the one whose name says that it is the smallest."""
    import timm

    def size(name: str) -> tuple[int, int]:
        places = [place for place, word in enumerate(_SMALL.split()) if word in name]
        return min(places, default=99), len(name)

    modules = sorted(timm.list_modules())
    names = [(module, sorted(timm.list_models(module=module), key=size)) for module in modules]
    return [Case("timm", module, models[0]) for module, models in names if models]


def diffusers_cases() -> list[Case]:
    """Return the models of diffusers."""
    return [Case("diffusers", name, name) for name in DIFFUSERS]


_EAGER = ("aimv2",)
"""Types that attend to other tokens if sdpa leaves out a mask of ones, as the error of a capture says."""


def _of_transformers(name: str, model_class: str) -> Any:
    """Return a tiny model, with the inputs of its calls if its config does not tell them."""
    model = tiny_model(getattr(transformers, model_class), CHANGES.get(name, {}))
    if name in _EAGER:
        model.set_attn_implementation("eager")
    return with_calls(model, USER_INPUTS[name]) if name in USER_INPUTS else model


def _timm(name: str) -> Any:
    """Make a model of timm, with random weights, that names a small size of images if it takes several."""
    import timm

    model = timm.create_model(name).eval()
    if not model.pretrained_cfg.get("fixed_input_size"):
        least = model.pretrained_cfg.get("min_input_size") or (3, 128, 128)
        model.pretrained_cfg["input_size"] = (3, *(max(128, size) for size in least[1:]))
    return model
