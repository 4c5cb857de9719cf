"""Adapters by rewriting the graph of a frozen PyTorch model. See the README for a tour."""

from .adapt import adapt
from .adapters import adapter_parameters, adapter_state_dict, load_adapter_state_dict
from .backend import backend
from .checkpoint import load, save
from .eager import wrap
from .errors import AdapterError, CaptureError, CheckpointError, ConfigError, SelectionError
from .execution import optimize
from .inspect import inspect
from .lora_lite import load_lora_lite, save_lora_lite
from .peft import load_peft, save_peft, to_peft_config
from .peft_config import from_peft_config
from .registry import register, registry
from .rewrite import merge, remove, rewrite
from .variant import FrozenLinear, ParamSpec, Variant
from .variants import (
    BOFT,
    C3A,
    EVA,
    HRA,
    IA3,
    OFT,
    AntiPaSTO,
    DeLoRA,
    DoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    OLoRA,
    PiSSA,
    RandLoRA,
    RoAd,
    VeRA,
)

__all__ = [
    "BOFT",
    "C3A",
    "EVA",
    "HRA",
    "IA3",
    "OFT",
    "AdapterError",
    "AntiPaSTO",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "FrozenLinear",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "OLoRA",
    "ParamSpec",
    "PiSSA",
    "RandLoRA",
    "RoAd",
    "SelectionError",
    "Variant",
    "VeRA",
    "adapt",
    "adapter_parameters",
    "adapter_state_dict",
    "backend",
    "from_peft_config",
    "inspect",
    "load",
    "load_adapter_state_dict",
    "load_lora_lite",
    "load_peft",
    "merge",
    "optimize",
    "register",
    "registry",
    "remove",
    "rewrite",
    "save",
    "save_lora_lite",
    "save_peft",
    "to_peft_config",
    "wrap",
]
