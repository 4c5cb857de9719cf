"""Sites: the linear computations of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..graph.provenance import inner_name
from ..graph.walk import walk
from .kinds.linear import SiteKind


@dataclass(frozen=True)
class Call:
    """One execution of a site in the graph: from its input node `x` to its output node `y`.

    `node` is the matrix product in between; they differ where the product is wrapped in reshapes (`Conv1D`) or
    followed by a separate bias addition. `routing` is what it takes besides: of a grouped product, where the tokens of
    each expert end.
    """

    x: fx.Node
    y: fx.Node
    node: fx.Node
    routing: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Site:
    """One linear computation: `y = x W^T + b` with a frozen `W (d_out, d_in)`, or another product that is linear in it.

    Args:
        name: qualified name of the module that owns the weight; of one of its several weights,
            `<module>.sites.<parameter>`, or the parameter's name less `_weight`.
        d_in: size of the last dimension of the input; of an embedding the number of ids, of a convolution that of the
            channels times the size of the kernel.
        d_out: size of the last dimension of the output; of a convolution, the number of channels.
        roles: what it does in the model, see `roles.ROLES`; empty if the dataflow does not tell.
        weight: qualified name of the weight parameter.
        bias: qualified name of the bias parameter, or None.
        kind: what it does with the weight, and the layout of the weight.
        bias_rows: of the bias parameter, where the bias is a part of it: the first and the one after the last; None
            for all.
        experts: how many experts have a `W` in the weight; 0 for a site that is no stack of experts.
        reasons: for each role, why.
        calls: where the graph runs it; several for a module used several times.
    """

    name: str
    d_in: int
    d_out: int
    roles: frozenset[str] = frozenset()
    weight: str = ""
    bias: str | None = None
    kind: SiteKind = field(default_factory=SiteKind)
    bias_rows: tuple[int, int] | None = None
    experts: int = 0
    reasons: dict[str, str] = field(default_factory=dict, compare=False)
    calls: tuple[Call, ...] = field(default=(), compare=False, repr=False)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does."""
        return self.kind.transposed

    def own_bias(self, stored: Tensor | None) -> Tensor | None:
        """The bias `(d_out,)`, from the parameter that it is a part of."""
        return stored if stored is None or self.bias_rows is None else stored[slice(*self.bias_rows)]

    def stored_bias(self, bias: Tensor, like: Tensor) -> Tensor:
        """`bias (d_out,)` as the model stores it; rows of other sites are those of `like`."""
        if self.bias_rows is None:
            return bias
        start, end = self.bias_rows
        return torch.cat([like[:start], bias, like[end:]])

    @cached_property
    def layer(self) -> int | None:
        """The index of the layer it is in: the first number in its name, or None."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def is_called(model: nn.Module, site: Site) -> bool:
    """Whether `site` is a module of `model` of its own, and runs only by a call of it."""
    owner = site.weight.rpartition(".")[0]
    named = {name for name, _ in model.named_modules(remove_duplicate=False)}  # a shared module has several names
    return {site.name, owner} <= named and all(inner_name(call.node) == site.name for call in site.calls)


def span(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """The nodes that `y` computes from `x`, `x` excluded and `y` included, in graph order."""
    # The graph is in topological order: what stands before `x` does not depend on it.
    needed = walk([y], lambda node: [operand for operand in node.all_input_nodes if x < operand])
    reached: set[fx.Node] = {x}
    for node in sorted(needed):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return sorted(reached - {x})
