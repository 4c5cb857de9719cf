"""The configs that `rewrite`, `wrap`, `adapt` and `backend` take: one variant, several, or several by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..adapters.mistakes import not_a_variant
from ..adapters.variant import Variant
from ..errors import ConfigError, shown
from ..graph.provenance import DEFAULT

Config = Variant | Sequence[Variant] | Mapping[str, Variant | Sequence[Variant]]
"""A variant, several to insert in this order, or a dict that names adapters: `{"fr": LoRA(r=8), "de": [IA3()]}`."""

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def as_adapters(cfg: Config) -> list[tuple[str, Variant]]:
    """Return the variants of a config in the order of insertion, each with the name of its adapter.

    Raises:
        ConfigError: `cfg` is empty, a name cannot be one, or an element is not a variant.
    """
    if not isinstance(cfg, Mapping):
        return [(DEFAULT, variant) for variant in _as_variants(cfg)]
    if not cfg or not all(isinstance(value, (Variant, list, tuple)) for value in cfg.values()):
        raise not_a_variant(cfg)
    return [(check_name(name), variant) for name, variants in cfg.items() for variant in _as_variants(variants)]


def _as_variants(cfg: Variant | Sequence[Variant]) -> list[Variant]:
    variants = list(cfg) if isinstance(cfg, Sequence) and not isinstance(cfg, str) else [cfg]
    wrong = [item for item in variants if not isinstance(item, Variant)]
    if wrong or not variants:
        raise not_a_variant(wrong[0] if wrong else cfg)
    return variants


def check_name(name: object) -> str:
    """Return the name of an adapter.

    Raises:
        ConfigError: it cannot be one.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ConfigError(
        f"The name of an adapter is of letters, digits and underscores and does not begin with a digit, because the"
        f" names of its tensors end in it; not {name!r}."
        if isinstance(name, str)
        else f"The name of an adapter is a string, as in rewrite(model, {{'fr': LoRA(r=8)}}), not {shown(name)}."
    )


def check_free(names: Iterable[str], present: Sequence[str]) -> None:
    """Raise ConfigError if a name is that of an adapter which is there already."""
    if taken := [name for name in names if name in present]:
        raise ConfigError(
            f"The model has an adapter {taken[0]!r} already; it has {', '.join(present)}. The way out: another name, or"
            f" delete(model, {taken[0]!r}) first."
        )
