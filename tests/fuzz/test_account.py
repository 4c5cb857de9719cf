"""Check each cell of the account: a dependency of a call, changed on a path, is followed, refused or ignored."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_fx as llfx
from tests.fuzz import account_page
from tests.fuzz.account import FOLLOWED, IGNORED, PATHS, REFUSED, Row, leave
from tests.fuzz.account_models import Ask, Subject, adapted, result_of
from tests.fuzz.account_rows import ROWS
from tests.fuzz.oracle import FORMULAS, Oracle
from tests.fuzz.verdict import Void, Wrong, is_ours, require_close
from tests.support.conformance import randomise
from tests.support.releases import has

NEUTRAL = {"copy.deepcopy", "gradient checkpointing", "requires_grad of a frozen weight"}
"""What changes no result of the eager model. The regions in a model are compared with the oracle, which has them."""
CELLS = [(row, path) for row in ROWS for path in PATHS]


def mark(row: Row, path: str) -> Any:
    marks = []
    first = [each for each in ROWS if each.group == row.group][:1]
    if path != "rewrite" or row not in first:
        marks.append(pytest.mark.slow if path == "backend" else pytest.mark.broad)  # it compiles each cell
    return pytest.param(row, path, marks=marks, id=f"{path}-{row.group}-{row.name}".replace(" ", "_"))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    with torch.random.fork_rng():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("row", "path"), [mark(row, path) for row, path in CELLS])
def test_a_cell_is_what_happens(row: Row, path: str) -> None:
    word = row.cells[path].partition(":")[0]
    if word == "n/a":
        if row.change is not None and "no module" in row.cells[path]:
            with pytest.raises(Void):
                row.change(adapted_once(path, row.subject, row.training)[1])
        return
    assert happens(row, path) == word


def happens(row: Row, path: str) -> str:
    """Return what the library does: one of the words of the account, or how it is wrong."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            return "refused" if (word := compared(row, path)) != FOLLOWED and any(map(is_ours, heard)) else word
        except llfx.AdapterError:
            return REFUSED
        except Exception as error:
            if isinstance(error.__cause__ or error.__context__, llfx.AdapterError):
                return REFUSED
            return f"raw: {type(error).__name__}: {error}"


def compared(row: Row, path: str) -> str:
    """Return "followed" or "ignored", or which result is neither that of the oracle nor that of before."""
    if row.before is None:
        plain, model = adapted_once(path, row.subject, row.training)
    else:
        plain = row.subject.build(path).train(row.training)
        row.before(plain)
        model = moved(adapted(path, row.subject, plain))
    oracle = oracle_of(plain, model)
    before = results(model, path, row.subject, Ask(), oracle)
    results(oracle.model, "", row.subject, Ask(), oracle)  # as calls change buffers
    if row.change is not None:
        model = changed(row.change, model)
        oracle.model = changed(row.change, oracle.model)
        oracle.copy_adapters(model, {"default": FORMULAS["LoRA"][1]})  # as a cast has made them
    expected = results(oracle.model, "", row.subject, row.ask, oracle)
    actual = results(model, path, row.subject, row.ask, oracle)
    tolerance = 0.05 if row.ask.context == "autocast" else row.subject.tolerance
    if same(actual, expected, tolerance):
        return FOLLOWED
    return IGNORED if same(actual, before, tolerance) else "wrong"


def results(model: Any, path: str, subject: Subject, ask: Ask, oracle: Oracle) -> dict[str, Tensor]:
    """Return what a call gives, with the gradients of the adapters and of what the oracle's base trains."""
    trained = {name for name, parameter in oracle.model.named_parameters() if parameter.requires_grad}
    if model is oracle.model:
        tensors = {**oracle.leaves(), **dict(model.named_parameters())}
    else:
        tensors = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    wanted = {*oracle.leaves(), *trained}
    return result_of(model, path, subject, ask, {name: each for name, each in tensors.items() if name in wanted})


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    """Return whether two results have the same tensors, in names, shapes, types and values."""
    try:
        require_close(one, other, tolerance, "result")
    except Wrong:
        return False
    return True


@functools.cache
def _stored(path: str, subject: Subject, training: bool) -> tuple[Any, Any]:
    plain = subject.build(path).train(training)
    return plain, moved(adapted(path, subject, plain))


def adapted_once(path: str, subject: Subject, training: bool) -> tuple[Any, Any]:
    """Return a model and what a path makes of it, captured once: copies, but where torch.compile knows the model."""
    if path == "backend":
        plain = subject.build(path).train(training)
        return plain, moved(adapted(path, subject, plain))
    return copy.deepcopy(_stored(path, subject, training))


def moved(model: Any) -> Any:
    """Return an adapted model whose adapters have random values."""
    randomise(model, 0)
    return model


def oracle_of(plain: Any, model: Any) -> Oracle:
    """Return an oracle with the adapters of `model`, of a model that stays as it is."""
    oracle = Oracle(copy.deepcopy(plain).requires_grad_(False))
    oracle.copy_adapters(model, {"default": FORMULAS["LoRA"][1]})
    return oracle


def changed(change: Any, model: Any) -> Any:
    """Return the model after a change, which may be another one."""
    result = change(model)
    return model if result is None else result


def test_the_rows_that_are_to_matter_do() -> None:
    """A change that changes nothing of the eager model would be followed by anything."""
    for row in ROWS:
        looks_at_a_region = row.before is leave and row.ask == Ask()
        changes = row.change or row.before or row.ask != Ask()
        if row.name in NEUTRAL or looks_at_a_region or not changes or row.ask.context in ("no_grad", "inference"):
            continue
        if row.training and row.ask.context == "autocast" and not has("transformers", "5.24"):
            continue  # whose training calls keep caches in the type of the weights
        plain = row.subject.build("wrap").train(row.training)
        before = result_of(plain, "", row.subject, Ask(), dict(plain.named_parameters()))
        other = row.subject.build("wrap").train(row.training)
        for change in (row.before, row.change):
            other = other if change is None else changed(change, other)
        after = result_of(other, "", row.subject, row.ask, dict(other.named_parameters()))
        assert not same(after, before, row.subject.tolerance), row.name


def test_the_page_is_the_account() -> None:
    assert account_page.PAGE.read_text(encoding="utf-8") == account_page.page(), "python -m tests.fuzz.account_page"


def test_names_of_rows_are_told_apart() -> None:
    assert len({(row.group, row.name) for row in ROWS}) == len(ROWS)
