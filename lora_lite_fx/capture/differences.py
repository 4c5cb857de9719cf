"""How far two results are from each other, and how far rounding may take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..compat.torch import pytree
from ..text_table import text_table

# How far two results may differ, relative to the largest value: another kernel may compute the same to rounding.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance_for(model: nn.Module, call: Any) -> float:
    """Return how far results of a call of a model may be apart for rounding, relative to the largest value."""
    values = (*model.parameters(), *pytree.tree_leaves(call))
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    # The coarsest dtype decides, because a result may be cast to a finer one at last.
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=1e-4)


@dataclass(frozen=True)
class Difference:
    """The difference between a graph and its model in the output of one module, or in one result.

    Args:
        module: qualified name of the module, with `@1` for its second call, `@2` for its third; of a result, its path
            in what the model returns, such as `logits`.
        mode: `"training"`, `"evaluation"` or `"the modes of its parts"`.
        difference: largest absolute difference of the tensors; infinite if one of them lacks a part.
        scale: largest absolute value that the model computes there.
        allowed: largest absolute difference that rounding explains.
        is_result: whether this is a result of the model, or a buffer that the model wrote to.
    """

    module: str
    mode: str
    difference: float
    scale: float
    allowed: float
    is_result: bool = False

    @property
    def relative(self) -> float:
        """The difference as a multiple of the largest value."""
        return self.difference / self.scale if self.scale else self.difference and math.inf

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.module} in {self.mode}: {self.difference:.3g}, {self.relative:.2g} of the largest value"


@dataclass(frozen=True)
class DifferenceTable(Sequence[Difference]):
    """The differences between a graph and its model; prints as a table of those that matter.

    Args:
        rows: evaluation first; in each mode the modules in the order in which they finish, then the results.
        model: class name of the model.
        notes: what could not be compared, and why.
    """

    rows: tuple[Difference, ...]
    model: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether rounding explains all differences in results."""
        return all(row.ok for row in self.rows if row.is_result)

    @property
    def first(self) -> Difference | None:
        """The first module whose output differs beyond rounding; a result if no module does; None if all agree."""
        return next((row for row in self.rows if not row.ok), None)

    @overload
    def __getitem__(self, index: int) -> Difference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Difference]: ...
    def __getitem__(self, index: int | slice) -> Difference | Sequence[Difference]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """Return the results, and the modules that differ beyond rounding, as a table."""
        head = ("output of", "mode", "difference", "relative", "allowed", "")
        shown = [row for row in self.rows if row.is_result or not row.ok]
        numbers = [(row.difference, row.relative, row.allowed) for row in shown]
        body = [
            (row.module, row.mode, *(f"{number:.2e}" for number in three), "ok" if row.ok else "DIFFERS")
            for row, three in zip(shown, numbers, strict=True)
        ]
        lines = text_table(head, body, right=(2, 3, 4))
        modules = [row for row in self.rows if not row.is_result]
        agree = sum(row.ok for row in modules)
        lines.append(f"{self.model}: {agree} of {len(modules)} outputs of modules agree")
        return "\n".join([*lines, *self.notes])


def distance(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference of two results; infinite if they are not of one kind.

    Infinities and NaNs in the same places are equal.
    """
    if type(ours) is not type(theirs) and not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return math.inf
    if not isinstance(ours, Tensor):  # objects of classes that are not plain cannot be compared
        return math.inf if isinstance(ours, (bool, int, float, str)) and ours != theirs else 0.0
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    if torch.equal(ours, theirs):  # the usual case, in a tenth of the time
        return 0.0
    one, other = _wide(ours), _wide(theirs)
    same = (one == other) | (one.isnan() & other.isnan())
    gaps = (one - other).abs().where(~same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    return gaps.max().item() if gaps.numel() else 0.0


def largest(value: Any) -> float:
    """Return the largest absolute value of a tensor, without infinities and what masks put in their place; else 0."""
    if not isinstance(value, Tensor) or not value.numel():
        return 0.0
    if value.dtype in TOLERANCES:  # the usual case, in a tenth of the time
        low, high = value.detach().aminmax()
        size = max(-low.item(), high.item())
        if size < torch.finfo(value.dtype).max / 1e3:  # and no NaN
            return size
    sizes = _wide(value).abs()
    if value.is_floating_point():
        sizes = sizes.where(sizes < torch.finfo(value.dtype).max / 1e3, 0)
    return sizes.nan_to_num(nan=0.0).max().item()


def agree(one: Any, other: Any) -> bool:
    """Tell whether two results are the same to the rounding of their dtype."""
    tolerance = TOLERANCES.get(other.dtype, 0.0) if isinstance(other, Tensor) else 0.0
    gap = distance(one, other)
    return gap == 0 or gap <= tolerance * max(1e-30, largest(other))


def all_agree(results: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Tell whether each tensor among some results agrees with that of the same path among others."""
    return all(not isinstance(value, Tensor) or agree(others.get(path), value) for path, value in results.items())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
