"""Adapters by rewriting the graph of a frozen PyTorch model. See the README for a tour."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .compat.versions import check_versions

check_versions()  # before anything is imported that an older release of Python or torch lacks


def _is_program() -> bool:
    """Check whether this is `python -m lora_lite_fx`, which answers `--help` and wrong options without torch.

    Python imports the package first, and has "-m" in the place of the program's name until it has found the program.
    """
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] == [__name__]


if not _is_program():  # else the program imports this again, when it has read its options
    from .adapters.adapted_site import AdaptedSite
    from .adapters.bank import Bank
    from .adapters.calibration_data import Batch, Statistic
    from .adapters.frozen_linear import FrozenLinear
    from .adapters.hyperparameters import WithDropout, WithRank, WithScale
    from .adapters.listing import AdapterRow, AdapterTable, adapters
    from .adapters.param_spec import ParamSpec
    from .adapters.registry import register, registry
    from .adapters.slot_optimizer import SlotOptimizer
    from .adapters.state import adapter_parameters, load_adapter_state_dict
    from .adapters.switches import active, by_row, scaled, set_adapter
    from .adapters.variant import Variant
    from .capture.differences import Difference, DifferenceTable
    from .distributed.materialize import materialize
    from .distributed.parallelize import parallelize
    from .distributed.shard import shard
    from .distributed.split import split
    from .errors import (
        AdapterError,
        CallError,
        CaptureError,
        CheckpointError,
        ConfigError,
        SelectionError,
    )
    from .execution.compile_layers import compile_layers
    from .execution.frozen import frozen
    from .execution.memory_plan import MemoryPlan, memory_plan, plan_memory
    from .execution.optimize import optimize
    from .formats.any_file import load_slot, save_slot
    from .formats.checkpoint import load, save
    from .formats.diffusers_files import load_diffusers, save_diffusers
    from .formats.lora_lite import load_lora_lite, save_lora_lite
    from .formats.peft.directory import adapter_state_dict, load_peft, save_peft, to_peft_config
    from .formats.peft.read_adapter import from_peft_config
    from .hugging_face.adapt import adapt
    from .inspection.shown_program import program
    from .inspection.table import inspect
    from .rewriting.bank_slots import put_slot, reset_slot, take_slot
    from .rewriting.capture import capture
    from .rewriting.eager import wrap
    from .rewriting.loftq import loftq
    from .rewriting.named import add, delete
    from .rewriting.reconfigure import reconfigure
    from .rewriting.rewrite import merge, remove, rewrite
    from .rewriting.sums import combine, to_lora
    from .rewriting.swap import swap
    from .rewriting.verify import verify
    from .torch_compile.backend import backend
    from .variants import (
        BOFT,
        C3A,
        EVA,
        HRA,
        IA3,
        OFT,
        PSOFT,
        AdaLoRA,
        AntiPaSTO,
        AntiPaSTOAblate,
        AntiPaSTOArrow,
        AntiPaSTODPLR,
        AntiPaSTOGain,
        DeLoRA,
        DoRA,
        FourierFT,
        Full,
        GLoRA,
        GraLoRA,
        HiRA,
        LoHa,
        LoKr,
        LoRA,
        LoRAXS,
        MiSS,
        OLoRA,
        PiSSA,
        RandLoRA,
        RoAd,
        SHiRA,
        TinyLoRA,
        TrainableTokens,
        VBLoRA,
        VeRA,
        WaveFT,
    )

if TYPE_CHECKING:
    from .hand_over.aoti import save_aoti
    from .hand_over.bake import bake
    from .hand_over.executorch_files import save_executorch
    from .hand_over.exported_program import export
    from .hand_over.gguf_file import save_gguf
    from .hand_over.onnx_file import save_onnx, save_onnx_adapter

_HAND_OVER = {
    "bake": "bake",
    "export": "exported_program",
    "save_aoti": "aoti",
    "save_executorch": "executorch_files",
    "save_gguf": "gguf_file",
    "save_onnx": "onnx_file",
    "save_onnx_adapter": "onnx_file",
}
"""The files of `hand_over/` that have these functions. Each is imported when it is asked for, because few need it."""


def __getattr__(name: str) -> Any:
    if name in _HAND_OVER:
        return getattr(importlib.import_module(f".hand_over.{_HAND_OVER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_instead_of(name)}")


_OF_PEFT = {
    "PeftModel": "llfx.load_peft(model, path) returns a graph with the adapter; llfx.adapt(model, path) a model.",
    "get_peft_model": "llfx.adapt(model, cfg) returns a model of the same class, llfx.rewrite(model, cfg) a graph.",
    "TaskType": "It is not needed: a model keeps its class.",
    "get_peft_model_state_dict": "llfx.adapter_state_dict(model) returns the tensors of adapters.",
    "inject_adapter_in_model": "llfx.wrap(model, cfg) returns a copy of the model with wrapped modules.",
    "prepare_model_for_kbit_training": "It is not needed: nothing is cast, and the inputs need no gradient.",
    "set_peft_model_state_dict": "llfx.load_adapter_state_dict(model, tensors) copies tensors into adapters.",
}
"""What to use in place of functions of PEFT that the package does not have."""


def _instead_of(name: str) -> str:
    if name.endswith("Config"):
        return ". A config is named as its method, llfx.LoRA(r=8); adapt and rewrite take PEFT's own, too."
    name = "PeftModel" if name.startswith(("PeftModel", "AutoPeftModel")) else name
    return f". {_OF_PEFT[name]}" if name in _OF_PEFT else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *_HAND_OVER})


__all__ = [
    "BOFT",
    "C3A",
    "EVA",
    "HRA",
    "IA3",
    "OFT",
    "PSOFT",
    "AdaLoRA",
    "AdaptedSite",
    "AdapterError",
    "AdapterRow",
    "AdapterTable",
    "AntiPaSTO",
    "AntiPaSTOAblate",
    "AntiPaSTOArrow",
    "AntiPaSTODPLR",
    "AntiPaSTOGain",
    "Bank",
    "Batch",
    "CallError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DeLoRA",
    "Difference",
    "DifferenceTable",
    "DoRA",
    "FourierFT",
    "FrozenLinear",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MemoryPlan",
    "MiSS",
    "OLoRA",
    "ParamSpec",
    "PiSSA",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "SelectionError",
    "SlotOptimizer",
    "Statistic",
    "TinyLoRA",
    "TrainableTokens",
    "VBLoRA",
    "Variant",
    "VeRA",
    "WaveFT",
    "WithDropout",
    "WithRank",
    "WithScale",
    "active",
    "adapt",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters",
    "add",
    "backend",
    "bake",
    "by_row",
    "capture",
    "combine",
    "compile_layers",
    "delete",
    "export",
    "from_peft_config",
    "frozen",
    "inspect",
    "load",
    "load_adapter_state_dict",
    "load_diffusers",
    "load_lora_lite",
    "load_peft",
    "load_slot",
    "loftq",
    "materialize",
    "memory_plan",
    "merge",
    "optimize",
    "parallelize",
    "plan_memory",
    "program",
    "put_slot",
    "reconfigure",
    "register",
    "registry",
    "remove",
    "reset_slot",
    "rewrite",
    "save",
    "save_aoti",
    "save_diffusers",
    "save_executorch",
    "save_gguf",
    "save_lora_lite",
    "save_onnx",
    "save_onnx_adapter",
    "save_peft",
    "save_slot",
    "scaled",
    "set_adapter",
    "shard",
    "split",
    "swap",
    "take_slot",
    "to_lora",
    "to_peft_config",
    "verify",
    "wrap",
]
