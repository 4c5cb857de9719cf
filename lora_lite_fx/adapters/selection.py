"""Select the sites that a config's targets include."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import replace

from ..errors import SelectionError, counted
from ..sites.kinds.linear import Linear
from ..sites.roles import FINE, GROUPS
from ..sites.site import Site
from .patterns import occurs
from .variant import Variant, as_tuple


def select(variant: Variant, sites: Iterable[Site]) -> list[Site]:
    """Return the sites that the config's targets include, after a check that the variant fits each of them.

    Raises:
        SelectionError: the targets include no site; the message lists the nearest names, and the roles that the sites
            have. Or a pattern of a rank or an alpha matches none of the included sites.
        ConfigError: the variant cannot be applied to one of the sites.
    """
    sites = list(sites)
    chosen = [site for site in sites if variant.selects(site)]
    if not chosen:
        raise SelectionError(_nothing_matched(variant, sites))
    for field in ("rank_pattern", "alpha_pattern", "block_size_pattern", "n_frequency_pattern"):
        for pattern, _ in getattr(variant, field, ()):
            if not any(occurs([pattern], site.name) for site in chosen):
                raise SelectionError(
                    f"{type(variant).__name__}: {pattern!r} in {field} matches none of the"
                    f" {counted(len(chosen), 'site')} to adapt ({', '.join(site.name for site in chosen[:3])}, ...)."
                )
    for site in chosen:
        variant.for_site(site.name).check(site)
    return chosen


def would_select(variant: Variant, site: Site, roles: Iterable[str]) -> bool:
    """Return whether the config's targets would include `site` if it were a linear in these roles."""
    return variant.selects(replace(site, kind=Linear(), roles=frozenset(roles)))


def warn_of_unused_patterns(
    variant: Variant, sites: Iterable[Site], known: Iterable[str] = (), stacklevel: int = 2
) -> None:
    """Warn of each pattern of the config's targets and exclusions that matches no site, which may be a slip.

    Args:
        variant: the config.
        sites: all sites of the model.
        known: names of weights that are not sites, of which another warning tells: patterns may match them.
        stacklevel: as for `warnings.warn`, seen from here.
    """
    sites = list(sites)
    names = [site.name for site in sites if site.kind.name in variant.target_kinds]
    unused = [
        f"{pattern!r} in {field}{_instead(pattern, names, sites)}"
        for field in ("target_names", "exclude_names")
        for pattern in as_tuple(getattr(variant, field))
        if not any(occurs([pattern], name) for name in (*names, *known))
    ]
    if unused:
        kinds = " or ".join(variant.target_kinds)
        warnings.warn(
            f"{type(variant).__name__}: no {kinds} site of the model matches {', nor '.join(unused)}.",
            stacklevel=stacklevel + 1,
        )


def _instead(pattern: str, names: list[str], sites: list[Site]) -> str:
    """Return what may be meant by a pattern that matches none of `names`: a site of another kind, or a name like it."""
    if others := [site for site in sites if occurs([pattern], site.name)]:
        return f" (to adapt {_first(others[:1])}, name its kind in target_kinds)"
    near = _near([pattern], names)
    return f" (the nearest: {near[0]})" if near else ""


def _near(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return names that end in something like the end of one of the patterns, the likeliest of each first."""
    by_tail = {name.rsplit(".", 1)[-1]: name for name in names}
    return [
        by_tail[tail]
        for pattern in patterns
        for tail in difflib.get_close_matches(pattern.strip("^$\\").rsplit(".", 1)[-1], by_tail, n=3, cutoff=0.4)
    ]


def _nothing_matched(variant: Variant, sites: list[Site]) -> str:
    """Return the message of the error for targets that include none of `sites`."""
    targets = {
        field: getattr(variant, field)
        for field in ("target_roles", "target_names", "exclude_names", "layers")
        if getattr(variant, field)
    } or {"default roles": variant.default_roles}
    wanted = ", ".join(f"{field}={value!r}" for field, value in targets.items())
    kinds = " or ".join(variant.target_kinds)
    others = [site for site in sites if site.kind.name not in variant.target_kinds]
    named = [site for site in others if _is_named(variant, site)]
    experts = [site for site in others if site.experts and would_select(variant, site, GROUPS["mlp"])]
    sites = [site for site in sites if site.kind.name in variant.target_kinds]
    if named and not any(_is_named(variant, site) for site in sites):
        return (
            f"{type(variant).__name__}: no {kinds} site matches {wanted};"
            f" to adapt {_first(named)}, name its kind in target_kinds."
        )
    if not sites and not others:
        return f"{type(variant).__name__}: the model has no {kinds} site to adapt."
    if not sites:
        return (
            f"{type(variant).__name__}: the model has no {kinds} site to adapt. The way out: target_kinds names other"
            f" kinds, such as {others[0].kind.name!r} for {_first(others)}."
        )
    names = [site.name for site in sites]
    near = list(dict.fromkeys(_near(as_tuple(variant.target_names), names)))
    roles = sorted({role for site in sites for role in site.roles})
    instead = " in place of target_roles" if variant.target_roles else ""
    way_out = ""
    if experts:
        way_out = f' The way out: target_kinds="experts"{instead}, for {_first(experts)}.'
    elif variant.target_roles and not any(site.kind.has_roles for site in sites):
        way_out = " The way out: leave target_roles out, because only linears have roles."
    elif variant.target_names is None and any(would_select(variant, site, FINE) for site in sites):
        way_out = f' The way out: target_names="."{instead} for all of them, or their names: target_names={names[0]!r}.'
    return (
        f"{type(variant).__name__}: no site matches {wanted}. The model has {counted(len(sites), 'site')}"
        f" ({'the nearest' if near else 'the first'}: {', '.join(near or names[:5])})"
        f" with the roles: {', '.join(roles) or 'none that could be inferred'}.{way_out}"
    )


def _first(sites: list[Site]) -> str:
    return ", ".join(f"{site.name} ({site.kind.name})" for site in sites[:3])


def _is_named(variant: Variant, site: Site) -> bool:
    return occurs(variant.target_names or (), site.name)
