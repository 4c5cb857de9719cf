"""Check the conditions of the optimizing passes one by one: a graph that does not meet one computes the same after.

`tests/mutants` has a mutant for each, which drops the condition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lora_lite_fx.ops.attention_mask import MaskOfSizes
from lora_lite_fx.ops.rotated_blocks import rotated_blocks
from lora_lite_fx.ops.rotated_pairs import rotated_pairs
from lora_lite_fx.passes import (
    AssociateProducts,
    ConvertMaskOnce,
    FoldScaleIntoAddition,
    GatherProducts,
    GroupHeads,
    LeaveOutMask,
    Pipeline,
    PutFastForms,
    RecomputeInputs,
    ShareSiblings,
)
from tests.support.adapter_graphs import IN, check, exported, x
from tests.support.programs import after, reasons

aten = torch.ops.aten
attention = F.scaled_dot_product_attention


def heads(count: int, length: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(1, count, length, 3, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)

# ConvertMaskOnce


def twice(m: Any, q: Tensor, mask: Tensor) -> Any:
    return attention(attention(q, q, q, mask), q, q, mask)


def overwritten_between(m: Any, q: Tensor, mask: Tensor) -> Any:
    mask = mask.clone()
    y = attention(q, q, q, mask)
    mask[:2].logical_not_()
    return attention(y, q, q, mask)


def in_two_types(m: Any, q: Tensor, mask: Tensor) -> Any:
    d = q.double()
    return attention(attention(q, q, q, mask).double(), d, d, mask)


def test_a_mask_of_booleans_is_converted() -> None:
    check(exported(twice, heads(2), MASK), ConvertMaskOnce(), heads(2), MASK, edits=1)


def test_a_mask_of_numbers_is_not_converted() -> None:
    numbers = MASK.float()
    check(exported(twice, heads(2), numbers), ConvertMaskOnce(), heads(2), numbers, edits=0)


def test_a_mask_that_is_overwritten_is_not_left_out() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    check(exported(overwritten_between, heads(2), causal), LeaveOutMask(), heads(2), causal, edits=0)
    check(exported(twice, heads(2), causal), LeaveOutMask(), heads(2), causal, edits=1)


def of_sizes(m: Any, q: Tensor, k: Tensor) -> Any:
    return attention(q, k, k, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())


def of_values(m: Any, q: Tensor, k: Tensor) -> Any:
    return attention(q, k, k, (k[0, 0, :, :1] > 0).expand(-1, q.shape[-2]).t())


def overwritten_with_values(m: Any, q: Tensor, k: Tensor) -> Any:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    seen[:, :1] = k[0, 0, :1, :1] > 0
    return attention(q, k, k, seen.tril())


@pytest.mark.parametrize(
    ("function", "target"),
    [(of_sizes, MaskOfSizes), (of_values, FunctionType), (overwritten_with_values, FunctionType)],
    ids=["sizes", "values", "overwritten"],
)
def test_a_mask_is_looked_at_once_for_each_size_if_it_follows_from_sizes(function: Any, target: type) -> None:
    gm = exported(function, heads(2), heads(2))
    Pipeline((LeaveOutMask(),)).run(gm)
    (look,) = (node for node in gm.graph.nodes if getattr(node.target, "__name__", "") == "needed_mask")
    assert isinstance(look.target, target)


def test_a_mask_that_is_overwritten_is_not_converted() -> None:
    check(exported(overwritten_between, heads(2), MASK), ConvertMaskOnce(), heads(2), MASK, edits=0)


def test_a_mask_of_queries_of_two_types_is_not_converted() -> None:
    check(exported(in_two_types, heads(2), MASK), ConvertMaskOnce(), heads(2), MASK, edits=0)


# FoldScaleIntoAddition


@pytest.mark.parametrize(
    ("compute", "edits"),
    [
        (lambda m, x: F.linear(x, m.weight) + 0.5 * F.linear(F.linear(x, m.a), m.b), 1),
        (lambda m, x: 0.5 * F.linear(F.linear(x, m.a), m.b) + F.linear(x, m.weight), 1),
        (lambda m, x: F.linear(x, m.weight) - 0.5 * F.linear(F.linear(x, m.a), m.b), 1),
    ],
    ids=["sum", "the other way round", "difference"],
)
def test_a_scale_is_folded(compute: Any, edits: int) -> None:
    check(exported(compute, x(), base="linear"), FoldScaleIntoAddition(), x(), edits=edits)


def test_an_addition_with_a_factor_keeps_it() -> None:
    compute = lambda m, x: torch.add(F.linear(x, m.weight), 0.5 * F.linear(F.linear(x, m.a), m.b), alpha=3)  # noqa: E731
    check(exported(compute, x(), base="linear"), FoldScaleIntoAddition(), x(), edits=0)


def test_a_difference_keeps_its_sign() -> None:
    compute = lambda m, x: 0.5 * F.linear(F.linear(x, m.a), m.b) - F.linear(x, m.weight)  # noqa: E731
    check(exported(compute, x(), base="linear_2"), FoldScaleIntoAddition(), x(), edits=0)


def test_a_number_is_not_the_first_term() -> None:
    compute = lambda m, x: 0.5 * F.linear(x, m.a) + 1.0  # noqa: E731
    check(exported(compute, x()), FoldScaleIntoAddition(), x(), edits=0)


def test_a_tensor_is_not_a_factor() -> None:
    compute = lambda m, x: F.linear(x, m.weight) + F.linear(F.linear(x, m.a), m.b) * m.row  # noqa: E731
    check(exported(compute, x(), base="linear"), FoldScaleIntoAddition(), x(), edits=0)


# GatherProducts


def lora(m: Any, x: Tensor) -> Any:
    return F.linear(x, m.weight) + F.linear(F.linear(x, m.a), m.b)


def scaled(m: Any, x: Tensor) -> Any:
    y = F.linear(x, m.weight)
    return (((y + F.linear(F.linear(x, m.a), m.b)) * m.row).type_as(y)) + 1


GATHERED: dict[str, tuple[Any, int]] = {
    "sum": (lora, 1),
    "scaled": (scaled, 1),
    "difference": (lambda m, x: F.linear(x, m.weight) - F.linear(F.linear(x, m.a), m.b), 0),
    "bias of the branch": (lambda m, x: F.linear(x, m.weight) + F.linear(F.linear(x, m.a), m.b, m.bias), 0),
    "other input": (lambda m, x: F.linear(x, m.weight) + F.linear(F.linear(2 * x, m.a), m.b), 0),
}


@pytest.mark.parametrize("case", GATHERED)
def test_products_are_gathered_where_the_operation_computes_their_sum(case: str) -> None:
    compute, edits = GATHERED[case]
    check(exported(compute, x(), base="linear add_1"), GatherProducts(), x(), edits=edits)


WIDER: dict[str, tuple[Any, int]] = {
    "not cast": (lambda m, y, z: y + z, 0),
    "cast": (lambda m, y, z: (y + z).type_as(y) + 1, 1),
    "scaled": (lambda m, y, z: ((y + z) * m.row.float()).type_as(y) + 1, 1),
    "shifted": (lambda m, y, z: ((y + z) * m.row.float() + m.row).type_as(y) + 1, 0),
    "read twice": (lambda m, y, z: (y + z).type_as(y) * (y + z).sum(), 0),
}


@pytest.mark.parametrize("case", WIDER)
def test_a_wider_sum_is_gathered_where_it_is_cast_to_the_type_of_its_site(case: str) -> None:
    result, edits = WIDER[case]

    def compute(m: Any, x: Tensor) -> Any:
        z = F.linear(F.linear(x.to(torch.float32), m.a.to(torch.float32)), m.b.to(torch.float32))
        return result(m, F.linear(x, m.weight), z)

    half = x(dtype=torch.bfloat16)
    gm = exported(compute, half, base="linear_2 add_1", dtype=torch.bfloat16)
    check(gm, GatherProducts(), half, edits=edits)


def test_the_weight_of_a_branch_is_not_a_site() -> None:
    compute = lambda m, x: F.linear(x, m.b @ m.a2) + F.linear(F.linear(x, m.a), m.b)  # noqa: E731
    check(exported(compute, x()), GatherProducts(), x(), edits=0)


def test_every_column_must_be_used() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        first, _ = F.linear(x, torch.cat((m.a, m.a2))).split([2, 2], -1)
        return F.linear(x, m.weight) + F.linear(first, m.b)

    gm = exported(compute, x(), base="linear_1")
    gm.graph.eliminate_dead_code()  # the other columns
    check(gm, GatherProducts(), x(), edits=0)


def test_a_site_is_not_moved_across_a_write() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        x = x + 0
        t = F.linear(x, m.a)
        x[:1].mul_(2)
        return F.linear(x, m.weight) + F.linear(t, m.b)

    check(exported(compute, x(), base="add slice_1 mul_ linear_1"), GatherProducts(), x(), edits=0, backward=False)


def test_a_term_is_not_read_before_it_is_computed() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        t1, t2 = F.linear(x, torch.cat((m.a, m.a2))).split([2, 2], -1)
        first = F.linear(x, m.weight) + F.linear(t1, m.b)
        return first, F.linear(x, m.weight) + F.linear(t2, m.b2 * first.sum())

    check(exported(compute, x(), base="linear_1 linear_3"), GatherProducts(), x(), edits=0)


def scaled_by(scale: Any) -> Any:
    def compute(m: Any, x: Tensor) -> Any:
        y = F.linear(x, m.weight)
        return ((y + F.linear(F.linear(x, m.a), m.b)) * scale(m, x)).type_as(y) + 1

    return compute


@pytest.mark.parametrize(
    "scale", [lambda m, x: m.row.sum(), lambda m, x: m.b.T * 2, lambda m, x: x[:, :5]], ids=["number", "matrix", "x"]
)
def test_only_rows_are_scales(scale: Any) -> None:
    gm = exported(scaled_by(scale), x(2), base="linear add_1 slice_1")
    assert check(gm, GatherProducts(), x(2)).edits == 1, "the sum itself is gathered"


def test_a_quotient_is_not_a_product() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        y = F.linear(x, m.weight)
        return ((y + F.linear(F.linear(x, m.a), m.b)) / m.row).type_as(y) + 1

    check(exported(compute, x(), base="linear add_1"), GatherProducts(), x(), edits=1)


def test_a_scaled_result_that_is_overwritten_is_not_saved() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        y = F.linear(x, m.weight)
        z = ((y + F.linear(F.linear(x, m.a), m.b)) * m.row).type_as(y)
        return z.mul_(2.0) + 1

    check(exported(compute, x(), base="linear mul_ add_1"), GatherProducts(), x(), edits=1)


def test_a_scale_of_zero_in_float16_has_a_gradient() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        y = F.linear(x, m.weight)
        return (((y + F.linear(F.linear(x, m.a), m.b)) * (m.row * 0.0)).type_as(y)) + 1

    half = x(dtype=torch.float16)
    check(exported(compute, half, base="linear add_1", dtype=torch.float16), GatherProducts(), half, edits=1)


# GroupHeads


def repeated(t: Tensor, times: int) -> Tensor:
    _, count, length, size = t.shape
    return t[:, :, None].expand(1, count, times, length, size).reshape(1, count * times, length, size)


def test_repeated_heads_are_grouped() -> None:
    compute = lambda m, q, k, v: attention(q, repeated(k, 2), repeated(v, 2))  # noqa: E731
    inputs = heads(4), heads(2, seed=1), heads(2, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=1)


def test_keys_and_values_that_are_repeated_differently_are_not_grouped() -> None:
    compute = lambda m, q, k, v: attention(q, repeated(k, 2), repeated(v, 4))  # noqa: E731
    inputs = heads(4), heads(2, seed=1), heads(1, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=0)


def test_heads_that_are_grouped_already_stay() -> None:
    compute = lambda m, q, k, v: attention(q, repeated(k, 2), repeated(v, 2), enable_gqa=True)  # noqa: E731
    inputs = heads(8), heads(2, seed=1), heads(2, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=0)


def test_heads_that_are_repeated_one_after_the_other_are_not_grouped() -> None:
    def tiled(t: Tensor) -> Tensor:
        _, count, length, size = t.shape
        return t[:, None].expand(1, 2, count, length, size).reshape(1, 2 * count, length, size)

    compute = lambda m, q, k, v: attention(q, tiled(k), tiled(v))  # noqa: E731
    inputs = heads(4), heads(2, seed=1), heads(2, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=0)


def test_a_reshape_that_joins_other_dimensions_stays() -> None:
    def joined(t: Tensor) -> Tensor:
        _, count, length, size = t.shape
        return t[:, :, None].expand(1, count, 2, length, size).reshape(1, count, 2 * length, size)

    compute = lambda m, q, k, v: attention(q, joined(k), joined(v))  # noqa: E731
    inputs = heads(2), heads(2, seed=1), heads(2, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=0)


def test_keys_that_a_slice_leaves_out_are_not_read() -> None:
    compute = lambda m, q, k, v: attention(q, repeated(k[:, :, :2], 2), repeated(v[:, :, :2], 2))  # noqa: E731
    inputs = heads(4), heads(2, seed=1), heads(2, seed=2)
    check(exported(compute, *inputs), GroupHeads(), *inputs, edits=1)


# AssociateProducts


def reflected(m: Any, x: Tensor) -> Any:
    return F.linear(x + F.linear(F.linear(x, m.a), m.back), m.weight)


def with_a_factor(m: Any, x: Tensor) -> Any:
    return F.linear(torch.add(x, F.linear(F.linear(x, m.a), m.back), alpha=3), m.weight)


def branch_is_read_elsewhere(m: Any, x: Tensor) -> Any:
    branch = F.linear(F.linear(x, m.a), m.back)
    return F.linear(x + branch, m.weight), branch + 1


def weight_comes_later(m: Any, x: Tensor) -> Any:
    z = x + F.linear(F.linear(x, m.a), m.back)
    return F.linear(z, m.weight * x.mean())


def overwritten_input(m: Any, x: Tensor) -> Any:
    x = x + 0
    z = x + F.linear(F.linear(x, m.a), m.back)
    x[:1].mul_(2)
    return F.linear(z, m.weight)


@pytest.mark.parametrize(
    ("compute", "base", "edits"),
    [
        (reflected, "linear_2", 1),
        (with_a_factor, "linear_2", 0),
        (branch_is_read_elsewhere, "linear_2 add_1", 0),
        (weight_comes_later, "mean mul linear_2", 0),
        (overwritten_input, "add slice_1 mul_ linear_2", 0),
    ],
    ids=["moves", "factor", "read elsewhere", "weight", "write"],
)
def test_a_branch_moves_to_the_output_where_that_is_the_same(compute: Any, base: str, edits: int) -> None:
    check(exported(compute, x(), base=base), AssociateProducts(), x(), edits=edits, backward=False)


# RecomputeInputs


def after_dropout(m: Any, x: Tensor) -> Any:
    return F.linear(F.linear(F.dropout(x, 0.5, True), m.a), m.b)


def test_dropout_is_not_drawn_again() -> None:
    check(exported(after_dropout, x(), base="dropout"), RecomputeInputs(), x(), edits=0)


# PutFastForms


def blocks_of(m: Any) -> Tensor:
    result: Tensor = m.a.reshape(3, 2, 2)
    return result


def pairs_of(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1, 1, 2, 3), *m.a.reshape(2, 1, 2, 3)


def set_argument(target: Any, place: int, value: Any) -> Callable[[fx.GraphModule], None]:
    """Return a change of one argument of the node that calls `target`; the value may be a function of the graph."""

    def change(gm: fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        node.update_arg(place, value(gm) if callable(value) else value)

    return change


def factor_of_sum(gm: fx.GraphModule) -> None:
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    node.update_kwarg("alpha", 0.5)


def write_after(target: Any) -> Callable[[fx.GraphModule], None]:
    """Return a change that overwrites the input of a graph after the node that calls `target`."""

    def change(gm: fx.GraphModule) -> None:
        copied = next(iter(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)))
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        with gm.graph.inserting_after(node):
            gm.graph.call_function(aten.mul_.Tensor, (copied, 2.0))

    return change


def sine(gm: fx.GraphModule) -> fx.Node:
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(x):
        result = gm.graph.call_function(aten.sin.default, (x,))
    result.meta["val"] = x.meta["val"]
    return result


@pytest.mark.parametrize(
    ("change", "edits"),
    {
        "a rotation": (lambda gm: None, 1),
        "blocks from the other side": (set_argument(aten.einsum.default, 0, "...nk,nck->...nc"), 0),
        "a factor": (factor_of_sum, 0),
        "of another value": (set_argument(aten.add.Tensor, 0, sine), 0),
        "rows of one block": (set_argument(aten.unflatten.int, 2, [1, -1, 2]), 0),
    }.values(),
)
def test_blocks_are_rotated_by_one_operation_where_that_is_the_same(change: Any, edits: int) -> None:
    gm = exported(lambda m, x: rotated_blocks(x, blocks_of(m)), x())
    change(gm)
    gm.recompile()
    check(gm, PutFastForms(), x(), edits=edits)


@pytest.mark.parametrize(
    ("change", "edits"),
    {
        "a rotation": (lambda gm: None, 1),
        "a factor": (factor_of_sum, 0),
        "another order": (set_argument(aten.flip.default, 1, [-1]), 0),
        "of two values": (set_argument(aten.flip.default, 0, lambda gm: reshaped(gm, sine(gm))), 0),
    }.values(),
)
def test_pairs_are_rotated_by_one_operation_where_that_is_the_same(change: Any, edits: int) -> None:
    gm = exported(lambda m, x: rotated_pairs(*pairs_of(m, x)), x())
    change(gm)
    gm.recompile()
    check(gm, PutFastForms(), x(), edits=edits)


def reshaped(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return `node` in pairs."""
    (flip,) = gm.graph.find_nodes(op="call_function", target=aten.flip.default)
    with gm.graph.inserting_before(flip):
        return gm.graph.call_function(aten.reshape.default, (node, [-1, 1, 2, 3]))


@pytest.mark.parametrize(
    ("compute", "between"),
    [
        (lambda m, x: rotated_blocks(x * 1.0, blocks_of(m)), aten.flatten.using_ints),
        (lambda m, x: rotated_pairs(*pairs_of(m, x * 1.0)), aten.flip.default),
    ],
    ids=["blocks", "pairs"],
)
def test_operations_are_not_moved_across_a_write(compute: Any, between: Any) -> None:
    gm = exported(compute, x())
    write_after(between)(gm)
    gm.recompile()
    check(gm, PutFastForms(), x(), edits=0, backward=False)


# ShareSiblings


def test_siblings_share_a_product() -> None:
    compute = lambda m, x: (F.linear(x, m.a), F.linear(x, m.a2))  # noqa: E731
    check(exported(compute, x()), ShareSiblings(), x(), edits=1)


def test_a_matrix_that_depends_on_the_input_is_not_shared() -> None:
    compute = lambda m, x: (F.linear(x, m.a), F.linear(x, m.a2 * x.mean()))  # noqa: E731
    check(exported(compute, x(), base="mean"), ShareSiblings(), x(), edits=0)


def test_matrices_of_two_types_are_not_stacked() -> None:
    """Each product has the type of its matrix under autocast, or where the operator takes two types."""
    gm: Any = exported(lambda m, x: (F.linear(x, m.a), F.linear(x, m.a2)), x())
    gm.a2 = torch.nn.Parameter(gm.a2.double())
    _, report = after(gm, ShareSiblings())
    assert (report.edits, len(reasons(report))) == (0, 1)


def test_products_around_a_write_are_not_shared() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        x = x + 0
        y = F.linear(x, m.a)
        x[:1].mul_(2)
        return y, F.linear(x, m.a2)

    check(exported(compute, x(), base="add slice_1 mul_"), ShareSiblings(), x(), edits=0, backward=False)


def test_equal_computations_around_a_write_stay_apart() -> None:
    def compute(m: Any, x: Tensor) -> Any:
        x = x + 0
        y = x * 2.0
        x[:1].mul_(3)
        return y, x * 2.0

    check(exported(compute, x(), base="add slice_1 mul_"), ShareSiblings(), x(), edits=0)


def test_computations_with_other_options_stay_apart() -> None:
    compute = lambda m, x: (torch.add(x, x, alpha=2), torch.add(x, x, alpha=3))  # noqa: E731
    check(exported(compute, x()), ShareSiblings(), x(), edits=0)


def test_dropouts_stay_apart() -> None:
    compute = lambda m, x: (F.dropout(x, 0.5, True), F.dropout(x, 0.5, True))  # noqa: E731
    check(exported(compute, x(64)), ShareSiblings(), x(64), edits=0)


def test_the_bias_of_a_product_is_not_lost() -> None:
    compute = lambda m, x: (F.linear(x, m.b.T, m.row[:2]), F.linear(x, m.b2.T, m.row[2:4]))  # noqa: E731
    value = x()[:, :5]
    assert IN > 5
    check(exported(compute, value), ShareSiblings(), value)
