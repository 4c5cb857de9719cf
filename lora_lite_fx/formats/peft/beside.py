"""What PEFT's directories hold beside an adapter: `modules_to_save`, trained biases, trained tokens, saved embeddings.

Here the first three are adapters of their own, `Full` and `TrainableTokens`, inside the one that the directory is
called by. Saved embeddings are not trained, and are compared with the base. `beside_written.py` is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.patterns import occurs
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...graph.tensors import tensor_of
from ...variants import Full, TrainableTokens
from ..filed_adapter import Fitting
from .target_modules import START, exactly, name_patterns

BESIDE = (Full, TrainableTokens)
"""The variants that a directory can hold beside another."""

_BIASES = ("none", "all", "lora_only")
PREFIX = "base_model.model."
BASE = ".base_layer."
TOKENS = ".token_adapter.trainable_tokens_delta"
TIED = ("embed_tokens", "lm_head")
"""The names by which PEFT knows embeddings, and the heads that are tied to them."""
_DOUBLE = re.compile(r"\.(original_module|modules_to_save)\.(default\.)?")
"""Matches in the keys by which PEFT writes biases of whole modules once more, if it trains all biases."""
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT adds to `modules_to_save` by the task."""


@dataclass(frozen=True)
class BesideFields:
    """What a config says of the tensors beside an adapter.

    Args:
        modules: the ends of the names of modules.
        bias: which biases train: none, all, or those of the adapted modules (`lora_only`).
        tokens: the ids of tokens that train, by the end of the name of their embedding; of the model's own if empty.
    """

    modules: tuple[str, ...] = ()
    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], variant: str) -> BesideFields:
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
        heads = _HEADS.get(str(task), ())
        if config.get("ensure_weight_tying") and any(module.rpartition(".")[2] in TIED for module in modules):
            heads = (*heads, *TIED)  # which PEFT trains and saves as one
        return cls(tuple(sorted({*modules, *heads})), bias, _tokens(config, variant))

    @property
    def excluded(self) -> tuple[str, ...]:
        """Patterns of the names that the adapter leaves alone, because they are in whole modules."""
        return tuple(rf"(^|\.){re.escape(module)}(\.|$)" for module in self.modules)

    def saves(self, module: str) -> bool:
        """Return whether PEFT saves the module of that name, because a module that it is or is in ends so."""
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(self.modules) for count in range(1, len(parts) + 1))

    def are_tied(self, config: Mapping[str, Any], name: str) -> bool:
        """Return whether PEFT has one adapter for an embedding and the head that is tied to it.

        Trained tokens are tied here without being asked.
        """
        if not config.get("ensure_weight_tying"):
            return False
        targets = config.get("target_modules") or ()
        if isinstance(targets, str):
            pattern = name_patterns(targets, "target_modules", name, START)
            targets = [embedding for embedding in TIED if occurs(pattern, embedding)]
        return any(str(end).rpartition(".")[2] in TIED for end in (*targets, *self.modules))

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
        for end, ids in self.tokens.items():
            named = {"target_names": (f"{re.escape(end)}$",), "target_kinds": ("embedding", "linear")} if end else {}
            configs.append(TrainableTokens(token_indices=ids, **named))  # type: ignore[arg-type]
        return configs


def _tokens(config: Mapping[str, Any], variant: str) -> dict[str, tuple[int, ...]]:
    value = config.get("trainable_token_indices") or {}
    by_end = value if isinstance(value, Mapping) else {"": value}
    if not all(isinstance(ids, (list, tuple)) and all(type(i) is int for i in ids) for ids in by_end.values()):
        raise ConfigError(
            f"{variant}: PEFT's trainable_token_indices must be a list of ids, or map names to them, got {value!r}."
        )
    return {str(end): tuple(ids) for end, ids in by_end.items()}


def is_beside(key: str) -> bool:
    """Return whether a key of a file may be that of a weight or bias of the model, or of rows of one."""
    return key.startswith(PREFIX) and (key.rpartition(".")[2] in ("weight", "bias") or key.endswith(TOKENS))


def fit_beside(fitting: Fitting, tensors: Mapping[str, Tensor], fields: BesideFields) -> None:
    """Fit the tensors of a file that train beside its adapter as adapters, and check that the others are the base's.

    Args:
        fitting: gets the adapters.
        tensors: those of the file whose keys `is_beside` takes and the adapter does not have.
        fields: what the config says of them.

    Raises:
        CheckpointError: one is not a weight or bias of the model, has another shape, or should be the base's and
            differs.
    """
    tokens = {key: tensor for key, tensor in tensors.items() if key.endswith(TOKENS)}
    _fit_tokens(fitting, tokens, fields)
    places: dict[str, tuple[str, str]] = {}
    for site in fitting.sites.values():
        of_site = (("lora_weight", f"{site.name}.weight"), ("lora_weight", site.weight), ("lora_bias", site.bias))
        places |= {name: (site.name, tensor) for tensor, name in of_site if name and name not in places}
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key in tokens or (_DOUBLE.search(key) and _DOUBLE.sub(".", key, 1) in tensors):
            continue
        name = key.removeprefix(PREFIX).replace(BASE, ".")
        module, _, leaf = name.rpartition(".")
        trains = (BASE not in key and fields.saves(module)) or (leaf == "bias" and fields.bias != "none")
        frozen = _frozen(fitting.gm, name)
        if frozen is not None and frozen.shape != tensor.shape:
            raise CheckpointError(f"{fitting.path}: {_other_shape(name, tensor, frozen)}")
        if trains and name in places:
            site_name, own = places[name]
            by_site.setdefault(site_name, {})[own] = tensor
        elif frozen is None or not _same(tensor, frozen):
            raise CheckpointError(
                f"{fitting.path} trains {name}, which is not the weight or bias of a linear, embedding, convolution or"
                " norm of the model, so that it cannot be represented here."
                if trains
                else f"{fitting.path}: {_not_of_the_base(key, name, frozen)}"
            )
    for weight in (True, False):
        if chosen := {name: own for name, own in by_site.items() if ("lora_weight" in own) == weight}:
            fitting.add(Full(weight=weight, target_names=exactly(chosen)), chosen)


def _fit_tokens(fitting: Fitting, tensors: Mapping[str, Tensor], fields: BesideFields) -> None:
    """Fit the trained tokens of a file, at embeddings and the heads that are tied to them."""
    path, sites = fitting.path, fitting.sites
    taken: dict[str, Tensor] = {}
    named = {key: key.removeprefix(PREFIX).removesuffix(TOKENS) for key in tensors}
    embeddings = {site.name for site in sites.values() if site.kind.token_dim == 1}
    for key in sorted(tensors, key=lambda key: named[key] not in embeddings):  # a tied head comes after its embedding
        name, tensor = named[key], tensors[key]
        ids = next((ids for end, ids in fields.tokens.items() if name.endswith(end)), None)
        if ids is None:
            raise CheckpointError(f"{path} has {key}, and its config names no tokens for it.")
        variant = TrainableTokens(token_indices=ids, target_names=exactly([name]), target_kinds=("embedding", "linear"))
        chosen = [site.name for site in sites.values() if variant.selects(site)]
        if twice := taken.keys() & chosen:
            if all(site in taken and torch.equal(taken[site], tensor) for site in chosen):
                continue
            raise CheckpointError(f"{path} trains tokens of {', '.join(twice)} twice, because its weight is tied.")
        taken |= dict.fromkeys(chosen, tensor)
        by_site = {site: {"lora_shared_tokens": tensor} for site in chosen or [name]}
        fitting.add(variant, by_site, ("lora_shared_ids",))


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
