"""A language model on a CUDA device that is not there: its tensors have a device and a shape, and no values.

A build of torch with CUDA runs fake tensors on any device. Whatever mixes devices raises, and so does what reads a
value, which on a real device is a synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.compat.torch import disable_current_modes as no_modes

_FIELDS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "OFT": {"block_size": 16},
    "PSOFT": {"r": 4},
    "RoAd": {"group_size": 8},
    "TrainableTokens": {"token_indices": (1, 2)},
    "VBLoRA": {"vector_length": 8},
}
"""Fields of variants whose defaults do not fit sites this small."""

FROM_DATA = {"AntiPaSTO", "EVA"}
"""Variants that start from the values of a calibration: they are inserted on the CPU, and the graph is moved."""


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:  # else a copied tensor would not mix with others
        return self


FAKE = _Mode()
_graphs: dict[Any, Any] = {}


@contextmanager
def on(device: str) -> Iterator[None]:
    """Make tensors on a device for the body; on "cuda" they are fake."""
    with FAKE if device == "cuda" else nullcontext(), torch.device(device):
        yield


def model(dtype: torch.dtype) -> Any:
    """Return a language model of two layers, on the device of now."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(labels: bool = True) -> dict[str, Tensor]:
    """Return the inputs of a call of two rows, on the device of now."""
    ids = torch.randint(0, 64, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if labels else {})


def config(name: str, **fields: Any) -> llfx.Variant:
    """Return a config of a variant that fits the model."""
    return llfx.registry()[name](**{**_FIELDS.get(name, {}), **fields})


def captured(dtype: torch.dtype, labels: bool = True, **options: Any) -> Any:
    """Return the graph of the model, and the inputs that it was captured with."""
    inputs = tokens(labels)
    key = inputs["input_ids"].device, dtype, labels, *options.items()
    if key not in _graphs:  # a rewritten graph is a copy
        _graphs[key] = llfx.capture(model(dtype), dict(inputs), verify=False, **options)
    return _graphs[key], inputs


def rewritten(name: str, dtype: torch.dtype, **options: Any) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Return a rewritten graph, and inputs for it."""
    if name in FROM_DATA:
        return moved(name, dtype, **options)
    graph, inputs = captured(dtype, **options)
    return llfx.rewrite(graph, config(name)), inputs


def moved(name: str, dtype: torch.dtype, **options: Any) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Return a graph that was rewritten on the CPU and moved to the device of now, and inputs for it."""
    inputs = tokens(options.get("labels", True))
    device = inputs["input_ids"].device
    with no_modes(), torch.device("cpu"):
        graph, on_cpu = captured(dtype, **options)
        gm = llfx.rewrite(graph, config(name), calibration=[on_cpu] if name in FROM_DATA else None)
    if device.type == "cuda":
        gm._apply(lambda tensor: (tensor if isinstance(tensor, FakeTensor) else FAKE.from_tensor(tensor)).to(device))
    return gm, inputs


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Compute products in `dtype` in the body: `torch.autocast` does not on a device that is not there."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


def kinds_of(result: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return the device, dtype and shape of each tensor in a result."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return [(leaf.device.type, leaf.dtype, tuple(leaf.shape)) for leaf in leaves]


def elsewhere(module: nn.Module, device: str) -> list[str]:
    """Return the names of the tensors of a module and of its programs' constants that are on another device."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = [name for name, tensor in named.items() if tensor.device.type != device]
    for program in getattr(getattr(module, "derived", None), "programs", {}).values():
        for holder in (program.values, *(piece.values for piece in program.pieces)):
            constants = getattr(holder, "constants", ()) if holder is not None else ()
            found += [f"{program.name}: a constant" for tensor in constants if tensor.device.type != device]
    return found
