"""The operators at the borders of no_grad and autocast regions."""

from __future__ import annotations

import torch
from torch import fx

from ..compat.torch import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED

GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast


def opens_region(node: fx.Node) -> bool:
    """Check whether a region with a mode of autograd or autocast of its own begins at `node`."""
    return node.target in (ENTER_AUTOCAST, torch.is_grad_enabled)


def closes_region(node: fx.Node) -> bool:
    """Check whether such a region ends at `node`, which sets the mode again that was saved at the beginning."""
    return node.target is EXIT_AUTOCAST or (node.target is SET_GRAD_ENABLED and isinstance(node.args[0], fx.Node))


def sets_mode(node: fx.Node) -> bool:
    """Check whether `node` begins or ends such a region, or sets the mode inside it."""
    return opens_region(node) or node.target in (SET_GRAD_ENABLED, EXIT_AUTOCAST)


def has_branches(gm: fx.GraphModule) -> bool:
    """Check whether a graph has graphs inside, as of `torch.cond`.

    A run of it, with data or without, leaves marks in Dynamo, with which a later capture fails.
    """
    return any(isinstance(module, fx.GraphModule) for module in gm.children())


def without_gradient(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of `graph` that run with autograd switched off by the model itself."""
    without: set[fx.Node] = set()
    enabled, at = True, {}
    for node in graph.nodes:
        if node.target is torch.is_grad_enabled:
            at[node] = enabled
        elif node.target is SET_GRAD_ENABLED:
            enabled = at.get(node.args[0], node.args[0])
        elif not enabled:
            without.add(node)
    return without


def regions_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return in words the regions that each call in `graph` runs in, the outermost first; empty outside of all."""
    regions: dict[fx.Node, str] = {}
    inside: dict[fx.Node, str] = {}  # by the node that begins the region
    for node in graph.nodes:
        if opens_region(node):
            inside[node] = f"{node.target} {node.args}"
        elif closes_region(node):
            inside.pop(node.args[0], None)
        elif node.target is SET_GRAD_ENABLED and inside:
            inside[next(reversed(inside))] = f"{node.target} {node.args}"
        regions[node] = " ".join(inside.values()) if node.op.startswith("call_") else ""
    return regions
