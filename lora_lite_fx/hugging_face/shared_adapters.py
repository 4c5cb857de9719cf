"""Share the adapters of a rewritten graph with the Hugging Face model that it was captured from."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..adapters.changed_buffers import HasBaseBuffers, base_buffers_of
from ..adapters.placement import placements
from ..capture.origins.wrong_arguments import graph_hint
from ..errors import AdapterError
from ..graph.tensors import has_attribute, register_tensor, tensor_of
from ..rewriting.model_of_graph import model_of_graph
from ..rewriting.rewrite import insert_placed
from ..sites.finding import find_sites


def share_adapters(gm: fx.GraphModule, base: fx.GraphModule) -> fx.GraphModule:
    """Insert the adapters of `gm` into another graph of its model, over the same tensors.

    Returns:
        `base`, a graph of the same model, which is changed.

    Raises:
        AdapterError: `base` lacks a site of `gm`, or the two have other weights there.
    """
    sites = {site.name: site for site in find_sites(base)}
    theirs = {site.name: site for site in find_sites(gm)}
    for placement in placements(gm):
        name = placement.site
        if name not in sites:
            raise AdapterError(f"The graph has an adapter at {name!r}, which the model's own call does not run.")
        ours, other = (tensor_of(graph, found[name].weight) for graph, found in ((base, sites), (gm, theirs)))
        if (ours.data_ptr(), ours.dtype) != (other.data_ptr(), other.dtype):
            raise AdapterError(
                f"The graph does not share the weight of {name!r} with its model any more: one of them was moved or"
                f" cast.{graph_hint(gm)}"
            )
    insert_placed(base, placements(gm), {name: site.roles for name, site in theirs.items()})
    for old, new in zip(placements(gm), placements(base), strict=True):
        if (old.site, old.names) != (new.site, new.names):
            raise AdapterError(f"The adapter at {old.site!r} has other tensors in the graph than in its model.")
        for name, own in new.tensors.items():
            register_tensor(base, own, tensor_of(gm, old.tensors[name]))
    shared = {name: buffer for name, buffer in base_buffers_of(gm).items() if has_attribute(base, name)}
    for name in shared:
        register_tensor(base, name, tensor_of(gm, name))
    assert isinstance(base, HasBaseBuffers)
    base.base_buffers = shared
    return base


def model_to_adapt(gm: fx.GraphModule) -> Any:
    """Return the model that a rewritten graph was captured from, a copy over the tensors of the graph.

    Raises:
        AdapterError: the graph has no adapters; or it does not remember its model, or lacks weights of it.
    """
    if not placements(gm):
        raise AdapterError(f"adapt takes a graph that has adapters, or a model and a config.{graph_hint(gm)}")
    way_out = "llfx.save(graph, 'adapter.safetensors'), and llfx.adapt(model, 'adapter.safetensors')"
    model, _ = model_of_graph(gm, "adapt", way_out)
    for name, base in base_buffers_of(gm).items():  # whose copies in the graph belong to the adapters
        if base is not None and has_attribute(model, name):
            register_tensor(model, name, base.to(tensor_of(model, name)).detach())
    return model
