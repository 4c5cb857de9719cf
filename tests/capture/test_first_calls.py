"""What a model makes in its first call is refused, with the way out: a graph would make it anew in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.untouched import untouched

CFG = llfx.LoRA(r=2, target_names=".")
X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Makes(nn.Module):
    """A linear, and what a function does with its result: it may make something in the first call."""

    shared: Tensor | None = None

    def __init__(self, after: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), after
        self.made: Any = None
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self, self.linear(x))
        return result


def layer(m: Any, y: Tensor) -> Any:
    if m.made is None:
        m.made = nn.Linear(4, 4, dtype=torch.float64)
    return m.made(y)


def parameter(m: Any, y: Tensor) -> Any:
    if m.made is None:
        m.made = nn.Parameter(torch.ones(4, dtype=torch.float64))
    return y * m.made


def drawn_tensor(m: Any, y: Tensor) -> Any:
    if m.made is None:
        m.made = torch.rand(4).to(y)
    return y * m.made


def drawn_buffer(m: Any, y: Tensor) -> Any:
    if m.made is None:
        m.register_buffer("noise", torch.rand(4).to(y))
        m.made = True
    return y * m.noise


TABLES: dict[str, Tensor] = {}


class Holder:
    """An object of a user's class that is no module."""

    noise: Tensor | None = None


def drawn_table_of_the_file(m: Any, y: Tensor) -> Any:
    if "noise" not in TABLES:
        TABLES["noise"] = torch.rand(4, dtype=torch.float64)
    return y * TABLES["noise"]


def drawn_in_an_object(m: Any, y: Tensor) -> Any:
    if m.holder.noise is None:
        m.holder.noise = torch.rand(4, dtype=torch.float64)
    return y * m.holder.noise


def table_of_the_class(m: Any, y: Tensor) -> Any:
    if Makes.shared is None:
        Makes.shared = torch.arange(4, dtype=torch.float64)
    return y * Makes.shared


def table_of_the_file(m: Any, y: Tensor) -> Any:
    if "counted" not in TABLES:
        TABLES["counted"] = torch.arange(4, dtype=torch.float64)
    return y * TABLES["counted"]


def counted_table(m: Any, y: Tensor) -> Any:
    if m.made is None:
        m.register_buffer("table", torch.arange(4).to(y))
        m.made = True
    return y * m.table


def tied(m: Any, y: Tensor) -> Any:
    m.same = m.linear.weight
    return nn.functional.linear(y, m.same)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    TABLES.clear()
    Makes.shared = None


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (layer, r"Makes makes its parameter made\.weight in the first call.*The way out: call the model once"),
        (parameter, r"Makes makes its parameter made in the first call.*The way out: call the model once"),
        (drawn_tensor, r"Makes keeps made from one call for the next.*The way out: call the model once before"),
        (drawn_table_of_the_file, r"Makes keeps TABLES from one call for the next.*The way out: call the model once"),
        (drawn_in_an_object, r"Makes keeps holder\.noise from one call for the next.*The way out: call the model once"),
        (drawn_buffer, r"Makes keeps (made|noise) from one call for the next.*The way out: call the model once before"),
    ],
)
def test_what_the_first_call_makes_is_refused_and_captured_after_it(after: Any, message: str) -> None:
    model = Makes(after).double()
    with untouched(model), pytest.raises(llfx.CaptureError, match=message):
        llfx.rewrite(model, CFG, (X,))
    model(X)
    gm = llfx.rewrite(model, CFG, (X,))
    randomise(gm, 0)
    wrapped = llfx.wrap(model, CFG, (X,))
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    for _ in range(2):
        close(gm(X + 1), wrapped(X + 1), 1e-12, "output")


def test_a_parameter_that_a_symbolic_trace_makes_is_refused() -> None:
    with pytest.raises(llfx.CaptureError, match="makes its parameter made in the first call"):
        llfx.rewrite(Makes(parameter).double(), CFG)


@pytest.mark.parametrize("after", [counted_table, tied, table_of_the_class, table_of_the_file])
def test_what_each_call_would_make_alike_is_captured_and_nothing_of_the_capture_stays(after: Any) -> None:
    model = Makes(after).double()
    gm = llfx.capture(model, (X,))
    assert Makes.shared is None
    assert not TABLES
    close(gm(X + 1), model(X + 1), 1e-12, "output")


def test_a_branch_that_a_trace_changes_is_seen_beside_a_buffer_of_the_first_call() -> None:
    def after(m: Any, y: Tensor) -> Any:
        return counted_table(m, 2 * y if torch.compiler.is_compiling() else y)

    with pytest.raises(llfx.CaptureError, match="differs from the model"):
        llfx.capture(Makes(after).double(), (X,))


@pytest.mark.parametrize("inputs", [(X.float(),), None])
def test_a_layer_without_a_shape_is_refused(inputs: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    for adapt in (llfx.rewrite, llfx.wrap):
        with pytest.raises(llfx.CaptureError, match=r"1\.weight gets its shape in the first call.*call the model once"):
            adapt(model, CFG, inputs)
    model(X.float())
    gm = llfx.capture(model, inputs)
    close(gm(X.float()), model(X.float()), 1e-6, "output")
