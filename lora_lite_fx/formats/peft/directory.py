"""PEFT directories (`adapter_config.json`, `adapter_model.safetensors`): read, written, and their content as values."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ...adapters.changed_buffers import warn_of_lost_buffers
from ...adapters.placement import adapter_names, adapter_tensor_names
from ...adapters.state import adapter_parameters, warn_of_trained_base
from ...adapters.state import adapter_state_dict as every_tensor
from ...adapters.switches import known_names, let_train
from ...capture.capture_model import Inputs
from ...errors import CheckpointError, ConfigError
from ...graph.insertion import DEFAULT
from ...graph.tensors import outside_inference_mode
from ...log import looking_up
from ...rewriting.capture import capture
from ..atomic_writing import write_folders
from ..base_fingerprints import fingerprints
from ..filed_adapter import insert_filed
from ..gathered import gathered, refuse_stage, write_once
from ..safetensors_files import check_finite, tensor_bytes
from ..untrusted_files import as_path, check_directory, json_object, read_json, read_safetensors
from .base_model import FINGERPRINTS
from .form import PeftAdapter
from .read_adapter import adapters_at_sites, read_adapter
from .written_form import written_form

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_DIGEST = "lora_lite_fx.config"  # the key of the config's digest in the metadata of the tensors
_ABOUT_THE_BASE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Fields that do not change what the adapter computes. They are often edited by hand, so the digest leaves them out."""


def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    as_lora: bool | None = None,
    target: str | None = None,
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
        target: the server that is to read it, "vllm", "sglang" or "openvino": plain LoRA of one rank that the server
            takes, with each scale folded into `B` (`lora_alpha` is `r`). What the server refuses, or would leave out
            without an error, is an error here; `server_rules.py` has the rules.
        allow_nonfinite: write values that are NaN or infinite too, in place of an error.
        whole_tensors: as for `save`.

    Raises:
        AdapterError: the model has no adapters, or the server does not take one; the message says by what rule.
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
            files = [_files(model, folder, adapter, as_lora, target, allow_nonfinite)]
        else:
            folders = {name: folder if name == DEFAULT else folder / name for name in names}
            files = [_files(model, folders[name], name, as_lora, target, allow_nonfinite) for name in names]

    write_once(model, lambda: write_folders(files), alone=whole_tensors is not None)


def _files(
    model: nn.Module,
    folder: Path,
    adapter: str | None,
    as_lora: bool | None,
    target: str | None,
    allow_nonfinite: bool,
) -> list[tuple[Path, bytes]]:
    """Return the paths of the two files of a directory, with their contents."""
    config, tensors, sites = _form(model, as_lora, target, adapter)
    tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
    if not allow_nonfinite:
        check_finite(tensors, folder / TENSORS, "nothing was written")
    prints = fingerprints(model, sites)
    metadata = {"format": "pt", _DIGEST: _digest(config), FINGERPRINTS: json.dumps(prints)}
    data = tensor_bytes(tensors, metadata)
    document = json.dumps(config, indent=2, sort_keys=True).encode()
    return [(folder / TENSORS, data), (folder / CONFIG, document)]


def _form(
    model: nn.Module, as_lora: bool | None, target: str | None, adapter: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the config, the tensors and the names of the sites of an adapter, for PEFT or for a server.

    Raises:
        ConfigError: both `as_lora` and `target` are given.
    """
    if target is None:
        return written_form(model, as_lora, adapter)
    if as_lora is not None:
        raise ConfigError(f"target={target!r} writes plain LoRA, so leave as_lora={as_lora} out.")
    from .served_form import served_form  # which few need

    return served_form(model, target, adapter)


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
    is_trainable: bool = True,
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
        is_trainable: whether the parameters of the adapter require gradients. PEFT's default is False.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError, AdapterError, CaptureError: as for `load`; or the repository cannot be had.
    """
    folder = directory_of(path, revision, subfolder)
    adapter = read_directory(folder, allow_nonfinite)
    with outside_inference_mode():
        gm = capture(model, example_inputs, fuse_loss=fuse_loss)
        present = adapter_tensor_names(gm)
        adapters = adapters_at_sites(gm, adapter)
        loaded = insert_filed(gm, adapters, folder, "load_peft", name=name, stack=stack)
        if not is_trainable:
            let_train(loaded, [path for path in adapter_tensor_names(loaded) if path not in present], False)
        return loaded


def read_directory(folder: Path, allow_nonfinite: bool = False) -> PeftAdapter:
    """Read and check a PEFT directory, without a model.

    Args:
        folder: the directory.
        allow_nonfinite: as for `load`.

    Raises:
        CheckpointError: it cannot be read or represented, or a value is not finite.
    """
    check_directory(folder)
    config = read_json(folder / CONFIG)
    tensors, metadata = read_safetensors(folder / TENSORS)
    _check_pair(config, metadata, folder)
    prints = None  # which PEFT's own files lack
    if FINGERPRINTS in metadata:
        prints = json_object(metadata[FINGERPRINTS], f"{folder}: the record of the fingerprints of its base")
    adapter = read_adapter(config, tensors, folder / CONFIG, folder / TENSORS, prints)
    if not allow_nonfinite:
        check_finite(adapter.tensors, adapter.path, "it is not loaded")
    return adapter


def to_peft_config(
    model: nn.Module, *, adapter: str | None = None, as_lora: bool | None = None, target: str | None = None
) -> dict[str, Any]:
    """Return the config of an adapter as PEFT writes it, JSON-ready; `peft.get_peft_config` takes it.

    Args:
        model: a model from `rewrite`, `wrap`, `adapt` or `load`.
        adapter: the name of the adapter; may be left out if there is one.
        as_lora, target: as for `save_peft`.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    with gathered(model) if target is not None else nullcontext():
        return _form(model, as_lora, target, adapter)[0]


def adapter_state_dict(model: nn.Module, target: str | None = None, *, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the adapters' tensors by qualified name, `"<module path>.<param>"`; or as a server takes them.

    Without `target` the tensors are detached and share the model's storage. Those of a sharded model are DTensors, as
    `torch.distributed.checkpoint` takes them. Buffers that training changes besides the adapters, as the statistics of
    batch norm, are not among them; files of `save` hold them.

    With `target` they are what `save_peft(model, folder, target=...)` writes, on the device of the model, to be sent to
    a server after each step of training: plain LoRA by PEFT's names, of one rank, with each scale folded into `B`.
    `to_peft_config(model, target=...)` is the config that belongs to them. All processes of a sharded model call this.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`; with `target`, not of `wrap`.
        target: "vllm", "sglang" or "openvino".
        adapter: the name of the adapter; None for all, and with `target` for the only one.

    Raises:
        AdapterError: the model has no adapters, or the server does not take the adapter; the message says by what rule.
        ConfigError: there is no adapter or no server of the name, or the model has several adapters.

    Warns:
        UserWarning: training has changed buffers.
    """
    if target is None:
        tensors = every_tensor(model)
        if adapter is None:
            return tensors
        known_names(model, adapter)
        return {name: tensors[name] for name in adapter_tensor_names(model, adapter)}
    adapter_parameters(model)  # refuses a model without adapters
    refuse_stage(model, "A dict for a server")
    with gathered(model):
        return _form(model, None, target, adapter)[1]


def directory_of(path: str | os.PathLike[str], revision: str | None, subfolder: str) -> Path:
    """Return the local directory that `load_peft` is asked for; of a repository, after a download if it is not cached.

    Args:
        path: of a directory, or "owner/name" of a repository on the Hub.
        revision: a branch, tag or commit of the repository; None for its main branch.
        subfolder: the folder in the directory or repository.

    Raises:
        CheckpointError: it is a directory, and `revision` is given; or the repository or its files cannot be had.
    """
    folder = as_path(path, "load_peft(model, path)")
    if folder.exists() or not _REPOSITORY.fullmatch(str(path)):
        if revision is not None:
            raise CheckpointError(f"{folder} is not a repository on the Hub, so it has no revision: leave it out.")
        return folder / subfolder if subfolder else folder
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{path} is not a directory, and for repositories on the Hub huggingface_hub must be installed."
        ) from error
    where = f"{path}{f' at {revision}' if revision else ''}{f', folder {subfolder}' if subfolder else ''}"
    try:
        with looking_up(where):
            config = Path(hf_hub_download(str(path), CONFIG, subfolder=subfolder or None, revision=revision))
            # The tensors of the same commit, should the branch move on meanwhile.
            commit = config.parts[config.parts.index("snapshots") + 1] if "snapshots" in config.parts else revision
            hf_hub_download(str(path), TENSORS, subfolder=subfolder or None, revision=commit)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{where} is neither a directory here nor in the local cache of the Hub, and could not be downloaded"
            f" ({type(error).__name__}). It needs {CONFIG} and {TENSORS}; a pickle is not read."
        ) from error
    return config.parent


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
