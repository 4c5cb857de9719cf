"""Values that a graph computes in another way in each mode.

A model may run other operations in training than in evaluation, such as stochastic depth. Its graph then has both, over
the same tensors, and chooses among the results. A program is for one mode, and has only the operations of that mode.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .walk import ancestors


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return the value of the mode."""
    return in_training if training else in_evaluation


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
    kept = [node for node in graph.nodes if node.op == "call_module" or node.is_impure(impure_random=False)]
    needed = set(ancestors(kept))
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
