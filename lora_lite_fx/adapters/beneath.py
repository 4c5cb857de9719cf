"""What the adapters below another one make of the weight and the bias that this one reads.

A stack `[first, second]` computes what merging `first` and then adapting the result by `second` computes. So
`base.weight` and `base.bias` of `second` are those of the linear that `first` makes of the frozen one. A coefficient of
the stack scales what its members add to the output, and not these.

Adapters of another name may be switched off, or act in some rows only: each is for itself, and they are left out. An
adapter that replaces the tensors, as `Full`, does so for all adapters around it, by its coefficient.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AdapterError, ConfigError
from ..graph.tensors import has_values
from ..sites.site import Site
from .dependencies import Dependencies
from .frozen_linear import FrozenLinear
from .maths import cast, wide
from .param_spec import AdapterTensors
from .promotion import call_forward
from .variant import Variant


def is_beneath(name: str, replaces: bool, outer: str) -> bool:
    """Return whether an adapter counts as a part of the linear for the adapters called `outer` around it.

    Args:
        name: the name of the adapter.
        replaces: whether it replaces the weight or the bias.
        outer: the name of the others.
    """
    return replaces or name == outer


def rows_of_replaced(site: str, name: str, reader: str) -> AdapterError:
    """Return the error of an adapter with a coefficient for each row, whose weight or bias another one reads."""
    return AdapterError(
        f"{name!r} cannot act in some rows of a batch only: it replaces the weight or bias of {site!r}, which"
        f" {reader!r} reads, and that is one for all rows. The way out: one number for all rows, or both"
        " adapters under one name."
    )


def require_tensors(variant: Variant, site: Site, outer: str) -> None:
    """Check that the linear with an adapter has one weight and bias for the adapters around it.

    Args:
        variant: the config of the adapter.
        site: the site.
        outer: the name of the variant that reads them.

    Raises:
        ConfigError: it has not.
    """
    name, why = type(variant).__name__, ""
    if variant.slots:
        why = f"a bank of {variant.slots} adapters"
    elif site.experts:
        why = f"{name} at {site.kind.article}, of which each has a weight"
    elif not variant.affine or not _is_affine(variant, _nameless(site)):
        why = f"{name}, which is not affine in its input"
    if why:
        raise ConfigError(
            f"{outer} reads the weight or bias of {site.name!r} and is around {why}, so that there is none for it to"
            f" read. The way out: put {outer} first in the list of configs, or give the two different names,"
            ' {"first": ..., "second": ...}.'
        )


def _nameless(site: Site) -> Site:
    """Return the site without what its variant computes nothing from, so that equal sites share an answer."""
    return replace(site, name="", weight="", bias=None if site.bias is None else "", tied=(), calls=())


@functools.lru_cache(maxsize=512)
@torch.no_grad()
def _is_affine(variant: Variant, site: Site) -> bool:
    """Try out on random inputs, of lengths from 1e-2 to 1e2, whether a variant with random values is affine."""
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults are
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        tensors: dict[str, Tensor] = {}
        for name, spec in variant.tensor_specs(site).items():
            tensor = spec.empty(torch.float64, torch.device("cpu")).detach()
            spec.fill(tensor)
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        weight = torch.randn(site.d_out, site.d_in, **exact)
        bias = None if site.bias is None else torch.randn(site.d_out, **exact)
        x, z = torch.logspace(-2, 2, 16, **exact)[:, None] * torch.randn(2, 16, site.d_in, **exact)

    def call(x: Any, **given: Tensor) -> Tensor:
        return F.linear(x, given.get("weight", weight), given.get("bias", bias))

    def f(x: Tensor) -> Tensor:
        y: Tensor = call_forward(variant, call, FrozenLinear(call, weight, bias, site), AdapterTensors(tensors), x)
        return y

    terms = [f(x + z), f(x), f(z), f(torch.zeros_like(x))]
    error, size = (terms[0] - terms[1] - terms[2] + terms[3]).abs(), sum(term.abs() for term in terms)
    return not has_values(weight) or bool((error.amax(1) <= 1e-9 * size.amax(1)).all())  # type: ignore[union-attr]


def tensors_with(
    variant: Variant, p: Any, site: Site, weight: Tensor, bias: Tensor | None, dependencies: Dependencies | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight `(d_out, d_in)` and bias `(d_out,)` of a linear with an adapter, without dropout.

    They are `b' = f(0)` and `W' = (f(I) - b')^T`, which is right because `f` is affine.

    Args:
        variant: the config of the adapter for the site.
        p: its tensors as attributes.
        site: the site.
        weight, bias: those of the linear. Where it has no bias, the result has none. The result has those that the
            adapter leaves as they are.
        dependencies: if given, notes what the variant reads apart from tensors.
    """
    products: list[tuple[Any, Tensor, dict[str, Tensor]]] = []
    exact = wide(weight)
    unit = site.kind.identity(exact)

    def call(x: Any, **given: Tensor) -> Tensor:
        used, added = cast(given.get("weight", exact), exact), given.get("bias", bias)
        added = None if added is None else cast(added, exact)
        # A product with I would cost as much as one with a long text.
        y = used.t() if x is unit else F.linear(x, used)
        y = y if added is None else y + added
        products.append((x, y, given))
        return y

    base = FrozenLinear(call, exact, bias, site)
    base = base if dependencies is None else dependencies.watch(base)
    columns = call_forward(variant, call, base, p, unit)
    x, product, given = products[0]
    if x is unit and columns is product:  # the adapter only replaces tensors: these are they
        return given.get("weight", weight), given.get("bias", bias)
    shift = call_forward(variant, call, base, p, torch.zeros_like(exact[:1])).flatten()
    return (columns - shift).t(), None if bias is None else shift
