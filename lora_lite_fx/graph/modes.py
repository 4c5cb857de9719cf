"""Values that a graph computes in another way in each mode.

A model may run other operations in training than in evaluation, such as stochastic depth. Its graph then has both, over
the same tensors, and chooses among the results. A program is for one mode, and has only the operations of that mode.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .walk import ancestors
from .writes import written_roots


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return the value of the mode."""
    return in_training if training else in_evaluation


def writes_outside(node: fx.Node) -> bool:
    """Tell whether `node` changes a tensor that the graph did not make: one of its module, or an input."""
    return any(root.op in ("get_attr", "placeholder") for root in written_roots(node))


def has_modes(graph: fx.Graph) -> bool:
    """Tell whether `graph` chooses among values by its mode."""
    return any(node.target is by_mode for node in graph.nodes)


def keep_mode(graph: fx.Graph, training: bool) -> None:
    """Leave only what `graph` computes in one mode, in place; random operations of the other are not run either."""
    if not has_modes(graph):
        return
    for node in [node for node in graph.nodes if node.target is by_mode]:
        node.replace_all_uses_with(node.args[1 if training else 2])
        graph.erase_node(node)
    writes = {node: roots for node in graph.nodes if (roots := written_roots(node)) and not writes_outside(node)}
    others = (node for node in graph.nodes if node not in writes)
    needed = set(ancestors(n for n in others if n.op == "call_module" or n.is_impure(impure_random=False)))
    while more := [node for node, roots in writes.items() if node not in needed and not needed.isdisjoint(roots)]:
        needed |= set(ancestors(more))
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
