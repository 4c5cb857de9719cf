"""Load adapters from a path of whatever kind."""

from __future__ import annotations

import os
from pathlib import Path

from torch import fx, nn

from .checkpoint import load
from .diffusers_files import FILE, load_diffusers
from .peft.directory import load_peft
from .peft.hub import CONFIG

WEIGHTS = "model.safetensors"
"""The name under which a Trainer looks for weights in a checkpoint."""


def load_any(
    model: nn.Module, path: str | os.PathLike[str], *, revision: str | None = None, subfolder: str = ""
) -> fx.GraphModule:
    """Load adapters from a file that `save` wrote, a PEFT directory or repository, a checkpoint, or diffusers' file.

    Args:
        model: as for `load`.
        path: of the file or directory; or "owner/name" of a repository on the Hub.
        revision, subfolder: as for `load_peft`.

    Raises:
        CheckpointError, AdapterError, CaptureError: as `load`.
    """
    where = Path(path) / subfolder
    if where.name == FILE or (where / FILE).is_file():
        return load_diffusers(model, where)
    # save_pretrained writes both: PEFT's form of PiSSA is LoRA, the other file has the adapter as it was.
    if (where / WEIGHTS).is_file():
        return load(model, where / WEIGHTS)
    if where.is_file():
        return load(model, where)
    if not where.exists() or (where / CONFIG).is_file() or revision is not None:
        return load_peft(model, path, revision=revision, subfolder=subfolder)
    return load(model, where / WEIGHTS)
