"""Safetensors files of adapters: the same bytes for the same content, and no value that is NaN or infinite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError

_ALIGNMENT = 8


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file with its metadata in order. The library writes several entries in a random one.

    Args:
        tensors: contiguous, on the CPU.
        metadata: entries of any number.
    """
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data[end:]


def check_finite(tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Check that the tensors of a file hold neither NaN nor infinity.

    Args:
        tensors: by name.
        path: of the file, for the message.
        what: what was not done, such as `"nothing was written"`.

    Raises:
        CheckpointError: one does; the message names it and says how to go on all the same.
    """
    bad = {name: count for name, tensor in tensors.items() if (count := _not_finite(tensor))}
    if bad:
        first = next(iter(bad))
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(tensors)} tensors of the adapter hold NaN or infinity"
            f" ({first}: {bad[first]} of {tensors[first].numel()} values), so {what}. Training has probably diverged;"
            " take an earlier state. The way out, if they are meant: allow_nonfinite=True."
        )


def _not_finite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # Types of 8 bits have no isfinite of their own.
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return values.numel() - int(torch.isfinite(values).sum())
