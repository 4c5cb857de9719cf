"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, read and written; and PEFT's configs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ...adapters.placement import Placement
from ...adapters.state import adapter_state_dict
from ...adapters.variant import Variant, pairs
from ...capture.capture import Inputs
from ...errors import CheckpointError, ConfigError
from ...graph.provenance import SHARED
from ...sites.site import Site
from ...variants import LoRA
from ...variants.pissa import FromWeight
from ..files import read_json, read_safetensors
from ..finite import check_finite
from ..mistakes import as_path, check_directory
from ..single_adapter import insert_from_file, only_adapter, sites_of
from ..writing import write_together
from .config import config_for, format_of, from_peft_config
from .variants import PeftFormat

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DIGEST = "lora_lite_fx.config"  # the key of the config's digest in the metadata of the tensors
_ABOUT_THE_BASE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Fields that do not change what the adapter computes. They are often edited by hand, so the digest leaves them out."""


def save_peft(
    model: nn.Module, path: str | os.PathLike[str], *, as_lora: bool = False, allow_nonfinite: bool = False
) -> None:
    """Write the adapter of `model` as a PEFT directory, which `PeftModel.from_pretrained` loads on the same base.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`, with one adapter.
        path: of the directory; made if it is not there. Its two files are written whole or not at all, and after a
            crash they are the old two, the new two, or there is no config. A digest of the config in the metadata of
            the tensors lets `load_peft` refuse two files that do not belong together.
        as_lora: write `PiSSA` and `OLoRA` as an ordinary LoRA of twice the rank, the start and the end side by side.
            It runs on the unchanged base, without the factorization that PEFT repeats at each load otherwise.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: the adapter cannot be represented; the message says why.
        CheckpointError: the files cannot be written, or a value is not finite.
    """
    folder = as_path(path, "save_peft(model, path)")
    variant, placed = only_adapter(model, "A PEFT directory")
    state: Mapping[str, Tensor] = adapter_state_dict(model)
    if as_lora:
        variant, state = _as_lora(variant, placed, state)
    sites = sites_of(model)
    config = config_for(variant, [sites[placement.site] for placement in placed], _module_names(model))
    form = format_of(variant)
    tensors = {}
    for placement in placed:
        for name, qualified in placement.tensors.items():
            if name in form.tensors:
                value = form.tensor_to_peft(variant, sites[placement.site], name, state[qualified])
                tensors[_key(form, sites[placement.site], name)] = value.contiguous().cpu()
    if not allow_nonfinite:
        check_finite(tensors, folder / TENSORS, "nothing was written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be a directory: {error}.") from error
    data = safetensors.torch.save(tensors, {"format": "pt", _DIGEST: _digest(config)})
    document = json.dumps(config, indent=2, sort_keys=True).encode()
    write_together([(folder / TENSORS, data), (folder / CONFIG, document)])


def load_peft(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    allow_nonfinite: bool = False,
) -> fx.GraphModule:
    """Capture `model` and insert the adapter of a PEFT directory, with its saved values.

    Args:
        model: the base, which is not changed.
        path: of the directory. Only JSON and safetensors are read.
        example_inputs: as for `capture`.
        allow_nonfinite: load values that are NaN or infinite too, in place of an error.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError: a file is unreadable, the two do not belong together, or a value is not finite; or the keys,
            shapes, config or modules do not fit the model, or the adapter does something that cannot be represented
            here; the message says what.
        CaptureError: the model cannot be captured.
    """
    folder = as_path(path, "load_peft(model, path)")
    check_directory(folder)
    config = read_json(folder / CONFIG)
    state, metadata = read_safetensors(folder / TENSORS)
    _check_pair(config, metadata, folder)
    try:
        variant = from_peft_config(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    form = format_of(variant)
    by_site = _by_site(form, state, folder / TENSORS)
    if not allow_nonfinite:
        check_finite(state, folder / TENSORS, "it is not loaded")
    return insert_from_file(model, variant, by_site, form.rest, folder, example_inputs)


def to_peft_config(model: nn.Module) -> dict[str, Any]:
    """Return the config of the model's one adapter as PEFT writes it, JSON-ready; `peft.get_peft_config` takes it.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    variant, placed = only_adapter(model, "A PEFT directory")
    sites = sites_of(model)
    return config_for(variant, [sites[placement.site] for placement in placed], _module_names(model))


# What keeps the two files together.


def _digest(config: Mapping[str, Any]) -> str:
    """Return a hash of the fields of a config that say what the adapter computes, however the JSON is written."""
    content = {name: value for name, value in config.items() if name not in _ABOUT_THE_BASE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_pair(config: Mapping[str, Any], metadata: Mapping[str, str], folder: Path) -> None:
    """Raise `CheckpointError` if the tensors were written with another config. Files of PEFT's own do not say."""
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(config):
        raise CheckpointError(
            f"{folder}: {TENSORS} was not saved with this {CONFIG}, so the two would compute what nobody saved. Save"
            " the adapter again, or take both files from one place. If the config was edited on purpose, write the"
            f" tensors without the entry {_DIGEST!r} in their metadata."
        )


# Names in the model and in the files.


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if not name.endswith(".base")]


def _key(form: PeftFormat, site: Site, name: str) -> str:
    key = form.tensors[name].key_at(site.kind.name)
    return f"base_model.{key}" if name.startswith(SHARED) else f"{_PREFIX}{site.name}.{key}"


def _by_site(form: PeftFormat, state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file, by site and by our names; those that sites share are at each."""
    by_site: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, site = _parsed(form, key, path)
        try:
            (shared if site is None else by_site.setdefault(site, {}))[name] = form.tensors[name].to_ours(tensor)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{path}: {key} cannot have the shape {tuple(tensor.shape)}.") from error
    return {site: {**tensors, **shared} for site, tensors in by_site.items()}


def _parsed(form: PeftFormat, key: str, path: Path) -> tuple[str, str | None]:
    """Return our name of the tensor called `key`, and its site; None for a tensor that sites share."""
    for name, theirs in form.tensors.items():
        if name.startswith(SHARED) and key == f"base_model.{theirs.key}":
            return name, None
        for ending in (theirs.key, theirs.embedding):
            if ending and key.startswith(_PREFIX) and key.endswith(f".{ending}"):
                return name, key.removeprefix(_PREFIX).removesuffix(f".{ending}")
    known = ", ".join(theirs.key for theirs in form.tensors.values())
    raise CheckpointError(
        f"{path}: {key} cannot be represented here; of {form.variant.__name__}, modules have {known}."
    )


def _as_lora(
    variant: Variant, placed: list[Placement], state: Mapping[str, Tensor]
) -> tuple[Variant, dict[str, Tensor]]:
    """Return a `LoRA` of twice the rank, and its tensors: `s (B A - B0 A0) = s [B, -B0] [A; A0]`."""
    if not isinstance(variant, FromWeight):
        raise ConfigError(f"as_lora is for PiSSA and OLoRA, which are differences of two LoRAs, not {variant!r}.")

    def twice(alpha: float) -> float:
        return alpha * (2**0.5 if variant.rank_stabilized else 2)

    plain = LoRA(
        r=2 * variant.r,
        alpha=twice(variant.alpha),
        rank_stabilized=variant.rank_stabilized,
        rank_pattern=tuple((pattern, 2 * r) for pattern, r in pairs(variant.rank_pattern)),
        alpha_pattern=tuple((pattern, twice(alpha)) for pattern, alpha in pairs(variant.alpha_pattern)),
        target_names=(".",),
    )
    tensors = {}
    for placement in placed:
        a, b, a0, b0 = (state[placement.tensors[name]] for name in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
        tensors[placement.tensors["lora_A"]] = torch.cat([a, a0])
        tensors[placement.tensors["lora_B"]] = torch.cat([b, -b0], dim=1)
    return plain, tensors
