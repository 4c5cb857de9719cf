"""`ChunkedLoss`: loss and gradients are those of all logits at once, and only rows with a label are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_lite_fx.errors import AdapterError, CallError
from lora_lite_fx.ops import chunked_loss
from lora_lite_fx.ops.chunked_loss import ChunkedLoss, Step
from tests.support.selection import broad_after

N, WIDTH, CLASSES, RANK = 23, 6, 17, 2
PLAIN = ChunkedLoss((Step("linear", (0, 1, None)), Step("to", (2,), "float32")), 1, CLASSES)
# Operands: h, t; W, bias, B, factor. A head with an adapter, a factor for each class, soft-capping and scaling.
FULL = ChunkedLoss(
    (
        Step("linear", (0, 2, 3)),
        Step("linear", (1, 4, None)),
        Step("add", (6, 7), 0.5),
        Step("type_as", (8, 6)),
        Step("mul", (9, 5)),
        Step("div", (10, 3.0)),
        Step("tanh", (11,)),
        Step("mul", (12, 3.0)),
        Step("sub", (13, 5), 2.0),
        Step("to", (14,), "float32"),
    ),
    2,
    CLASSES,
)
OTHERS = ChunkedLoss((Step("matmul", (0, 1)), Step("mul", (3, 3)), Step("div", (4, 2))), 1, CLASSES, ignore_index=-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_FEWEST_ROWS", 4)


def operands_of(loss: ChunkedLoss, dtype: torch.dtype, trained: bool = True) -> list[Tensor]:
    """Return random operands; all but the head's weight require gradients, or the rows alone."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if loss.rows == 2:
        rows, shared = [random(N, WIDTH), random(N, RANK)], [random(CLASSES, WIDTH)]
        shared += [random(CLASSES), random(CLASSES, RANK), random(CLASSES)]
    elif loss.steps[0].name == "matmul":
        rows, shared = [random(N, WIDTH)], [random(WIDTH, CLASSES), random(CLASSES).abs() + 1]
    else:
        rows, shared = [random(N, WIDTH)], [random(CLASSES, WIDTH)]
    for index, tensor in enumerate([*rows, *shared]):
        tensor.requires_grad_(index < len(rows) or (trained and index > len(rows)) or loss is OTHERS)
    return [*rows, *shared]


def labels_of(pattern: str, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(1))
    ignored = {"all": [], "half": range(0, N, 2), "one": range(1, N), "none": range(N)}[pattern]
    labels[list(ignored)] = ignore_index
    return labels


def of_all_logits(loss: ChunkedLoss, labels: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Compute the loss as models do, with autograd."""
    logits = loss.values(operands)[-1]
    return F.cross_entropy(logits, labels, ignore_index=loss.ignore_index, reduction="mean" if loss.is_mean else "sum")


def results(loss: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
    trained = [operand for operand in operands if operand.requires_grad]
    return [loss.detach(), *torch.autograd.grad(3 * loss, trained)]


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of each dtype, relative to the largest value."""


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for value, right in zip(ours, expected, strict=True):
        assert value.dtype == right.dtype
        allowed = TOLERANCES[dtype] * float(right.abs().max())
        torch.testing.assert_close(value, right, rtol=0, atol=allowed if right.isfinite().all() else 0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pattern", ["all", "half", "one", "none"])
@pytest.mark.parametrize("is_mean", [True, False])
@pytest.mark.parametrize("kind", [PLAIN, FULL, OTHERS], ids=["plain", "full", "others"])
@pytest.mark.parametrize("waits", [False, True], ids=["cpu", "gpu"])
def test_loss_and_gradients_are_those_of_all_logits(
    kind: ChunkedLoss,
    is_mean: bool,
    pattern: str,
    dtype: torch.dtype,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_loss, "reading_waits", lambda labels: waits)
    steps = tuple(step for step in kind.steps if step.name != "to") if dtype is torch.float64 else kind.steps
    loss = ChunkedLoss(steps, kind.rows, CLASSES, kind.ignore_index, is_mean)
    operands, labels = operands_of(kind, dtype), labels_of(pattern, kind.ignore_index)
    ours, theirs = loss(labels, *operands), of_all_logits(loss, labels, operands)
    assert ours.dtype == theirs.dtype
    assert ours.isnan() == (pattern == "none" and is_mean)
    assert_close(results(ours, operands), results(theirs, operands), dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [PLAIN, FULL, OTHERS], ids=["plain", "full", "others"])
def test_under_autocast_types_are_those_of_plain_operations(kind: ChunkedLoss, compiled: bool) -> None:
    operands, labels = operands_of(kind, torch.float32), labels_of("half", kind.ignore_index)
    function: Any = torch.compile(kind, backend="aot_eager", fullgraph=True) if compiled else kind
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = function(labels, *operands), of_all_logits(kind, labels, operands)
        eager = kind(labels, *operands)
    assert ours.dtype == theirs.dtype
    found = results(ours, operands)
    torch.testing.assert_close(found, results(eager, operands), rtol=0, atol=0)
    assert_close(found, results(theirs, operands), torch.bfloat16)


def test_small_gradients_do_not_vanish_in_half_precision() -> None:
    n = 4096
    h = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    weight = 1e-2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)).half()
    labels = torch.arange(n) % CLASSES
    (ours,) = torch.autograd.grad(2.0**16 * PLAIN(labels, h, weight), h)
    exact = h.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(2.0**16 * F.cross_entropy(exact @ weight.double().t(), labels), exact)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pattern", broad_after(1, ["all", "half", "one", "none"]))
def test_compiled_it_is_one_operator_for_any_labels(pattern: str) -> None:
    operands = operands_of(FULL, torch.float32)
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    count = torch.compile(FULL, backend=backend, fullgraph=True)
    count(labels_of("half"), *operands)
    compiled: Any = torch.compile(FULL, backend="aot_eager", fullgraph=True)
    for labels in (labels_of("half"), labels_of(pattern)):
        ours, expected = compiled(labels, *operands), FULL(labels, *operands)
        for value, plain in zip(results(ours, operands), results(expected, operands), strict=True):
            torch.testing.assert_close(value, plain, rtol=0, atol=0, equal_nan=True)
    assert len(graphs) == 1


def test_only_rows_with_a_label_are_multiplied() -> None:
    operands, labels = operands_of(PLAIN, torch.float32), labels_of("half")
    with FlopCounterMode(display=False) as flops:
        PLAIN(labels, *operands).backward()
    assert flops.get_total_flops() == 2 * 2 * int((labels >= 0).sum()) * WIDTH * CLASSES
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        PLAIN(labels, *operands)
    assert flops.get_total_flops() == 2 * int((labels >= 0).sum()) * WIDTH * CLASSES


def test_gradients_alone_are_saved() -> None:
    operands, saved = operands_of(PLAIN, torch.float32), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = PLAIN(labels_of("half"), *operands)
    assert sum(tensor.numel() for tensor in saved) == N * WIDTH + 1
    assert loss.requires_grad


def test_it_may_be_run_again_in_the_backward_pass() -> None:
    operands, labels = operands_of(FULL, torch.float64), labels_of("half")
    again = checkpoint(FULL, labels, *operands, use_reentrant=False)
    for value, expected in zip(results(again, operands), results(FULL(labels, *operands), operands), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_the_backward_pass_may_run_twice() -> None:
    operands = operands_of(FULL, torch.float64)
    loss = FULL(labels_of("half"), *operands)
    first = torch.autograd.grad(loss, operands[:2], retain_graph=True)
    for value, expected in zip(torch.autograd.grad(loss, operands[:2]), first, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_gradients_of_gradients_are_refused() -> None:
    operands = operands_of(PLAIN, torch.float32)
    with pytest.raises(AdapterError, match=r"no gradients of gradients.*create_graph=True"):
        torch.autograd.grad(PLAIN(labels_of("all"), *operands), operands[0], create_graph=True)


def test_other_numbers_of_labels_than_of_rows_are_refused() -> None:
    with pytest.raises(CallError, match=f"labels for {N - 1} tokens or rows, and logits for {N}"):
        PLAIN(labels_of("all")[1:], *operands_of(PLAIN, torch.float32))


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_is_not_a_class_is_refused(label: int) -> None:
    labels = labels_of("half")
    labels[1] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        PLAIN(labels, *operands_of(PLAIN, torch.float32))


class Packed(Tensor):
    """A weight that linears alone can read, as quantized ones are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "matmul" in func.__name__:
            raise NotImplementedError(func.__name__)
        plain: Any = super().__torch_function__
        return plain(func, types, args, kwargs or {})


def test_tensors_that_are_not_ordinary_make_all_logits() -> None:
    h, weight = operands_of(PLAIN, torch.float32)
    labels = labels_of("half")
    loss = PLAIN(labels, h, weight.as_subclass(Packed)).as_subclass(Tensor)
    assert_close(results(loss, [h]), results(PLAIN(labels, h, weight), [h]), torch.float32)
