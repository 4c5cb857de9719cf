"""`fuse_loss`: a head and its loss become one operation, or stay as they are with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_fx.passes import DropMetadataAsserts, FuseLoss
from tests.execution.test_fused_loss import assert_close
from tests.support.programs import after, count, reasons
from tests.support.selection import broad_after


class Loss(nn.Module):
    """A head whose loss a test computes."""

    def __init__(self, compute: Callable[..., Any], classes: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, classes)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.compute = compute

    def forward(self, h: Tensor, y: Tensor) -> Any:
        return self.compute(self, h, y)


def graph_of(compute: Callable[..., Any], classes: int = 20, h: Tensor | None = None, y: Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 3, 6, generator=generator) if h is None else h
    y = torch.randint(classes, (5, 3), generator=generator) if y is None else y
    y.view(-1)[0] = -100
    gm: Any = torch.export.export(Loss(compute, classes), (h, y)).module()
    DropMetadataAsserts().run(gm)
    return gm, (h, y)


def entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), **options)


TAKEN: dict[str, Callable[..., Any]] = {
    "as it is": lambda m, h, y: entropy(m.head(h), y),
    "a sum, of other labels": lambda m, h, y: entropy(m.head(h), y.where(y > 0, 3), reduction="sum", ignore_index=3),
    "transposed weight": lambda m, h, y: entropy(h @ m.head.weight.T, y),
    "a temperature that trains": lambda m, h, y: entropy(m.head(h) / m.temperature, y),
    "a factor for each class": lambda m, h, y: entropy(m.head(h) * m.head.bias - 1, y),
    "logits used twice": lambda m, h, y: entropy(m.head(h) + m.head(h).tanh(), y),
    "shifted": lambda m, h, y: entropy(m.head(h)[:, :-1].contiguous(), y[:, 1:]),
    "the last token": lambda m, h, y: entropy(m.head(h)[:, -1], y[:, 0]),
    "chosen tokens": lambda m, h, y: entropy(m.head(h)[torch.arange(5), y[:, 0].abs() % 3], y[:, 0]),
    "in another type": lambda m, h, y: entropy(m.head(h).double(), y),
    "two losses": lambda m, h, y: entropy(m.head(h), y) + entropy(m.head(2 * h), y),
}


@pytest.mark.parametrize("name", broad_after(3, TAKEN))
def test_losses_of_logits_by_row_are_fused(name: str) -> None:
    gm, inputs = graph_of(TAKEN[name])
    changed, report = after(gm, FuseLoss())
    assert report.edits == (2 if name == "two losses" else 1), report
    assert not count(changed, torch.ops.aten.linear.default)
    assert_same(gm, changed, *inputs)


def assert_same(gm: Any, changed: Any, h: Tensor, y: Tensor) -> None:
    found: list[list[Tensor]] = []
    for module in (gm, changed):
        h = h.detach().clone().requires_grad_()
        parameters = [h, *(p for _, p in sorted(module.named_parameters()))]
        loss = module(h, y)
        loss = loss if isinstance(loss, Tensor) else loss[0]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)])
    assert_close(found[0], found[1])


def overwritten(m: Any, h: Tensor, y: Tensor) -> Tensor:
    h = h.clone()
    logits = F.linear(h, m.head.weight.detach())
    h.mul_(2)
    return entropy(logits, y)


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "weights": (lambda m, h, y: entropy(m.head(h), y, weight=m.head.bias.detach().abs()), "the classes have weights"),
    "smoothing": (lambda m, h, y: entropy(m.head(h), y, label_smoothing=0.1), "the labels are smoothed"),
    "by row": (lambda m, h, y: entropy(m.head(h), y, reduction="none").sum(), "the loss has a value for each row"),
    "by position": (
        lambda m, h, y: F.cross_entropy(m.head(h).transpose(1, 2), y),
        "the logits are not a matrix with a number as label of each row",
    ),
    "probabilities": (
        lambda m, h, y: F.cross_entropy(m.head(h).view(-1, 20), m.head(2 * h).view(-1, 20).softmax(-1)),
        "the logits are not a matrix with a number as label of each row",
    ),
    "read": (lambda m, h, y: (lambda z: entropy(z, y) + z.mean())(m.head(h)), "the logits are read by mean too"),
    "a softmax": (
        lambda m, h, y: entropy(m.head(h).softmax(-1), y),
        "softmax on the way to the logits is not known to work row by row",
    ),
    "a norm over rows": (
        lambda m, h, y: (lambda z: entropy(z / z.std(), y))(m.head(h)),
        "the logits are read by std too",
    ),
    "a factor for each row": (
        lambda m, h, y: entropy(m.head(h) * h[..., :1], y),
        "mul on the way to the logits has an operand of another shape",
    ),
    "weights of a batch": (
        lambda m, h, y: entropy(torch.matmul(h, m.head.weight.T.expand(5, 6, 20)), y),
        "expand is not the same for all rows of logits",
    ),
    "joined rows": (
        lambda m, h, y: entropy(m.head(h).view(-1, 10), y.where(y < 0, y % 10).repeat(1, 2)),
        "view on the way to the logits is not known to work row by row",
    ),
    "some classes": (
        lambda m, h, y: entropy(m.head(h)[..., :19], y.clamp(-100, 18)),
        "slice on the way to the logits is not known to work row by row",
    ),
    "one class": (
        lambda m, h, y: F.cross_entropy(m.head(h.repeat(1, 7, 1)[:, :20])[..., 0], y[:, 0]),
        "select on the way to the logits is not known to work row by row",
    ),
    "classes in another order": (
        lambda m, h, y: entropy(m.head(h)[:, :, torch.arange(19, -1, -1)], y),
        "index on the way to the logits is not known to work row by row",
    ),
    "reversed classes": (
        lambda m, h, y: entropy(m.head(h).flip(-1), y),
        "flip on the way to the logits is not known to work row by row",
    ),
    "dropout": (
        lambda m, h, y: entropy(F.dropout(m.head(h), 0.0), y),
        "dropout on the way to the logits is not known to work row by row",
    ),
    "overwritten": (overwritten, "a tensor is overwritten in between"),
    "logits alone": (lambda m, h, y: entropy(h, y % 6), "h on the way to the logits is not known to work row by row"),
}


@pytest.mark.parametrize("name", broad_after(6, LEFT))
def test_other_losses_stay_and_the_reason_is_given(name: str) -> None:
    compute, why = LEFT[name]
    gm, inputs = graph_of(compute)
    changed, report = after(gm, FuseLoss())
    assert report.edits == 0
    assert [reason.partition(": ")[2] for reason in reasons(report)] == [why]
    assert_same(gm, changed, *inputs)


def test_logits_that_are_no_wider_than_their_input_stay() -> None:
    gm, _ = graph_of(TAKEN["as it is"], classes=6)
    _, report = after(gm, FuseLoss())
    assert report.edits == 0
    assert "the logits (6) are not wider than what they are computed of (6)" in reasons(report)[0]


def test_a_graph_without_a_loss_says_so() -> None:
    gm, _ = graph_of(lambda m, h, y: m.head(h).sum() + y.sum())
    assert reasons(after(gm, FuseLoss())[1]) == ["the graph computes no cross-entropy"]
