"""TinyLoRA in PEFT.

PEFT's files number the trained vectors by the order of the modules in the model, which a graph does not keep. But PEFT
draws the projections of a module from the seed and the same number, and writes them beside it, so that they say which
number it has. An adapter that starts here has projections by the names of sites, which tell no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....adapters.variant import Variant
from ....errors import CheckpointError, ConfigError
from ....variants import TinyLoRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftAdapter, PeftForm

_VECTOR = "base_model.tinylora_v."
_PROJECTIONS = ".tinylora_P"
_AT_MODULE = ".tinylora_v"


class _TinyLoRA(PeftForm):
    def read(self, adapter: PeftAdapter) -> PeftAdapter:
        tensors = _with_vectors_at_modules(adapter.config, adapter.tensors, adapter.path)
        return super().read(replace(adapter, tensors=tensors))

    def filed(self, variant: Variant, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.fixed["tied"]:
            return tensors
        numbers = _numbers(variant.projection_seed, tensors)  # type: ignore[attr-defined]
        if sorted(numbers.values()) != sorted(map(str, range(len(numbers)))):
            raise ConfigError(
                "TinyLoRA: PEFT's files number the vectors by the order of the modules in the model, which a graph does"
                " not keep. Projections that PEFT drew tell it, and these were drawn here. The way out:"
                " TinyLoRA(tied=True), which has one vector for all."
            )
        return {
            f"{_VECTOR}{numbers[key.rpartition('.')[0]]}" if key.endswith(_AT_MODULE) else key: tensor
            for key, tensor in tensors.items()
        }


def _with_vectors_at_modules(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
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
    numbers = _numbers(config.get("projection_seed", 42), state)
    for module in numbers:
        if numbers[module] not in vectors:
            raise CheckpointError(
                f"{path}: which of the vectors is that of {module} cannot be told, because its projections are not"
                " those that PEFT draws from the seed. Train with weight_tying=1.0, which has one vector for all."
            )
        renamed[f"{module}{_AT_MODULE}"] = vectors[numbers[module]]
    return renamed


def _numbers(seed: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the number by which PEFT draws the projections of each module, below the count of all; else none, "".

    Args:
        seed: of the config.
        tensors: with the projections, by PEFT's keys.
    """
    projections = {key.removesuffix(_PROJECTIONS): each for key, each in tensors.items() if key.endswith(_PROJECTIONS)}
    drawn: dict[Any, dict[Any, str]] = {}  # the numbers by the shape and dtype of projections, and by their values
    for tensor in projections.values():
        if (kind := (tensor.shape, tensor.dtype)) not in drawn:
            numbers = map(str, range(len(projections)))
            drawn[kind] = {_values(_drawn(seed, number, tensor)): number for number in numbers}
    return {
        module: drawn[tensor.shape, tensor.dtype].get(_values(tensor), "") for module, tensor in projections.items()
    }


def _drawn(seed: Any, number: str, like: Tensor) -> Tensor:
    """Return the projections that PEFT draws for the module with this number; none, if that is no number."""
    if type(seed) is not int or not number.isdecimal() or like.dim() != 3:
        return torch.empty(0)
    generator = torch.Generator().manual_seed((seed + int(number)) % 2**64)
    drawn = torch.normal(0.0, like.shape[-1] ** -0.5, tuple(like.shape), generator=generator, device="cpu")
    return drawn.to(like.dtype)


def _values(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())


def _form(tied: bool) -> PeftForm:
    vector = {"lora_shared_tinylora_v": PeftTensor("tinylora_v.0")} if tied else {"lora_v": PeftTensor("tinylora_v")}
    return _TinyLoRA(
        TinyLoRA,
        "TINYLORA",
        {
            "r": PeftField("r", 2),
            "u": PeftField("u", 64),
            "dropout": PeftField("tinylora_dropout", 0.0),
            "projection_seed": PeftField("projection_seed", 42),
        },
        {
            "lora_A": PeftTensor("tinylora_A"),
            "lora_B": PeftTensor("tinylora_B"),
            "lora_P": PeftTensor("tinylora_P"),
            **vector,
        },
        fixed={"tied": tied},
        constants={"weight_tying": float(tied)},
        written={"save_projection": True},
        unread=frozenset({"init_v_bound"}),
        conv1d=True,
    )


FORMS = (_form(tied=False), _form(tied=True))
