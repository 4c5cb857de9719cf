"""Rows that a model lays out in any way before a site: each has its own adapter there, or an error says why not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.sites.batch.batch_dimension import batch_dim, batch_sizes, follow_rows
from lora_lite_fx.sites.finding import find_sites
from tests.adapters.test_switches import fill
from tests.sites.row_layouts import FOLLOWED, PARTIAL, REFUSED
from tests.support.architectures import DECODERS
from tests.support.architectures_others import OTHERS
from tests.support.selection import broad_unless, slow_unless

SLOTS = 3
CFG = llfx.LoRA(r=2, target_names=(".",))


class Between(nn.Module):
    """Two linears, with layouts of rows between them."""

    def __init__(self, *layouts: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.layouts = nn.Linear(8, 8), nn.Linear(8, 8), layouts

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layout in self.layouts:
            y = layout(y)
        result: Tensor = self.last(y)
        return result


def inputs(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return, for each entry of the output and each row of the input, whether the entry depends on the row."""
    y = model(x)
    changed = []
    for row in range(len(x)):
        other = x.clone()
        other[row] += 1e-7 * torch.randn(x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(row))
        changed.append(model(other) != y)
    return torch.stack(changed, -1)


def check(model: nn.Module, run: Callable[[list[int], Tensor], Tensor], x: Tensor, rows: list[int]) -> bool:
    """Check that entries which depend on one row alone are as if all rows had its adapter; return whether any do."""
    mixed, depends = run(rows, x), rows_of(model, x)
    for row, adapter in enumerate(rows):
        alone = depends[..., row] & (depends.sum(-1) == 1)
        assert torch.allclose(mixed[alone], run([adapter] * len(x), x)[alone], rtol=1e-9, atol=1e-9)
    return bool((depends.sum(-1) == 1).any())


HOW: tuple[Any, ...] = (
    (llfx.rewrite, llfx.Bank(CFG, SLOTS)),
    (llfx.wrap, {"a": CFG, "b": CFG}),
    (llfx.rewrite, {"a": CFG, "b": CFG}),
    (llfx.wrap, llfx.Bank(CFG, SLOTS)),
)
"""The ways to give rows adapters of their own."""
NAMES = {-1: None, 0: "a", 2: "b"}


def runner(model: nn.Module, example: Tensor, adapt: Any, cfg: Any) -> Callable[[list[int], Tensor], Tensor]:
    """Return a function of the adapters of the rows and of a batch."""

    @functools.cache
    def adapted() -> Any:
        gm = adapt(llfx.capture(model, (example,)), cfg)
        fill(gm)
        return gm

    def run(rows: list[int], x: Tensor) -> Tensor:
        chosen: Any = [NAMES[row] for row in rows] if isinstance(cfg, dict) else torch.tensor(rows)
        with llfx.by_row(adapted(), chosen):
            y: Tensor = adapted()(x)
        return y

    return run


ROWS = [2, -1, 0]


def between(*layouts: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Between(*layouts).double()


# Values of all rows meet in each of them, so that no entry depends on one adapter alone.
MIXING = {"normalized over rows", "less than the largest"}
EVERYDAY = {"joined and split", "tokens sorted and put back", "written tokens", "each its own token"}
EVERYDAY |= {"flip", "indexed by values", "written over", "written numbers", "put back by another"}


@pytest.mark.parametrize("name", broad_unless(EVERYDAY.__contains__, list(FOLLOWED)))
def test_rows_that_keep_their_place_have_their_own_adapters(name: str) -> None:
    model = between(FOLLOWED[name])
    for how in HOW[:2]:
        run = runner(model, inputs(2, 5), *how)
        if name in MIXING:
            run(ROWS, inputs(3, 4, seed=1))
        else:
            assert check(model, run, inputs(3, 4, seed=1), ROWS)


@pytest.mark.parametrize("name", broad_unless(EVERYDAY.__contains__, list(REFUSED)))
def test_rows_that_may_be_others_are_refused(name: str) -> None:
    model = between(REFUSED[name])
    for how in HOW[:2]:
        with pytest.raises(llfx.AdapterError, match="The rows of the batch cannot be told at 'last'"):
            runner(model, inputs(2, 5), *how)(ROWS, inputs(3, 4, seed=1))


def test_the_error_names_the_line_that_loses_the_rows() -> None:
    run = runner(between(REFUSED["flip"]), inputs(2, 5), *HOW[0])
    with pytest.raises(
        llfx.AdapterError, match=r"after flip \(flip\) \(File .*test_row_layouts.py\", line .*leave the site"
    ):
        run(ROWS, inputs(3, 4))


class Turned(nn.Module):
    """A constant that goes through a site, and then to other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x.new_ones(1, 8).expand(x.shape[0], -1)).flip(0) + x[:, 0]
        return y


def test_a_constant_that_goes_to_other_rows_after_a_site_is_refused() -> None:
    with pytest.raises(llfx.AdapterError, match=r"'last'.*nothing proves which row is which after .*flip"):
        runner(Turned().double(), inputs(2, 5), *HOW[0])(ROWS, inputs(3, 4))


class Recurrent(nn.Module):
    """A recurrent layer along the tokens, or along the rows."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.over, self.last = nn.GRU(8, 8, batch_first=batch_first), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.over(x)[0])
        return y


@pytest.mark.broad
def test_recurrent_layers_run_along_the_tokens_and_not_along_the_rows() -> None:
    for batch_first in (True, False):
        model = Recurrent(batch_first).double()
        gm: Any = llfx.rewrite(model, llfx.LoRA(r=2, target_names="last"), (inputs(2, 5),))
        fill(gm)
        scales, x = torch.tensor([1.0, 0.0, -1.0]), inputs(3, 5)
        with llfx.scaled(gm, scales):
            if batch_first:
                assert torch.allclose(gm(x)[1], model(x)[1])
            else:
                with pytest.raises(llfx.AdapterError, match="nothing proves which row is which after gru"):
                    gm(x)


@pytest.mark.parametrize("name", broad_unless("put by sums".__eq__, list(PARTIAL)))
def test_layouts_that_run_for_some_values_alone_are_refused(name: str) -> None:
    with pytest.raises(llfx.AdapterError, match="cannot be told at 'last'"):
        llfx.rewrite(between(PARTIAL[name]), llfx.Bank(CFG, SLOTS), (inputs(2, 5),), verify=False)


class Two(nn.Module):
    """A linear for each of two inputs, whose rows meet or do not."""

    def __init__(self, meet: bool) -> None:
        super().__init__()
        self.one, self.two, self.meet = nn.Linear(8, 8), nn.Linear(8, 8), meet

    def forward(self, x: Tensor, y: Tensor) -> Any:
        one, two = self.one(x), self.two(y)
        return one + two if self.meet else (one, two)


@pytest.mark.broad
def test_inputs_count_the_same_rows_only_if_their_rows_meet() -> None:
    for meet, names in ((True, "."), (False, "one"), (False, "two"), (False, ".")):
        gm: Any = llfx.rewrite(Two(meet).double(), llfx.LoRA(r=2, target_names=names), (inputs(2, 5), inputs(2, 1)))
        fill(gm)
        x, y = inputs(3, 4), inputs(3, 1, seed=1)
        with llfx.scaled(gm, torch.tensor([1.0, 0.0, -1.0])):
            if not meet and names == ".":
                with pytest.raises(llfx.AdapterError, match="those of y, which nothing shows to be those of x"):
                    gm(x, y)
                continue
            together = gm(x, y)
        with llfx.scaled(gm, -1.0):
            last = gm(x, y)
        for mixed, alone in [(together, last)] if meet else zip(together, last, strict=True):
            assert torch.allclose(mixed[2], alone[2])


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless({"qwen3_moe"}.__contains__, ["qwen3_moe", "llama4", "bloom", "xlnet"]))
def test_rows_of_models_have_their_own_adapters(name: str) -> None:
    model = {**DECODERS, **OTHERS}[name].build()
    gm: Any = llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("attention",)))
    fill(gm)
    ids = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    scales = [1.0, 0.0, -1.0]
    with llfx.scaled(gm, torch.tensor(scales)):
        mixed = gm(input_ids=ids).logits
    for row, scale in enumerate(scales):
        with llfx.scaled(gm, scale):
            assert torch.allclose(mixed[row], gm(input_ids=ids).logits[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({**DECODERS, **OTHERS}.keys() - {"clip", "siglip", "swin"}))
def test_all_sites_whose_rows_are_not_joined_are_proved(name: str) -> None:
    """Two models have rows of texts and of images, which need not be the same; and one has a fixed batch."""
    gm = llfx.capture({**DECODERS, **OTHERS}[name].build())
    flow, sizes = follow_rows(gm.graph), batch_sizes(gm.graph)
    for site in find_sites(gm):
        for call in site.calls:
            if [str(size) in sizes for size in call.y.meta["val"].shape].count(True) == 1:
                batch_dim(flow, call.y, site.name)


KEEPING_SHAPE = {**FOLLOWED, **REFUSED}


class Joined(nn.Module):
    """Linears of which each reads a layout of the sum of two earlier values."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.linears, self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in steps), steps

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for linear, (name, one, other) in zip(self.linears, self.steps, strict=True):
            y = values[one % len(values)] + values[other % len(values)]
            values.append(linear(KEEPING_SHAPE[name](y)))
        return values[-1]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_layouts(data: st.DataObject) -> None:
    check_layouts(data)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_many_layouts(data: st.DataObject) -> None:
    check_layouts(data)


def check_layouts(data: st.DataObject) -> None:
    """Check random layouts between random linears: an entry of one row has its adapter, or there is an error."""
    step = st.tuples(st.sampled_from(sorted(KEEPING_SHAPE)), st.integers(0, 3), st.integers(0, 3))
    model = Joined(data.draw(st.lists(step, min_size=1, max_size=4))).double()
    try:
        model(inputs(2, 5)), model(inputs(3, 4))
    except (RuntimeError, IndexError):
        return  # shapes that do not fit
    run = runner(model, inputs(2, 5), *data.draw(st.sampled_from(HOW)))
    with contextlib.suppress(llfx.AdapterError):
        check(model, run, inputs(3, 4, seed=1), data.draw(st.permutations(ROWS)))
