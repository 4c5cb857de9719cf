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
from torch.export import ExportedProgram

from ...adapters.changed_buffers import warn_of_lost_buffers
from ...adapters.placement import adapter_names
from ...adapters.state import warn_of_trained_base
from ...adapters.variant import Variant
from ...capture.capture import Inputs
from ...errors import CheckpointError, ConfigError
from ...graph.provenance import DEFAULT, SHARED
from ...sites.site import Site
from ...variants import TinyLoRA
from ..atomic_writing import make_folder, write_together
from ..checkpoint import fingerprints
from ..filed_adapter import AdapterFile, loader
from ..finite import check_finite
from ..gathered import gathered, write_once
from ..mistakes import as_path, check_directory
from ..single_adapter import insert_from_file, module_names, sites_in, sites_of
from ..stages import refuse_stage
from ..tensor_bytes import tensor_bytes
from ..untrusted_files import read_json, read_safetensors
from .adapted_modules import PeftModule, by_site, exactly, peft_modules
from .base_model import FINGERPRINTS, base_fields, compare_names, prints_in
from .beside import WholeFields, insert_whole, is_whole
from .form import PeftFormat
from .hub import CONFIG, TENSORS, directory_of
from .peft_config import config_for, read_config
from .sites import check_site
from .tinylora import with_vectors_at_modules
from .variants import format_of
from .whole_only import WHOLE_ONLY, as_beside, as_own, method_of
from .whole_written import trains_whole_only, whole_placements, write_whole
from .written_form import as_written

PREFIX = "base_model.model."
_DIGEST = "lora_lite_fx.config"  # the key of the config's digest in the metadata of the tensors
_ABOUT_THE_BASE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Fields that do not change what the adapter computes. They are often edited by hand, so the digest leaves them out."""


def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    as_lora: bool | None = None,
    allow_nonfinite: bool = False,
    whole_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of `model` as a PEFT directory, which `PeftModel.from_pretrained` loads on the same base.

    If the model is sharded, all processes call this, and process 0 writes.

    Several adapters are written as PEFT does: "default" into the directory, and each other one into a folder of its
    name in it, which `load_peft(..., subfolder=name, name=name)` and PEFT's `load_adapter` read.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`.
        path: of the directory; made if it is not there. Its two files are written whole or not at all, and after a
            crash they are the old two, the new two, or there is no config. A digest of the config in the metadata of
            the tensors lets `load_peft` refuse two files that do not belong together.
        adapter: the name of the adapter to write, into the directory itself; None for all.
        as_lora: whether to write an ordinary LoRA, which runs on the unchanged base in whatever reads r, alpha, A and
            B. True does, as `to_lora`, for every adapter whose change of the weights has a low rank. None does for
            `PiSSA` and `OLoRA`: of twice the rank, the start and the end side by side. False writes PEFT's own form of
            those, whose base PEFT factorizes and changes at each load, and which is wrong elsewhere.
            `LoRAXS`, which PEFT has not, is always written as a LoRA of its rank.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.
        whole_tensors: as for `save`.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: the adapter cannot be represented; the message says why.
        CheckpointError: the files cannot be written, or a value is not finite.
    """
    folder = as_path(path, "save_peft(model, path)")
    refuse_stage(model, "A PEFT directory")
    warn_of_trained_base(model, "save_peft")  # refuses a model without adapters
    warn_of_lost_buffers(model, "save_peft writes", "llfx.save, whose files hold them")
    names = adapter_names(model)
    with gathered(model, whole_tensors):
        if adapter is not None or len(names) == 1:
            files = [_files(model, folder, adapter, as_lora, allow_nonfinite)]
        else:
            folders = {name: folder if name == DEFAULT else folder / name for name in names}
            files = [_files(model, folders[name], name, as_lora, allow_nonfinite) for name in names]

    def write() -> None:
        for contents in files:
            make_folder(contents[0][0].parent)
            write_together(contents)

    write_once(model, write, alone=whole_tensors is not None)


def _files(
    model: nn.Module, folder: Path, adapter: str | None, as_lora: bool | None, allow_nonfinite: bool
) -> list[tuple[Path, bytes]]:
    """Return the paths of the two files of a directory, with their contents."""
    config, tensors, sites = peft_form(model, as_lora, adapter)
    if not allow_nonfinite:
        check_finite(tensors, folder / TENSORS, "nothing was written")
    prints = fingerprints(model, sites)
    metadata = {"format": "pt", _DIGEST: _digest(config), FINGERPRINTS: json.dumps(prints)}
    data = tensor_bytes(tensors, metadata)
    document = json.dumps(config, indent=2, sort_keys=True).encode()
    return [(folder / TENSORS, data), (folder / CONFIG, document)]


def load_peft(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    name: str | None = None,
    stack: bool = False,
    allow_nonfinite: bool = False,
    fuse_loss: bool | None = None,
) -> fx.GraphModule:
    """Capture a model and insert the adapter of a PEFT directory, with its saved values.

    Other weights of the base than those that the adapter was made for are treated as by `load`. Directories that
    `save_peft` did not write do not say them, and are compared by the name of the base. Only safetensors and JSON are
    read.

    Args:
        model: the base, which is not changed.
        path: of the directory; or "owner/name" of a repository on the Hugging Face Hub, which is downloaded once and
            then found in the local cache, as by transformers. With `HF_HUB_OFFLINE=1` only the cache is asked.
        example_inputs: as for `capture`.
        revision: a branch, tag or commit of the repository.
        subfolder: the folder in the directory or repository that holds the adapter.
        name: as for `load`.
        stack: as for `load`.
        allow_nonfinite: as for `load`.
        fuse_loss: as for `rewrite`.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError, AdapterError, CaptureError: as for `load`; or the repository cannot be had.
    """
    folder = directory_of(path, revision, subfolder)
    options: Any = {"name": name, "stack": stack, "allow_nonfinite": allow_nonfinite, "fuse_loss": fuse_loss}
    return _load_directory(model, folder, example_inputs, **options)


def _read_directory(folder: Path) -> AdapterFile:
    """Read and check a PEFT directory, without a model."""
    check_directory(folder)
    config = read_json(folder / CONFIG)
    state, metadata = read_safetensors(folder / TENSORS)
    _check_pair(config, metadata, folder)
    return adapter_of(config, state, folder / CONFIG, folder / TENSORS, prints_in(metadata, folder))


def adapter_of(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    config_path: Path,
    path: Path,
    prints: dict[str, str] | None = None,
) -> AdapterFile:
    """Check an adapter in the form in which PEFT writes it, without a model.

    Args:
        config: as of an `adapter_config.json`.
        state: the tensors by PEFT's keys.
        config_path, path: of the config and of the tensors, for messages.
        prints: the fingerprints of the weights that the adapter was made for, by site, if they are known.

    Raises:
        CheckpointError: the adapter cannot be represented.
    """
    try:
        variant = read_config(config, new=False)
    except ConfigError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    if method_of(config) in WHOLE_ONLY:
        fields, beside = as_beside(config, state, path)

        def insert_beside(gm: fx.GraphModule) -> None:
            if prints is None:
                compare_names(gm, config, path)
            insert_whole(gm, beside, fields, path, prints)

        return AdapterFile(state, insert_beside)
    form = format_of(variant)
    if isinstance(variant, TinyLoRA):
        state = with_vectors_at_modules(config, state, path)
    whole_fields = WholeFields.of(config, type(variant).__name__)
    modules, whole = _by_module(form, state, path)
    if form.same_rank:
        modules = {name: has for name, has in modules.items() if not _is_pruned(has.get(form.same_rank))}
        variant = _with_ranks_of(variant, form.same_rank, modules)
    if form.from_file is not None:
        field, tensor = form.from_file
        sizes = {len(has[tensor]) for has in modules.values() if tensor in has and has[tensor].dim()}
        if len(sizes) == 1 and min(sizes) > 0:
            variant = dataclasses.replace(variant, **{field: min(sizes)})  # type: ignore[arg-type]

    def insert(gm: fx.GraphModule) -> None:
        if prints is None:
            compare_names(gm, config, path)
        insert_whole(gm, whole, whole_fields, path, prints)
        sites = sites_in(gm)
        targets = config.get("target_parameters") or ()
        found = by_site(gm, sites, modules, targets, path)
        if prints is not None:  # zeros may fill up an attention module, see `adapted_modules.py`
            found = {name: module for name, module in found.items() if name in prints or not module.is_empty}

        def check(variant: Variant, site: Site) -> None:
            check_site(variant, site, as_module=not found[site.name].is_parameter)

        tensors = {name: module.tensors for name, module in found.items()}
        try:
            of_sites = _for_sites(variant, found)
        except ConfigError as error:
            raise CheckpointError(f"{config_path}: {error}") from error
        insert_from_file(gm, sites, of_sites, tensors, form.rest, path, prints, check)

    return AdapterFile(state, insert)


_load_directory = loader(_read_directory, "load_peft")


def to_peft_config(model: nn.Module, *, adapter: str | None = None, as_lora: bool | None = None) -> dict[str, Any]:
    """Return the config of an adapter as PEFT writes it, JSON-ready; `peft.get_peft_config` takes it.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`.
        adapter: the name of the adapter; may be left out if there is one.
        as_lora: as for `save_peft`.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    return peft_form(model, as_lora, adapter)[0]


def peft_form(
    model: nn.Module, as_lora: bool | None, adapter: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the config and the tensors of an adapter of `model`, as PEFT writes them, and the names of its sites.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    names = list(dict.fromkeys(module_names(model).values()))
    beside = [placement.site for placement in whole_placements(model, adapter)]
    if trains_whole_only(model, adapter):
        config, tensors = as_own(*write_whole(model, sites_of(model), (), names, adapter), names)
        return config | base_fields(model), _to_write(tensors), beside
    placed, variant, state = as_written(model, as_lora, adapter)
    sites = sites_of(model)
    modules = peft_modules(model, variant, placed, sites, state)
    fields, tensors = write_whole(model, sites, modules, names, adapter)
    form = format_of(variant)
    for module in modules:
        for name, tensor in module.tensors.items():
            if name in form.tensors:
                tensors[_key(form, module, name)] = form.tensor_to_peft(variant, module.sites[0], name, tensor)
    config = config_for(variant, modules, names) | base_fields(model) | fields
    return config, _to_write(tensors), [*(placement.site for placement in placed), *beside]


def _to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}


def _for_sites(variant: Variant, found: Mapping[str, PeftModule]) -> Variant:
    """Return the config with targets, ranks and alphas that name sites, where PEFT's name other things."""
    sites = [site for module in found.values() for site in module.sites]
    if not all(_selects(variant, site) for site in sites):
        kinds = tuple(dict.fromkeys(site.kind.name for site in sites))
        variant = dataclasses.replace(variant, target_names=exactly(found), target_kinds=kinds)
    for field, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        theirs = {name: variant.overrides(module.name).get(field) for name, module in found.items()}
        ours = {
            name: value
            for name, value in theirs.items()
            if value is not None and variant.overrides(name).get(field) != value
        }
        if ours:
            others = ((f"^{re.escape(name)}$", value) for name, value in ours.items())
            change: dict[str, Any] = {pattern: (*others, *getattr(variant, pattern))}
            variant = dataclasses.replace(variant, **change)
    return variant


def _selects(variant: Variant, site: Site) -> bool:
    try:
        return variant.selects(site)
    except ConfigError:  # a pattern takes too long, and the names of the tensors say the same
        return False


def _is_pruned(tensor: Tensor | None) -> bool:
    """Return whether a factor has no rank left, so that its site is not adapted any more."""
    return tensor is not None and tensor.dim() > 0 and len(tensor) == 0


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


def _key(form: PeftFormat, module: PeftModule, name: str) -> str:
    key = form.tensors[name].key_at(module.sites[0].kind.name)
    return f"base_model.{key}" if name.startswith(SHARED) else f"{PREFIX}{module.path}.{key}"


def _by_module(
    form: PeftFormat, state: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the adapter's tensors in a file, by module and by our names, and the other tensors by key.

    Those that modules share are at each.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(form.ignored):
            continue
        if (parsed := _parsed(form, key, path)) is None:
            whole[key] = tensor
            continue
        name, module = parsed
        try:
            (shared if module is None else modules.setdefault(module, {}))[name] = form.tensors[name].to_ours(tensor)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{path}: {key} cannot have the shape {tuple(tensor.shape)}.") from error
    return {module: {**tensors, **shared} for module, tensors in modules.items()}, whole


def _parsed(form: PeftFormat, key: str, path: Path) -> tuple[str, str | None] | None:
    """Return our name of the tensor called `key`, and its module; None for a tensor that modules share.

    Return None for what is not the adapter's, but a weight or bias of the model.
    """
    for name, theirs in form.tensors.items():
        if name.startswith(SHARED) and key == f"base_model.{theirs.key}":
            return name, None
        for ending in (theirs.key, theirs.embedding):
            if ending and key.startswith(PREFIX) and key.endswith(f".{ending}"):
                return name, key.removeprefix(PREFIX).removesuffix(f".{ending}")
    if is_whole(key):
        return None
    known = ", ".join(theirs.key for theirs in form.tensors.values())
    raise CheckpointError(
        f"{path}: {key} cannot be represented here; of {form.variant.__name__}, modules have {known}."
    )
