"""Read safetensors and JSON without trust: regular files of a sane size, and nothing that runs code.

The paths that a user passes are checked here too: what is wrong with one, and what would be right.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import CheckpointError, shown
from .atomic_writing import kind_of

MOST_JSON = 4 * 2**20
"""The bytes that a JSON document may have. An adapter's config has some thousand."""

MOST_TENSORS = 2**40
"""The bytes that a file of tensors may have."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: it is not there, or not readable.
    """
    check_regular(path, MOST_TENSORS)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file (truncated, corrupt or foreign): {error}."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: it is not there, or not readable, or holds something else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is not a readable JSON file: nothing is there.")
    check_regular(path, MOST_JSON)
    try:
        # What was a file a moment ago may be a pipe now, and opening that would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # reading sets aside all the memory that it is asked for
            document = json.loads(file.read(min(size, MOST_JSON) + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {type(error).__name__}: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return document


def json_object(text: str, what: str) -> dict[str, Any]:
    """Return the object that a part of a file holds, such as an entry of the metadata of its tensors.

    Raises:
        CheckpointError: it is damaged, or something else; `what` names it.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} is not an object, but {shown(document)}.")
    return document


def check_regular(path: Path, most: int) -> None:
    """Check that `path` is a regular file, or a link to one, of at most `most` bytes.

    Reading anything else may wait for ever (a pipe), never end (a device) or fill the memory.

    Raises:
        CheckpointError: it is not.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a file: nothing is there.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(f"{path} is not a file but {kind_of(state)}.")
    if state.st_size > most:
        raise CheckpointError(
            f"{path} has {state.st_size:,} bytes, and a file of its kind has {most:,} at most: it is not read."
        )


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
            f"{path}: nothing is there, neither a file nor a directory. A repository on the Hugging Face Hub is named"
            " owner/name."
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
