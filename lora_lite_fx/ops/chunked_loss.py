"""Cross-entropy of logits that are made some rows at a time, and are gone before the next rows are.

The logits of a language model are by far its largest values: a row as long as the vocabulary for each token. In
training nobody needs them but the loss. `ChunkedLoss` multiplies only the rows that have a label, a chunk of them at a
time, and computes the gradients of what the logits are computed of at once. So it saves a narrow row per token. On a
GPU it multiplies all rows, because the process would wait for the number of those with a label.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AdapterError, CallError
from ..graph.direct_calls import is_ordinary, reading_waits
from ..graph.tensors import has_values

_FEWEST_ROWS = 512
"""Of a chunk. With fewer rows, a product with the weight of a head takes longer for each of them."""


class Step(NamedTuple):
    """One operation on the way to the logits.

    Args:
        name: of the operation, one of `_FORWARD`.
        operands: indices of values, which are the operands of the loss, followed by the results of the steps; numbers,
            as floats; None for a bias that is not there.
        option: the factor of the second operand of a sum; the name of a dtype.
    """

    name: str
    operands: tuple[int | float | None, ...]
    option: float | str | None = None


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "linear": lambda _, x, w, b: F.linear(x, w, b),
    "matmul": lambda _, x, w: x @ w,
    "add": lambda alpha, a, b: torch.add(a, b, alpha=alpha),
    "sub": lambda alpha, a, b: torch.sub(a, b, alpha=alpha),
    "mul": lambda _, a, b: torch.mul(a, b),
    "div": lambda _, a, b: torch.div(a, b),
    "tanh": lambda _, a: a.tanh(),
    "to": lambda dtype, a: a.to(getattr(torch, dtype)),
    "type_as": lambda _, a, b: a.type_as(b),
}
"""The operations, as functions of the option and the operands."""

_BACKWARD: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "linear": (lambda g, y, _, x, w, b: g @ w, lambda g, y, _, x, w, b: g.t() @ x, lambda g, y, _, x, w, b: g),
    "matmul": (lambda g, y, _, x, w: g @ w.t(), lambda g, y, _, x, w: x.t() @ g),
    "add": (lambda g, y, alpha, a, b: g, lambda g, y, alpha, a, b: g if alpha == 1 else g * alpha),
    "sub": (lambda g, y, alpha, a, b: g, lambda g, y, alpha, a, b: g * -alpha),
    "mul": (lambda g, y, _, a, b: g * b, lambda g, y, _, a, b: g * a),
    "div": (lambda g, y, _, a, b: g / b, lambda g, y, _, a, b: -g * y / b),
    "tanh": (lambda g, y, _, a: torch.ops.aten.tanh_backward(g, y),),
    "to": (lambda g, y, _, a: g,),
    "type_as": (lambda g, y, _, a, b: g,),
}
"""For each operand its gradient, as a function of that of the result, the result, the option and the operands; before
it is summed where the operand was broadcast.

By hand, because autograd does not record inside an operator that `torch.compile` does not look into, and would pass
each chunk of the logits through hooks of the caller, such as those of checkpointing.
"""

_PRODUCTS = ("linear", "matmul")
"""The operations that autocast computes in its own type."""


@dataclass(frozen=True)
class ChunkedLoss:
    """`labels, *operands -> loss`: the cross-entropy of logits that some steps compute of the operands.

    The gradients are computed in the forward pass, and the backward pass scales them; gradients of gradients are
    refused. Loss and gradients have the types that the plain operations give them, also under autocast. Softmax and
    sums are in float32 at least. Under `torch.compile` it is one operator. With tensors that are not ordinary, such as
    quantized weights, it makes all logits at once.

    Args:
        steps: the last one's result is the logits `(n, classes)`.
        rows: how many of the operands, the first ones, have a row for each label; the others are shared by all rows.
        classes: the number of columns of the logits.
        ignore_index: the label of rows that do not count.
        is_mean: whether the loss is the mean over the rows that count, and not the sum.
    """

    __name__ = "chunked_loss"  # as torch.fx names its calls

    steps: tuple[Step, ...]
    rows: int
    classes: int
    ignore_index: int = -100
    is_mean: bool = True
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = ([tuple(step) for step in self.steps], self.rows, self.classes, self.ignore_index, self.is_mean)
        object.__setattr__(self, "text", repr(fields))  # an operator of torch can take a text, and no object

    def __call__(self, labels: Tensor, *operands: Tensor) -> Tensor:
        """Return the loss.

        Args:
            labels: `(n,)`, of int64.
            operands: matrices of n rows, then what is shared.

        Raises:
            CallError: there are other numbers of labels than of rows.
        """
        if any(operand.shape[0] != labels.shape[0] for operand in operands[: self.rows]):
            raise CallError(
                f"There are labels for {labels.shape[0]} tokens or rows, and logits for {operands[0].shape[0]}."
                " They must be as many: one label for each."
            )
        if not all(map(is_ordinary, operands)):
            logits = self.values(operands)[-1]
            reduction = "mean" if self.is_mean else "sum"
            return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction=reduction)
        device = labels.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        needed = [torch.is_grad_enabled() and operand.requires_grad for operand in operands]
        return _apply(self.text, low, needed, labels, *operands)

    def values(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Return the operands and the results of all steps."""
        values: list[Any] = list(operands)
        for step in self.steps:
            values.append(_FORWARD[step.name](step.option, *_operands(step, values)))
        return values

    def gradients(self, values: Sequence[Tensor], of_logits: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of the operands that need one, of these values and the gradient of the last."""
        count = len(values) - len(self.steps)
        needs = [*needed, *[False] * len(self.steps)]
        for index, step in enumerate(self.steps, count):
            needs[index] = any(needs[operand] for operand in step.operands if isinstance(operand, int))
        found: list[Tensor | None] = [*[None] * (len(values) - 1), of_logits]
        for index in reversed(range(count, len(values))):
            step, gradient = self.steps[index - count], found[index]
            found[index] = None
            for operand, rule in zip(step.operands, _BACKWARD[step.name], strict=False):
                if gradient is None or not isinstance(operand, int) or not needs[operand]:
                    continue
                part = rule(gradient, values[index], step.option, *_operands(step, values))
                part = part.sum_to_size(values[operand].shape).to(values[operand].dtype)
                known = found[operand]
                found[operand] = part if known is None else known + part
        return found[:count]

    def compute(
        self, labels: Tensor, operands: Sequence[Tensor], low: torch.dtype | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Return the loss, the share of one row in it, and the gradients of operands that need one, without the share.

        The share is kept apart, because it makes gradients so small that they would vanish in float16.

        Args:
            labels, operands: as above.
            low: the type that products are computed in, inside autocast.
            needed: for each operand, whether it needs a gradient.
        """
        with contextlib.nullcontext() if low is None else torch.autocast(labels.device.type, enabled=False):
            used = self._cast(operands, low)
            rows, shared = used[: self.rows], used[self.rows :]
            totals = [
                operand.new_zeros(operand.shape, dtype=operand.dtype if index < self.rows else _wide(operand))
                if need
                else None
                for index, (operand, need) in enumerate(zip(used, needed, strict=True))
            ]
            counts = labels != self.ignore_index
            with_ignored = reading_waits(labels) or not has_values(labels)  # that say how many rows count
            kept = torch.arange(len(labels), device=labels.device) if with_ignored else counts.nonzero().squeeze(1)
            losses = []
            for places in kept.chunk(self._chunks(kept, rows)):
                values = self.values([*(operand[places] for operand in rows), *shared])
                logits, targets = values[-1], labels[places]
                log_probabilities = F.log_softmax(logits, -1, dtype=_wide(logits))
                losses.append(F.nll_loss(log_probabilities, targets, ignore_index=self.ignore_index, reduction="sum"))
                if not any(needed):
                    continue
                of_logits = _of_logits(log_probabilities, targets, counts[places] if with_ignored else None)
                found = self.gradients(values, of_logits.to(logits.dtype), needed)
                for index, (total, gradient) in enumerate(zip(totals, found, strict=True)):
                    if total is not None and gradient is not None:
                        total.index_copy_(0, places, gradient) if index < self.rows else total.add_(gradient)
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            share = loss.new_ones(())
            if self.is_mean:
                number = counts.sum()
                share, loss = share / number.clamp(min=1), loss / number
            gradients = [t.to(operand.dtype) for t, operand in zip(totals, operands, strict=True) if t is not None]
            return [loss.to(_wide(logits) if low is not None else logits.dtype), share, *gradients]

    def empty(
        self, labels: Tensor, operands: Sequence[Tensor], low: torch.dtype | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Return tensors without data like those that `compute` returns."""
        used = self._cast(operands, low)
        logits = self.values([*(operand[:0] for operand in used[: self.rows]), *used[self.rows :]])[-1]
        loss = logits.new_empty((), dtype=_wide(logits) if low is not None else logits.dtype)
        share = logits.new_empty((), dtype=_wide(logits))
        return [loss, share, *(t.new_empty(t.shape) for t, need in zip(operands, needed, strict=True) if need)]

    def _chunks(self, kept: Tensor, rows: Sequence[Tensor]) -> int:
        """Return in how many chunks to multiply: such that the logits of one are about as large as all rows."""
        size = sum(operand.numel() for operand in rows) // self.classes
        return max(1, len(kept) // max(size, _FEWEST_ROWS))

    def _cast(self, operands: Sequence[Tensor], low: torch.dtype | None) -> list[Tensor]:
        """Return the operands as products take them, inside autocast; once, and not for each chunk."""
        products = {index for step in self.steps if step.name in _PRODUCTS for index in step.operands}
        return [
            operand.to(low) if low is not None and index in products else operand
            for index, operand in enumerate(operands)
        ]


def _operands(step: Step, values: Sequence[Any]) -> list[Any]:
    return [values[operand] if isinstance(operand, int) else operand for operand in step.operands]


def _of_logits(log_probabilities: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
    """Return the gradient of the summed loss of some rows, in the memory of the log-probabilities.

    Args:
        log_probabilities: `(rows, classes)`.
        targets: `(rows,)`.
        counts: which rows count; None for all.
    """
    of_logits, at_labels = log_probabilities.exp_(), targets.unsqueeze(1)
    if counts is not None:
        at_labels = at_labels.where(counts.unsqueeze(1), 0)
    of_logits.scatter_(1, at_labels, of_logits.gather(1, at_labels) - 1)  # the probabilities, less one at the label
    return of_logits if counts is None else of_logits.masked_fill_(~counts.unsqueeze(1), 0)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums of such values."""
    return torch.promote_types(tensor.dtype, torch.float32)


@functools.cache
def _from_text(text: str) -> ChunkedLoss:
    steps, *fields = ast.literal_eval(text)
    return ChunkedLoss(tuple(Step(*step) for step in steps), *fields)


def _compute(text: str, labels: Tensor, operands: Sequence[Tensor], low: Any, needed: Sequence[bool]) -> list[Tensor]:
    return _from_text(text).compute(labels, operands, low, needed)


@torch.library.custom_op("lora_lite_fx::chunked_loss", mutates_args=())
def _opaque(
    text: str, labels: Tensor, operands: Sequence[Tensor], low: torch.dtype | None, needed: Sequence[bool]
) -> list[Tensor]:
    """Compute the loss in an operator that torch.compile does not look into: how many rows count is in the labels."""
    return _compute(text, labels, operands, low, needed)


@_opaque.register_fake
def _(
    text: str, labels: Tensor, operands: Sequence[Tensor], low: torch.dtype | None, needed: Sequence[bool]
) -> list[Tensor]:
    return _from_text(text).empty(labels, operands, low, needed)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: str, low: Any, needed: Sequence[bool], labels: Tensor, *operands: Tensor) -> Tensor:
        compute = _opaque if torch.compiler.is_compiling() else _compute
        loss, *saved = compute(text, labels, list(operands), low, needed)
        ctx.save_for_backward(*saved)
        ctx.needed = needed
        return loss

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise AdapterError(
                "A fused loss has no gradients of gradients, because its gradients are computed in the forward pass."
                " The way out: a backward pass without create_graph=True, or a model without fuse_loss=True."
            )
        share, *gradients = ctx.saved_tensors
        factor, scaled = of_loss * share, iter(gradients)
        return None, None, None, None, *((next(scaled) * factor if need else None) for need in ctx.needed)


_apply: Callable[..., Tensor] = _Function.apply
