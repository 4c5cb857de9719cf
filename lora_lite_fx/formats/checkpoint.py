"""`save` and `load`: adapters in one safetensors file.

The tensors are those of `adapter_state_dict`, and the buffers that training has changed. The metadata holds one JSON
document: the configs with the sites they were inserted at, a fingerprint of the frozen weights of those sites, the
names of the buffers, and a checksum of all that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.contract import check_contract
from ..adapters.named_configs import check_name
from ..adapters.placement import Placement, configs_of
from ..adapters.registry import check_saving, from_config, to_config
from ..adapters.state import check_fit, check_unscaled, warn_of_trained_base
from ..adapters.switches import known_names
from ..adapters.variant import Variant
from ..capture.capture_model import Inputs
from ..errors import CheckpointError, ConfigError
from ..graph.insertion import DEFAULT
from ..graph.tensors import outside_inference_mode
from ..rewriting.capture import capture
from ..rewriting.choose_sites import NewAdapter
from ..sites.site import stored_weight
from .atomic_writing import write_atomically
from .base_fingerprints import check_base
from .filed_adapter import FiledAdapter, Fitting, insert_filed
from .gathered import Held, gathered, held_by, write_once
from .safetensors_files import check_finite
from .untrusted_files import as_path, check_file, foreign_file_hint, read_safetensors

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
        held = held_by(model, adapter)
        if adapter is not None and all(placement.adapter_name != adapter for placement in held.placed):
            known_names(model, adapter)  # says which names there are
        check_unscaled(model)
        data = file_of(held, file, adapter, allow_nonfinite)
    write_once(model, lambda: write_atomically(file, data), alone=whole_tensors is not None)


def file_of(held: Held, file: Path, adapter: str | None, allow_nonfinite: bool) -> bytes:
    """Return the file of adapters.

    Args:
        held: the adapters of a model.
        file: the path, for messages.
        adapter, allow_nonfinite: as for `save`.

    Raises:
        ConfigError, CheckpointError: as `save`.
    """
    values = held.values
    configs = list(configs_of(held.placed, adapter))
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


@dataclass(frozen=True)
class Checkpoint:
    """A file that `save` wrote.

    Args:
        path: of the file.
        adapters: the name, the config and the names of the sites of each config.
        tensors: all that it holds, by the names that a model with these adapters alone gives them.
        buffers: the buffers of the model among them.
        document: the metadata.
    """

    path: Path
    adapters: Sequence[tuple[str, Variant, Sequence[str]]]
    tensors: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    document: Mapping[str, Any]


def load(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    name: str | None = None,
    stack: bool = False,
    allow_nonfinite: bool = False,
    fuse_loss: bool | None = None,
) -> fx.GraphModule:
    """Capture a model and insert the adapters of a file that `save` wrote, with their saved values.

    It is an error if the base's weights are others than those that a variant was made for, and a warning if the variant
    does not depend on them. The graph gets the buffers of the file, which are its own then. Only safetensors and JSON
    are read.

    Args:
        model: the base, which is not changed.
        path: of the file or directory.
        example_inputs: as for `capture`.
        name: the name that the adapter gets, in place of the one that it has in the file. Beside the adapters of the
            model it does not act until `active` names it.
        stack: whether an adapter without a name goes around those that the model has, so that both act; else that is an
            error. `load(remove(model), path)` loads it in their place, and `load_adapter_state_dict` copies values
            into the present ones.
        allow_nonfinite: load values that are NaN or infinite too, in place of an error.
        fuse_loss: as for `rewrite`.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError: the file is unreadable or foreign, or its keys, shapes, dtypes, config or sites do not fit the
            model; or a value is not finite; or the adapter does something that cannot be represented here. The message
            says what.
        AdapterError: the model has adapters, and neither `name` nor `stack` is given.
        ConfigError: the name is taken; or the file has adapters of several names, and `name` is given.
        CaptureError: the model cannot be captured.
    """
    file = read_checkpoint(as_path(path, "load(model, path)"))
    with outside_inference_mode():
        gm = capture(model, example_inputs, fuse_loss=fuse_loss)
        buffers, adapters = adapters_of_checkpoint(gm, model, file, allow_nonfinite)
        return insert_filed(gm, adapters, file.path, "load", name=name, stack=stack, buffers=buffers)


def adapters_of_checkpoint(
    gm: fx.GraphModule, model: object, file: Checkpoint, allow_nonfinite: bool = False
) -> tuple[dict[str, Tensor], list[FiledAdapter]]:
    """Return the buffers of a file that a graph reads, and its adapters at the sites of the graph.

    Args:
        gm: the graph of `model`.
        model: it may have buffers that the graph does not read.
        file: what was read.
        allow_nonfinite: as for `load`.

    Raises:
        CheckpointError: they do not fit the graph, or a value is not finite.
    """
    buffers, adapters = _buffers_read_by(gm, model, file), _fitted(gm, file)
    if not allow_nonfinite:
        check_finite(file.tensors, file.path, "it is not loaded")
    return buffers, adapters


def _buffers_read_by(gm: fx.GraphModule, model: object, file: Checkpoint) -> dict[str, Tensor]:
    """Return those buffers of a file that the graph reads.

    Raises:
        CheckpointError: the model lacks one, or has it in another form.
    """
    known = dict(model.named_buffers(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    read = dict(gm.named_buffers(remove_duplicate=False))
    for name, value in file.buffers.items():
        now = read.get(name, known.get(name))
        if now is None:
            raise CheckpointError(f"{file.path} holds the buffer {name!r}, which the model does not have.")
        if (now.shape, now.is_floating_point()) != (value.shape, value.is_floating_point()):
            raise CheckpointError(
                f"{file.path} holds the buffer {name!r} of shape {tuple(value.shape)} in {value.dtype}, and the model"
                f" has it of {tuple(now.shape)} in {now.dtype}."
            )
    return {name: value for name, value in file.buffers.items() if name in read}


def _fitted(gm: fx.GraphModule, file: Checkpoint) -> list[FiledAdapter]:
    """Return the adapters of a file at the sites of a graph, after checks of everything that can be wrong."""
    fitting = Fitting(gm, file.path)
    for _, _, names in file.adapters:
        fitting.check_sites_exist(names)
    sites = fitting.sites
    plans = [NewAdapter(variant, [sites[each] for each in names], {}, name) for name, variant, names in file.adapters]
    expected: dict[str, Tensor] = {}
    places: list[dict[str, dict[str, str]]] = []
    inner: dict[str, list[str]] = defaultdict(list)  # the names of the adapters that are at a site already
    try:
        for index, plan in enumerate(plans):
            for site in plan.sites:
                plan.variant.for_site(site.name).check(site)
            check_contract(plan.variant, plan.sites, gm, [name for name, around in inner.items() if around])
            places.append({})
            for site in plan.sites:
                placement = Placement.of(plan.variant, index, site, inner[site.name], plan.adapter_name)
                inner[site.name].append(plan.adapter_name)
                specs = placement.local.tensor_specs(site)
                dtype = plan.variant.param_dtype(stored_weight(gm, site).dtype)
                places[-1][site.name] = placement.tensors
                for name, qualified in placement.tensors.items():
                    expected[qualified] = specs[name].empty(dtype, torch.device("meta"))
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    check_base(gm, plans, file.document["fingerprint"], file.path, stacklevel=5)
    try:
        # Before any tensor is made: a damaged config may ask for more of them than there is memory.
        check_fit(expected, {name: value for name, value in file.tensors.items() if name not in file.buffers})
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if file.document.get("checksum") != _checksum(file.document, file.tensors):
        raise CheckpointError(f"{file.path} is corrupt: it does not hold what was saved.")
    by_site = [
        {site: {own: file.tensors[path] for own, path in names.items()} for site, names in of_plan.items()}
        for of_plan in places
    ]
    return [FiledAdapter(plan, tensors) for plan, tensors in zip(plans, by_site, strict=True)]


def _checksum(document: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return a hash of the document without its checksum and of the tensors: names, shapes, dtypes and values."""
    content = {key: value for key, value in document.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file that `save` wrote, without a model.

    Raises:
        CheckpointError: it is not there, or is another file, or damaged.
    """
    check_file(path)
    tensors, metadata = read_safetensors(path)
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
        records, prints, buffers = document["adapters"], document["fingerprint"], document.get("buffers", [])
        if not isinstance(prints, dict) or not records:
            raise TypeError("adapters must be a list that is not empty, fingerprint an object")
        if not isinstance(buffers, list) or not all(isinstance(name, str) and name in tensors for name in buffers):
            raise CheckpointError(f"{path}: its metadata is damaged: buffers must be a list of names of tensors.")
        adapters = []
        for record in records:
            config, names = record["config"], record["sites"]
            if not isinstance(config, dict) or not all(isinstance(name, str) for name in [*names, *config]):
                raise TypeError("config must be an object, sites a list of names")
            adapters.append((check_name(record.get("name", DEFAULT)), from_config(config), list(dict.fromkeys(names))))
        return Checkpoint(path, adapters, tensors, {name: tensors[name] for name in buffers}, document)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {type(error).__name__}: {error}.") from error
