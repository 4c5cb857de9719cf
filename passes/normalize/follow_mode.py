"""One graph for training and evaluation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...compat.torch import OpOverload, schema_of
from ...errors import COMPILE_INSTEAD, CaptureError
from ...graph.copies import copy_graph
from ...graph.modes import add_flagged_modules, owner_of, read_flag
from ...graph.queries import line_of
from ..pipeline import GraphPass, eliminate_dead_code
from .both_modes import take_both

aten = torch.ops.aten


@dataclass(frozen=True)
class FollowMode(GraphPass):
    """Make a graph captured in training mode compute the same as `eval_graph` when its module is in evaluation mode.

    Safe because both graphs were captured from one function, and the pass compares them node by node. They may differ
    in literals (the flags of dropout and batch norm, the dropout probability of attention), in the counters that batch
    norm keeps in training, and in dropouts that evaluation leaves out. Each difference becomes an expression of the
    flag `training` of the module that ran the operation, which `torch.compile` guards on and `torch.export` freezes.
    Where they differ otherwise, as by stochastic depth, the graph computes both and chooses, and the programs derived
    from it compute one.

    Args:
        eval_graph: the graph of the same function, captured in evaluation mode.

    Raises:
        CaptureError: the modes differ in what they return, or in tensors that they write to.
    """

    eval_graph: fx.Graph

    def run(self, gm: fx.GraphModule) -> int:
        for module in (gm, self.eval_graph.owning_module):
            if module is not None:
                eliminate_dead_code(module)  # such as a cast of what only the other mode reads
        before = copy_graph(gm.graph)
        try:
            edits = follow_mode(gm.graph, self.eval_graph)
        except ModesDiffer as error:
            gm.graph = before
            added = take_both(gm, self.eval_graph)
            if added is None:
                raise CaptureError(str(error)) from None
            edits = added
        add_flagged_modules(gm, gm.graph)
        return edits


def follow_mode(train_graph: fx.Graph, eval_graph: fx.Graph) -> int:
    """Do the work of `FollowMode` on bare graphs; return the number of arguments changed."""
    merge = _TwoModes(train_graph)
    # The graphs may read sizes at different places, so skip those here: their users are compared instead.
    evals = (node for node in eval_graph.nodes if not _is_size(node))
    expected = next(evals, None)
    for node in [node for node in train_graph.nodes if not _is_size(node)]:
        while expected is not None and _is_layout(expected) and not _is_layout(node):
            merge.only_in_evaluation(expected, before=node)
            expected = next(evals, None)
        if expected is not None and (node.op, node.target) == (expected.op, expected.target):
            merge.pair(node, expected)
            expected = next(evals, None)
        else:
            merge.only_in_training(node)
    if expected is not None:
        raise ModesDiffer(expected)
    return merge.edits


class _TwoModes:
    """The graph for training while it is changed, and the nodes of the graph for evaluation that match its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.twin: dict[fx.Node, fx.Node] = {}
        self.edits = 0
        self.flags: dict[str, fx.Node] = {}
        self.skipped: set[fx.Node] = set()
        self.counted: set[fx.Node] = set()

    def pair(self, node: fx.Node, twin: fx.Node) -> None:
        """Let the arguments of `node` follow those of its twin in the other graph."""
        if node.op in ("placeholder", "get_attr"):
            self.twin[twin] = node
            return
        args, kwargs = _with_defaults(node, twin)
        twin_args, twin_kwargs = _with_defaults(twin, node)
        if kwargs.keys() != twin_kwargs.keys():
            raise ModesDiffer(node)
        node.args = self._follow(node, args, twin_args)
        node.kwargs = {key: self._follow(node, value, twin_kwargs[key]) for key, value in kwargs.items()}
        self.twin[twin] = node

    def only_in_evaluation(self, node: fx.Node, before: fx.Node) -> None:
        """Take a change of layout over for both modes."""
        with self.graph.inserting_before(before):
            self.twin[node] = self.graph.node_copy(node, lambda operand: self.twin[operand])
        self.edits += 1

    def only_in_training(self, node: fx.Node) -> None:
        """Make a node that only training has do nothing in evaluation: a counter, a dropout, a change of layout.

        Raises:
            CaptureError: the node is none of these.
        """
        if node.op == "get_attr" or _is_layout(node):
            return
        if node.target is aten.dropout.default and node.args[2] is True:
            node.update_arg(2, self._flag(node))
            self.skipped.add(node)
            self.edits += 1
            return
        counter = node.args[0] if node.target in (aten.add_.Tensor, "add_") else None
        # A module that runs several times adds to the counter that its earlier call returned.
        if not isinstance(counter, fx.Node) or not (counter.op == "get_attr" or counter in self.counted):
            raise ModesDiffer(node)
        node.update_arg(1, self._follow(node, node.args[1], 0))
        self.counted.add(node)

    def _follow(self, node: fx.Node, in_train: Any, in_eval: Any) -> Any:
        if isinstance(in_train, fx.Node):
            if _is_size(in_train) and isinstance(in_eval, fx.Node) and self._equal_sizes(in_train, in_eval):
                return in_train
            twin = self.twin.get(in_eval)
            if twin is None or self._passed_on(twin) is not self._passed_on(in_train):
                raise ModesDiffer(node)
            return twin if _is_layout(twin) else in_train
        if isinstance(in_train, (tuple, list)) and isinstance(in_eval, (tuple, list)):
            if len(in_train) != len(in_eval):
                raise ModesDiffer(node)
            return type(in_train)(self._follow(node, t, e) for t, e in zip(in_train, in_eval, strict=True))
        if isinstance(in_train, dict) and isinstance(in_eval, dict) and in_train.keys() == in_eval.keys():
            return {key: self._follow(node, value, in_eval[key]) for key, value in in_train.items()}
        if isinstance(in_train, slice) and isinstance(in_eval, slice):
            bounds = ((in_train.start, in_eval.start), (in_train.stop, in_eval.stop), (in_train.step, in_eval.step))
            return slice(*(self._follow(node, *bound) for bound in bounds))
        if type(in_train) is type(in_eval) and in_train == in_eval:
            return in_train
        if not all(isinstance(value, (bool, int, float)) for value in (in_train, in_eval)):
            raise ModesDiffer(node)
        self.edits += 1
        flag = self._flag(node)
        if in_train is True and in_eval is False:
            return flag
        with self.graph.inserting_before(node):
            if in_train is False and in_eval is True:  # a number would be no switch
                value = total = self.graph.call_function(operator.not_, (flag,))
            else:
                value = self.graph.call_function(operator.mul, (flag, in_train - in_eval))
                total = self.graph.call_function(operator.add, (value, in_eval)) if in_eval else value
        for number in {value, total} if (stack := node.meta.get("nn_module_stack")) else ():
            number.meta["nn_module_stack"] = stack  # so that the layer computes it itself
        return total

    def _passed_on(self, node: fx.Node) -> fx.Node:
        """Return the node that has the value of `node` in evaluation, apart from its layout."""
        while _is_layout(node) or node in self.skipped:
            node = node.all_input_nodes[0]
        return node

    def _equal_sizes(self, in_train: fx.Node, in_eval: fx.Node) -> bool:
        """Check whether a size read in the other graph is known to equal one read in this graph."""
        tensor = self.twin.get(in_eval.args[0]) if _is_size(in_eval) else None  # type: ignore[arg-type]
        if tensor is None:
            return False
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        size = tensor.meta["val"].shape[in_eval.args[1]]
        return statically_known_true(size == in_train.meta["val"])

    def _flag(self, node: fx.Node) -> fx.Node:
        """Return the flag that the operation of `node` depends on: that of the module which ran it."""
        path = owner_of(node)
        if path not in self.flags:
            self.flags[path] = read_flag(self.graph, path)
        return self.flags[path]


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _is_layout(node: fx.Node) -> bool:
    """Check whether `node` only makes a tensor contiguous. Capture leaves such a node out if the tensor is already."""
    return node.target is aten.contiguous.default


def _with_defaults(node: fx.Node, twin: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `node`, with defaults for those that only its twin passes."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for position, argument in enumerate(schema_of(node.target).arguments):
            passed = position < len(args) or argument.name in kwargs
            if passed or not argument.has_default_value():
                continue
            if position < len(twin.args):
                args.append(argument.default_value)
            elif argument.name in twin.kwargs:
                kwargs[argument.name] = argument.default_value
    return tuple(args), kwargs


class ModesDiffer(Exception):
    """A graph runs other operations in training than in evaluation, from `node` on."""

    def __init__(self, node: fx.Node) -> None:
        is_exported = any("val" in each.meta for each in node.graph.find_nodes(op="placeholder"))
        examples = "" if is_exported else "pass example_inputs, so that torch.export captures both modes; or "
        super().__init__(
            f"The model runs other operations in training than in evaluation, from `{node.format_node()}`"
            f"{line_of(node)} on. One graph cannot follow both. The way out: {examples}switch off what draws random"
            f" decisions in training (layerdrop, jitter, SpecAugment) or what branches on self.training, or"
            f" {COMPILE_INSTEAD}."
        )
        self.node = node
