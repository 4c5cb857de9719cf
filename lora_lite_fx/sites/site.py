"""Sites: the linear computations of a captured graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..errors import ConfigError
from ..graph.insertion import inner_name
from ..graph.sharded import whole
from ..graph.tensors import tensor_of
from ..graph.walk import walk
from .computed import Computation
from .kinds.banked_linear import Banked
from .kinds.linear import Linear
from .kinds.site_kind import SiteKind
from .matching import Call


@dataclass(frozen=True)
class Site:
    """One computation that is linear in a frozen `W (d_out, d_in)`: `y = x W^T + b`, or another product with `W`.

    Args:
        name: qualified name of the module that owns the weight. If the module owns several weights, it is
            `<module>.sites.<parameter>`, or the parameter's name without `_weight`.
        d_in: size of the last dimension of the input; for an embedding the number of ids, for a convolution the number
            of channels times the size of the kernel.
        d_out: size of the last dimension of the output; for a convolution, the number of channels.
        roles: its roles in the model, see `roles.ROLES`; empty if the dataflow leaves a doubt.
        weight: qualified name of the weight parameter; of the largest one, if the weight is computed from several.
        bias: qualified name of the bias, a parameter or a buffer; of the largest, if it is computed. None without bias.
        kind: how it multiplies with the weight, and the layout of the weight.
        bias_rows: the rows of the bias parameter that are the bias, as the first and the one after the last. None
            means all.
        experts: the number of experts that have a `W` in the weight; 0 for other kinds of sites.
        tied: the names of the other sites that have the same parameter as their weight.
        reasons: the reason for each role.
        calls: its executions in the graph; several for a module that is used several times.
    """

    name: str
    d_in: int
    d_out: int
    roles: frozenset[str] = frozenset()
    weight: str = ""
    bias: str | None = None
    kind: SiteKind = field(default_factory=Linear)
    bias_rows: tuple[int, int] | None = None
    experts: int = 0
    tied: tuple[str, ...] = field(default=(), compare=False)
    reasons: dict[str, str] = field(default_factory=dict, compare=False)
    calls: tuple[Call, ...] = field(default=(), compare=False, repr=False)

    @property
    def transposed(self) -> bool:
        """Tell whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does."""
        return self.kind.transposed

    @property
    def is_plain_linear(self) -> bool:
        """Tell whether it is a linear over the last dimension, with one adapter for all rows."""
        return type(self.kind) is Linear

    @property
    def computed_weight(self) -> fx.Node | None:
        """The node that is the stored weight, if the graph computes it; see `computed.Computation`."""
        return self.calls[0].computed_weight if self.calls else None

    @property
    def computed_bias(self) -> fx.Node | None:
        """The node that is the bias, if the graph computes it."""
        return self.calls[0].computed_bias if self.calls else None

    def own_bias(self, stored: Tensor | None) -> Tensor | None:
        """Return the bias `(d_out,)` from the stored parameter, or None if there is none."""
        return stored if stored is None or self.bias_rows is None else stored[slice(*self.bias_rows)]

    def stored_bias(self, bias: Tensor, like: Tensor) -> Tensor:
        """Return the parameter to store for `bias (d_out,)`. Rows of other sites come from `like`."""
        if self.bias_rows is None:
            return bias
        start, end = self.bias_rows
        return torch.cat([like[:start], bias, like[end:]])

    def with_bank(self, slots: int, batch: int = 0) -> Site:
        """Return the site as one whose adapter is a bank.

        Args:
            slots: the number of adapters.
            batch: the dimension of its input and output that counts the rows of the batch.

        Raises:
            ConfigError: it is not a plain linear.
        """
        if not self.is_plain_linear:
            raise ConfigError(
                f"{self.name!r} is {self.kind.article}, and a bank has its adapters at plain linears. The way out:"
                " leave the site out by exclude_names, or one adapter for all rows."
            )
        return replace(self, kind=Banked(self.kind.transposed, self.kind.rows, slots, batch))

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel of a convolution; empty at other sites."""
        kernel: tuple[int, ...] = getattr(self.kind, "kernel", ())
        return kernel

    @property
    def channels(self) -> int:
        """The size of a row of `W` without the kernel: the channels of a convolution, or of one of its groups."""
        return self.d_in // math.prod(self.kernel)

    @cached_property
    def layer(self) -> int | None:
        """The index of its layer: the first number in its name, or None."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def is_called(model: nn.Module, site: Site) -> bool:
    """Return whether `site` is a module of `model` of its own, and runs only when that module is called."""
    owner = site.weight.rpartition(".")[0]
    named = {name for name, _ in model.named_modules(remove_duplicate=False)}  # a shared module has several names
    return {site.name, owner} <= named and all(inner_name(call.node) == site.name for call in site.calls)


def span(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Return the nodes on the way from `x` to `y`, without `x` and with `y`, in graph order."""
    # The graph is in topological order: what stands before `x` does not depend on it.
    needed = walk([y], lambda node: [operand for operand in node.all_input_nodes if x < operand])
    reached: set[fx.Node] = {x}
    for node in sorted(needed):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return sorted(reached - {x})


def stored_weight(model: nn.Module, site: Site) -> Tensor:
    """Return the frozen weight of `site` as the graph has it, a parameter or computed from the tensors of `model`."""
    return frozen_tensor(model, site.weight, site.computed_weight)


def stored_bias(model: nn.Module, site: Site) -> Tensor | None:
    """Return the frozen bias of `site` as the graph has it, or None."""
    return None if site.bias is None else frozen_tensor(model, site.bias, site.computed_bias)


def frozen_tensor(model: nn.Module, name: str, computed: fx.Node | None) -> Tensor:
    """Return the tensor of `model` that has this name; or the one that `computed` is, if that is given.

    All processes gather it if they have parts of it.
    """
    return whole(tensor_of(model, name).detach()) if computed is None else Computation.of(computed).run(model)
