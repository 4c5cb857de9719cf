"""Trials of kind "writes": random programs that write in place, some of it in one mode alone, on both ways of capture.

The oracle is the same program with adapters by hooks. It has buffers of its own, as a graph has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.fuzz.blocks import WIDTH
from tests.fuzz.oracle import FORMULAS, Oracle, gradients_of
from tests.fuzz.verdict import Wrong, require_close, the_oracle
from tests.support.conformance import randomise
from tests.support.untouched import snapshot

TOLERANCE = 1e-8
CALLS = ((True, True), (True, False), (False, False), (True, True), (False, True), (False, False))
"""The calls of a trial: in training mode or not, with gradients or not."""


def _without_gradients(m: Any, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        x.add_(0.5)


def _plus_one(m: Any, x: Tensor, y: Tensor) -> None:
    x += 1


def _minus_another(m: Any, x: Tensor, y: Tensor) -> None:
    part = x.view(-1, WIDTH)
    part -= y.detach()


Statement = Callable[[Any, Tensor, Tensor], Any]
VALUES: dict[str, Statement] = {
    "linear 0": lambda m, x, y: m.linears[0](x),
    "linear 1": lambda m, x, y: m.linears[1](x),
    "linear 2": lambda m, x, y: m.linears[2](x),
    "add": lambda m, x, y: x + y,
    "tanh": lambda m, x, y: torch.tanh(x),
    "clone": lambda m, x, y: x.clone(),
    "view": lambda m, x, y: x.view(-1, WIDTH),
    "slice": lambda m, x, y: x[:, :],
    "detach": lambda m, x, y: x.detach(),
    "times a buffer": lambda m, x, y: x * m.values,
    "plus the count": lambda m, x, y: x + m.count,
    "batch norm": lambda m, x, y: m.norm(x),
    "activation in place": lambda m, x, y: m.act(x),
    "relu in place": lambda m, x, y: F.relu(x, inplace=True),
}
"""What makes a value of one or two others."""
WRITES: dict[str, Statement] = {
    "mul_": lambda m, x, y: x.mul_(1.1),
    "add_ of another": lambda m, x, y: x.add_(y.detach() + 1),
    "copy_ of another": lambda m, x, y: x.copy_(torch.tanh(y)),
    "neg_ of torch": lambda m, x, y: torch.neg_(x),
    "a part": lambda m, x, y: x.narrow(1, 0, 3).mul_(2),
    "+= a number": _plus_one,
    "-= another in a view": _minus_another,
    "out": lambda m, x, y: torch.mul(x.detach(), 2, out=x.detach()),
    "without gradients": _without_gradients,
    "a count": lambda m, x, y: m.count.add_(1),
    "a buffer": lambda m, x, y: m.values.mul_(1.1),
    "a part of a buffer": lambda m, x, y: m.values.view(2, -1)[0].add_(1),
    "a buffer by out": lambda m, x, y: torch.mul(m.values, 1.1, out=m.values),
    "an average": lambda m, x, y: m.values.lerp_(x.detach().mean(0), 0.1),
}
"""What writes, to a value of the program or to the model."""


@dataclass(frozen=True)
class Line:
    """A statement: its name, what it reads, and the mode in which alone it runs; None for both."""

    name: str
    reads: tuple[int, int] = (0, 0)
    mode: bool | None = None


class Program(nn.Module):
    """Statements over a list of values, of which the first is the input. The result is the sum of the last ones.

    Args:
        lines: of each statement its name, the numbers of the values it gets, and the mode in which alone it runs.
    """

    count: Tensor
    values: Tensor

    def __init__(self, lines: tuple[Line, ...]) -> None:
        super().__init__()
        self.lines = lines
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.act, self.norm = nn.ReLU(inplace=True), nn.BatchNorm1d(WIDTH)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("values", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Any:
        made = [self.linears[0](x)]
        for line in self.lines:
            one, other = (made[number % len(made)] for number in line.reads)
            runs = line.mode is None or self.training is line.mode
            if line.name in VALUES:
                made.append(VALUES[line.name](self, one, other) if runs else one)
            elif runs:
                WRITES[line.name](self, one, other)
        return sum(made[-3:])


@dataclass(frozen=True)
class Writes:
    """A program, adapted.

    Args:
        lines: of the program.
        variant: by its name in `FORMULAS`.
        exported: whether it is captured with example inputs.
    """

    lines: tuple[Line, ...]
    variant: str = "LoRA"
    exported: bool = False

    def features(self) -> frozenset[str]:
        modes = {None: "", True: " in training", False: " in evaluation"}
        words = {f"{line.name}{modes[line.mode]}" for line in self.lines}
        return frozenset(words | ({"exported"} if self.exported else {"traced"}))

    def check(self) -> None:
        torch.manual_seed(1)
        model, x = Program(self.lines).double().eval(), torch.randn(5, WIDTH, dtype=torch.float64)
        oracle = Oracle(copy.deepcopy(model))
        with the_oracle():
            for training in (True, False):
                copy.deepcopy(model).train(training)(x)
        before = snapshot(model)
        config, formula = FORMULAS[self.variant]
        try:
            gm = llfx.rewrite(model, config, (x,) if self.exported else None)
            randomise(gm, 1)
            oracle.copy_adapters(gm, {"default": formula})
            for number, call in enumerate(CALLS):
                self._compare(gm, oracle, number, *call)
        finally:
            if snapshot(model) != before:
                raise Wrong("the user's model", "it is not as it was")

    def _compare(self, gm: Any, oracle: Oracle, number: int, training: bool, with_gradients: bool) -> None:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        results = []
        named = dict(gm.named_parameters())
        tensors = [oracle.leaves(), {name: named[name] for name in oracle.leaves()}]
        for adapted, leaves in zip((oracle.model, gm), tensors, strict=True):
            adapted.train(training)
            with torch.set_grad_enabled(with_gradients):
                if adapted is gm:
                    y = gm(x)
                    gradients = gradients_of(y, leaves)
                else:
                    with the_oracle():
                        y = adapted(x)
                        gradients = gradients_of(y, leaves)
            results.append((y, gradients))
        (expected, wanted), (y, found) = results
        where = f"call {number}, {'training' if training else 'evaluation'}"
        require_close(y, expected, TOLERANCE, "output", where)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors[0].items() if wanted or found}
        require_close(zeros | found, zeros | wanted, TOLERANCE, "gradient", where)


@st.composite
def writes(draw: Any) -> Writes:
    """Draw a trial."""
    numbers = st.tuples(st.integers(0, 7), st.integers(0, 7))
    modes = st.sampled_from((None, None, None, None, None, None, True, False))
    names = st.sampled_from((*VALUES, *WRITES))
    lines = draw(st.lists(st.builds(Line, names, numbers, modes), min_size=1, max_size=8))
    return Writes(tuple(lines), draw(st.sampled_from(sorted(FORMULAS))), draw(st.booleans()))
