"""Say by class what operators do to the dimensions of their operands, for `follow_rows.py`.

Operators are known by the name that `plain_name` returns. One that is in no class may do anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...compat.torch import OpOverload, schema_of
from ...graph.queries import argument_of
from ..dataflow import op_name

# fmt: off
SAME_ELEMENTS = frozenset({
    "view", "unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "view_as_complex", "view_as_real",
})
"""The same elements in the same order, in another shape."""

CASTS = frozenset({
    "to", "to_copy", "type_as", "contiguous", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy",
})
"""The same elements in the same shape."""

SHAPE_OF_OTHER = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
"""They take no values from their second operand."""

CONSTANTS = frozenset({
    "zeros", "ones", "full", "empty", "rand", "randn", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "new_empty", "expand", "expand_as", "broadcast_to",
    "repeat",
})
"""Of values that do not depend on rows, they make one that is the same in each row, or is drawn for each."""

_EACH_ROW = CASTS | {
    # Elementwise, without the tag that says so.
    "dropout", "native_dropout", "alpha_dropout", "feature_dropout", "bernoulli", "masked_fill", "copy", "fill", "zero",
    "and", "or", "xor", "prelu", "hardswish", "log_sigmoid", "one_hot", "uniform", "normal", "exponential",
    "where", "floor_divide", "tril", "triu", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like",
    # Products. If they sum over the rows, no dimension of their result counts them.
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "grouped_mm", "grouped_mm_fallback",
    # The dimensions in another order, or more of them.
    "transpose", "permute", "t", "mt", "numpy_t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "stack",
    "expand", "expand_as", "broadcast_to",
}

PLACED_BY_VALUE = {"embedding": 0, "bucketize": 1, "isin": 1, "masked_scatter": 2}
"""Operators of each row that take entries of this operand by the values of others: it may not depend on rows."""

STATISTICS = frozenset({
    "batch_norm", "instance_norm", "native_batch_norm", "native_batch_norm_legit",
    "native_batch_norm_legit_no_training",
})
"""They update statistics, which are one for all rows."""

_FIRST_IS_BATCH = STATISTICS | {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "group_norm", "native_group_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im",
    "grid_sampler", "channel_shuffle",
}
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Operators along the time, whose states have other dimensions than their input."""

_SUMS = frozenset({"histc", "bincount"})  # without the tag of reductions
_BY_DIM = ("dim", "dims", "dimension")
# fmt: on

_ALONG_LAST: dict[str, Callable[[fx.Node], int]] = {
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "rms_norm"), lambda node: len(argument_of(node, "normalized_shape"))
    ),
    "cdist": lambda node: 2,
}
"""Operators along the last dimensions, and along how many."""


def plain_name(node: fx.Node) -> str:
    """Return the name of an operator without the underscores of its forms, or of an unknown function, in angles."""
    name = op_name(node)
    known = isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "transformers")
    return name.strip("_") if known else f"<{name}>"


def is_of_each_row(node: fx.Node, name: str) -> bool:
    """Check whether an operator computes each row of its result of the same row of its operands, in any dimension."""
    return name in _EACH_ROW or (isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags)


def dimensions_along(node: fx.Node, name: str, operand: fx.Node) -> frozenset[int] | None:
    """Return the dimensions of an operand along which an operator works; None if that is not known.

    Args:
        node: a call of the operator.
        name: its name.
        operand: one of its operands.
    """
    count = operand.meta["val"].dim()
    every = frozenset(range(count))
    if name in _FIRST_IS_BATCH:
        return every - {0}
    if name in ("pad", "constant_pad_nd"):
        padding = argument_of(node, "pad")  # of the last dimension first
        return frozenset(count - 1 - place // 2 for place, size in enumerate(padding) if size != 0)
    if name.startswith("scaled_dot_product"):
        return every - set(range(count - 2))
    if name in _ALONG_LAST:
        return every - set(range(count - _ALONG_LAST[name](node)))
    if name in RECURRENT:  # states have the layers first
        rows = 0 if argument_of(node, "batch_first") and operand is node.args[0] else 1
        return every - {rows}
    if not isinstance(node.target, OpOverload) or name.startswith("<"):
        return None
    if not any(argument.name in _BY_DIM for argument in schema_of(node.target).arguments):
        return every if sums_up(node, name) else None
    dims: Any = argument_of(node, *_BY_DIM)
    dims = [dims] if isinstance(dims, int) else dims
    return frozenset(dim % count for dim in dims) if dims else every


def sums_up(node: fx.Node, name: str) -> bool:
    """Check whether an operator makes one value of those along its dimensions, in whatever order they are."""
    return name in _SUMS or (isinstance(node.target, OpOverload) and torch.Tag.reduction in node.target.tags)
