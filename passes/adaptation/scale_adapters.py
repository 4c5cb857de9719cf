"""Scale adapters by a coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...adapters.accounting import account_for
from ...adapters.beneath import rows_of_replaced
from ...capture.function_tracing.trace import fake_like
from ...capture.graph_calls import add_input
from ...compat.torch import TO_COPY
from ...graph.insertion import OUTLET, PASSED, Insertion, record, recorded, surrounding
from ...graph.tensors import HALF
from ...graph.walk import walk
from ...sites.batch.batch_dimension import batch_dim, batch_sizes, follow_rows
from ...sites.site import Site
from ..pipeline import GraphPass

aten = torch.ops.aten
_CASTS = frozenset({aten.type_as.default, aten.to.dtype, TO_COPY})


@dataclass(frozen=True)
class ScaleAdapters(GraphPass):
    """Make `y = base + c (adapted - base)` of the output of every adapter that has a coefficient.

    An adapter that adds a branch to the output has the branch multiplied. Any other is interpolated with the output
    that is there without it; if it changes the input or a frozen tensor, the frozen linear runs a second time, on what
    it would have read. Safe because `lerp` returns its ends to the bit at 0 and 1, as `base + 0 branch` and
    `base + 1 branch` are.

    Args:
        scales: by name of the adapter, a number, which becomes a part of the graph and of its records; or a tensor
            `()` or `(batch,)`, for which the graph gets an input `scale_<name>`. Its values do not matter.
    """

    scales: Mapping[str, float | Tensor]

    def run(self, gm: fx.GraphModule) -> int:
        account = account_for(gm)
        is_by_row = any(isinstance(scale, Tensor) and scale.dim() for scale in self.scales.values())
        flow = follow_rows(gm.graph) if is_by_row else None
        inputs = {
            name: add_input(gm.graph, input_name(name), _stand_in(gm, scale))
            for name, scale in self.scales.items()
            if isinstance(scale, Tensor)
        }
        edits = 0
        for site in account.adapted("scaled"):
            for call in site.calls:
                y = call.y
                for insertion in surrounding(account.around(site), call.x, call.y)[0]:
                    adapted = insertion.outlet or y
                    scale = self.scales.get(insertion.adapter_name)
                    if scale is None:
                        y = adapted
                        continue
                    rows = None
                    if flow is not None and isinstance(scale, Tensor) and scale.dim():
                        rows = batch_dim(flow, call.y, site.name)
                    given = scale if isinstance(scale, float) else inputs[insertion.adapter_name]
                    y = _scale(site, insertion, y, adapted, given, rows)
                    edits += 1
        return edits


def input_name(adapter_name: str) -> str:
    """Return the name of the input for the coefficient of an adapter."""
    return f"scale_{adapter_name}"


def _stand_in(gm: fx.GraphModule, scale: Tensor) -> Tensor | None:
    """Return a tensor without data for a coefficient, beside those of the graph; None if it has no shapes."""
    values = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    beside = next((value for value in values if isinstance(value, Tensor)), None)
    if scale.dim():
        size = next(iter(batch_sizes(gm.graph).values()))
        assert beside is not None
        return beside.new_empty((size,), dtype=scale.dtype)
    return None if beside is None else fake_like(scale, beside)


def _scale(
    site: Site, insertion: Insertion, y: fx.Node, adapted: fx.Node, scale: fx.Node | float, rows: int | None
) -> fx.Node:
    """Scale one adapter, and return its new output.

    Args:
        site: its site.
        insertion: the adapter at one call of the site.
        y: the output of the call inside the adapter.
        adapted: the output with it; `y` itself if it changes the input or a frozen tensor alone.
        scale: the coefficient, as a number or as an input of the graph.
        rows: the dimension of the output that counts the rows of the batch, if there is one for each; or None.
    """
    if isinstance(scale, float):
        insertion = replace(insertion, scale=insertion.scale * scale)
        for node in insertion.nodes:
            own = recorded(node)
            assert own is not None
            record(node, replace(own, scale=insertion.scale))
    build = _Builder(site, replace(insertion, part=OUTLET), scale, rows, y)
    _scale_passed(insertion, build)
    if (found := _branch(insertion, y, adapted)) is not None:
        branch, total = found
        with y.graph.inserting_before(total):
            total.replace_input_with(branch, build.product(branch))
        return adapted
    with y.graph.inserting_before(max(y, adapted).next):
        base = _without(insertion, y, build)
        result = build.between(base, adapted)
    adapted.replace_all_uses_with(result, delete_user_cb=lambda user: user not in build.inserted)
    return result


def _scale_passed(insertion: Insertion, build: _Builder) -> None:
    """Scale the weight and the bias that an adapter replaces for adapters of other names around it.

    Raises:
        AdapterError: there is a coefficient for each row.
    """
    build = replace(build, insertion=replace(build.insertion, part=PASSED))
    for made, below in insertion.tensors_passed.items():
        readers = (recorded(user) for user in made.users if insertion.is_outside(user))
        reader = next((by for by in readers if by is not None), None)
        if reader is None or reader.adapter_name == insertion.adapter_name:
            continue
        if build.rows is not None:
            raise rows_of_replaced(build.site.name, insertion.adapter_name, reader.adapter_name)
        with made.graph.inserting_before(made.next):
            result = build.call(aten.type_as.default, (build.between(below, made), below), made.meta.get("val"))
        made.replace_all_uses_with(result, delete_user_cb=lambda user: user not in build.inserted)


def _branch(insertion: Insertion, y: fx.Node, adapted: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the value that an adapter adds to the output `y` and the sum, if that is all that the adapter does."""
    if insertion.inlet is not None or insertion.tensors_replaced:
        return None
    total = _uncast(adapted, insertion)
    if total.target is not aten.add.Tensor or total.kwargs or insertion.is_outside(total):
        return None
    operands = [operand for operand in total.args if isinstance(operand, fx.Node)]
    others = [operand for operand in operands if _uncast(operand, insertion) is not y]
    if len(operands) != 2 or len(others) != 1 or insertion.is_outside(others[0]):
        return None
    own = walk(others, lambda node: [read for read in node.all_input_nodes if not insertion.is_outside(read)])
    reads_y = any(y in node.all_input_nodes for node in own)
    return None if reads_y else (others[0], total)


def _uncast(node: fx.Node, insertion: Insertion) -> fx.Node:
    while node.target in _CASTS and not insertion.is_outside(node):
        node = node.all_input_nodes[0]
    return node


def _without(insertion: Insertion, y: fx.Node, build: _Builder) -> fx.Node:
    """Return what `y`, the output inside an adapter, is without what the adapter does to the input and the weights."""
    copies = dict(insertion.tensors_replaced)
    if insertion.inlet is not None:
        assert insertion.x is not None
        copies[insertion.inlet] = insertion.x
    if not copies:
        return y
    changed = set(copies)
    start = min(changed)
    for node in sorted(walk([y], lambda node: [read for read in node.all_input_nodes if start < read])):
        if node not in changed and not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
            copies[node] = build.copy(node, copies)
    return copies.get(y, y)


@dataclass
class _Builder:
    """Inserts nodes of one adapter at the place where the graph inserts, and records them as the adapter's.

    Args:
        site, scale, rows: as of `_scale`.
        insertion: the record of the nodes.
        output: a value of the shape and in the modules of the site's output, which stands before what is inserted.
        inserted: the nodes.
    """

    site: Site
    insertion: Insertion
    scale: fx.Node | float
    rows: int | None
    output: fx.Node
    inserted: set[fx.Node] = field(default_factory=set)

    def product(self, branch: fx.Node) -> fx.Node:
        """Insert `c branch`."""
        # A number () takes part in a product in the type of the other factor.
        scale = self.scale if self.rows is None else self._beside(branch)
        return self.call(aten.mul.Tensor, (branch, scale), branch.meta.get("val"))

    def between(self, base: fx.Node, adapted: fx.Node) -> fx.Node:
        """Insert `base + c (adapted - base)`, which is one of the two to the bit at 0 and 1."""
        value = adapted.meta.get("val")
        is_half = value is not None and value.dtype in HALF  # which would round the coefficient to three digits
        ends = [self._wide(base), self._wide(adapted)] if is_half else [base, adapted]
        scale = self._beside(ends[1])
        lerp = aten.lerp.Tensor if isinstance(scale, fx.Node) else aten.lerp.Scalar
        result = self.call(lerp, (*ends, scale), ends[1].meta.get("val"))
        return self.call(aten.type_as.default, (result, adapted), value) if is_half else result

    def copy(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of a node, whose operands are copies where there are any."""
        copied = self.output.graph.node_copy(node, lambda read: copies.get(read, read))
        return self._recorded(copied)

    def _wide(self, node: fx.Node) -> fx.Node:
        return self.call(aten.to.dtype, (node, torch.float32), node.meta["val"].to(torch.float32))

    def _beside(self, other: fx.Node) -> fx.Node | float:
        """Return the coefficient in the type of `other` and, if there is one for each row, in the shape of the output.

        The type follows the value, because autocast may give it another one than the graph was captured with.
        """
        if not isinstance(self.scale, fx.Node):
            return self.scale
        value, given = other.meta.get("val"), self.scale.meta.get("val")
        known = None if value is None or given is None else given.to(value.dtype)
        scale = self.call(aten.type_as.default, (self.scale, other), known)
        if self.rows is None:
            return scale
        dim, ones = self.rows, [1] * self.output.meta["val"].dim()
        # Not -1, so that another number of coefficients than of rows is an error, and is not broadcast.
        rows = self.call(aten.sym_size.int, (self.output, dim), self.output.meta["val"].shape[dim])
        shape = [*ones[:dim], rows, *ones[dim + 1 :]]
        known = None if known is None else known.view([*ones[:dim], -1, *ones[dim + 1 :]])
        return self.call(aten.view.default, (scale, shape), known)

    def call(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        """Insert the call of an operation that returns a tensor like `value`."""
        node = self.output.graph.call_function(target, args)
        node.meta = {key: entry for key, entry in self.output.meta.items() if key not in ("val", "custom")}
        if value is not None:
            node.meta["val"] = value
        return self._recorded(node)

    def _recorded(self, node: fx.Node) -> fx.Node:
        record(node, self.insertion)
        self.inserted.add(node)
        return node
