"""Walks along the edges of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx


def walk(starts: Iterable[Any], following: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Yield each node that can be reached from `starts` once, depth first, the starts included.

    Args:
        starts: the nodes to begin at; arguments that are not nodes, such as numbers, are skipped.
        following: gives the nodes that come after a node, such as its operands or its users.
    """
    stack = list(dict.fromkeys(start for start in starts if isinstance(start, fx.Node)))
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for other in following(node):
            if other not in seen:
                seen.add(other)
                stack.append(other)


def ancestors(nodes: Iterable[Any], stop: Callable[[fx.Node], bool] = lambda node: False) -> Iterator[fx.Node]:
    """Yield `nodes` and all nodes that they are computed from, each once.

    Args:
        nodes: as `starts` of `walk`.
        stop: says at which nodes the walk ends: such a node is yielded, its operands are not.
    """
    return walk(nodes, lambda node: () if stop(node) else node.all_input_nodes)
