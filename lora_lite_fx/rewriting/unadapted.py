"""Say what a config's targets leave out although a user may expect it.

Targets may include weights that are not sites. Default targets leave out experts, linears of unknown role, and a head
that was drawn at random, though their user has not said so.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..adapters.contract import check_contract
from ..adapters.patterns import occurs
from ..adapters.placement import placements
from ..adapters.selection import would_select
from ..adapters.variant import Variant
from ..errors import ConfigError
from ..execution.optimize import execution_of
from ..graph.tensors import tensor_of
from ..log import logger
from ..sites.roles import COARSE, FINE, GROUPS
from ..sites.site import Site
from ..sites.unmatched import LeftOut

_SHOWN = 5
_NEW_HEAD = "linear of a head that was drawn at random"
_EXPERTS = "stack of experts"


@dataclass(frozen=True)
class Unadapted:
    """Sites of one sort that have no adapter, though a user may expect one there.

    Args:
        sort: what one of them is.
        names: of the sites; of a weight that is not a site also the reason.
        parameters: the number of entries of their weights.
        way: the fields of a config that adapts them; empty if none can.
        variant: the variant of such a config; empty for any.
    """

    sort: str
    names: tuple[str, ...]
    parameters: int
    way: str
    variant: str = ""

    def __str__(self) -> str:
        sort = self.sort if len(self.names) == 1 else self.sort.replace(" ", "s ", 1)
        return f"{len(self.names)} {sort} ({_counted(map(_pattern, self.names))}; {self.parameters:,} parameters)"

    def config(self, variant: str = "") -> str:
        """Return the code of a config that adapts them, empty if none can.

        Args:
            variant: the variant that a config of any variant has; if it is empty, the fields alone are returned.
        """
        if not self.way:
            return ""
        if self.variant:
            return f"{self.variant}({self.way})"
        return f"{variant}(..., {self.way})" if variant else self.way

    def told(self) -> str:
        """Return them as a line, with the way to adapt them."""
        return f"{self}: {self.config()}" if self.way else str(self)


def find_unadapted(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    left_out: Iterable[LeftOut],
    adapted: Container[str],
    variants: Sequence[Variant] = (),
) -> list[Unadapted]:
    """Return the sites without an adapter that the targets would include if it were known what they do.

    Args:
        gm: the graph.
        sites: all of its sites.
        left_out: the weights that are not sites.
        adapted: the names of the sites with an adapter.
        variants: the configs; without one, default targets are meant.
    """
    made_from = execution_of(gm).made_from
    new = made_from.new_head if made_from is not None else ()

    def included(site: Site, roles: Iterable[str], in_layers: bool = True) -> bool:
        asked = variants if in_layers else [replace(variant, layers=None) for variant in variants]
        return not variants or any(would_select(variant, site, roles) for variant in asked)

    free = [site for site in sites if site.name not in adapted]
    heads = [site for site in free if site.name in new and not site.roles & FINE and included(site, FINE, False)]
    told = {site.name for site in heads} | {site.name for site in sites if site.name in adapted}
    experts = [site for site in free if site.experts and included(site, GROUPS["mlp"])]
    stacks = [weight for weight in left_out if weight.kind.is_stack and included(weight.site, GROUPS["mlp"])]
    inner = [site for site in _up_to_the_last_layer(sites) if site.name not in told]
    unknown = [site for site in inner if _is_unknown(site) and included(site, FINE)]
    sizes = [tensor_of(gm, weight.weight).numel() for weight in stacks]
    reasons = tuple(f"{weight.name}, because {weight.reason}" for weight in stacks)
    found = [
        _of_sites(_EXPERTS, experts, 'target_kinds="experts"'),
        Unadapted("stack of experts without a site", reasons, sum(sizes), ""),
        _of_sites("linear of unknown role", unknown, f"target_names={_patterns(unknown)}"),
        replace(_of_sites(_NEW_HEAD, heads, f"target_names={_short(heads, sites)}"), variant="Full"),
    ]
    return [each for each in found if each.names]


def covered(variant: Variant, left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """Return the weights that the config's targets include by name or role, though they are not sites."""
    return [weight for weight in left_out if variant.selects(weight.site)]


def describe(left_out: Iterable[LeftOut]) -> str:
    """Return the names of weights with the reasons, layers that are alike counted together."""
    return _counted(f"{_pattern(weight.name)} ({weight.reason})" for weight in left_out)


def tell_of_left_out(
    gm: fx.GraphModule, variants: Sequence[Variant], sites: Sequence[Site], left_out: Sequence[LeftOut]
) -> None:
    """Tell of weights that the targets include but that are not sites, and of sites that default targets leave out.

    The first is a warning. The second is a warning if a head was drawn at random, or if what is left out holds more
    parameters than what is adapted; else it is a line of the log, as it always is for targets that a user has given.

    Args:
        gm: the graph.
        variants: the configs.
        sites: all sites of the model.
        left_out: the weights that are not sites.
    """
    for variant in {type(variant).__name__: variant for variant in variants}.values():
        if missed := covered(variant, left_out):
            warnings.warn(
                f"{type(variant).__name__}: {len(missed)} weights that its targets include are not sites, and stay"
                f" without an adapter: {describe(missed)}. exclude_names leaves them out without this warning.",
                stacklevel=5,
            )
    chosen = [site for site in sites if any(variant.selects(site) for variant in variants)]
    adapted = {site.name for site in chosen} | {placement.site for placement in placements(gm)}
    by_default = [variant for variant in variants if variant.target_roles is None and variant.target_names is None]
    unadapted = find_unadapted(gm, sites, left_out, adapted, by_default or variants)
    if not unadapted:
        return
    variant = (by_default or variants)[0]
    name, roles, held = type(variant).__name__, variant.default_roles, sum(map(_size, chosen))
    text = f"{', '.join(map(str, unadapted))}. The sites that get an adapter hold {held:,} parameters."
    of_experts = name if _fits_experts(gm, variant, sites) else "LoRA"
    ways = [each.config(of_experts if each.sort == _EXPERTS else name) for each in unadapted]
    if ways := [way for way in ways if way]:
        text += f" To adapt them too, add a config: {', '.join(ways)}."
    is_much = sum(each.parameters for each in unadapted) > held
    if by_default and (is_much or any(each.sort == _NEW_HEAD for each in unadapted)):
        warnings.warn(
            f"{name}: the default roles {roles} leave out {text} target_roles={roles} leaves them out without this"
            " warning.",
            stacklevel=5,
        )
    else:
        logger.info("left without an adapter: %s", text)


def _fits_experts(gm: fx.GraphModule, variant: Variant, sites: Iterable[Site]) -> bool:
    """Check whether the variant can be at the first stack of experts; some need their input as a vector."""
    try:
        check_contract(variant, [site for site in sites if site.experts][:1], gm)
    except ConfigError:
        return False
    return True


def _up_to_the_last_layer(sites: Sequence[Site]) -> list[Site]:
    """Return the sites that run before the last layer ends, because default roles leave out the head anyway.

    Among them are linears outside of layers, such as the projector between the encoder of images and the decoder.
    """
    in_layers = [call.node for site in sites if site.layer is not None for call in site.calls]
    return [site for site in sites if in_layers and site.calls[0].node <= max(in_layers)]


def _is_unknown(site: Site) -> bool:
    return site.kind.has_roles and site.roles <= COARSE


def _size(site: Site) -> int:
    """Return the number of entries of the weight of a site."""
    return site.d_in * site.d_out * max(site.experts, 1)


def _of_sites(sort: str, sites: Sequence[Site], way: str) -> Unadapted:
    return Unadapted(sort, tuple(site.name for site in sites), sum(map(_size, sites)), way)


def _counted(texts: Iterable[str]) -> str:
    """Return the first texts, each once and with its number, and how many others there are."""
    counts = Counter(texts)
    shown = [f"{text} x {count}" if count > 1 else text for text, count in list(counts.items())[:_SHOWN]]
    return ", ".join([*shown, f"and {len(counts) - _SHOWN} others"] if len(counts) > _SHOWN else shown)


def _pattern(name: str) -> str:
    """Return a qualified name with its numbers as stars, so that it stands for all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _patterns(sites: Iterable[Site]) -> tuple[str, ...]:
    """Return regular expressions that find the first of `sites`."""
    patterns = dict.fromkeys(_pattern(site.name) for site in sites)
    return tuple(_as_regex(pattern) for pattern in list(patterns)[:_SHOWN])


def _short(wanted: Sequence[Site], sites: Iterable[Site]) -> str:
    """Return the code of patterns that find `wanted` alone: the first or last parts of their names, if they do."""
    names = dict.fromkeys(site.name for site in wanted)
    others = [site.name for site in sites if site.name not in names]
    patterns = _patterns(wanted)
    for index in (-1, 0):
        parts = tuple(dict.fromkeys(name.split(".")[index] for name in names))
        if not any(occurs(parts, name) for name in others):
            patterns = parts
            break
    return f'"{patterns[0]}"' if len(patterns) == 1 else repr(patterns)


def _as_regex(pattern: str) -> str:
    """Return the end of a pattern as a regular expression that finds it."""
    parts = pattern.split(".")[-2:]
    return r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in parts[parts[0] == "*" :] or parts) + "$"
