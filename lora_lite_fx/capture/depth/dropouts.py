"""Make the graph of a model in evaluation from that in training, where only dropouts tell the two modes apart.

A run without data shows whether they do: in both modes it computes without the dropouts, and notes what each was called
with. If nothing else differs between the records, the graph of the one mode is that of the other but for these numbers.
An export takes some ten times as long as such a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...graph.copies import Draft, copy_graph
from ...graph.queries import argument_of, set_argument
from .program import Step
from .watched_functions import MadeContiguous

_DROPOUT = torch.ops.aten.dropout.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_NUMBERS: dict[Any, tuple[str, ...]] = {_DROPOUT: ("p", "train"), _ATTENTION: ("dropout_p",)}
"""The arguments of dropouts that may differ between the modes."""

Dropout = tuple[Any, ...]
"""The operator of a dropout, and its numbers."""


class WithoutDropouts(TorchFunctionMode):
    """Computes without dropouts, and records them.

    Args:
        record: gets the dropouts, in order.
    """

    def __init__(self, record: list[Dropout]) -> None:
        super().__init__()
        self._record = record
        self._stand_ins: dict[Any, Callable[..., Any]] = {
            F.dropout: self._dropout,
            torch.dropout: self._plain_dropout,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._stand_ins.get(func, func)(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        self._record.append((_DROPOUT, p, training))
        return F.dropout(input, 0.0, False, inplace)

    def _plain_dropout(self, input: Tensor, p: float, train: bool) -> Tensor:
        self._record.append((_DROPOUT, p, train))
        return torch.dropout(input, 0.0, False)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        self._record.append((_ATTENTION, dropout_p))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kw)


def with_other_dropouts(gm: fx.GraphModule, before: list[Dropout], after: list[Dropout]) -> fx.GraphModule | None:
    """Return a graph like that of `gm` with other dropouts.

    Args:
        gm: the captured model. The result shares its modules.
        before: the dropouts of the model in the mode in which it was captured.
        after: the same with other numbers.

    Returns:
        The graph; None if `gm` does not have the dropouts of `before`, or if equal ones have different numbers after.
    """
    new = dict(zip(before, after, strict=True))
    if [new[each] for each in before] != after:
        return None
    other = Draft(gm, copy_graph(gm.graph))
    nodes = [node for node in other.graph.nodes if node.target in _NUMBERS]
    if [_dropout_of(node) for node in nodes] != before:
        return None
    for node in nodes:
        _, *numbers = new[_dropout_of(node)]
        for name, number in zip(_NUMBERS[node.target], numbers, strict=True):
            set_argument(node, name, number)
    return other


def has_contiguous_calls(gm: fx.GraphModule, captured: Sequence[Step], other: Sequence[Step]) -> bool:
    """Tell whether a graph makes those tensors contiguous that a run in another mode makes.

    Dropouts change how the result of an attention lies in memory, and a graph lacks the calls without effect.

    Args:
        gm: the graph.
        captured: the steps of a run in the mode in which it was captured.
        other: those of a run with the same calls.
    """
    acting, needed = (
        [step.what.acts for step in steps if isinstance(step.what, MadeContiguous)] for steps in (captured, other)
    )
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)
    return len(nodes) == sum(acting) and all(acts for acts, needs in zip(acting, needed, strict=True) if needs)


def _dropout_of(node: fx.Node) -> Dropout:
    return node.target, *(argument_of(node, name) for name in _NUMBERS[node.target])
