"""diffusers' LoRA files: `pytorch_lora_weights.safetensors`, read and written.

A file has the LoRA of a pipeline's components. The keys of each are those of PEFT behind the name of the component:
`unet.mid_block.attentions.0.proj_in.lora_A.weight`. A file of `model.save_lora_adapter` has one component, and no name
of it. Older files say `lora.down` for `lora_A` and `lora.up` for `lora_B`. The config of each component is JSON in the
file's metadata, its fields behind the same name. Files without it have the scale 1 where they have no `alpha`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.changed_buffers import warn_of_lost_buffers
from ..adapters.state import warn_of_trained_base
from ..capture.capture_model import Inputs
from ..errors import CheckpointError, ConfigError
from ..graph.tensors import outside_inference_mode
from ..rewriting.capture import capture
from .atomic_writing import write_folders
from .filed_adapter import insert_filed
from .gathered import gathered, refuse_stage, write_once
from .peft.base_model import source_of
from .peft.beside import PREFIX
from .peft.form import PeftAdapter
from .peft.read_adapter import adapters_at_sites, read_adapter
from .peft.written_form import written_form
from .safetensors_files import check_finite, tensor_bytes
from .untrusted_files import as_path, json_object, read_safetensors

FILE = "pytorch_lora_weights.safetensors"
_CONFIG = "lora_adapter_metadata"
_OLD_KEYS = (
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.(to_[qkv])_lora\.", r".\1.lora."),
    (r"\.(lora|lora_linear_layer)\.down\.", ".lora_A."),
    (r"\.(lora|lora_linear_layer)\.up\.", ".lora_B."),
)
_ALPHA = ".alpha"
_ADAPTERS = re.compile(r"\.lora_(A|B|magnitude_vector)(\.|$)")
_UNSAID = ("auto_mapping", "base_model_name_or_path", "peft_type", "revision", "task_type")


def save_diffusers(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    component: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write the adapter of `model` as a file that `load_lora_weights` of a diffusers pipeline loads.

    Args:
        model: a model with one adapter, from `rewrite`, `wrap`, `adapt` or `load`. Its variant must be one that PEFT
            calls LoRA: LoRA, DoRA, or PiSSA and OLoRA, which are written as a LoRA of twice the rank.
        path: of the directory, which is made if it is not there. The file in it is `pytorch_lora_weights.safetensors`.
        adapter: the name of the adapter to write; may be left out if there is one.
        component: name of the model in its pipeline. None: "unet" for a UNet, "transformer" for a transformer.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: the adapter cannot be represented, or the name of the component is not known; the message says why.
        CheckpointError: the file cannot be written, or a value is not finite.
    """
    folder = as_path(path, "save_diffusers(model, path)")
    refuse_stage(model, "A file of diffusers")
    with gathered(model):
        config, tensors, _ = written_form(model, None, adapter)
    warn_of_trained_base(model, "save_diffusers")
    warn_of_lost_buffers(model, "save_diffusers writes", "llfx.save, whose files hold them")
    if config["peft_type"] != "LORA":
        raise ConfigError(f"diffusers reads LoRA, and this adapter is what PEFT calls {config['peft_type']}.")
    if beside := [key.removeprefix(PREFIX) for key in tensors if not _ADAPTERS.search(key)]:
        raise ConfigError(f"diffusers reads LoRA alone, and this adapter has {beside[0]} beside it.")
    component = component or _component_of(model)
    if component is None:
        raise ConfigError(
            "The pipeline's name for this model is not known. The way out: component='unet', or 'transformer',"
            " 'text_encoder', ...: its attribute in the pipeline."
        )
    named = {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    fields = {f"{component}.{name}": value for name, value in config.items() if name not in _UNSAID}
    if not allow_nonfinite:
        check_finite(named, folder / FILE, "nothing was written")
    metadata = {"format": "pt", _CONFIG: json.dumps(fields, indent=2, sort_keys=True)}
    data = tensor_bytes(named, metadata)
    write_once(model, lambda: write_folders([[(folder / FILE, data)]]))


def load_diffusers(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    component: str | None = None,
    name: str | None = None,
    stack: bool = False,
    allow_nonfinite: bool = False,
    fuse_loss: bool | None = None,
) -> fx.GraphModule:
    """Capture a model and insert its adapter of a diffusers LoRA file, with its saved values.

    Args:
        model: the UNet or transformer of a pipeline, which is not changed.
        path: of the file, or of the directory with `pytorch_lora_weights.safetensors`: of a pipeline, or of
            `save_lora_adapter` of the model alone.
        example_inputs: as for `capture`.
        component: name of the model in the pipeline. None: as for `save_diffusers`, or the only one in the file.
        name: as for `load`.
        stack: as for `load`.
        allow_nonfinite: as for `load`.
        fuse_loss: as for `rewrite`.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError, AdapterError, CaptureError: as for `load`; or the file has nothing for the component, or keys
            of another library (kohya's `lora_unet_...`).
    """
    adapter = read_diffusers(model, path, component, allow_nonfinite)
    with outside_inference_mode():
        gm = capture(model, example_inputs, fuse_loss=fuse_loss)
        adapters = adapters_at_sites(gm, adapter)
        return insert_filed(gm, adapters, adapter.path, "load_diffusers", name=name, stack=stack)


def read_diffusers(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    component: str | None = None,
    allow_nonfinite: bool = False,
) -> PeftAdapter:
    """Read and check the adapter of a model in a file.

    Args:
        model: says which component of a pipeline it is.
        path, component, allow_nonfinite: as for `load_diffusers`.

    Raises:
        CheckpointError: as `load_diffusers`.
    """
    wanted = component or (_component_of(model) if isinstance(model, nn.Module) else None)
    parts = {key.partition(".")[0] for key, _ in model.named_parameters()}
    file = as_path(path, "load_diffusers(model, path)")
    file = file / FILE if file.is_dir() else file
    config, tensors = _read(file, wanted, parts)
    adapter = read_adapter(config, tensors, file, file)
    if not allow_nonfinite:
        check_finite(adapter.tensors, adapter.path, "it is not loaded")
    return adapter


def _read(file: Path, component: str | None, parts: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config and tensors of a component in `file`, or of the model alone if all keys are its `parts`."""
    state, metadata = read_safetensors(file)
    if foreign := [key for key in state if key.startswith(("lora_unet_", "lora_te", "lora_transformer_"))]:
        raise CheckpointError(
            f"{file}: {foreign[0]} is a key of kohya's scripts, not of diffusers. The way out: let a pipeline of"
            " diffusers convert it, by load_lora_weights(file) and save_lora_weights(folder, ...)."
        )
    present = sorted({key.partition(".")[0] for key in state})
    is_of_model_alone = bool(present) and component not in present and all(name in parts for name in present)
    if component not in present and not is_of_model_alone:
        if component is not None or len(present) != 1:
            said = f"nothing for {component!r}" if component else "several components"
            raise CheckpointError(
                f"{file} has {said}; it has adapters of {', '.join(present)}. The way out: component={present[0]!r}."
            )
        (component,) = present
    start = "" if is_of_model_alone else f"{component}."
    tensors = {_new_key(key.removeprefix(start)): value for key, value in state.items() if key.startswith(start)}
    alphas = {key.removesuffix(_ALPHA): tensors.pop(key) for key in list(tensors) if key.endswith(_ALPHA)}
    config = _config_in(metadata, start, file) or _config_of(tensors, alphas, file)
    return config, {PREFIX + key: value for key, value in tensors.items()}


def _new_key(key: str) -> str:
    """Return the key in today's form."""
    for old, new in _OLD_KEYS:
        key = re.sub(old, new, f".{key}").removeprefix(".")
    return key


def _config_in(metadata: Mapping[str, str], start: str, file: Path) -> dict[str, Any] | None:
    """Return the component's config in PEFT's words; None if the file does not say it."""
    fields = json_object(metadata.get(_CONFIG, "{}"), f"{file}: its config, {_CONFIG},")
    own = {name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}
    return {**own, "peft_type": "LORA"} if own else None


def _config_of(tensors: Mapping[str, Tensor], alphas: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Return a config that says of the tensors what diffusers takes them for: a scale of 1 without an alpha."""
    ranks = {
        key.partition(".lora_A.")[0]: tensor.shape[0]
        for key, tensor in tensors.items()
        if ".lora_A." in key and tensor.dim()
    }
    if not ranks:
        raise CheckpointError(f"{file}: no key of it ends in lora_A.weight or lora.down.weight.")
    if unknown := sorted(alphas.keys() - ranks.keys()):
        raise CheckpointError(f"{file} has {unknown[0]}{_ALPHA}, and no factors there.")
    scale = {name: float(alphas[name]) if name in alphas else float(rank) for name, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, scale))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in scale.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(".lora_magnitude_vector" in key for key in tensors),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in tensors),
    }


def _component_of(model: nn.Module) -> str | None:
    """Return the name that pipelines have for a model of this class; None if the class does not say."""
    source = source_of(model)
    name = type(model if source is None else source).__name__
    return "unet" if name.startswith("UNet") else "transformer" if "Transformer" in name else None
