"""Whole tensors in PEFT's directories: `modules_to_save`, trained biases, and the embeddings that PEFT saves with them.

Here they are adapters of their own, `Full`, before the adapter that the directory is called by.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...adapters.placement import Placement, adapter_tensor_names, by_adapter
from ...adapters.state import adapter_state_dict
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...graph.tensors import tensor_of
from ...sites.finding import find_sites
from ...sites.site import Site
from ...variants import Full
from ..single_adapter import insert_from_file

FIELDS = frozenset({"modules_to_save", "bias"})
"""The fields of a config that name whole tensors."""

_BIASES = ("none", "all", "lora_only")
_PREFIX = "base_model.model."
_BASE = ".base_layer."
_DOUBLE = re.compile(r"\.(original_module|modules_to_save)\.(default\.)?")
"""Matches in the keys by which PEFT writes biases of whole modules once more, if it trains all biases."""
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT adds to `modules_to_save` by the task."""


@dataclass(frozen=True)
class WholeFields:
    """What a config says of whole tensors.

    Args:
        modules: the ends of the names of modules.
        bias: which biases train: none, all, or those of the adapted modules (`lora_only`).
    """

    modules: tuple[str, ...]
    bias: str

    @classmethod
    def of(cls, config: Mapping[str, Any], variant: str) -> WholeFields:
        """Read the fields.

        Raises:
            ConfigError: one has an impossible value. `variant` is the name of the method, for the message.
        """
        modules, bias = config.get("modules_to_save") or (), config.get("bias") or "none"
        if not isinstance(modules, (list, tuple, set, frozenset)) or not all(isinstance(m, str) for m in modules):
            raise ConfigError(f"{variant}: PEFT's modules_to_save must be a list of names, got {modules!r}.")
        if bias not in _BIASES:
            raise ConfigError(f"{variant}: PEFT's bias must be one of {', '.join(_BIASES)}, got {bias!r}.")
        task = getattr(config.get("task_type"), "value", config.get("task_type"))
        return cls(tuple(sorted({*modules, *_HEADS.get(str(task), ())})), bias)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Patterns of the names that the adapter leaves alone, because they are in whole modules."""
        return tuple(rf"(^|\.){re.escape(module)}(\.|$)" for module in self.modules)

    def saves(self, module: str) -> bool:
        """Return whether PEFT saves the module of that name, because a module that it is or is in ends so."""
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(self.modules) for count in range(1, len(parts) + 1))

    def configs(self, adapter: Variant) -> list[Variant]:
        """Return the configs of new adapters beside `adapter`, whose biases are those meant by `lora_only`."""
        configs: list[Variant] = []
        if self.modules:
            configs.append(Full(target_names=(rf"({'|'.join(map(re.escape, self.modules))})(\.|$)",)))
        if self.bias == "all":
            configs.append(Full(weight=False, target_names=(".",), exclude_names=self.excluded))
        elif self.bias == "lora_only":
            targets = {"target_names": adapter.target_names, "target_kinds": adapter.target_kinds}
            configs.append(Full(weight=False, exclude_names=adapter.exclude_names, **targets))  # type: ignore[arg-type]
        return configs


# Reading.


def is_whole(key: str) -> bool:
    """Return whether a key of a file may be that of a weight or bias of the model."""
    return key.startswith(_PREFIX) and key.rpartition(".")[2] in ("weight", "bias")


def insert_whole(
    gm: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    fields: WholeFields,
    path: Path,
    prints: Mapping[str, str] | None,
) -> None:
    """Insert the whole tensors of a file that train, and check that the others are those of the base.

    Args:
        gm: the graph, without the adapter of the file; it is changed.
        tensors: those of the file whose keys `is_whole` takes and the adapter does not have.
        fields: what the config says.
        path: of the file, for messages.
        prints: as for `insert_from_file`.

    Raises:
        CheckpointError: one is not a weight or bias of the model, has another shape, or should be the base's and
            differs.
    """
    places: dict[str, tuple[str, str]] = {}
    for site in find_sites(gm):
        of_site = (("lora_weight", f"{site.name}.weight"), ("lora_weight", site.weight), ("lora_bias", site.bias))
        places |= {name: (site.name, tensor) for tensor, name in of_site if name and name not in places}
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if _DOUBLE.sub(".", key, 1) in tensors and _DOUBLE.search(key):
            continue
        name = key.removeprefix(_PREFIX).replace(_BASE, ".")
        module, _, leaf = name.rpartition(".")
        trains = (_BASE not in key and fields.saves(module)) or (leaf == "bias" and fields.bias != "none")
        frozen = _frozen(gm, name)
        if frozen is not None and frozen.shape != tensor.shape:
            raise CheckpointError(f"{path}: {_other_shape(name, tensor, frozen)}")
        if not trains and (frozen is None or not _same(tensor, frozen)):
            raise CheckpointError(f"{path}: {_not_of_the_base(key, name, frozen)}")
        if trains and name in places:
            site_name, own = places[name]
            by_site.setdefault(site_name, {})[own] = tensor
        elif trains and (frozen is None or not _same(tensor, frozen)):
            raise CheckpointError(
                f"{path} trains {name}, which is not the weight or bias of a linear, embedding, convolution or norm of"
                " the model, so that it cannot be represented here."
            )
    for weight in (True, False):
        chosen = {name: own for name, own in by_site.items() if ("lora_weight" in own) == weight}
        if chosen:
            names = tuple(f"^{re.escape(name)}$" for name in chosen)
            insert_from_file(gm, Full(weight=weight, target_names=names), chosen, (), path, prints)


def _frozen(gm: nn.Module, name: str) -> Tensor | None:
    try:
        return tensor_of(gm, name).detach()
    except (AttributeError, AssertionError):
        return None


def _same(tensor: Tensor, frozen: Tensor) -> bool:
    """Return whether two tensors are equal in the type of either."""
    frozen = frozen.to(tensor.device)
    return torch.equal(tensor, frozen.to(tensor.dtype)) or torch.equal(tensor.to(frozen.dtype), frozen)


def _other_shape(name: str, tensor: Tensor, frozen: Tensor) -> str:
    message = f"it holds {name} {tuple(tensor.shape)}, and the model's is {tuple(frozen.shape)}."
    if tensor.dim() == 2 and tensor.shape[1] == frozen.shape[1]:
        message += (
            " If its vocabulary was resized for training, resize the model's first:"
            f" model.resize_token_embeddings({len(tensor)})."
        )
    return message


def _not_of_the_base(key: str, name: str, frozen: Tensor | None) -> str:
    if frozen is None:
        return f"{key} cannot be represented here: neither the adapter nor the model has it."
    return (
        f"{key} is a weight that the adapter was trained on, and the model's {name} has other values, so that the two"
        " would compute something else. If the embeddings were resized or changed before the training, load these"
        f" values into the base first: model.get_parameter({name!r}).data.copy_(tensor)."
    )


# Writing.


def whole_placements(model: nn.Module) -> list[Placement]:
    """Return the places of the whole tensors of an adapted model."""
    return [placement for variant, members in by_adapter(model) if isinstance(variant, Full) for placement in members]


def write_whole(
    model: nn.Module, sites: Mapping[str, Site], adapted: Collection[str], modules: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of the config for the whole tensors of `model`, and the tensors by PEFT's keys.

    Args:
        model: an adapted model.
        sites: its adapted sites by name.
        adapted: the names of the sites of the adapter beside them.
        modules: the names of the model's modules.

    Raises:
        ConfigError: PEFT cannot hold them; the message says why.
    """
    state = adapter_state_dict(model)
    tensors: dict[str, Tensor] = {}
    saved: list[str] = []
    biases: set[str] = set()
    for placement in whole_placements(model):
        site, name = sites[placement.site], placement.site
        own = {leaf.removeprefix("lora_"): state[path] for leaf, path in placement.tensors.items()}
        if "weight" in own:
            _check_saved(site, own, adapted, modules)
            saved.append(name)
        else:
            biases.add(name)
        between = _BASE if name in adapted else "."
        tensors |= {f"{_PREFIX}{name}{between}{leaf}": tensor for leaf, tensor in own.items()}
    fields: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    if biases:
        fields["bias"] = _biases(model, biases, sites, adapted)
    return fields, tensors


def _check_saved(site: Site, own: Collection[str], adapted: Collection[str], modules: Sequence[str]) -> None:
    name = site.name
    if name not in modules or (site.bias is not None and "bias" not in own):
        raise ConfigError(f"Full: PEFT saves whole modules, and at {name!r} a part of one is trained.")
    if name in adapted:
        raise ConfigError(f"Full: PEFT trains {name!r} whole or adapts it, not both.")
    if alike := [module for module in modules if module.endswith(name) and module != name]:
        raise ConfigError(f"Full: PEFT's modules_to_save cannot name {name!r} and not {alike[0]!r}.")


def _biases(model: nn.Module, biases: set[str], sites: Mapping[str, Site], adapted: Collection[str]) -> str:
    """Return PEFT's word for these biases, given by the names of their sites."""
    own = {*adapter_tensor_names(model)}
    names = {name.replace(".base.", ".") for name, _ in model.named_parameters() if name not in own}
    every = {name.rpartition(".")[0] for name in names if name.endswith("bias")}
    if every <= {placement.site for placement in whole_placements(model)}:
        return "all"
    if biases == {name for name in adapted if sites[name].bias is not None}:
        return "lora_only"
    raise ConfigError(
        f"Full: PEFT trains all biases of a model or those of the adapted modules, and here it is {len(biases)} of"
        f" {len(every)}."
    )
