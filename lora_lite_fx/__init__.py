"""Adapters by rewriting the graph of a frozen PyTorch model. See the README for a tour."""

from .adapters import adapter_parameters, adapter_state_dict, load_adapter_state_dict
from .checkpoint import load, save
from .eager import wrap
from .errors import AdapterError, CaptureError, CheckpointError, ConfigError, SelectionError
from .inspect import inspect
from .registry import register, registry
from .rewrite import merge, remove, rewrite
from .variant import FrozenLinear, ParamSpec, Variant
from .variants import EVA, HRA, IA3, OFT, AntiPaSTO, DeLoRA, DoRA, LoHa, LoKr, LoRA, OLoRA, PiSSA, RoAd, VeRA

__all__ = [
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
    "FrozenLinear",
    "LoHa",
    "LoKr",
    "LoRA",
    "OLoRA",
    "ParamSpec",
    "PiSSA",
    "RoAd",
    "SelectionError",
    "Variant",
    "VeRA",
    "adapter_parameters",
    "adapter_state_dict",
    "inspect",
    "load",
    "load_adapter_state_dict",
    "merge",
    "register",
    "registry",
    "remove",
    "rewrite",
    "save",
    "wrap",
]
