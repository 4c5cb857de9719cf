"""The form in which an adapter is written: another one where PEFT or a server would compute something else."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters.placement import Placement, adapter_names, placements
from ...adapters.state import adapter_values
from ...adapters.variant import Variant, adapter_namespace
from ...errors import ConfigError
from ...rewriting.sums import to_lora
from ...variants import PSOFT, LoRA, LoRAXS, TinyLoRA
from ...variants.pissa import FromWeight
from ..single_adapter import only_adapter, sites_of, weight_of
from .beside import BESIDE
from .variants import format_of
from .whole_written import whole_placements


def as_written(
    model: nn.Module, as_lora: bool | None, adapter: str | None
) -> tuple[Sequence[Placement], Variant, Mapping[str, Tensor]]:
    """Return the placements of the model's one adapter, and its config and tensors as they are written.

    Args:
        model: an adapted model.
        as_lora, adapter: as for `save_peft`.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: it has several, or they cannot be represented.
    """
    variant, placed = only_adapter(model, "A PEFT directory", beside=BESIDE, adapter=adapter)
    state: Mapping[str, Tensor] = adapter_values(model)
    if type(variant) is LoRAXS:
        if as_lora is False:
            raise ConfigError("PEFT has no LoRAXS. It is written as a LoRA; leave as_lora out.")
        return placed, *_as_lora(variant, placed, state)
    form = format_of(variant)  # refuses a class of the user's own, which may compute something else than its parent
    if isinstance(variant, FromWeight):
        if as_lora is not False:
            return placed, *_as_lora(variant, placed, state)
    elif as_lora and type(variant) is not LoRA:
        return _converted(model, variant, adapter)
    if form.same_rank:
        return placed, *_of_one_rank(variant, placed, state)
    if isinstance(variant, TinyLoRA) and not variant.tied:
        raise ConfigError(
            "TinyLoRA: PEFT's files number the vectors by the order of the modules in the model, which a graph does not"
            " keep. They hold TinyLoRA(tied=True), which has one vector for all."
        )
    if isinstance(variant, PSOFT):
        _check_factors(model, placed, state)
    return placed, variant, state


def _check_factors(model: nn.Module, placed: Sequence[Placement], state: Mapping[str, Tensor]) -> None:
    """Check that PEFT gets the frozen factors of `PSOFT` from the base, which its files lack.

    Singular vectors have the signs that the algorithm gives them, which another device or library may choose otherwise.
    """
    sites = sites_of(model)
    for placement in placed:
        weight = weight_of(model, sites[placement.site]).detach()
        ours = {name: state[placement.tensors[name]] for name in ("lora_A", "lora_B")}
        theirs = {name: torch.empty_like(tensor) for name, tensor in ours.items()}
        placement.local.init(sites[placement.site], weight.float(), adapter_namespace(theirs))
        if not all(torch.allclose(ours[name], theirs[name].to(ours[name]), atol=1e-3) for name in ours):
            raise ConfigError(
                f"PSOFT: PEFT computes the frozen factors anew from the base, and at {placement.site!r} they are others"
                " here than those of this adapter: it was made on another device, or for another base."
            )


def _converted(
    model: nn.Module, variant: Variant, adapter: str | None
) -> tuple[Sequence[Placement], Variant, Mapping[str, Tensor]]:
    """Return an adapter of any variant as `LoRA`, exactly."""
    if beside := whole_placements(model, adapter):
        raise ConfigError(
            f"as_lora: the adapter trains {beside[0].site!r} whole beside {type(variant).__name__}. The way out: write"
            " it without as_lora, or give the two names of their own."
        )
    lora, _ = to_lora(model, adapter=adapter or adapter_names(model)[0])
    placed = placements(lora)
    state = adapter_values(lora)
    sites = sites_of(lora)
    for placement in placed:
        rank, site = len(state[placement.tensors["lora_A"]]), sites[placement.site]
        if 2 * rank > min(site.d_in, site.d_out):
            raise ConfigError(
                f"as_lora: {type(variant).__name__} changes {placement.site!r} by a matrix of rank {rank}, which is no"
                " smaller than half the weight. The way out: an approximation,"
                " lora, errors = llfx.to_lora(model, r=16), and save_peft(lora, path)."
            )
    return placed, placed[0].variant, state


def _as_lora(
    variant: FromWeight | LoRAXS, placed: Sequence[Placement], state: Mapping[str, Tensor]
) -> tuple[Variant, dict[str, Tensor]]:
    """Return the same update as a `LoRA`, and its tensors.

    Of PiSSA and OLoRA it has twice the rank, `s (B A - B0 A0) = s [B, -B0] [A; A0]`; of LoRA-XS, `B R` is its `B`.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stabilized = not isinstance(variant, LoRAXS) and variant.rank_stabilized
    for placement in placed:
        local: Any = placement.local
        a, b, *others = (state[name] for name in placement.tensors.values())
        if isinstance(variant, LoRAXS):
            b = b @ others[0]
        else:
            a, b = torch.cat([a, others[0]], dim=-2), torch.cat([b, -others[1]], dim=-1)
        if (width := min(a.shape[-1], b.shape[-2])) < a.shape[-2]:  # no site has a rank above its smaller side
            eye = torch.eye(width, dtype=a.dtype, device=a.device).expand(*a.shape[:-2], -1, -1)
            a, b = (eye, b @ a) if width == a.shape[-1] else (b @ a, eye)
        tensors |= {placement.tensors["lora_A"]: a, placement.tensors["lora_B"]: b}
        ranks[placement.site] = rank = a.shape[-2]
        alphas[placement.site] = local.scale * (rank**0.5 if stabilized else rank)
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    plain = LoRA(
        r=int(r),
        alpha=alpha,
        rank_stabilized=stabilized,
        rank_pattern={f"^{re.escape(site)}$": rank for site, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(site)}$": other for site, other in alphas.items() if other != alpha},
        target_names=(".",),
    )
    return plain, tensors


def _of_one_rank(
    variant: Any, placed: Sequence[Placement], state: Mapping[str, Tensor]
) -> tuple[Variant, dict[str, Tensor]]:
    """Return the adapter with the largest of its ranks everywhere; products with the zeros that are added are zero.

    The scale of AdaLoRA depends on the rank, so its `E` makes up for the difference.
    """
    r = max(state[placement.tensors["lora_A"]].shape[0] for placement in placed)
    tensors = {}
    for placement in placed:
        for name, qualified in placement.tensors.items():
            tensor = state[qualified]
            lacking = r - tensor.shape[0 if name in ("lora_A", "lora_E") else 1]
            if name == "lora_E":
                before: Any = placement.local
                tensor = tensor * ((r + 1e-5) / (before.r + 1e-5))
            tensors[qualified] = F.pad(tensor, (0, 0, 0, lacking) if name == "lora_A" else (0, lacking))
    return dataclasses.replace(variant, r=r, rank_pattern=()), tensors
