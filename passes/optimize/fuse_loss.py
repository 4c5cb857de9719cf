"""Make one operation of the head of a model, what follows it, and the cross-entropy of its logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.layers import module_call_of
from ...graph.queries import obstacle_between, operation_name, value_of
from ...ops.chunked_loss import ChunkedLoss, Step
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten

_ELEMENTWISE: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
}
_COPIES = {aten.contiguous.default, aten.clone.default}
_VIEWS = {aten.view.default, aten.reshape.default}
_CHOICES_BY_DIM = {aten.slice.Tensor, aten.select.int}
_REDUCTIONS = {1: True, 2: False}
"""The reductions of cross-entropy by their number: whether each is the mean, and not the sum."""


@dataclass(frozen=True)
class FuseLoss(GraphPass):
    """Compute the loss of a head some rows at a time, and only of rows that have a label; its logits are not made.

    A training step of a language model saves its logits, as many as the vocabulary is large for each token, and
    multiplies by the head for every token. The pass goes back from the cross-entropy to the products with narrow
    values: the head, and an adapter's branch. All between works on each row of logits by itself: scaling, soft-capping,
    sums, casts. Views and slices on the way choose and order rows, so they are done to the narrow values.

    Where the model returns the logits too, it returns None in their place. So the pass runs for models only whose
    caller asked for it (`fuse_loss=True`), and in training mode. Apart from that it is safe, because each row of logits
    depends on that row of the narrow values alone, and nothing but the loss reads the logits.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})
    option: ClassVar[str] = "fuse_loss"

    def run(self, gm: fx.GraphModule) -> Outcome:
        losses = gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
        if not losses:
            return Outcome(0, (Declined((), "the graph computes no cross-entropy"),))
        edits = 0
        declined = []
        for loss in losses:
            try:
                _fuse(gm, loss)
            except _Unfit as reason:
                declined.append(Declined.at([loss], str(reason)))
            else:
                edits += 1
        return Outcome(edits, tuple(declined))


_Moves = tuple[fx.Node, ...]


class _Unfit(Exception):
    """The reason why a loss is not fused."""


class _Value(NamedTuple):
    """An operand of a step: of its kind (`row`, `shared`, `step`) the one of this number."""

    kind: str
    number: int


def _fuse(gm: fx.GraphModule, loss: fx.Node) -> None:
    """Replace a cross-entropy, and what makes its logits.

    Raises:
        _Unfit: the graph was left as it is.
    """
    logits, labels, ignore_index, is_mean = _arguments(loss)
    head = _Head(gm, logits)
    _check_readers(gm, head.members, loss)
    graph = gm.graph
    with graph.inserting_before(loss):
        rows = [_moved(node, moves) for node, moves in head.rows]
        operation = ChunkedLoss(head.steps, len(rows), head.classes, ignore_index, is_mean)
        fused = graph.call_function(operation, (labels, *rows, *head.shared))
    fused.meta = dict(loss.meta)
    loss.replace_all_uses_with(fused)
    graph.erase_node(loss)
    output = graph.output_node()
    output.args = fx.node.map_arg(output.args, lambda node: None if node in head.members else node)


def _check_readers(gm: fx.GraphModule, members: Collection[fx.Node], loss: fx.Node) -> None:
    """Raise `_Unfit` if something else than the loss and the caller needs what the operation stands for."""
    called = gm.meta.get("called", ())
    for node in members:
        others = [user for user in node.users if user not in members and user is not loss and user.op != "output"]
        if others:
            raise _Unfit(f"the logits are read by {operation_name(others[0])} too")
        if name := module_call_of(node, called):
            raise _Unfit(f"a hook stands on {name.partition('@')[0]}")
    if why := obstacle_between(gm, min(members), loss):
        raise _Unfit(why)


def _arguments(loss: fx.Node) -> tuple[fx.Node, fx.Node, int, bool]:
    """Return the logits, the labels, the label that is ignored, and whether the loss is the mean."""
    names = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given: dict[str, Any] = {**dict(zip(names, loss.args, strict=False)), **loss.kwargs}
    logits, labels, reduction = given["input"], given["target"], given.get("reduction", 1)
    value, target = logits.meta.get("val"), labels.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        raise _Unfit("the shapes of logits and labels are not known")
    if value.dim() != 2 or target.dim() != 1 or target.dtype is not torch.int64:
        raise _Unfit("the logits are not a matrix with a number as label of each row")
    if given.get("weight") is not None:
        raise _Unfit("the classes have weights")
    if given.get("label_smoothing", 0.0) != 0.0:
        raise _Unfit("the labels are smoothed")
    if reduction not in _REDUCTIONS:
        raise _Unfit("the loss has a value for each row")
    return logits, labels, given.get("ignore_index", -100), _REDUCTIONS[reduction]


class _Head:
    """The operations that compute logits of narrow values, row by row.

    Args:
        gm: the module.
        logits: a matrix `(n, classes)`.

    Attributes:
        rows: the narrow values, each with the nodes that choose and order its rows up to the logits.
        shared: what is the same for all rows: weights, biases, factors.
        members: the nodes that the operation stands for.

    Raises:
        _Unfit: something on the way is not known to work row by row.
    """

    def __init__(self, gm: fx.GraphModule, logits: fx.Node) -> None:
        self.gm = gm
        self.classes = logits.meta["val"].shape[-1]
        self.rows: list[tuple[fx.Node, _Moves]] = []
        self.shared: list[fx.Node] = []
        self.members: dict[fx.Node, None] = {}
        self._steps: list[tuple[str, list[Any], Any]] = []
        self._known: dict[Any, _Value] = {}
        self._wide(logits, ())
        if not self.rows:
            raise _Unfit("the logits are not computed of narrow values")

    @property
    def steps(self) -> tuple[Step, ...]:
        """The operations, as `ChunkedLoss` takes them."""
        first = {"row": 0, "shared": len(self.rows), "step": len(self.rows) + len(self.shared)}

        def index(operand: Any) -> Any:
            return first[operand.kind] + operand.number if isinstance(operand, _Value) else operand

        return tuple(Step(name, tuple(map(index, operands)), option) for name, operands, option in self._steps)

    def _wide(self, node: fx.Node, moves: _Moves) -> _Value:
        """Add what computes a value that has logits, or parts of them, as rows."""
        if _width(node) != self.classes:
            raise _Unfit(f"{operation_name(node)} on the way to the logits is not made of their rows")
        if (node, moves) not in self._known:
            self._known[node, moves] = self._add(node, moves)
            self.members[node] = None
        return self._known[node, moves]

    def _add(self, node: fx.Node, moves: _Moves) -> _Value:
        args: Any = node.args
        alpha: Any = node.kwargs.get("alpha", 1)
        unknown = node.kwargs.keys() - {"alpha", "memory_format"}
        if _moves_rows(node, self.classes) and not unknown:
            return self._wide(args[0], (node, *moves))
        if node.target is aten.linear.default and not unknown:
            bias = self._shared(args[2], 1) if len(args) > 2 and args[2] is not None else None
            return self._step("linear", [self._row(args[0], moves), self._shared(args[1], 2), bias])
        if node.target in (aten.matmul.default, aten.mm.default):
            return self._step("matmul", [self._row(args[0], moves), self._shared(args[1], 2)])
        if name := _ELEMENTWISE.get(node.target):
            operands = [self._operand(operand, node, moves) for operand in args]
            return self._step(name, operands, float(alpha) if name in ("add", "sub") else None)
        if node.target is aten.tanh.default:
            return self._step("tanh", [self._wide(args[0], moves)])
        if node.target is aten.to.dtype and not unknown and args[1].is_floating_point:
            return self._step("to", [self._wide(args[0], moves)], str(args[1]).removeprefix("torch."))
        if node.target is aten.type_as.default:
            return self._step("type_as", [self._wide(args[0], moves), self._wide(args[1], moves)])
        raise _Unfit(f"{operation_name(node)} on the way to the logits is not known to work row by row")

    def _operand(self, operand: Any, node: fx.Node, moves: _Moves) -> Any:
        """Add an operand of an elementwise operation: a number, a factor for each class or for all, or rows."""
        if not isinstance(operand, fx.Node):
            return float(operand)
        value = value_of(self.gm, operand)
        if isinstance(value, Tensor) and value.dim() <= 1:
            return self._shared(operand, value.dim())
        if isinstance(value, Tensor) and str(value.shape) == str(node.meta["val"].shape):
            return self._wide(operand, moves)
        raise _Unfit(f"{operation_name(node)} on the way to the logits has an operand of another shape")

    def _row(self, node: fx.Node, moves: _Moves) -> _Value:
        """Add a narrow value that has a row for each row of logits."""
        width = _width(node)
        if width is None or width >= self.classes:
            raise _Unfit(f"the logits ({self.classes}) are not wider than what they are computed of ({width})")
        return self._once((node, moves, "row"), "row", self.rows, (node, moves))

    def _shared(self, node: fx.Node, dim: int) -> _Value:
        value = value_of(self.gm, node)
        if not isinstance(value, Tensor) or value.dim() != dim:
            raise _Unfit(f"{operation_name(node)} is not the same for all rows of logits")
        return self._once((node, "shared"), "shared", self.shared, node)

    def _once(self, key: Any, kind: str, values: list[Any], value: Any) -> _Value:
        if key not in self._known:
            values.append(value)
            self._known[key] = _Value(kind, len(values) - 1)
        return self._known[key]

    def _step(self, name: str, operands: list[Any], option: Any = None) -> _Value:
        self._steps.append((name, operands, option))
        return _Value("step", len(self._steps) - 1)


def _width(node: Any) -> int | None:
    """Return the size of the rows of a value; None if it has no rows, or they have no fixed size."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    width = value.shape[-1] if isinstance(value, Tensor) and value.dim() > 1 else None
    return width if isinstance(width, int) else None


def _moves_rows(node: fx.Node, classes: int) -> bool:
    """Check whether `node`, a value of rows of `classes` elements, only chooses and orders such rows."""
    args: Any = node.args
    if not args or _width(args[0]) != classes:
        return False
    dims = args[0].meta["val"].dim()
    if node.target in _CHOICES_BY_DIM:
        return bool((args[1] if len(args) > 1 else 0) not in (-1, dims - 1))
    if node.target is aten.index.Tensor:
        return bool(len(args[1]) < dims)
    return node.target in _VIEWS or node.target in _COPIES


def _moved(node: fx.Node, moves: _Moves) -> fx.Node:
    """Choose and order the rows of a narrow value as the moves do those of logits; return a matrix."""
    width = node.meta["val"].shape[-1]
    for move in moves:
        args: Any = move.args[1:]
        if move.target in _VIEWS:
            args = ([*args[0][:-1], width],)
        elif move.target in _COPIES:
            continue
        target: Any = aten.reshape.default if move.target in _VIEWS else move.target
        value = node.meta["val"]
        node = node.graph.call_function(target, (node, *args))
        node.meta["val"] = value.new_empty((*move.meta["val"].shape[:-1], width))
    return node
