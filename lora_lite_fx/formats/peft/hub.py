"""Directories on the Hugging Face Hub, found in its local cache or downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import CheckpointError
from ..mistakes import as_path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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
