"""The trained vectors of TinyLoRA in PEFT's files, which number them by the order of the modules in the model.

A graph does not keep that order. But PEFT draws the projections of a module from the seed and the same number, and
writes them beside it, so that they say which number it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError

_VECTOR = "base_model.tinylora_v."
_PROJECTIONS = ".tinylora_P"


def with_vectors_at_modules(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in which each module has a vector of its own, the vector's key at its module.

    Args:
        config: PEFT's config of TinyLoRA.
        state: the tensors by PEFT's keys.
        path: of the file, for messages.

    Raises:
        CheckpointError: the projections are not those that PEFT draws, or not there.
    """
    projections = {key: tensor for key, tensor in state.items() if key.endswith(_PROJECTIONS)}
    modules = {key.rpartition(".")[0] for key in state if key.endswith(".tinylora_A")}
    if lacking := sorted(modules - {key.removesuffix(_PROJECTIONS) for key in projections}):
        raise CheckpointError(
            f"{path} lacks the projections of {lacking[0]}. PEFT draws them anew, by the order of the modules in the"
            " model, which a graph does not keep; save the adapter with save_projection=True."
        )
    if config.get("weight_tying", 0.0) == 1:
        return dict(state)
    vectors = {key.removeprefix(_VECTOR): tensor for key, tensor in state.items() if key.startswith(_VECTOR)}
    renamed = {key: tensor for key, tensor in state.items() if not key.startswith(_VECTOR)}
    seed = config.get("projection_seed", 42)
    numbers: dict[Any, dict[Any, str]] = {}  # by the shape and dtype of projections, and by their values
    for key, tensor in projections.items():
        module, kind = key.removesuffix(_PROJECTIONS), (tensor.shape, tensor.dtype)
        if kind not in numbers:
            numbers[kind] = {_values(_drawn(seed, number, tensor)): number for number in vectors}
        number = numbers[kind].get(_values(tensor))
        if number is None:
            raise CheckpointError(
                f"{path}: which of the vectors is that of {module} cannot be told, because its projections are not"
                " those that PEFT draws from the seed. Train with weight_tying=1.0, which has one vector for all."
            )
        renamed[f"{module}.tinylora_v"] = vectors[number]
    return renamed


def _drawn(seed: Any, number: str, like: Tensor) -> Tensor:
    """Return the projections that PEFT draws for the module with this number; none, if that is no number."""
    if type(seed) is not int or not number.isdecimal() or like.dim() != 3:
        return torch.empty(0)
    generator = torch.Generator().manual_seed((seed + int(number)) % 2**64)
    drawn = torch.normal(0.0, like.shape[-1] ** -0.5, tuple(like.shape), generator=generator, device="cpu")
    return drawn.to(like.dtype)


def _values(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())
