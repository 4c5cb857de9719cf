"""Which models are tried: of each model type the class that does most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from .diffusers_cases import DIFFUSERS, diffuser
from .tiny import tiny_model

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

_WINDOWS = {"window_size": 2, "image_size": 64}  # windows that fit into the smallest image of the four stages
_HYBRID = ["linear_attention", "full_attention"]
_MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN3 = {**_MROPE, "vision_config.num_heads": 6}
_TILES = {"image_grid_pinpoints": [[64, 128], [128, 64]], "vision_config.image_size": 64}
_MAMBA2 = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_5": {**_QWEN3, "vision_config.out_hidden_size": 256, "text_config.layer_types": _HYBRID},
    "qwen3_5_moe": {**_QWEN3, "vision_config.out_hidden_size": 128, "text_config.layer_types": _HYBRID},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "qwen3_vl": _QWEN3 | {"vision_config.out_hidden_size": 256},
    "qwen3_vl_moe": _QWEN3 | {"vision_config.out_hidden_size": 128},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": _HYBRID, "shared_intermediate_size": 48},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "kimi_linear": {"layer_types": _HYBRID},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "chunk_size": 8},
    "mamba2": {"chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v": _MROPE,
    "glm46v": _MROPE,
    "glm4v_moe": {**_MROPE, "text_config.head_dim": 16},
    "glmga": _MROPE,
    "glm_ocr": {**_MROPE, "text_config.head_dim": 8},
    "paddleocr_vl": _MROPE,
    "minicpm_ocr": {"text_config.layer_types": _HYBRID, "image_token_id": 95},
    "minicpmv4_6": {"text_config.layer_types": _HYBRID, "image_token_id": 95},
    "minicpmv4_7": {"text_config.layer_types": _HYBRID, "image_token_id": 95},
    "lfm3_vl": {"text_config.layer_types": ["conv", "full_attention"]},
    "janus": {"vq_config.base_channels": 32, "vision_config.projection_dim": 256},
    "instructblipvideo": {"video_token_index": 95},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "text_config.moe_k": 2,
    },
    "qwen2_5_omni_thinker": {**_MROPE, "vision_start_token_id": 90, "vision_config.window_size": 56},
    "qwen3_omni_moe_thinker": {**_MROPE, "vision_start_token_id": 90},
    "step3p7": {"text_config.sliding_window": 4},
    "llama4": {
        "vision_config.intermediate_size": 192,
        "vision_config.projector_input_dim": 256,
        "vision_config.projector_output_dim": 256,
        "vision_config.vision_output_dim": 256,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "nemotron_h_omni": {"image_token_id": 95},
    "ovis2": {"hidden_size": 256},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "xlnet": {"d_model": 64, "n_head": 2, "d_head": 32},
    "aya_vision": {"vision_config.hidden_size": 64, "vision_config.num_attention_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 95}},
    "qwen2_vl": {**_MROPE, "vision_config.num_heads": 4, "vision_config.hidden_size": 512},
    "qwen2_5_vl": {**_MROPE, "vision_config.num_heads": 4, "vision_config.out_hidden_size": 512},
    "blip-2": {"image_token_index": 95},
    "instructblip": {"image_token_index": 95},
    "mllama": {
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.vision_output_dim": 160,
        "text_config.cross_attention_layers": [1],
    },
    "llava_next": _TILES,
    "llava_onevision": _TILES,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "donut-swin": _WINDOWS,
    "maskformer-swin": _WINDOWS,
}
"""Fields of configs by model type, where small values of others would leave out a part of the model."""

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
        return lambda: tiny_model(getattr(transformers, self.model), _CHANGES.get(self.name, {}))


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


def _timm(name: str) -> Any:
    """Make a model of timm, with random weights, that names a small size of images if it takes several."""
    import timm

    model = timm.create_model(name).eval()
    if not model.pretrained_cfg.get("fixed_input_size"):
        least = model.pretrained_cfg.get("min_input_size") or (3, 128, 128)
        model.pretrained_cfg["input_size"] = (3, *(max(128, size) for size in least[1:]))
    return model
