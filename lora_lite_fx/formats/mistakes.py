"""Checks of the paths that a user passes: what is wrong with them, and what would be right."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError, shown


def as_path(path: object, call: str) -> Path:
    """Return `path` as a Path.

    Args:
        path: what the user passed.
        call: the call as it is written right, such as `save(model, path)`.

    Raises:
        CheckpointError: it is neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"The path must be a string or a Path, not {shown(path)}. The call is {call}.")
    return Path(path)


def check_file(path: Path) -> None:
    """Raise `CheckpointError` unless there is a file at `path`; the message says how a directory is loaded."""
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} is not a file: nothing is there. load reads the file that save wrote.")
        return
    is_peft, has_weights = (path / "adapter_config.json").is_file(), (path / "model.safetensors").is_file()
    if is_peft and not has_weights:
        hint = f"It is a PEFT directory: llfx.load_peft(model, {str(path)!r})."
    elif not is_peft and (path / "config.json").is_file():
        hint = f"It holds a whole model: AutoModelForCausalLM.from_pretrained({str(path)!r})."
    elif has_weights:
        hint = f"An adapted model was saved there: pass the file in it, {str(path / 'model.safetensors')!r}."
    else:
        hint = "load reads the file that save wrote."
    raise CheckpointError(f"{path} is not a file but a directory. {hint}")


def check_directory(path: Path) -> None:
    """Raise `CheckpointError` unless `path` is a directory; the message says how a file is loaded."""
    if path.is_dir():
        return
    if not path.exists():
        raise CheckpointError(
            f"{path} is not a directory: nothing is there. A repository on the Hugging Face Hub is named owner/name."
        )
    if (path.parent / "adapter_config.json").is_file():
        hint = f"Pass the PEFT directory that it is in, {str(path.parent)!r}."
    else:
        hint = f"llfx.load(model, {str(path)!r}) loads a file that save wrote."
    raise CheckpointError(f"{path} is a file, and load_peft reads a directory. {hint}")


def foreign_file_hint(path: Path, metadata: object) -> str:
    """Return which function reads a safetensors file that `save` did not write, after a space; empty if unknown."""
    if (path.parent / "adapter_config.json").is_file():
        return f" It is part of a PEFT directory: llfx.load_peft(model, {str(path.parent)!r})."
    if isinstance(metadata, dict) and "cfg" in metadata:
        return f" It is a file of lora-lite: llfx.load_lora_lite(model, {str(path)!r})."
    return ""
