"""Files: safetensors and JSON, read without trust and written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import CheckpointError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: it is not there, or not readable.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.")
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
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {type(error).__name__}: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return document


def write_atomically(path: Path, data: bytes) -> None:
    """Write a new file beside `path` and rename it over: readers see the old bytes or the new, never a part.

    Raises:
        CheckpointError: it could not be written; what was there before is unchanged.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file starts readable by its owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. What was there before is unchanged.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
