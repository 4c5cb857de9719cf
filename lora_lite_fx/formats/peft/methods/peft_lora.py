"""LoRA and what PEFT writes as one: DoRA, and starts from the weights (PiSSA, OLoRA) or from data (EVA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....adapters.placement import Placement
from ....adapters.variant import Variant
from ....errors import ConfigError
from ....sites.site import Site
from ....variants import EVA, DoRA, LoRA, LoRAXS, OLoRA, PiSSA
from ..fields_and_tensors import (
    BOTH_PATTERNS,
    GAUSSIAN,
    PeftField,
    PeftTensor,
    R,
    as_patches,
    as_points,
    as_rows,
)
from ..form import PeftForm

_PLAIN_STARTS = ("gaussian", "orthogonal", "mica")
"""Starts that leave the base as it is, so that the file is that of any LoRA."""
_STARTS_ON_ANOTHER_BASE = ("lora_ga", "corda")
"""Starts for which PEFT changes the base in memory. The file is that of a LoRA on the changed base."""


class _Lora(PeftForm):
    def start_in(self, config: Mapping[str, Any]) -> Any:
        start = super().start_in(config)
        if start in _PLAIN_STARTS or start in _STARTS_ON_ANOTHER_BASE:
            return True
        if isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start):
            return "pissa"  # factorized by another algorithm
        return start

    def start_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().start_fields(config)
        return {**fields, **_eva_fields(config.get("eva_config") or {})} if self.variant is EVA else fields

    def warnings_of(self, config: Mapping[str, Any]) -> Iterator[str]:
        start = config.get(self.start)
        if start in _STARTS_ON_ANOTHER_BASE:
            yield (
                f"with init_lora_weights={start!r} PEFT changes the base in memory before training. On the base as it"
                " was published the adapter computes something else than in training, here as in PEFT. Load it on the"
                " base that was saved with it, or save it in PEFT with path_initial_model_for_weight_conversion."
            )
        elif isinstance(start, str) and start.startswith("pissa_niter"):
            yield (
                f"PEFT's init_lora_weights={start!r} factorizes the weight with random numbers, anew at each load."
                " Here the exact factors are subtracted from the base, so outputs agree up to that approximation."
            )
        elif start == "mica":
            yield (
                "with init_lora_weights='mica' an adapter computes the same here as in PEFT, and trains otherwise,"
                " because PEFT trains lora_A alone (MiCA). The way out: load it, and let nothing else require grad."
            )
        yield from super().warnings_of(config)

    def reasons_against(self, variant: Variant, site: Site) -> Iterator[str]:
        yield from super().reasons_against(variant, site)
        if site.kind.token_dim == 1 and getattr(variant, "bias", False):
            yield "has no bias at an embedding"


class _FromWeight(_Lora):
    """PiSSA and OLoRA, whose update `s (B A - B0 A0) = s [B, -B0] [A; A0]` is a LoRA of twice the rank."""

    def as_lora(
        self, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[LoRA, Mapping[str, Tensor]] | None:
        factors = {}
        for placement in placed:
            a, b, a0, b0 = (state[placement.tensors[name]] for name in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
            factors[placement.site] = torch.cat([a, a0], dim=-2), torch.cat([b, -b0], dim=-1)
        variant: Any = placed[0].variant
        return _lora_of(placed, factors, variant.rank_stabilized)


class _LoraXS(_Lora):
    """LoRA-XS, which PEFT has not: with `B R` for its `B` it is a LoRA."""

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return False

    def as_lora(
        self, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[LoRA, Mapping[str, Tensor]] | None:
        factors = {}
        for placement in placed:
            a, b, r = (state[name] for name in placement.tensors.values())
            factors[placement.site] = a, b @ r
        return _lora_of(placed, factors, False)

    def as_written(
        self, model: nn.Module, variant: Variant, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[Variant, Mapping[str, Tensor]]:
        raise ConfigError("PEFT has no LoRAXS. It is written as a LoRA; leave as_lora out.")


def _lora_of(
    placed: Sequence[Placement], factors: Mapping[str, tuple[Tensor, Tensor]], stabilized: bool
) -> tuple[LoRA, dict[str, Tensor]]:
    """Return the LoRA that has these factors at the sites, with the scales of the adapter that is there."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for placement in placed:
        local: Any = placement.local
        a, b = factors[placement.site]
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


def _eva_fields(config: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Return the fields of `EVA` for PEFT's `eva_config`. Its `tau` bounds an error that there is not here."""
    options = dict(config if isinstance(config, Mapping) else vars(config))
    for key, only in (("whiten", False), ("adjust_scaling_factors", True)):
        if options.get(key, only) != only:
            raise ConfigError(f"EVA: PEFT's eva_config with {key}={options[key]!r} cannot be represented here.")
    masks = options.get("use_label_mask", True)
    if masks and options.get("label_mask_value", -100) != -100:
        raise ConfigError(
            f"EVA: PEFT's eva_config with label_mask_value={options['label_mask_value']!r} cannot be represented here;"
            " the value is -100."
        )
    return {"rho": options.get("rho", 2.0), "center": True, "use_label_mask": masks}


_FACTORS = {
    "lora_A": PeftTensor("lora_A.weight", as_rows, embedding="lora_embedding_A", conv=as_patches),
    "lora_B": PeftTensor("lora_B.weight", as_rows, embedding="lora_embedding_B", conv=as_points),
}
_MAGNITUDE = PeftTensor(
    "lora_magnitude_vector", Tensor.flatten, conv=lambda m, kernel: m[(None, slice(None), *[None] * len(kernel))]
)


def _form(variant: type[Variant], start: object, form: type[PeftForm] = _Lora) -> PeftForm:
    magnitude = {"lora_m": _MAGNITUDE} if variant is DoRA else {}
    bias = {"lora_bias": PeftTensor("lora_B.bias")} if variant is LoRA else {}
    return form(
        variant,
        "LORA",
        {
            **R,
            "alpha": PeftField("lora_alpha", 8),
            "dropout": PeftField("lora_dropout", 0.0),
            "rank_stabilized": PeftField("use_rslora", False),
            **({"bias": PeftField("lora_bias", False)} if variant is LoRA else {}),
        },
        {**_FACTORS, **magnitude, **bias},
        constants={"use_dora": variant is DoRA, "init_lora_weights": start},
        unread=frozenset({"eva_config", "qalora_group_size"}),
        trains_otherwise={
            "velora_config": "PEFT approximates the gradient of lora_A (VeLoRA), which is exact here",
        },
        unread_in_files=frozenset({"lora_ga_config", "corda_config", "velora_config"}),
        ignored=("lora_velora_embed",),
        start="init_lora_weights",
        starts={start: {}, **(GAUSSIAN if start is True else {})},
        patterns=BOTH_PATTERNS,
        conv1d=variant is not OLoRA,
        kinds=("linear", "embedding", "conv") if variant in (LoRA, DoRA) else ("linear",),
        own_conv=True,
        rest=("lora_A0", "lora_B0") if variant in (PiSSA, OLoRA) else (),
    )


FORMS = (
    _form(LoRA, True),
    _form(DoRA, True),
    _form(PiSSA, "pissa", _FromWeight),
    _form(OLoRA, "olora", _FromWeight),
    _form(EVA, "eva"),
    _LoraXS(LoRAXS, "LORA", {}, {}),
)
