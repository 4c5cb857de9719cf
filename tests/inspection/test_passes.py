"""`inspect(..., passes=True)`: what each pass did for each program, and why it did not do more."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from lora_lite_fx.graph.insertion import is_inserted
from lora_lite_fx.inspection.shown_program import summarized
from lora_lite_fx.passes import OPTIMIZATIONS, Declined
from tests.inspection.test_inspect import LLAMA

CFG = llfx.LoRA(r=2, target_names=("_proj$",))
DIFFERENT = "self_attn.o_proj, mlp.down_proj: different inputs (model.layers.0\u20131)"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA)


@pytest.fixture(scope="module")
def gm(model: Any) -> Any:
    return llfx.rewrite(model, CFG)


def test_both_programs_report_their_passes_and_the_graph_stays(gm: Any) -> None:
    text = str(gm.graph)
    table = llfx.inspect(gm, passes=True)
    assert str(gm.graph) == text
    assert [report.program for report in table.programs] == ["training", "inference"]
    for report in table.programs:
        assert [each.name for each in report.passes] == [each.name for each in OPTIMIZATIONS.of(report.program)]
    edits = {each.name: each.edits for each in table.programs[0].passes}
    assert edits["share_siblings"] == 2 * 2
    assert edits["gather_products"] == 2 * 4
    for report in table.programs:
        again = llfx.program(gm, report.program).meta["report"]
        assert [(each.name, each.edits, each.declined) for each in again.passes] == [
            (each.name, each.edits, each.declined) for each in report.passes
        ]
    assert str(table).startswith(f"{llfx.inspect(gm)}\n\npasses of the training program\n  leave_out_mask")
    assert sum(DIFFERENT in line for line in str(table).splitlines()) == 2


def test_the_data_have_the_reasons_site_by_site_and_go_through_json(gm: Any) -> None:
    data = json.loads(json.dumps(llfx.inspect(gm, passes=True).to_dict()))
    (report,) = [each for each in data["programs"][1]["passes"] if each["name"] == "share_siblings"]
    assert report["edits"] == 4
    assert report["declined"] == [
        {"sites": [f"model.layers.{i}.self_attn.o_proj", f"model.layers.{i}.mlp.down_proj"], "why": "different inputs"}
        for i in range(2)
    ]


def test_nothing_is_reported_unless_asked_for(gm: Any) -> None:
    table = llfx.inspect(gm)
    assert table.programs == ()
    assert "programs" not in table.to_dict()
    assert "share_siblings" not in str(table)


@pytest.mark.slow
def test_a_hugging_face_model_reports_the_passes_of_its_graph(model: Any, gm: Any) -> None:
    adapted = llfx.adapt(model, CFG)
    names = [
        [(each.name, each.edits, each.declined) for each in p.passes] for p in llfx.inspect(gm, passes=True).programs
    ]
    table = llfx.inspect(adapted, passes=True)
    assert [[(each.name, each.edits, each.declined) for each in p.passes] for p in table.programs] == names


def test_the_reports_are_of_the_passes_that_the_model_runs_with(gm: Any) -> None:
    fewer = llfx.optimize(gm, OPTIMIZATIONS.without("share_siblings", "gather_products"))
    for report in llfx.inspect(fewer, passes=True).programs:
        assert not {"share_siblings", "gather_products"} & {each.name for each in report.passes}
    checkpointed = llfx.rewrite(gm, llfx.IA3(), checkpoint_layers=True)
    assert [report.program for report in llfx.inspect(checkpointed, passes=True).programs] == [
        "checkpointed",
        "inference",
    ]


def test_a_changed_graph_is_reported_anew(gm: Any) -> None:
    twin = copy.deepcopy(gm)
    llfx.inspect(twin, passes=True)
    scaled = next(node for node in twin.graph.nodes if is_inserted(node) and node.target is torch.ops.aten.mul.Tensor)
    scaled.replace_all_uses_with(scaled.args[0])
    twin.recompile()
    edits = [
        {each.name: each.edits for each in report.passes}["fold_scale_into_addition"]
        for model in (gm, twin)
        for report in llfx.inspect(model, passes=True).programs
    ]
    assert edits == [14, 14, 13, 13]


@pytest.mark.broad
def test_the_command_reports_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--passes"]) == 0
    assert "passes of the inference program" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--passes", "--json"]) == 0
    assert [each["program"] for each in json.loads(capsys.readouterr().out)["programs"]] == ["training", "inference"]


def test_equal_layers_and_equal_reasons_are_one_line() -> None:
    def record(layer: int, *names: str, why: str = "no") -> Declined:
        return Declined(tuple(f"model.layers.{layer}.{name}" for name in names), why)

    records = [record(layer, "q", "k") for layer in (0, 1, 2, 5)] + [record(layer, "v") for layer in (5, 0, 1, 2)]
    assert summarized(records) == ["q, k; v: no (model.layers.0\u20132, 5)"]
    assert summarized([record(0, "q"), record(1, "q", why="yes")]) == [
        "q: no (model.layers.0)",
        "q: yes (model.layers.1)",
    ]
    assert summarized([Declined((), "the graph"), Declined(("lm_head",), "no")]) == ["the graph", "lm_head: no"]
    assert summarized([Declined(("h.0.a", "h.1.a"), "no")]) == ["h.0.a, h.1.a: no"]
    assert summarized([Declined(("0", "1"), "no"), Declined(("0.a.1",), "no")]) == ["0, 1: no", "a.1: no (0)"]
