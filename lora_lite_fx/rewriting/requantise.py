"""Quantize merged weights again, as those of the base are, and tell by how much that changes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, fx

from ..errors import AdapterError
from ..execution.optimize import execution_of
from ..sites.finding import find_sites
from ..storage.dequantized import DequantizedLinear, error_of, stand_ins


class Requantised:
    """The quantized sites of a graph, and the errors of those that have been quantized again.

    Args:
        gm: a graph of a quantized model.

    Attributes:
        by_site: for each quantized site a function that makes the tensors to store a weight in.
        errors: how far the stored weights are from the exact ones, by site, see `error_of`.

    Raises:
        AdapterError: no site is quantized, or the graph does not remember the modules that are.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        made_from = execution_of(gm).made_from
        modules = {} if made_from is None else stand_ins(made_from.skeleton)
        owners = {site.name: site.weight.rpartition(".")[0] for site in find_sites(gm)}
        self.errors: dict[str, float] = {}
        self.by_site: dict[str, Callable[[Tensor], Mapping[str, Tensor]]] = {
            name: partial(self._store, name, modules[owner]) for name, owner in owners.items() if owner in modules
        }
        if not self.by_site:
            raise AdapterError("merge(requantise=True): no site of the base is quantized. The way out: merge(model).")

    @torch.no_grad()
    def _store(self, name: str, module: DequantizedLinear, weight: Tensor) -> Mapping[str, Tensor]:
        stored = module.requantized(weight)
        self.errors[name] = error_of(weight, stored)
        return stored.tensors
