"""What a call changes in Python is seen, named and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_lite_fx.capture.process_state.python_state import PythonState, state_put_back

SEEN: list[int] = [1]
TABLES: dict[str, Any] = {}


class Kept(nn.Module):
    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))
        self.sizes, self.names, self.size, self.nothing = [1, [2]], {"a": 1}, 1.5, float("nan")


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Kept()


def change(model: Any, then_fail: bool = False) -> None:
    model.inner.sizes[1].append(3)
    model.inner.names["b"] = 2
    model.inner.size = 2.5
    model.inner.later = "text"
    model.inner.table = model.inner.table + 1
    model.inner.__class__.total += 1
    del model.inner.nothing
    SEEN.append(2)
    if then_fail:
        raise ZeroDivisionError


def test_changes_are_named_and_put_back() -> None:
    model, seen = Around(), SEEN
    sizes, names, table = model.inner.sizes, model.inner.names, model.inner.table
    state = PythonState(model)
    assert state.changes() == []
    change(model)
    changes = {change.name: change for change in state.changes()}
    assert changes.keys() == {
        *(f"inner.{name}" for name in ("sizes", "names", "size", "later", "table", "nothing")),
        *("total", "SEEN"),
    }
    counts = {name for name, change in changes.items() if change.is_count}
    assert counts == {"inner.names", "inner.size", "inner.later", "total", "SEEN"}
    state.restore()
    assert state.changes() == []
    assert (model.inner.sizes, model.inner.names, model.inner.size) == ([1, [2]], {"a": 1}, 1.5)
    assert (model.inner.sizes is sizes, model.inner.names is names, model.inner.table is table) == (True, True, True)
    assert (Kept.total, SEEN, SEEN is seen, hasattr(model.inner, "later")) == (0, [1], True, False)


def test_a_table_of_objects_in_a_file_is_no_state() -> None:
    with state_put_back(Around()) as state:
        TABLES["a"] = object()
        assert state.changes() == []
    assert TABLES.pop("a") is not None


def test_a_table_of_tensors_in_a_file_is_put_back() -> None:
    with state_put_back(Around()) as state:
        TABLES["a"] = torch.zeros(1)
        assert [change.name for change in state.changes()] == ["TABLES"]
    assert TABLES == {}


def test_the_state_is_put_back_after_an_error() -> None:
    model = Around()
    with pytest.raises(ZeroDivisionError), state_put_back(model):
        change(model, then_fail=True)
    assert PythonState(model).changes() == []
    assert (model.inner.size, Kept.total, SEEN) == (1.5, 0, [1])
