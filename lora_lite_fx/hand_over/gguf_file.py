"""`save_gguf`: adapters as a GGUF file for llama.cpp's `--lora`, over the GGUF file of the base."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.changed_buffers import warn_of_lost_buffers
from ..adapters.state import warn_of_trained_base
from ..errors import AdapterError, ConfigError, shown
from ..formats.atomic_writing import write_atomically
from ..formats.gathered import gathered, refuse_stage, write_once
from ..formats.peft.base_model import source_of
from ..formats.plain_lora import SiteFactors, plain_lora
from ..formats.safetensors_files import check_finite
from ..formats.untrusted_files import as_path
from ..rewriting.named import acting_now
from .targets import import_package

_RUNTIME = "llama.cpp"
_TYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp calls a type of models.

    Args:
        name: llama.cpp's name.
        permuted: whether its converter reorders the rows of q and k, because the rotation there turns neighbours.
    """

    name: str
    permuted: bool = False


_ARCHITECTURES = {
    "llama": _Architecture("llama", permuted=True),
    "mistral": _Architecture("llama", permuted=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "phi3": _Architecture("phi3"),
}
"""By `model_type` of transformers: those whose adapters were compared with torch, in a model that llama.cpp loaded."""

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""The fields with the number of heads of the linears whose rows are reordered."""


def save_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write adapters as a GGUF file, which llama.cpp adds to the GGUF file of the base: `--lora fr.gguf`.

    Each scale is folded into `B`, and the file says so (`adapter.lora.alpha` is 0). Variants other than `LoRA` are
    written as one if the change of the weights has a low rank, exactly, as `to_lora` does.

    Args:
        model: a result of `rewrite`, `adapt` or `load`, for a causal language model of transformers.
        path: of the file, which is written whole or not at all.
        adapter: the name of the adapter; None for all that act, by their coefficients.
        dtype: of the tensors, float32 or float16.
        config: the config of the model, for a graph that does not remember its model, as one from a `.pt2` file.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.

    Raises:
        ImportError: the package gguf is missing.
        AdapterError: the architecture is not known here; or llama.cpp has no adapter at a site or of this form.
        ConfigError: there is no adapter of the name, or an argument is impossible.
        CheckpointError: the file cannot be written, or a value is not finite.

    Warns:
        UserWarning: several adapters act, and the file has their sum.
    """
    file = as_path(path, "save_gguf(model, path)")
    if dtype not in _TYPES:
        raise ConfigError(f"dtype is torch.float32 or torch.float16, which llama.cpp adds to all bases, not {dtype}.")
    refuse_stage(model, "A GGUF file")
    warn_of_trained_base(model, "save_gguf")  # refuses a model without adapters
    warn_of_lost_buffers(model, "save_gguf writes", "llfx.save, whose files hold them")
    config = _config_of(model) if config is None else config
    architecture = _architecture_of(config)
    if adapter is None and len(acting := acting_now(model) or ()) > 1:
        warnings.warn(
            f"save_gguf writes the sum of the adapters that act, {', '.join(acting)}, as one."
            f" adapter={acting[0]!r} writes one of them.",
            stacklevel=2,
        )
    with gathered(model):
        found = plain_lora(model, _RUNTIME, adapter)
        tensors = _tensors(found, architecture, config, dtype)
    if not allow_nonfinite:
        check_finite(tensors, file, "nothing was written")
    write_once(model, lambda: write_atomically(file, _file(architecture, tensors)))


def _config_of(model: nn.Module) -> Any:
    """Return the config of an adapted model, or that which a graph remembers of its model."""
    config = getattr(source_of(model), "config", None)
    if config is None:
        raise AdapterError(
            "The architecture of the model is not known, because this is a graph of no model of transformers, or one"
            " from a .pt2 file. The way out: save_gguf(graph, path, config=model.config)."
        )
    return config


def _architecture_of(config: Any) -> _Architecture:
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        raise ConfigError(f"config is that of a model of transformers, with its model_type, not {shown(config)}.")
    if kind not in _ARCHITECTURES:
        raise AdapterError(
            f"save_gguf knows how llama.cpp orders the rows of {', '.join(_ARCHITECTURES)}, and not of {kind!r}. The"
            " way out: llfx.merge(model), and llama.cpp's own converter."
        )
    return _ARCHITECTURES[kind]


def _tensors(
    found: list[SiteFactors], architecture: _Architecture, config: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the factors by llama.cpp's names, in its order of rows.

    Raises:
        AdapterError: llama.cpp has no tensor for a site, or reads it for another site too.
    """
    gguf = import_package("gguf", "gguf")
    kind = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for factors in found:
        site = factors.site
        if site.tied:
            raise AdapterError(
                f"llama.cpp has one tensor for {site.name!r} and {site.tied[0]!r}, whose weights are tied, so it would"
                " adapt both. The way out: exclude_names for that site, or llfx.merge(model)."
            )
        name = names.get_name(site.name)
        if name is None or site.weight != f"{site.name}.weight":
            raise AdapterError(
                f"llama.cpp's {architecture.name} has no tensor for {site.name!r}. The way out: leave that site out, or"
                " llfx.merge(model)."
            )
        b = factors.b
        heads = _HEADS.get(site.name.rpartition(".")[2])
        if architecture.permuted and heads is not None:
            b = _permuted(b, getattr(config, heads, None) or config.num_attention_heads)
        for suffix, factor in (("lora_a", factors.a), ("lora_b", b)):
            tensors[f"{name}.weight.{suffix}"] = factor.to("cpu", dtype).contiguous()
    return tensors


def _permuted(rows: Tensor, heads: int) -> Tensor:
    """Return rows `(d_out, r)` in the order in which the two halves of each head alternate."""
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _file(architecture: _Architecture, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of the file."""
    gguf = import_package("gguf", "gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
