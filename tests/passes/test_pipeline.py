"""Passes and pipelines: what the runner does around each pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import ConfigError
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    Declined,
    GraphPass,
    InsertAdapter,
    MergeAdapters,
    Outcome,
    PassError,
    Pipeline,
    RemoveAdapters,
)
from tests.support.models import GatedMLP, Net, ids


class Down(nn.Module):
    """The smallest block with a down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.proj(torch.relu(self.fc(x)))


EXAMPLE = (torch.randn(2, 4),)


def test_passes_make_no_edit_the_second_time() -> None:
    gm = llfx.capture(Net([GatedMLP], True, False), (ids(2, 5),))
    insert = Pipeline((InsertAdapter(llfx.LoRA(r=2), 0, ("blocks.0.up", "head")),))
    assert [report.edits for report in insert.run(gm)] == [2]
    before = str(gm.graph)
    assert [report.edits for report in insert.run(gm)] == [0]
    assert str(gm.graph) == before
    assert [report.edits for report in Pipeline((RemoveAdapters(), RemoveAdapters(), MergeAdapters())).run(gm)] == [
        2,
        0,
        0,
    ]


def test_reports_name_the_pass_and_its_time() -> None:
    (report,) = Pipeline((RemoveAdapters(),)).run(llfx.capture(Down(), EXAMPLE))
    assert (report.name, report.edits) == ("remove_adapters", 0)
    assert report.seconds >= 0


def test_a_pipeline_can_go_without_a_pass() -> None:
    pipeline = Pipeline((RemoveAdapters(), MergeAdapters()))
    assert [p.name for p in pipeline.without("remove_adapters")] == ["merge_adapters"]
    with pytest.raises(ValueError, match="No pass is named fuse"):
        pipeline.without("fuse")


@dataclass(frozen=True)
class Fail(GraphPass):
    """A pass that raises `error`."""

    error: Exception

    def run(self, gm: fx.GraphModule) -> int:
        raise self.error


def test_an_unexpected_failure_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError, match=r"KeyError in pass fail \(passes that ran before: remove_adapters\)"):
        Pipeline((RemoveAdapters(), Fail(KeyError("x")))).run(llfx.capture(Down(), EXAMPLE))


def test_a_refusal_keeps_its_class_and_notes_the_pass() -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline((Fail(ConfigError("no")),)).run(llfx.capture(Down(), EXAMPLE))
    assert "in pass fail" in caught.value.__notes__[0]


@dataclass(frozen=True)
class Returns(GraphPass):
    """Returns a value and changes nothing."""

    value: Any

    def run(self, gm: fx.GraphModule) -> Any:
        return self.value


@pytest.mark.parametrize("value", [None, 1.0, Outcome("two")], ids=str)  # type: ignore[arg-type]
def test_a_pass_that_returns_no_number_of_edits_is_named(value: object) -> None:
    with pytest.raises(PassError, match=r"TypeError in pass returns \(.*: none\): run must return the number of edits"):
        Pipeline((Returns(value),)).run(llfx.capture(Down(), EXAMPLE))


def test_reports_have_the_reasons_of_a_pass_each_once() -> None:
    gm = llfx.rewrite(Down(), llfx.LoRA(r=2, target_names=("proj",)), EXAMPLE)
    nodes = {node.name: node for node in gm.graph.nodes}
    assert Declined.at([nodes["proj_lora_A_linear"], nodes["proj_add"]], "no") == Declined(("proj",), "no")
    assert str(Declined.at([nodes["linear"], nodes["proj_add"]], "no")) == "fc, proj: no"
    assert str(Declined((), "no")) == "no"
    declined = (Declined(("proj",), "no"), Declined(("fc",), "no"), Declined(("proj",), "no"))
    reports = Pipeline((Returns(Outcome(0, declined)), Returns(3))).run(gm)
    assert [(report.edits, report.declined) for report in reports] == [(0, declined[:2]), (3, ())]


# Dumps.


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, str]]:
    """Dump to a new folder; the function returns the texts of its files by name, without their numbers."""
    folder = tmp_path / "dump"
    monkeypatch.setenv("LORA_LITE_FX_DUMP", str(folder))
    return lambda: {path.name.split("_", 1)[1]: path.read_text() for path in sorted(folder.iterdir())}


def test_a_pass_that_changes_the_graph_is_dumped_before_and_after(dump: Callable[[], dict[str, str]]) -> None:
    llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)(*EXAMPLE)  # the call derives a program
    texts = dump()
    assert "lora_A" in texts["insert_adapter.after.txt"]
    assert "lora_A" not in texts["insert_adapter.before.txt"]
    assert texts["insert_adapter.after.txt"].startswith("# insert_adapter: 2 edits\ngraph():\n")
    for each in OPTIMIZATIONS.of("training"):
        assert (f"{each.name}.txt" in texts) != (f"{each.name}.before.txt" in texts), each.name
        assert (f"{each.name}.after.txt" in texts) == (f"{each.name}.before.txt" in texts), each.name


def test_a_pass_that_does_nothing_is_dumped_as_one_line_and_its_reasons(dump: Callable[[], dict[str, str]]) -> None:
    llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)(*EXAMPLE)
    texts = dump()
    assert texts["group_heads.txt"] == "# group_heads: no edits\n"
    assert texts["share_siblings.txt"] == "# share_siblings: no edits\n# share_siblings: fc, proj: different inputs\n"


class Unprintable:
    """A value without a text."""

    def __repr__(self) -> str:
        raise ValueError("no text")


@dataclass(frozen=True)
class Break(GraphPass):
    """Leaves a graph that cannot be printed, and fails."""

    def run(self, gm: fx.GraphModule) -> int:
        relu = next(node for node in gm.graph.nodes if node.name == "relu")
        relu.args = (Unprintable(),)
        raise KeyError("lost")


def test_a_failing_pass_is_dumped_with_its_error_and_what_it_left(dump: Callable[[], dict[str, str]]) -> None:
    for wrong in (Fail(KeyError("x")), Break()):
        with pytest.raises(PassError):
            Pipeline((RemoveAdapters(), wrong)).run(llfx.capture(Down(), EXAMPLE))
    texts = dump()
    assert "remove_adapters.txt" in texts
    assert texts["fail.failed.txt"] == "# fail failed: KeyError: 'x'\n" + texts["fail.before.txt"]
    lines = texts["break.failed.txt"].splitlines()
    assert lines[0] == "# break failed: KeyError: 'lost'"
    assert lines[1] == "# The graph cannot be printed as a whole: ValueError: no text"
    assert "    # relu cannot be printed: ValueError: no text" in lines
    assert sum("call_function[target=torch.ops.aten.linear" in line for line in lines) == 2
    assert not (set(texts) & {"fail.after.txt", "break.after.txt"})
