"""Compute in single precision what adapters compute in double precision for autocast alone."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...adapters.registry import recorded_variant
from ...errors import ConfigError
from ...graph.parameter_work import parameter_work
from ...graph.provenance import recorded
from ...graph.queries import operation_name
from ...ops.precision import double_under_autocast
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten

# Sums and products of a few numbers, whose errors stay those of a rounding, and what moves numbers.
_HARMLESS = {
    aten.add.Tensor,
    aten.index_copy.default,
    aten.mT.default,
    aten.matmul.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.new_zeros.default,
    aten.sub.Tensor,
    aten.unflatten.int,
    aten.unsqueeze.default,
}


@dataclass(frozen=True)
class NarrowParameterWork(GraphPass):
    """Compute sums and products of float32 parameters in float32, where an adapter computes them in float64.

    OFT does, because autocast would form them in half precision and leaves float64 alone. In training they are formed
    in each call, at less than half the time and half the saved bytes in float32. Under autocast they stay in float64.

    Safe because the variant says that autocast is the only reason (`Variant.double_for_autocast`), and its result is
    rounded to float32 anyway. Systems of equations and decompositions, which may enlarge errors, stay in float64 with
    all that leads to them.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        work = dict.fromkeys(parameter_work(gm))  # in the order of the graph
        narrowed: set[fx.Node] = set()
        declined = []
        for node in work:
            if node in narrowed or not _widens_for_autocast(node):
                continue
            inside = _until_float32(node)
            others = [each for each in sorted(inside) if not _is_harmless(each, work)]
            if others:
                names = ", ".join(dict.fromkeys(map(operation_name, others)))
                declined.append(Declined.at([node], f"{names} stay in float64"))
                continue
            narrowed |= inside
        for node in narrowed:
            node.meta["val"] = node.meta["val"].to(torch.float32)
            node.meta.pop("tensor_meta", None)
            if _is_cast(node):
                node.target, node.args = double_under_autocast, node.args[:1]
        return Outcome(len(narrowed), tuple(declined))


def _until_float32(cast: fx.Node) -> set[fx.Node]:
    """Return what is computed in float64 of a cast, and the other casts that are computed with, until it is rounded."""
    inside, waiting = set(), [cast]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        inside.add(node)
        operands = [] if _is_cast(node) else [each for each in node.all_input_nodes if _dtype(each) is torch.float64]
        waiting += [*operands, *(user for user in node.users if not _casts(user, torch.float64, torch.float32))]
    return inside


def _is_harmless(node: fx.Node, work: Container[fx.Node]) -> bool:
    if node not in work:
        return False
    if _is_cast(node):
        return _widens_for_autocast(node)
    return node.target in _HARMLESS and "dtype" not in node.kwargs


def _widens_for_autocast(node: fx.Node) -> bool:
    if not _casts(node, torch.float32, torch.float64) or (provenance := recorded(node)) is None:
        return False
    try:
        return recorded_variant(json.loads(provenance.config)).double_for_autocast
    except ConfigError:  # its class is not known in this process
        return False


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten.to.dtype


def _casts(node: fx.Node, before: torch.dtype, after: torch.dtype) -> bool:
    """Tell whether a node is a cast between these types, and no more."""
    operand = node.args[0] if node.args else None
    return _is_cast(node) and _dtype(operand) is before and node.args[1:] == (after,) and not node.kwargs


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None
