"""Run a backward pass without torch's engine, which asks the devices of tensors for streams, and fails without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


@torch.no_grad()
def gradients_of(loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the leaves that `loss` is computed of, each with its gradient, by the functions that autograd recorded."""
    found: list[tuple[Tensor, Tensor]] = []
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in _in_order(loss.grad_fn):
        of_outputs = gradients.pop(node, {})
        if not of_outputs:
            continue
        if hasattr(node, "variable"):
            found.append((node.variable, of_outputs[0]))
            continue
        for (following, place), gradient in _of_inputs(node, of_outputs):
            if gradient is not None:
                like, known = following._input_metadata[place], gradients[following]
                gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                known[place] = known[place] + gradient if place in known else gradient
    return found


def _in_order(last: Any) -> list[Any]:
    """Return the functions such that each comes after all that use its result."""
    order: list[Any] = []
    stack, seen = [(last, False)], set()
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]


def _of_inputs(node: Any, of_outputs: dict[int, Tensor]) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """Return the edges to the functions of the inputs that need a gradient, each with that."""
    known = [of_outputs.get(place) for place in range(len(node._input_metadata))]
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    is_of_python = isinstance(node, BackwardCFunction)
    if is_of_python:  # one of Python, which gets zeros, and has results for all arguments
        given = [
            _zeros(like) if value is None else value for value, like in zip(known, node._input_metadata, strict=True)
        ]
        results = node.apply(*given)
        results = results if isinstance(results, tuple) else (results,)
        needed = [result for result, needs in zip(results, node.needs_input_grad, strict=True) if needs]
    else:
        results = node(*known)
        results = results if isinstance(results, tuple) else (results,)
        needed = [each for each, edge in zip(results, node.next_functions, strict=True) if edge[0] is not None]
    return zip(edges, needed, strict=True)


def _zeros(like: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
