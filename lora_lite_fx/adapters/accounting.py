"""Account for the adapters that a graph records: each one is found at its site, or its site is named with the reason.

Passes of others may change an adapted graph. A decomposition writes a product in another way, a fusion makes one
product of three, a quantization computes a weight. The records on the nodes survive that, but a site may not be found
any more. Whoever folds, lists or writes adapters asks here, so that none is left out in silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..errors import AdapterError
from ..graph.insertion import Insertion, insertions, surrounding
from ..sites.computed import Computation, computes_the_same
from ..sites.finding import find_sites
from ..sites.site import Site


@dataclass(frozen=True)
class Account:
    """The adapters of a graph, by the sites at which they are.

    Args:
        sites: all sites of the graph, adapted or not.
        insertions: the recorded adapters, by qualified name of the site.
        lost: the reason for each site that has recorded adapters and cannot be found, by its name.
    """

    sites: Sequence[Site]
    insertions: Mapping[str, Sequence[Insertion]]
    lost: Mapping[str, str]

    def adapted(self, purpose: str) -> list[Site]:
        """Return the adapted sites.

        Args:
            purpose: says in an error what they are needed for, such as `merge`.

        Raises:
            AdapterError: a site that has adapters cannot be found; the message names it, and says what to do.
        """
        if self.lost:
            name, why = next(iter(self.lost.items()))
            others = f" The others: {', '.join(list(self.lost)[1:4])}." if len(self.lost) > 1 else ""
            raise AdapterError(
                f"{purpose} needs every adapted site, and {len(self.lost)} of {len(self.insertions)} are not found in"
                f" the graph any more. {name!r}: {why}.{others} The way out: {purpose} before the pass that changed the"
                " graph (a fusion, a quantization). Or: remove takes the adapters out as it is, and adapter_state_dict"
                " returns their tensors."
            )
        return [site for site in self.sites if site.name in self.insertions]

    def around(self, site: Site) -> Sequence[Insertion]:
        """Return the adapters of `site`, the innermost first.

        Raises:
            AdapterError: they are not all found at its calls, so that a further adapter would not be around them.
        """
        if site.name in self.lost:
            raise AdapterError(
                f"{site.name!r} cannot get a further adapter: {self.lost[site.name]}. The way out: insert all adapters"
                " before the pass that changed the graph (a fusion, a quantization)."
            )
        return self.insertions.get(site.name, ())


def account_for(gm: fx.GraphModule, sites: Sequence[Site] | None = None) -> Account:
    """Find the site of each adapter that `gm` records.

    Args:
        gm: a graph, with adapters or without.
        sites: the sites of the graph, if they are known already.
    """
    sites = find_sites(gm) if sites is None else sites
    by_site: dict[str, list[Insertion]] = defaultdict(list)
    for insertion in insertions(gm.graph):
        by_site[insertion.site].append(insertion)
    known = {site.name: site for site in sites}
    lost = {name: why for name, around in by_site.items() if (why := _why_lost(known.get(name), around))}
    return Account(sites, by_site, lost)


def _why_lost(site: Site | None, around: Sequence[Insertion]) -> str:
    """Return why `site` is not the one place of the adapters `around` it; empty if it is."""
    variants = " and ".join(dict.fromkeys(insertion.variant for insertion in around))
    if site is None:
        adapted = next((node for insertion in around if (node := insertion.y or insertion.inlet)), None)
        what = f"the value {adapted.name} ({adapted.target})" if adapted else "nothing that is left"
        return f"{variants} is at {what}, which is not found to be a product with a frozen weight"
    adapters = {insertion.adapter for insertion in around}
    at_calls = [surrounding(around, call.x, call.y)[0] for call in site.calls]
    found = {insertion.call for here in at_calls for insertion in here}
    if any(len(here) != len(adapters) for here in at_calls) or len(found) != len(around):
        return (
            f"the graph computes the site {len(site.calls)} times and records {len(around)} insertions of {variants},"
            f" of which {len(found)} are at a product with its weight {site.weight!r}"
        )
    for computed in (site.computed_weight, site.computed_bias):
        if computed is not None and (name := _read_otherwise(computed, around)):
            return f"{variants} reads {name!r} itself, and the product reads {computed.name}, computed of it"
    return ""


def _read_otherwise(computed: fx.Node, around: Sequence[Insertion]) -> str:
    """Return the name of a frozen tensor that an adapter does not read as the product does; empty if there is none.

    An adapter at a weight or bias that is `computed` has a copy of the computation. It has none if another pass has put
    the computation there afterwards: then merging would give it another weight than it has in the graph.
    """
    tensors = Computation.of(computed).tensors
    for insertion in around:
        inside = set(insertion.nodes)
        read = [node for node in insertion.nodes if node.op == "get_attr" and inside & node.users.keys()]
        name = next((str(node.target) for node in read if node.target in tensors), "")
        if name and not any(computes_the_same(node, computed) for node in insertion.nodes):
            return name
    return ""
