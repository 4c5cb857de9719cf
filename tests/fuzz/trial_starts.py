"""Trials of kind "starts": models that hide something where they start, or on the inputs of the example.

Gates start near zero and are opened after the capture, examples are zeros, ones or random, and arguments are left out.
The oracle is the same model with adapters by hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.fuzz.blocks import WIDTH
from tests.fuzz.oracle import FORMULAS, Oracle, gradients_of
from tests.fuzz.verdict import require_close, the_oracle
from tests.support.conformance import randomise

TOLERANCE = 1e-8
STARTS = (0.0, 1e-6, 0.1)
EXAMPLES: dict[str, Callable[..., Tensor]] = {"zeros": torch.zeros, "ones": torch.ones, "random": torch.rand}


def _attend(m: Any, x: Tensor, condition: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = x @ x.mT
    seen = torch.ones_like(scores).tril() if mask is None else mask[:, None]
    return scores.masked_fill(seen == 0, -1e9).softmax(-1) @ x


def _given(function: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a statement that does something if there is a condition."""
    return lambda m, x, condition, mask: x if condition is None else function(m, x, condition)


STATEMENTS: dict[str, Callable[..., Tensor]] = {
    "linear 0": lambda m, x, condition, mask: m.linears[0](x),
    "linear 1": lambda m, x, condition, mask: m.linears[1](x),
    "tanh": lambda m, x, condition, mask: torch.tanh(x),
    "attend": _attend,
    "residual gate": lambda m, x, condition, mask: x + m.gate(x),
    "residual scale": lambda m, x, condition, mask: x + m.scale * torch.sin(x),
    "masked": lambda m, x, condition, mask: x if mask is None else x * mask[..., None],
    "plus the condition": _given(lambda m, x, condition: x + condition),
    "plus a gate of the condition": _given(lambda m, x, condition: x + m.gate(condition)),
    "times the condition": _given(lambda m, x, condition: x * condition),
    "times a linear of the condition": _given(lambda m, x, condition: x * (1 + m.linears[1](condition))),
    "times a scale of the condition": _given(lambda m, x, condition: x * (1 + m.scale * condition)),
    "twice for one row": lambda m, x, condition, mask: 2 * x if x.shape[0] == 1 else x,
    "twice while it is traced": lambda m, x, condition, mask: 2 * x if torch.compiler.is_compiling() else x,
    "a gate of twice for one row": lambda m, x, condition, mask: x + m.gate(2 * x if x.shape[0] == 1 else x),
}


class Started(nn.Module):
    """Statements one after the other, of which some read a condition or a mask that may be left out."""

    def __init__(self, names: tuple[str, ...], start: float) -> None:
        super().__init__()
        self.names = names
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.gate, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.empty(WIDTH))
        for parameter in self.gates():
            nn.init.constant_(parameter, start)

    def gates(self) -> list[nn.Parameter]:
        return [*self.gate.parameters(), self.scale]

    def forward(self, x: Tensor, condition: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        for name in self.names:
            x = STATEMENTS[name](self, x, condition, mask)
        y: Tensor = self.linears[0](x)
        return y


@dataclass(frozen=True)
class Starts:
    """A model, adapted where it starts.

    Args:
        names: of its statements.
        start: the value of its gates.
        example: a key of `EXAMPLES`, for `x` and the condition.
        variant: by its name in `FORMULAS`.
    """

    names: tuple[str, ...]
    start: float = 0.0
    example: str = "random"
    variant: str = "LoRA"

    def features(self) -> frozenset[str]:
        return frozenset({*self.names, f"gates of {self.start}", f"an example of {self.example}"})

    def check(self) -> None:
        torch.manual_seed(1)
        model = Started(self.names, self.start).double().eval()
        x, condition = (EXAMPLES[self.example](3, 4, WIDTH, dtype=torch.float64) for _ in range(2))
        example = {"x": x, "condition": condition, "mask": torch.ones(3, 4)}
        config, formula = FORMULAS[self.variant]
        gm = llfx.rewrite(model, config, example)
        randomise(gm, 1)
        with torch.no_grad():
            for parameter in model.gates():  # the graph has its storage
                parameter.normal_()
        oracle = Oracle(copy.deepcopy(model))
        oracle.copy_adapters(gm, {"default": formula})
        for rows, has_condition, has_mask in product((2, 1), (True, False), (True, False)):
            self._compare(gm, oracle, rows, has_condition, has_mask)

    def _compare(self, gm: Any, oracle: Oracle, rows: int, has_condition: bool, has_mask: bool) -> None:
        x, condition = torch.randn(2, rows, 5, WIDTH, dtype=torch.float64).unbind()
        mask = torch.ones(rows, 5)
        mask[0, -1] = 0
        inputs = {"x": x} | ({"condition": condition} if has_condition else {}) | ({"mask": mask} if has_mask else {})
        named = dict(gm.named_parameters())
        with the_oracle():
            expected = oracle.model(**inputs)
            wanted = gradients_of(expected, oracle.leaves())
        try:
            y = gm(**inputs)
        except llfx.CallError:
            return
        found = gradients_of(y, {name: named[name] for name in oracle.leaves()})
        where = f"{rows} rows of {', '.join(inputs)}"
        require_close(y, expected, TOLERANCE, "output", where)
        require_close(found, wanted, TOLERANCE, "gradient", where)


@st.composite
def starts(draw: Any) -> Starts:
    """Draw a trial."""
    names = draw(st.lists(st.sampled_from(sorted(STATEMENTS)), min_size=1, max_size=5))
    example = draw(st.sampled_from(sorted(EXAMPLES)))
    return Starts(tuple(names), draw(st.sampled_from(STARTS)), example, draw(st.sampled_from(sorted(FORMULAS))))
