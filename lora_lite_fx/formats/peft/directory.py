"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, read and written; and PEFT's configs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from ...adapters.state import warn_of_trained_base
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...graph.provenance import SHARED
from ...sites.site import Site
from ..checkpoint import fingerprints
from ..files import read_json, read_safetensors
from ..finite import check_finite
from ..loading import AdapterFile, loader
from ..mistakes import as_path, check_directory
from ..single_adapter import insert_from_file, sites_of
from ..tensor_bytes import tensor_bytes
from ..writing import write_together
from .base_model import FINGERPRINTS, base_fields, compare_names, prints_in
from .config import config_for, format_of, read_config
from .variants import PeftFormat
from .whole import WholeFields, insert_whole, is_whole
from .whole_written import whole_placements, write_whole
from .written import as_written

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DIGEST = "lora_lite_fx.config"  # the key of the config's digest in the metadata of the tensors
_ABOUT_THE_BASE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Fields that do not change what the adapter computes. They are often edited by hand, so the digest leaves them out."""


def save_peft(
    model: nn.Module, path: str | os.PathLike[str], *, as_lora: bool | None = None, allow_nonfinite: bool = False
) -> None:
    """Write the adapter of `model` as a PEFT directory, which `PeftModel.from_pretrained` loads on the same base.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`, with one adapter.
        path: of the directory; made if it is not there. Its two files are written whole or not at all, and after a
            crash they are the old two, the new two, or there is no config. A digest of the config in the metadata of
            the tensors lets `load_peft` refuse two files that do not belong together.
        as_lora: for `PiSSA` and `OLoRA`, whether to write an ordinary LoRA of twice the rank, the start and the end
            side by side. None does: it runs on the unchanged base in whatever reads r, alpha, A and B. False writes
            PEFT's own form, whose base PEFT factorizes and changes at each load, and which is wrong elsewhere.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: the adapter cannot be represented; the message says why.
        CheckpointError: the files cannot be written, or a value is not finite.
    """
    folder = as_path(path, "save_peft(model, path)")
    placed, variant, state = as_written(model, as_lora)
    warn_of_trained_base(model, "save_peft")
    sites = sites_of(model)
    config = _config(model, variant, [sites[placement.site] for placement in placed])
    form = format_of(variant)
    tensors = {}
    for placement in placed:
        for name, qualified in placement.tensors.items():
            if name in form.tensors:
                value = form.tensor_to_peft(variant, sites[placement.site], name, state[qualified])
                tensors[_key(form, sites[placement.site], name)] = value.contiguous().cpu()
    modules = _modules(model)
    adapted = [placement.site for placement in placed]
    fields, whole = write_whole(model, sites, adapted, modules)
    config |= fields
    tensors |= {key: tensor.contiguous().cpu() for key, tensor in whole.items()}
    if not allow_nonfinite:
        check_finite(tensors, folder / TENSORS, "nothing was written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be a directory: {error}.") from error
    prints = fingerprints(model, [*adapted, *(placement.site for placement in whole_placements(model))])
    metadata = {"format": "pt", _DIGEST: _digest(config), FINGERPRINTS: json.dumps(prints)}
    data = tensor_bytes(tensors, metadata)
    document = json.dumps(config, indent=2, sort_keys=True).encode()
    write_together([(folder / TENSORS, data), (folder / CONFIG, document)])


@loader
def load_peft(folder: Path) -> AdapterFile:
    """Capture a model and insert the adapter of a PEFT directory, with its saved values.

    Other weights of the base than those that the adapter was made for are treated as by `load`. Directories that
    `save_peft` did not write do not say them, and are compared by the name of the base.
    """
    check_directory(folder)
    config = read_json(folder / CONFIG)
    state, metadata = read_safetensors(folder / TENSORS)
    _check_pair(config, metadata, folder)
    try:
        variant = read_config(config, new=False)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    form = format_of(variant)
    whole_fields = WholeFields.of(config, type(variant).__name__)
    by_site, whole = _by_site(form, state, folder / TENSORS)
    if form.same_rank:
        variant = _with_ranks_of(variant, form.same_rank, by_site)
    prints = prints_in(metadata, folder)

    def insert(gm: fx.GraphModule) -> None:
        if prints is None:
            compare_names(gm, config, folder)
        insert_whole(gm, whole, whole_fields, folder, prints)
        insert_from_file(gm, variant, by_site, form.rest, folder, prints)

    return AdapterFile(state, insert)


def to_peft_config(model: nn.Module, *, as_lora: bool | None = None) -> dict[str, Any]:
    """Return the config of the model's one adapter as PEFT writes it, JSON-ready; `peft.get_peft_config` takes it.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`.
        as_lora: as for `save_peft`.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    placed, variant, _ = as_written(model, as_lora)
    sites = sites_of(model)
    fields, _ = write_whole(model, sites, [placement.site for placement in placed], _modules(model))
    return _config(model, variant, [sites[placement.site] for placement in placed]) | fields


def _config(model: nn.Module, variant: Variant, sites: list[Site]) -> dict[str, Any]:
    return config_for(variant, sites, _modules(model)) | base_fields(model)


def _modules(model: nn.Module) -> list[str]:
    """Return the names of the model's own modules."""
    return [name for name, _ in model.named_modules() if not name.endswith(".base")]


def _with_ranks_of(variant: Variant, tensor: str, by_site: Mapping[str, Mapping[str, Tensor]]) -> Variant:
    """Return the config with the ranks that the tensors of that name have."""
    ranks = {
        f"^{re.escape(site)}$": len(has[tensor])
        for site, has in by_site.items()
        if tensor in has and has[tensor].dim()  # a number is refused later, as every other wrong shape
    }
    others = {pattern: rank for pattern, rank in ranks.items() if rank and rank != getattr(variant, "r", rank)}
    return dataclasses.replace(variant, rank_pattern=others)  # type: ignore[call-arg]


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


def _key(form: PeftFormat, site: Site, name: str) -> str:
    key = form.tensors[name].key_at(site.kind.name)
    return f"base_model.{key}" if name.startswith(SHARED) else f"{_PREFIX}{site.name}.{key}"


def _by_site(
    form: PeftFormat, state: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the adapter's tensors in a file, by site and by our names, and the other tensors by key.

    Those that sites share are at each.
    """
    by_site: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if (parsed := _parsed(form, key, path)) is None:
            whole[key] = tensor
            continue
        name, site = parsed
        try:
            (shared if site is None else by_site.setdefault(site, {}))[name] = form.tensors[name].to_ours(tensor)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{path}: {key} cannot have the shape {tuple(tensor.shape)}.") from error
    return {site: {**tensors, **shared} for site, tensors in by_site.items()}, whole


def _parsed(form: PeftFormat, key: str, path: Path) -> tuple[str, str | None] | None:
    """Return our name of the tensor called `key`, and its site; None for a tensor that sites share.

    Return None for what is not the adapter's, but a weight or bias of the model.
    """
    for name, theirs in form.tensors.items():
        if name.startswith(SHARED) and key == f"base_model.{theirs.key}":
            return name, None
        for ending in (theirs.key, theirs.embedding):
            if ending and key.startswith(_PREFIX) and key.endswith(f".{ending}"):
                return name, key.removeprefix(_PREFIX).removesuffix(f".{ending}")
    if is_whole(key):
        return None
    known = ", ".join(theirs.key for theirs in form.tensors.values())
    raise CheckpointError(
        f"{path}: {key} cannot be represented here; of {form.variant.__name__}, modules have {known}."
    )
