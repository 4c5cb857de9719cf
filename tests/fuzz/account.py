"""The account: everything that a call of a model depends on, and what each path does when it changes.

- followed: the next call gives what the eager model gives, with the same adapters.
- refused: an error or a warning of this library names it.
- ignored: the next call gives what it gave before, and the page says why that is meant.
- n/a: there is no such change on this path, for the reason that is given.

`python -m tests.fuzz.account_page` prints the table, and `test_account.py` checks each cell. A new dependency is a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.fuzz import operations as ops
from tests.fuzz.account_models import Ask, Subject
from tests.fuzz.blocks import WIDTH

PATHS = ("rewrite", "traced", "adapt", "wrap", "backend")
NET, PLAIN = Subject(), Ask()
FOLLOWED, REFUSED, IGNORED = "followed", "refused", "ignored"


@dataclass(frozen=True)
class Row:
    """A dependency of a call.

    Args:
        group: what kind of thing it is.
        name: the dependency, and how it changes.
        cells: by path what the library does: one of the three words, then a colon and a reason; or "n/a: ...".
        subject: the model.
        change: changes the adapted model, and the oracle in the same way; it may return another model.
        before: changes the model before it is adapted. Then the first call is compared.
        ask: how the model is called after the change.
        training: the mode of the model.
    """

    group: str
    name: str
    cells: dict[str, str]
    subject: Subject = NET
    change: Callable[[Any], Any] | None = None
    before: Callable[[Any], Any] | None = None
    ask: Ask = PLAIN
    training: bool = False


def cells(rewrite: str, adapt: str = "", wrap: str = "", backend: str = "", traced: str = "") -> dict[str, str]:
    """Return the cells of a row. `traced` is as `rewrite` if it is left out, and the others are followed."""
    given = (rewrite, traced or rewrite, adapt or FOLLOWED, wrap or FOLLOWED, backend or FOLLOWED)
    return dict(zip(PATHS, given, strict=True))


EVERYWHERE = cells(FOLLOWED)
NO_MODULE = "n/a: a graph has no module where the model has one without tensors"
NO_CLASS = "n/a: a graph has no module of this class"
NO_TRACE = "n/a: a model of transformers is exported"
WARNED = "refused: a warning says that it does not act"
ANSWER = "the graph has the answer of its capture"


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(ops.part_of(model, "b0.up"), "weight", Twice(), unsafe=True)


def untied(model: Any) -> None:
    head = ops.part_of(model, "lm_head")
    head.weight = nn.Parameter(0.5 * torch.ones_like(head.weight.detach()), requires_grad=False)


def field_of_config(name: str, value: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        if not hasattr(model, "config"):
            raise AttributeError("a graph has no config")
        setattr(model.config, name, value)

    return change


def _double(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in grad_input)


def backward_hook(model: Any) -> None:
    ops.place_of(model, "b0.down").register_full_backward_hook(_double)


def mask(model: Any) -> None:
    part = ops.part_of(model, "b0")
    part.mask = torch.linspace(0, 2, WIDTH).to(part.shift)


def leave(model: Any) -> None:
    """Leave the model as it is: what it has in its forward is looked at."""
