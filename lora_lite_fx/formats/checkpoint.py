"""`save` and `load`: adapters in one safetensors file.

The tensors are those of `adapter_state_dict`, and the buffers that training has changed. The metadata holds one JSON
document: the configs with the sites they were inserted at, a fingerprint of the frozen weights of those sites, the
names of the buffers, and a checksum of all that.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.contract import check_contract
from ..adapters.named_configs import check_name
from ..adapters.placement import Placement, configs_of, graph_of, placements
from ..adapters.registry import check_saving, from_config, to_config
from ..adapters.state import (
    adapter_values,
    check_fit,
    check_unscaled,
    load_adapter_values,
    warn_of_trained_base,
)
from ..adapters.switches import known_names
from ..adapters.variant import Variant
from ..errors import CheckpointError, ConfigError, counted
from ..graph.provenance import DEFAULT
from ..graph.sharded import whole
from ..graph.tensors import tensor_of
from ..log import phase
from ..rewriting.eager import AdaptedLinear
from ..rewriting.plan import Plan
from ..rewriting.rewrite import insert_adapters
from ..sites.finding import find_sites
from ..sites.site import Site, stored_weight
from .atomic_writing import write_atomically
from .filed_adapter import AdapterFile, loader
from .finite import check_finite
from .gathered import gathered, write_once
from .mistakes import as_path, check_file, foreign_file_hint
from .stages import held_by
from .untrusted_files import read_safetensors

FORMAT = "lora_lite_fx"  # the key of the document; one key, since the order of several would differ between runs
VERSION = 1


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    allow_nonfinite: bool = False,
    whole_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters of `model` to one safetensors file; a failure leaves what was at `path` as it was.

    The file also holds the buffers that differ from the base's, because training has changed them: the statistics of
    batch norm. All adapters of a model have one value of each.

    If the model is sharded, or a stage of a pipeline, all processes call this, and process 0 writes.

    Args:
        model: a model with adapters, from `rewrite`, `wrap`, `adapt`, `load` or `split`.
        path: of the file; its folder must exist.
        adapter: the name of the adapter to write; None for all, whether they act or not.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.
        whole_tensors: of a sharded model, its parameters by name if they are gathered already, as
            `accelerator.get_state_dict` does. Then the process that has them calls this alone.

    Raises:
        AdapterError: the model has no adapters, or records one at a site that its graph does not show any more.
        ConfigError: a variant is not registered, so that the file could not be loaded; or there is no adapter of the
            name.
        CheckpointError: the file cannot be written, or a value is not finite; or a stage of a pipeline is missing.
    """
    file = as_path(path, "save(model, path)")
    warn_of_trained_base(model, "save")
    with gathered(model, whole_tensors):
        data = _file_of(model, file, adapter, allow_nonfinite)
    write_once(model, lambda: write_atomically(file, data), alone=whole_tensors is not None)


def _file_of(model: nn.Module, file: Path, adapter: str | None, allow_nonfinite: bool) -> bytes:
    held = held_by(model, adapter, fingerprints)
    values = held.values
    if adapter is not None and all(placement.adapter_name != adapter for placement in held.placed):
        known_names(model, adapter)  # says which names there are
    configs = list(configs_of(held.placed, adapter))
    check_unscaled(model)
    state = {
        written: values[own].contiguous().cpu()
        for (_, members), in_file in zip(configs, _as_written(configs), strict=True)
        for placement, filed in zip(members, in_file, strict=True)
        for own, written in zip(placement.tensors.values(), filed.tensors.values(), strict=True)
    }
    state |= {name: buffer.contiguous().cpu() for name, buffer in held.buffers.items()}
    if not allow_nonfinite:
        check_finite(state, file, "nothing was written")
    for variant, _ in configs:
        check_saving(variant)
    records = [_record(variant, members) for variant, members in configs]
    prints = {name: held.prints[name] for record in records for name in record["sites"]}
    document: dict[str, Any] = {"version": VERSION, "adapters": records, "fingerprint": prints}
    if held.buffers:
        document["buffers"] = [*held.buffers]
    document["checksum"] = _checksum(document, state)
    return safetensors.torch.save(state, {FORMAT: json.dumps(document)})


def _record(variant: Variant, members: Sequence[Placement]) -> dict[str, Any]:
    name = members[0].adapter_name
    named = {} if name == DEFAULT else {"name": name}  # earlier versions read files without names
    return {"config": to_config(variant), "sites": [placement.site for placement in members], **named}


def _as_written(configs: Sequence[tuple[Variant, Sequence[Placement]]]) -> list[list[Placement]]:
    """Return the placements as they are in a model that has these adapters alone, whose names a file has."""
    written: list[list[Placement]] = []
    seen: Counter[tuple[str, str]] = Counter()
    for index, (_, members) in enumerate(configs):
        written.append([replace(each, adapter=index, position=seen[each.site, each.adapter_name]) for each in members])
        seen.update((each.site, each.adapter_name) for each in members)
    return written


@loader
def load(file: Path) -> AdapterFile:
    """Capture a model and insert the adapters of a file that `save` wrote, with their saved values.

    It is an error if the base's weights are others than those that a variant was made for, and a warning if the variant
    does not depend on them. The graph gets the buffers of the file, which are its own then.
    """
    check_file(file)
    state, metadata = read_safetensors(file)
    chosen, document = _parse(metadata, file)
    names = tuple(dict.fromkeys(name for name, _, _ in chosen))
    buffers = _buffers_in(state, document, file)
    return AdapterFile(state, lambda gm: _insert(gm, chosen, document, state, file), names, buffers)


def _insert(
    gm: fx.GraphModule,
    chosen: Sequence[tuple[str, Variant, list[str]]],
    document: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Insert the adapters of a file into a graph, after checks of everything that can be wrong."""
    with phase("found the sites") as details:
        sites = {site.name: site for site in find_sites(gm)}
        details.append(f"{len(sites)} in the model")
    placed = [Plan(variant, _existing(sites, names, path), {}, name) for name, variant, names in chosen]
    try:
        for plan in placed:
            for site in plan.sites:
                plan.variant.for_site(site.name).check(site)
            check_contract(plan.variant, plan.sites, gm)
        expected = _expected(gm, placed)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_base(gm, [(plan.variant, list(plan.sites)) for plan in placed], document["fingerprint"], path)
    try:
        # Before any tensor is made: a damaged config may ask for more of them than there is memory.
        check_fit(expected, {name: value for name, value in state.items() if name not in document.get("buffers", ())})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    first = insert_adapters(gm, placed)
    values = adapter_values(gm)
    for placement in placements(gm):
        if placement.adapter >= first:
            written = _in_file(placed, placement.adapter - first, sites[placement.site])
            values |= {own: state[written.tensors[name]] for name, own in placement.tensors.items()}
    load_adapter_values(gm, values)
    if document.get("checksum") != _checksum(document, state):
        raise CheckpointError(f"{path} is corrupt: it does not hold what was saved.")


def fingerprints(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Return the fingerprints of the frozen weights of an adapted model's sites, by name."""
    weights = _frozen_weights(graph_of(model), dict.fromkeys(sites))
    return {name: fingerprint(weight) for name, weight in weights.items()}


def fingerprint(weight: Tensor) -> str:
    """Return a hash of a weight's shape and values. A base in float32 and its cast to bfloat16 have the same."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(weight.detach().to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _checksum(document: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return a hash of the document without its checksum and of the tensors: names, shapes, dtypes and values."""
    content = {key: value for key, value in document.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Reading.


def _parse(metadata: Mapping[str, str], path: Path) -> tuple[list[tuple[str, Variant, list[str]]], dict[str, Any]]:
    """Return the configs with the names of their adapters and of their sites, and the whole document."""
    if FORMAT not in metadata:
        raise CheckpointError(
            f"{path} was not written by lora_lite_fx.save: its metadata has no {FORMAT!r}."
            f"{foreign_file_hint(path, metadata)}"
        )
    try:
        document = json.loads(metadata[FORMAT])
        if document["version"] != VERSION:
            raise CheckpointError(
                f"{path} has version {document['version']!r}; this library reads version {VERSION!r}."
            )
        records, prints = document["adapters"], document["fingerprint"]
        if not isinstance(prints, dict) or not records:
            raise TypeError("adapters must be a list that is not empty, fingerprint an object")
        chosen = []
        for record in records:
            config, names = record["config"], record["sites"]
            if not isinstance(config, dict) or not all(isinstance(name, str) for name in [*names, *config]):
                raise TypeError("config must be an object, sites a list of names")
            chosen.append((check_name(record.get("name", DEFAULT)), from_config(config), list(dict.fromkeys(names))))
        return chosen, document
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {type(error).__name__}: {error}.") from error


def _buffers_in(state: Mapping[str, Tensor], document: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that are buffers of the model."""
    names = document.get("buffers", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name in state for name in names):
        raise CheckpointError(f"{path}: its metadata is damaged: buffers must be a list of names of tensors.")
    return {name: state[name] for name in names}


def _existing(sites: Mapping[str, Site], names: list[str], path: str | os.PathLike[str]) -> list[Site]:
    missing = [name for name in names if name not in sites]
    if missing:
        raise CheckpointError(
            f"{path} adapts {counted(len(missing), 'site')} that the model does not have"
            f" ({', '.join(missing[:3])}, ...); the model has {', '.join(list(sites)[:3])}, ..."
        )
    return [sites[name] for name in names]


def check_base(
    gm: fx.GraphModule,
    placed: list[tuple[Variant, list[Site]]],
    prints: Mapping[str, str],
    path: object,
    stacklevel: int = 5,
) -> None:
    """Compare the weights of a graph with those that adapters were made for; a difference is a warning.

    Args:
        gm: the graph.
        placed: the adapters with their sites.
        prints: the fingerprints of the weights that they were made for, by site.
        path: of the file, for messages.
        stacklevel: as for `warnings.warn`.

    Raises:
        CheckpointError: they differ, and a variant means nothing on other weights.
    """
    names = {site.name: site for _, targets in placed for site in targets}
    now = {name: fingerprint(stored_weight(gm, site)) for name, site in names.items()}
    other = {name for name in names if prints.get(name) != now[name]}
    for variant, targets in placed:
        differ = [site.name for site in targets if site.name in other]
        if not differ:
            continue
        message = (
            f"{path}: the {type(variant).__name__} adapter was made for other weights than the model's, at"
            f" {len(differ)} of {counted(len(targets), 'site')} ({differ[0]}, ...)"
        )
        if variant.ties_to_weight:
            raise CheckpointError(f"{message}; it means nothing on these. Load it on the base it was made for.")
        warnings.warn(f"{message}.", stacklevel=stacklevel)


def _expected(gm: fx.GraphModule, placed: Sequence[Plan]) -> dict[str, Tensor]:
    """Return the tensors that a file with these adapters holds, without data."""
    expected: dict[str, Tensor] = {}
    for adapter, plan in enumerate(placed):
        for site in plan.sites:
            placement = _in_file(placed, adapter, site)
            specs = placement.local.tensor_specs(site)
            dtype = plan.variant.param_dtype(stored_weight(gm, site).dtype)
            for name, qualified in placement.tensors.items():
                expected[qualified] = specs[name].empty(dtype, torch.device("meta"))
    return expected


def _in_file(placed: Sequence[Plan], adapter: int, site: Site) -> Placement:
    """Return the placement as the file has it: a model that has adapters already may give its tensors other names."""
    inner = [plan.adapter_name for plan in placed[:adapter] if site.name in {target.name for target in plan.sites}]
    return Placement.of(placed[adapter].variant, adapter, site, inner, placed[adapter].adapter_name)


# Writing.


def _frozen_weights(model: nn.Module, names: Mapping[str, None]) -> dict[str, Tensor]:
    """Return the frozen weight of each site, as the model stores it."""
    if isinstance(model, fx.GraphModule):
        adapted = account_for(model).adapted("save")
        return {site.name: stored_weight(model, site) for site in adapted if site.name in names}
    modules = {name: model.get_submodule(name) for name in names}  # wrapped, or themselves
    return {
        name: whole(
            module.frozen_weight().detach() if isinstance(module, AdaptedLinear) else tensor_of(module, "weight")
        )
        for name, module in modules.items()
    }
