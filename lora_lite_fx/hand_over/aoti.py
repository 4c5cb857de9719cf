"""`save_aoti`: an adapted model as a package of AOTInductor, whose adapter `swappable.py` exchanges.

The tensors of the adapters and a coefficient for each of them are constants of the package, by the names of
`adapter_state_dict`. What a reader of the package has to know of them is a description in its metadata.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..adapters.placement import Placement, configs_of, graph_of, placements
from ..adapters.registry import to_config
from ..adapters.switches import HasSwitches
from ..adapters.variant import Variant
from ..errors import AdapterError
from ..formats.atomic_writing import write_atomically
from ..formats.base_fingerprints import fingerprints
from ..formats.single_adapter import sites_of
from ..formats.untrusted_files import as_path
from ..graph.insertion import SHARED, recorded
from ..graph.tensors import outside_inference_mode, register_tensor, tensor_of
from ..passes import input_name
from .check_package import check_package
from .exported_program import exported, served
from .foldable_options import OF_ALPHA, OF_RANK, WITHOUT_EFFECT, Folding, folding, rank_dims
from .served_graph import ServedGraph, Tensors
from .swappable import FORMAT, KEY, TENSORS

_OPTIONS = {
    # Each of these would make a constant of an adapter's tensor or of a coefficient, which no exchange reaches then.
    "always_keep_tensor_constants": True,  # else vectors of up to 8 elements are numbers in the code
    "joint_graph_constant_folding": False,  # else tensors of one element are
    "freezing": False,  # else all are folded into what is computed of them
}


@outside_inference_mode()
def save_aoti(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Tensors | tuple[Tensor, ...] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    bake: bool = False,
    cache: bool = False,
) -> None:
    """Compile a model with AOTInductor, and write a package that runs without Python's model and without this library.

    `Swappable(path)` of `swappable.py`, a file that imports torch alone, calls the package by names of inputs, and
    exchanges, scales and switches off its adapter; for a bank it puts adapters into slots. Batch and length stay open.
    Before anything is written, the package is compared with the model, with other values of the adapters too.

    Args:
        model: a result of `rewrite`, `load`, `adapt` or `merge`. Only the adapters that act are in the package.
        path: of the package; its folder must exist.
        inputs: as for `export`.
        outputs: names of fields of the model's output, as for `export`.
        bake: make constants of what depends on parameters alone. Such a package is faster for variants as DoRA, and
            has no adapter to exchange.
        cache: compile a step of a causal language model, see `export`.

    Raises:
        AdapterError: `model` is no such result; or has a bank beside another adapter; or AOTInductor cannot compile it,
            or compiles something that computes otherwise.
        CallError, ConfigError, CaptureError: as for `export`.
        CheckpointError: the file cannot be written. What was there before is unchanged.
    """
    file = as_path(path, "save_aoti(model, path, inputs)")
    placed = [] if bake else _acting(model)
    held, scaled = graph_of(model), _coefficients(model, placed)
    graph = served(model, inputs, outputs, cache, bake, "save_aoti", scaled)
    _make_contiguous(graph, placed)
    program = exported(graph)
    spec = _description(held, placed, scaled, graph, program, bake)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model.pt2"
        _compile(program, package, spec, graph)
        tensors = {name: tensor_of(held, name).detach().cpu().contiguous() for name in spec["tensors"]}
        if tensors:
            with zipfile.ZipFile(package, "a", zipfile.ZIP_STORED) as archive:
                root = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{root}/{TENSORS}", safetensors.torch.save(tensors))
        check_package(package, graph, tensors)
        write_atomically(file, package)


def _acting(model: nn.Module) -> list[Placement]:
    """Return the adapters of a model that act, in their places.

    Raises:
        AdapterError: a bank is beside another adapter.
    """
    graph = graph_of(model)
    acts = model.switches.acts if isinstance(model, HasSwitches) else lambda name: True
    placed = [placement for placement in placements(graph) if acts(placement.adapter_name)]
    if len({placement.variant.slots for placement in placed}) > 1:
        raise AdapterError(
            "llfx.save_aoti takes adapters that act together, or banks of the same number of slots, and not both. The"
            " way out: active(model, name) for one of them."
        )
    return placed


def _coefficients(model: nn.Module, placed: Sequence[Placement]) -> dict[str, Tensor]:
    """Return the coefficient of each adapter that is not a bank, as it is now."""
    numbers = model.switches.constants("llfx.save_aoti") if isinstance(model, HasSwitches) else {}
    graph, found = graph_of(model), dict[str, Tensor]()
    for placement in placed:
        if placement.variant.slots is None:
            tensors = [tensor_of(graph, name) for name in placement.tensors.values()]
            is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
            found[placement.adapter_name] = torch.tensor(
                numbers.get(placement.adapter_name, 1.0),
                dtype=torch.float64 if is_double else torch.float32,
                device=tensors[0].device,
            )
    return found


def _make_contiguous(graph: ServedGraph, placed: Sequence[Placement]) -> None:
    """Lay inputs and the adapters' tensors out row by row, because compiled code keeps to the strides that it saw."""
    graph.inputs.update({name: tensor.contiguous() for name, tensor in graph.inputs.items()})
    read = {str(node.target) for node in graph.gm.graph.find_nodes(op="get_attr")}
    for name in {name for placement in placed for name in placement.tensors.values()} & read:
        tensor = tensor_of(graph.gm, name)
        if not tensor.is_contiguous():
            value = tensor.detach().contiguous()
            register_tensor(graph.gm, name, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)


def _description(
    model: nn.Module,
    placed: Sequence[Placement],
    scaled: Mapping[str, Tensor],
    graph: ServedGraph,
    program: ExportedProgram,
    bake: bool,
) -> dict[str, Any]:
    """Return what a reader of the package has to know, as JSON-ready data."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = [nodes[str(name)].meta["val"] for name in program.graph_signature.user_inputs]
    some = next(iter(program.state_dict.values()), torch.empty(()))
    why = "was compiled with bake=True" if bake else "was compiled of a model in which no adapter acted"
    spec: dict[str, Any] = {
        "format": FORMAT,
        "refused": dict.fromkeys(("load", "use", "put"), f"{why}: it has no adapter to exchange."),
        "device": str(some.device),
        "inputs": {
            name: {"shape": [_size(size) for size in value.shape], "dtype": _name_of(value.dtype)}
            for name, value in zip(graph.inputs, values, strict=True)
        },
        "sizes": {
            str(symbol): [_lower(bounds.lower), _upper(bounds.upper)]
            for symbol, bounds in program.range_constraints.items()
        },
        "outputs": list(graph.outputs),
        "coefficients": {},
        "tensors": {},
    }
    return spec | _exchanged(model, placed, scaled, graph) if placed else spec


def _exchanged(
    model: nn.Module, placed: Sequence[Placement], scaled: Mapping[str, Tensor], graph: ServedGraph
) -> dict[str, Any]:
    """Return what a reader of the package has to know of the adapters that it exchanges."""
    read = {str(node.target) for node in graph.gm.graph.find_nodes(op="get_attr")}
    slots, configs = placed[0].variant.slots, list(configs_of(placed, None))
    folds = {members[0].adapter: folding(variant) for variant, members in configs}
    sites = sites_of(model)
    tensors = dict[str, Any]()
    for each in placed:
        known = folds[each.adapter]
        ranks = rank_dims(each.local, sites[each.site]) if known.is_padded else {}
        for short, full in each.tensors.items():
            tensor, is_shared = tensor_of(model, full), short.startswith(SHARED)
            tensors[full] = {
                "shape": list(tensor.shape if slots is None or is_shared else tensor.shape[1:]),  # of one adapter
                "dtype": _name_of(tensor.dtype),
                "read": full in read,
                "shared": is_shared,
                "ranks": [dim - tensor.dim() for dim in ranks.get(short, ())],  # from the end
                "scaled": short in known.scaled,
            }
    return {
        "refused": {"put": "has no bank. The way out: load(name, file) and use(name)."}
        if slots is None
        else {
            "use": "has a bank. The way out: put(slot, file), and adapter_ids, the slot of each row, or -1 for none."
        },
        **({} if slots is None else {"slots": slots}),
        "adapters": [_adapter(variant, members, folds[members[0].adapter]) for variant, members in configs],
        "coefficients": {input_name(name): _name_of(value.dtype) for name, value in scaled.items()},
        "tensors": tensors,
        "fingerprint": fingerprints(model, [placement.site for placement in placed]),
    }


def _adapter(variant: Variant, members: Sequence[Placement], known: Folding) -> dict[str, Any]:
    """Return the description of one config of an adapter."""
    config = to_config(variant)
    config.pop("slots", None)
    return {
        "name": members[0].adapter_name,
        "config": config,
        "unread": sorted(WITHOUT_EFFECT),
        "folds": [*(OF_ALPHA if known.scaled else ()), *(OF_RANK if known.is_padded else ())],
        "tensors": {member.site: member.tensors for member in members},
        "ties_to_weight": variant.ties_to_weight,
    }


def _size(size: object) -> int | str | None:
    """Return a size of an input: a number, a letter, or None for one that follows from others."""
    text = str(size)
    return int(text) if text.isdigit() else text if text.isidentifier() else None


def _lower(bound: Any) -> int:
    return 0 if bound <= 2 else int(bound)  # torch excludes 0 and 1 from every open size, and they work


def _upper(bound: Any) -> int | None:
    return int(bound) if str(bound).isdigit() and int(bound) < 2**31 else None  # sympy's infinity is not a number


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compile(program: ExportedProgram, package: Path, spec: Mapping[str, Any], graph: ServedGraph) -> None:
    """Compile a program into a package.

    Raises:
        AdapterError: AOTInductor cannot.
    """
    from ..compat.dynamo import aoti_compile_and_package  # importing it takes a second

    options = {**_OPTIONS, "aot_inductor.metadata": {KEY: json.dumps(spec)}}
    try:
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise AdapterError(
            f"AOTInductor cannot compile this model{_blamed(str(error), graph)}: {lines[0]}. Nothing was written. The"
            " way out: bake=True, if an operator of an adapter is the reason. A C++ compiler (g++ or clang) that torch"
            " finds, if that is missing. Or llfx.export, whose program runs without compiling."
        ) from error


def _blamed(message: str, graph: ServedGraph) -> str:
    """Return the site and the variant whose operator an error names."""
    for node in graph.gm.graph.nodes:
        record = recorded(node)
        if record is not None and node.op == "call_function" and str(node.target) in message:
            return f", because of {node.target} of {record.fields['variant']} at {record.site!r}"
    return ""
