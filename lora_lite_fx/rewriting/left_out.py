"""Say what a config's targets leave out although a user may expect it: weights that are not sites, unknown roles."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..adapters.variant import Variant
from ..sites.left_out import LeftOut
from ..sites.roles import COARSE, GROUPS
from ..sites.site import Site

_SHOWN = 5
_FINE = frozenset(role for group in GROUPS.values() for role in group)


def covered(variant: Variant, left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """Return the weights that the config's targets include by name or role, though they are not sites."""
    return [weight for weight in left_out if variant.selects(weight.site)]


def describe(left_out: Iterable[LeftOut]) -> str:
    """Return the names of weights with the reasons, layers that are alike counted together."""
    return _counted(f"{_pattern(weight.name)} ({weight.reason})" for weight in left_out)


def warn_of_left_out(variants: Sequence[Variant], sites: Sequence[Site], left_out: Sequence[LeftOut]) -> None:
    """Warn of weights that the targets include but that are not sites, and of linears of unknown role.

    A linear of unknown role is left out by default roles without its user having said anything about it.

    Args:
        variants: the configs.
        sites: all sites of the model.
        left_out: the weights that are not sites.
    """
    inner = _up_to_the_last_layer(sites)
    chosen = {site.name for variant in variants for site in sites if variant.selects(site)}
    for variant in {type(variant).__name__: variant for variant in variants}.values():
        name = type(variant).__name__
        if missed := covered(variant, left_out):
            warnings.warn(
                f"{name}: {len(missed)} weights that its targets include are not sites, and stay without an adapter:"
                f" {describe(missed)}. exclude_names leaves them out without this warning.",
                stacklevel=5,
            )
        unknown = [site.name for site in inner if site.name not in chosen and _is_unknown(variant, site)]
        if unknown:
            patterns = Counter(map(_pattern, unknown))
            names = tuple(_as_regex(pattern) for pattern in list(patterns)[:_SHOWN])
            roles = variant.default_roles
            warnings.warn(
                f"{name}: the default roles {roles} leave out {len(unknown)} linears of unknown role:"
                f" {_counted(map(_pattern, unknown))}. To adapt them, add a config that names them:"
                f" {name}(..., target_names={names}). target_roles={roles} leaves them out without this warning.",
                stacklevel=5,
            )


def _up_to_the_last_layer(sites: Sequence[Site]) -> list[Site]:
    """Return the sites that run before the last layer ends, because default roles leave out the head anyway.

    Among them are linears outside of layers, such as the projector between the encoder of images and the decoder.
    """
    in_layers = [call.node for site in sites if site.layer is not None for call in site.calls]
    return [site for site in sites if in_layers and site.calls[0].node <= max(in_layers)]


def _is_unknown(variant: Variant, site: Site) -> bool:
    """Return whether default roles leave `site` out only because its role is unknown."""
    by_default = variant.target_roles is None and variant.target_names is None
    return by_default and site.roles <= COARSE and variant.selects(_known(site))


def _known(site: Site) -> Site:
    return replace(site, roles=_FINE)


def _counted(texts: Iterable[str]) -> str:
    """Return the first texts, each once and with its number, and how many others there are."""
    counts = Counter(texts)
    shown = [f"{text} x {count}" if count > 1 else text for text, count in list(counts.items())[:_SHOWN]]
    return ", ".join([*shown, f"and {len(counts) - _SHOWN} others"] if len(counts) > _SHOWN else shown)


def _pattern(name: str) -> str:
    """Return a qualified name with its numbers as stars, so that it stands for all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _as_regex(pattern: str) -> str:
    """Return the end of a pattern as a regular expression that finds it."""
    parts = pattern.split(".")[-2:]
    return r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in parts[parts[0] == "*" :] or parts) + "$"
