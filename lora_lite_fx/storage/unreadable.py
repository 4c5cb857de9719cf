"""Refuse modules whose weights cannot be read here, so that no linear stays without an adapter in silence."""

from __future__ import annotations

import torch
from torch import nn

from ..compat.torch_modules import buffers_of, parameters_of
from ..errors import is_instance_of
from ..graph.tensors import is_quantized
from .stored_weight import Storage, not_supported

_PACKAGES = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "gptqmodel": "GPTQ or AWQ",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr_quant": "SpQR",
    "vptq": "VPTQ",
}
_WAY_OUT = (
    "Load the model with dense weights (some configs have dequantize=True), or quantized by bitsandbytes, torchao, HQQ,"
    " quanto or compressed-tensors."
)


def _read(module: nn.Module, dtype: torch.dtype) -> None:
    """Raise ConfigError for a module that holds quantized weights in a form that is not known here."""
    if isinstance(module, nn.Embedding):
        return
    tensors = (*parameters_of(module).values(), *buffers_of(module).values())
    if any(tensor is not None and tensor.dim() > 1 and is_quantized(tensor) for tensor in tensors):
        known = (name for package, name in _PACKAGES.items() if is_instance_of(module, package))
        form = next((f"the form of {name}" for name in known), "a form")
        raise not_supported(
            type(module).__name__, f"it keeps its weight in {form} that this library cannot read", _WAY_OUT
        )


UNREADABLE = Storage((*(f"{package}." for package in _PACKAGES), "transformers.integrations."), _read)
"""What no other storage reads, so that it is asked last."""
