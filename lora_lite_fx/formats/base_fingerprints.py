"""Fingerprints of the frozen weights that an adapter was made for, which its file holds by site."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapters.accounting import account_for
from ..adapters.placement import graph_of
from ..compat.torch import version_of
from ..errors import CheckpointError, counted
from ..graph.direct_calls import ORDINARY
from ..graph.sharded import whole
from ..graph.tensors import tensor_of
from ..rewriting.adapted_linear import AdaptedLinear
from ..rewriting.choose_sites import NewAdapter
from ..sites.site import Site, stored_weight


def fingerprint(weight: Tensor) -> str:
    """Return a hash of a weight's shape and values. A base in float32 and its cast to bfloat16 have the same."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(weight.detach().to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_known: MutableMapping[Tensor, tuple[Hashable, str]] = WeakTensorKeyDictionary()
"""The fingerprint of each weight that was hashed, with the state that it had then."""


def fingerprint_at(model: nn.Module, site: Site) -> str:
    """Return the fingerprint of the frozen weight of a site, which is hashed again only if it has changed.

    Two sums over it, which take a tenth of the time, show changes that no counter of torch counts, as of `.data`. A
    weight that the graph computes, as of a quantized base, is hashed each time.
    """
    if site.computed_weight is not None:
        return fingerprint(stored_weight(model, site))
    weight = tensor_of(model, site.weight)
    state = _state_of(weight) if type(weight) in ORDINARY else None
    if state is None:
        return fingerprint(stored_weight(model, site))
    known = _known.get(weight)
    if known is None or known[0] != state:
        known = _known[weight] = state, fingerprint(weight)
    return known[1]


def _state_of(weight: Tensor) -> Hashable | None:
    """Return what tells whether a weight is as it was; None if it cannot be told."""
    values = weight.detach()
    if values.is_meta or values.dtype not in _FLOATS or not values.is_contiguous():
        return None
    if not values.nbytes or values.nbytes % 8:
        return None
    bits = int(values.view(-1).view(torch.int64).sum())
    rows = values.view(len(values), -1)  # a sum of bits alone stays if all signs change, or two rows change places
    mixed = rows @ torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    version = None if weight.is_inference() else version_of(weight)
    return weight.data_ptr(), rows.shape, rows.dtype, version, bits, mixed.cpu().view(torch.uint8).numpy().tobytes()


def fingerprints(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Return the fingerprints of the frozen weights of an adapted model's sites, by name."""
    model, names = graph_of(model), dict.fromkeys(sites)
    if isinstance(model, fx.GraphModule):
        adapted = account_for(model).adapted("save")
        return {site.name: fingerprint_at(model, site) for site in adapted if site.name in names}
    modules = {name: model.get_submodule(name) for name in names}  # wrapped, or themselves
    weights = {
        name: module.frozen_weight() if isinstance(module, AdaptedLinear) else tensor_of(module, "weight")
        for name, module in modules.items()
    }
    return {name: fingerprint(whole(weight.detach())) for name, weight in weights.items()}


def check_base(
    gm: fx.GraphModule, plans: Sequence[NewAdapter], prints: Mapping[str, str], path: object, stacklevel: int
) -> None:
    """Compare the weights of a graph with those that adapters were made for; a difference is a warning.

    Args:
        gm: the graph.
        plans: the adapters with their sites.
        prints: the fingerprints of the weights that they were made for, by site.
        path: of the file, for messages.
        stacklevel: as for `warnings.warn`, seen from here.

    Raises:
        CheckpointError: they differ, and a variant means nothing on other weights.
    """
    sites = {site.name: site for plan in plans for site in plan.sites}
    other = {name for name, site in sites.items() if prints.get(name) != fingerprint_at(gm, site)}
    for plan in plans:
        differ = [site.name for site in plan.sites if site.name in other]
        if not differ:
            continue
        message = (
            f"{path}: the {type(plan.variant).__name__} adapter was made for other weights than the model's, at"
            f" {len(differ)} of {counted(len(plan.sites), 'site')} ({differ[0]}, ...)"
        )
        if plan.variant.ties_to_weight:
            raise CheckpointError(f"{message}; it means nothing on these. Load it on the base it was made for.")
        warnings.warn(f"{message}.", stacklevel=stacklevel)
