"""Read safetensors and JSON without trust: regular files of a sane size, and nothing that runs code."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import CheckpointError
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
