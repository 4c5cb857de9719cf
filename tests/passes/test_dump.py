"""`LORA_LITE_FX_DUMP`: a folder for each program, with the graph around each pass that changes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import GraphPass, PassError, Pipeline, Program, RemoveAdapters
from tests.passes.test_check import Negate
from tests.passes.test_pipeline import EXAMPLE, Down, Fail

Texts = dict[str, dict[str, str]]


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Texts]:
    """Dump to a new folder; the function returns the texts by folder and file, without the numbers of the folders."""
    root = tmp_path / "dump"
    monkeypatch.setenv("LORA_LITE_FX_DUMP", str(root))

    def texts() -> Texts:
        folders = sorted(root.iterdir()) if root.exists() else []
        return {
            folder.name.split("_", 1)[1]: {path.name: path.read_text() for path in sorted(folder.iterdir())}
            for folder in folders
        }

    return texts


def test_each_program_has_a_folder_with_the_passes_that_changed_it(dump: Callable[[], Texts]) -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.LoRA(r=2)], EXAMPLE).eval()
    gm(*EXAMPLE)  # derives the training program
    with torch.no_grad(), llfx.frozen(gm):
        gm(*EXAMPLE)
    texts = dump()
    assert list(texts) == ["graph_of_Down", "training_of_Down", "inference_of_Down"]
    assert list(texts["graph_of_Down"]) == [
        f"0{place}_insert_adapter.{when}.txt" for place in (0, 1) for when in ("after", "before")
    ]
    programs: tuple[Program, ...] = ("training", "inference")
    for program in programs:
        reports = llfx.program(gm, program).meta["report"].passes
        assert list(texts[f"{program}_of_Down"]) == [
            f"{place:02d}_{each.name}.{when}.txt"
            for place, each in enumerate(reports)
            for when in ("after", "before")
            if each.edits
        ]


def test_the_text_has_shapes_and_dtypes_reasons_and_lines_of_the_model(dump: Callable[[], Texts]) -> None:
    llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)(*EXAMPLE)
    texts = dump()
    before, after = (texts["graph_of_Down"][f"00_insert_adapter.{when}.txt"] for when in ("before", "after"))
    assert after.startswith("# insert_adapter: 2 edits\ndef forward(self, x):\n")
    assert "lora_A" not in before
    assert 'fc_lora_A: "f32[2, 4]" = self.fc.lora_A' in after
    assert re.search(r'fc_lora_A_linear: "f32\[s\d+, 2\]" = torch\.ops\.aten\.linear\.default\(x, fc_lora_A\)', after)
    assert "code: def forward" not in after
    assert re.search(r"File: .*/variants/lora\.py:\d+ in forward, code: ", after)
    assert re.search(r"File: .*/test_pipeline\.py:\d+ in forward, code: return x \+ self\.proj", before)
    gathered = texts["training_of_Down"]
    (name,) = [name for name in gathered if "gather_products.after" in name]
    assert gathered[name].startswith("# gather_products: 2 edits\n")


def test_a_pipeline_that_changes_nothing_writes_nothing(dump: Callable[[], Texts]) -> None:
    Pipeline((RemoveAdapters(),)).run(llfx.capture(Down(), EXAMPLE))
    assert dump() == {}


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


def test_a_failing_pass_is_dumped_with_its_error_and_what_it_left(dump: Callable[[], Texts]) -> None:
    programs: tuple[Program, ...] = ("training", "checkpointed", "inference")
    for program, wrong in zip(programs, (Fail(KeyError("x")), Break(), Negate()), strict=True):
        with pytest.raises(PassError):
            Pipeline((RemoveAdapters(), wrong), check=EXAMPLE).run(llfx.capture(Down(), EXAMPLE), program)
    failed, broken, negated = dump().values()
    assert failed.keys() == {"01_fail.before.txt", "01_fail.failed.txt"}
    assert failed["01_fail.failed.txt"] == "# fail failed: KeyError: 'x'\n" + failed["01_fail.before.txt"]
    lines = broken["01_break.failed.txt"].splitlines()
    assert lines[0] == "# break failed: KeyError: 'lost'"
    assert lines[1] == "# The graph cannot be printed as a whole: ValueError: no text"
    assert "    # relu cannot be printed: ValueError: no text" in lines
    assert sum("call_function[target=torch.ops.aten.linear" in line for line in lines) == 2
    assert negated["01_negate.failed.txt"].startswith("# negate failed: PassError: Pass negate changes what the graph")
    assert "torch.ops.aten.neg.default" in negated["01_negate.failed.txt"]
    assert "torch.ops.aten.neg.default" not in negated["01_negate.before.txt"]


def test_a_symbolic_graph_without_shapes_is_dumped_too(dump: Callable[[], Texts]) -> None:
    llfx.rewrite(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), llfx.LoRA(r=1, target_names=("0",)))
    assert "_0_lora_A" in dump()["graph_of_GraphModule"]["00_insert_adapter.after.txt"]
