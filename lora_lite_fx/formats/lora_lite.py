"""lora-lite's files: one safetensors, tensors `<module path>.lora_*`, the config as JSON in `metadata["cfg"]`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.changed_buffers import warn_of_lost_buffers
from ..adapters.maths import wide
from ..adapters.placement import Placement
from ..adapters.registry import from_config
from ..adapters.state import adapter_values, warn_of_trained_base
from ..adapters.variant import Variant
from ..capture.capture_model import Inputs
from ..errors import CheckpointError, ConfigError
from ..graph.tensors import outside_inference_mode
from ..rewriting.capture import capture
from ..sites.site import Site
from ..variants import EVA, HRA, IA3, AntiPaSTO, DeLoRA, DoRA, LoRA, LoRAXS, PiSSA, RoAd
from .atomic_writing import write_atomically
from .filed_adapter import Fitting, insert_filed
from .gathered import gathered, refuse_stage, write_once
from .safetensors_files import check_finite
from .single_adapter import only_adapter, sites_of, weight_of
from .untrusted_files import as_path, read_safetensors


@dataclass(frozen=True)
class _Format:
    """The form in which lora-lite writes a variant.

    Args:
        name: its name in lora-lite.
        variant: our class.
        fields: its names of the fields that it has besides `r` and `alpha`, by ours.
        constants: the values that our other fields must have.
        rest: our tensors that it does not keep, as they follow from the weight.
    """

    name: str
    variant: type[Variant]
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    rest: frozenset[str] = frozenset()


_FORMATS = (
    _Format("lora", LoRA),
    _Format("lora_xs", LoRAXS),
    _Format("pissa", PiSSA, rest=frozenset({"lora_A0", "lora_B0"})),
    _Format("dora", DoRA),
    _Format("delora", DeLoRA, {"lambda0": "lambda0"}),
    _Format("hra", HRA),
    _Format("ia3", IA3, constants={"feedforward_names": ()}),
    _Format("ia3_ff", IA3, constants={"feedforward_names": (".",)}),
    _Format("eva", EVA),
    _Format("road", RoAd, {"kind": "road_variant", "group_size": "group_size"}),
    _Format(
        "antipasto",
        AntiPaSTO,
        {name: name for name in ("block_size", "max_rotation_angle", "rotate_basis")},
    ),
)
# lora-lite has both for every variant. Where ours has none, the file holds lora-lite's default, which has no effect.
_RANK_AND_ALPHA = {"r": 8, "alpha": 16.0}
_COMMON = frozenset({"variant", "r", "alpha", "dtype", "target_roles", "target_names", "exclude_names", "layers"})
# Fields of ours that say only how an adapter starts or trains; its file means the same whatever they are.
_UNREAD = frozenset({"rho", "center", "train_A", "init_weights", "rank_pattern", "alpha_pattern", "target_kinds"})


def save_lora_lite(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None, allow_nonfinite: bool = False
) -> None:
    """Write the adapter of `model` as a lora-lite file; a failure leaves what was at `path` as it was.

    Args:
        model: a model with one adapter, from `rewrite`, `wrap`, `adapt` or `load`.
        path: of the file; its folder must exist.
        adapter: the name of the adapter to write; may be left out if there is one.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: the adapter cannot be represented; the message says why.
        CheckpointError: the file cannot be written, or a value is not finite.
    """
    file = as_path(path, "save_lora_lite(model, path)")
    refuse_stage(model, "A lora-lite file")
    warn_of_trained_base(model, "save_lora_lite")
    warn_of_lost_buffers(model, "save_lora_lite writes", "llfx.save, whose files hold them")
    with gathered(model):
        data = _file_of(model, file, adapter, allow_nonfinite)
    write_once(model, lambda: write_atomically(file, data))


def _file_of(model: nn.Module, file: Path, adapter: str | None, allow_nonfinite: bool) -> bytes:
    variant, placed = only_adapter(model, "A lora-lite file", adapter=adapter)
    sites = sites_of(model)
    form = _format_of(variant, [sites[placement.site] for placement in placed])
    state = adapter_values(model)
    tensors: dict[str, Tensor] = {}
    for placement in placed:
        _check_site(model, variant, placement, sites[placement.site])
        for name, qualified in placement.tensors.items():
            if name not in form.rest:
                tensors[f"{placement.site}.{name}"] = state[qualified].contiguous().cpu()
    dtypes = {tensor.dtype for tensor in tensors.values()}
    config = {
        "variant": form.name,
        **{name: getattr(variant, name, default) for name, default in _RANK_AND_ALPHA.items()},
        "dtype": str(dtypes.pop()).removeprefix("torch."),
        "target_roles": [],
        "target_names": [f"^{re.escape(placement.site)}$" for placement in placed],
        "exclude_names": [],
        "layers": None,
        **{theirs: getattr(variant, ours) for ours, theirs in form.fields.items()},
    }
    if not allow_nonfinite:
        check_finite(tensors, file, "nothing was written")
    return safetensors.torch.save(tensors, {"cfg": json.dumps(config)})


def load_lora_lite(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    name: str | None = None,
    stack: bool = False,
    allow_nonfinite: bool = False,
    fuse_loss: bool | None = None,
) -> fx.GraphModule:
    """Capture a model and insert the adapter of a lora-lite file, with its values, in the dtype that they have.

    Args:
        model: the base, which is not changed.
        path: of the file.
        example_inputs: as for `capture`.
        name: as for `load`.
        stack: as for `load`.
        allow_nonfinite: as for `load`.
        fuse_loss: as for `rewrite`.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError, AdapterError, ConfigError, CaptureError: as for `load`.
    """
    file = as_path(path, "load_lora_lite(model, path)")
    tensors, metadata = read_safetensors(file)
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, own = key.rpartition(".")
        by_site.setdefault(site, {})[own] = tensor
    try:
        variant, form = _variant(metadata, sorted(by_site))
    except (ConfigError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its config cannot be read: {error}") from error
    if not allow_nonfinite:
        check_finite(tensors, file, "it is not loaded")
    with outside_inference_mode():
        gm = capture(model, example_inputs, fuse_loss=fuse_loss)
        fitting = Fitting(gm, file)
        fitting.add(variant, by_site, form.rest)
        return insert_filed(gm, fitting.adapters, file, "load_lora_lite", name=name, stack=stack)


def _variant(metadata: Mapping[str, str], sites: list[str]) -> tuple[Variant, _Format]:
    if "cfg" not in metadata:
        raise ConfigError('it was not written by lora-lite: its metadata has no "cfg".')
    config = json.loads(metadata["cfg"])
    if not isinstance(config, dict):
        raise ConfigError("it is not a JSON object.")
    form = next((form for form in _FORMATS if form.name == config.get("variant")), None)
    if form is None:
        known = ", ".join(form.name for form in _FORMATS)
        raise ConfigError(f"lora-lite's variant {config.get('variant')!r} is not known here; known are {known}.")
    if unknown := sorted(config.keys() - _COMMON - set(form.fields.values())):
        raise ConfigError(f"lora-lite's {form.name} has no field {', '.join(map(str, unknown))}.")
    has = {item.name for item in dataclasses.fields(form.variant)}
    ours_to_theirs = {name: name for name in _RANK_AND_ALPHA if name in has} | dict(form.fields)
    fields: dict[str, Any] = {ours: config[theirs] for ours, theirs in ours_to_theirs.items() if theirs in config}
    fields["target_names"] = [f"^{re.escape(site)}$" for site in sites]
    return from_config(
        {"variant": form.variant.__name__, "dtype": config.get("dtype"), **fields, **form.constants}
    ), form


def _format_of(variant: Variant, sites: list[Site]) -> _Format:
    name = type(variant).__name__
    if type(variant) is IA3:
        # It keeps the two gates apart, by file; here one adapter may have both.
        at_input = {variant.gates_input(site) for site in sites}
        if len(at_input) > 1:
            raise ConfigError("IA3: a lora-lite file has gates at inputs or at outputs, and this adapter has both.")
        kind = "ia3_ff" if at_input.pop() else "ia3"
        return next(form for form in _FORMATS if form.name == kind)
    form = next((form for form in _FORMATS if form.variant is type(variant)), None)
    if form is None:
        raise ConfigError(f"lora-lite has no variant that computes {name}.")
    plain = type(variant)()
    for item in dataclasses.fields(variant):
        value = getattr(variant, item.name)
        if item.name not in _COMMON | form.fields.keys() | _UNREAD and value != getattr(plain, item.name):
            raise ConfigError(f"{name}: lora-lite has no {item.name}, which is {value!r} here.")
    return form


def _check_site(model: nn.Module, variant: Variant, placement: Placement, site: Site) -> None:
    name = type(variant).__name__
    if not site.kind.vector_dims or site.transposed or not site.weight.startswith(f"{site.name}."):
        raise ConfigError(f"{name}: lora-lite adapts ordinary linear modules, and site {site.name!r} is not one.")
    if variant.overrides(site.name):
        raise ConfigError(f"{name}: lora-lite has one rank and one alpha for all sites, and this adapter has several.")
    if isinstance(variant, AntiPaSTO):
        values = placement.namespace(model).lora_S
        largest = torch.linalg.svdvals(wide(weight_of(model, site)))[: variant.r]
        if not torch.allclose(wide(values), largest.to(wide(values)), rtol=1e-2):
            raise ConfigError(
                f"{name}: lora-lite takes the largest singular values out of the weight when it loads a file, and at"
                f" {site.name!r} calibration chose others."
            )
