"""The benchmark: its statistics, its files, and the agreement of the arms that it compares."""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from pathlib import Path
from typing import Any, cast

import benchmark
import benchmark_alone
import benchmark_arms
import benchmark_cases as cases
import benchmark_cuda
import benchmark_measures
import benchmark_profile
import benchmark_report as report
import finetune_model
import pytest
import torch
import transformers
from benchmark_arms import ADAPTED, BASE, VARIANTS, Arms, capture, config
from benchmark_report import Result

from tests.support.models import tiny_llama
from tests.support.selection import broad_after

CASE = cases.CASES["tiny-qkv"]
TOKENS, WIDTH, RANK = 4, 64, 16


@functools.cache
def arms(variant: str, call: str = "train") -> Arms:
    step = CASE.step(CASE.module("cpu", torch.float32), call, "cpu", torch.float32)
    graph, _ = capture(step)
    return Arms(step, graph, config(variant, RANK, CASE))


def result(**fields: Any) -> Result:
    return Result(**{"case": "a case", "measure": "train", "variant": "LoRA", "unit": "s", **fields})


# Statistics.


def test_ratios_are_of_medians_and_of_rounds() -> None:
    seconds = {"base": [1.0, 2.0, 4.0], "base-again": [1.0, 2.0, 4.0], "ours": [2.0, 3.0, 4.0]}
    times = report.of_rounds(result(), seconds)
    assert times.values["ours"] == 3.0
    assert times.ratios["ours"] == 1.5
    assert times.paired["ours"] == [1.5, 1.0, 2.0]
    assert not times.void


def test_an_arm_is_judged_by_the_rounds_it_took_part_in() -> None:
    seconds: dict[str, list[float | None]] = {
        "base": [1.0, 1.0, 2.0],
        "base-again": [1.0, 1.0, 2.0],
        "peft": [9.0, None, 10.0],
    }
    times = report.of_rounds(result(), seconds)
    assert times.values["peft"] == 9.5
    assert times.paired["peft"][0] == 7.0


@pytest.mark.parametrize(
    ("again", "void"),
    [([1.02] * 3, False), ([1.04] * 3, True), ([0.96] * 3, True), ([1.0, 1.06, 1.06], True)],
)
def test_a_run_is_void_if_the_base_differs_from_itself(again: list[float], void: bool) -> None:
    times = report.of_rounds(result(), {"base": [1.0, 1.0, 1.0], "base-again": again})
    assert bool(times.void) == void
    assert ("(void)" in report.table(WHERE, [times])) == void


def test_a_run_is_void_if_rounds_differ_although_medians_agree() -> None:
    times = report.of_rounds(result(), {"base": [1.0, 2.0, 3.0], "base-again": [2.0, 3.0, 1.0]})
    assert times.ratios["base-again"] == 1.0
    assert times.void


# Files.

WHERE = {
    "machine": "a processor",
    "system": "a system",
    "versions": {"torch": "2"},
    "date": "2000-01-01",
    "settings": {"rank": 16},
}


def test_a_result_file_gives_the_same_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = report.of_rounds(
        result(notes={"peft": "not there: none"}), {"base": [1 / 3] * 2, "base-again": [1 / 3] * 2}
    )
    sizes = report.of_values(result(measure="saved", unit="B"), {"base": 2e6, "ours": 3e6})
    report.write(tmp_path / "a.json", WHERE, [times, sizes])
    where, results = report.read([tmp_path / "a.json"])
    assert report.table(where, results) == report.table(WHERE, [times, sizes])
    assert benchmark.main(["--from-json", str(tmp_path / "a.json"), "--out", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == report.table(WHERE, [times, sizes])
    assert "333.33 ms" in printed
    assert "1.500" in printed
    assert "peft: not there: none" in printed
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_several_result_files_become_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"{measure}.json" for measure in ("saved", "flops")]
    written = [report.of_values(result(measure=path.stem), {"base": 1.0, "ours": 2.0}) for path in paths]
    for path, value in zip(paths, written, strict=True):
        report.write(path, WHERE, [value])
    assert benchmark.main(["--from-json", *map(str, paths), "--out", str(tmp_path / "both")]) == 0
    where, results = report.read([tmp_path / "both.json"])
    assert results == written
    assert where["settings"] == [WHERE["settings"]] * 2


# Agreement.


@pytest.mark.filterwarnings("ignore:The cayley-neumann")
@pytest.mark.parametrize("variant", broad_after(1, VARIANTS))
def test_all_arms_agree(variant: str) -> None:
    of_inference = ("ours-frozen", "ours-adapt-frozen", "ours-exported")
    left_out = ("peft-liger", "ours-adapt", "ours-fused", "ours-balanced", *of_inference)  # of whole models the others
    names = [name for name in (*BASE, *ADAPTED) if "compiled" not in name and name not in left_out]
    ready, notes = benchmark.ready_arms(arms(variant), names, compiled=False)
    assert not notes
    assert [arm.name for arm in ready] == names
    assert len(next(arm for arm in ready if arm.name == "peft").results()) == 4 + len(ready[-2].parameters)


def arms_of_model(call: str) -> Arms:
    build: Any = cases.CASES["tiny"].build
    case = cases.Case(functools.partial(build, vocabulary=256), cases.CAUSAL)
    step = case.step(case.module("cpu", torch.float32), call, "cpu", torch.float32)
    return Arms(step, capture(step)[0], config("LoRA", RANK, case))


@pytest.mark.parametrize("call", broad_after(1, ["train", "train-masked"]))
def test_arms_of_whole_models_agree(call: str) -> None:
    of_model = arms_of_model(call)
    ready, notes = benchmark.ready_arms(of_model, ["base", "ours", "ours-fused", "ours-balanced"], compiled=False)
    assert not notes
    assert [arm.name for arm in ready] == ["base", "ours", "ours-fused", "ours-balanced"]


def test_a_token_is_decoded_through_adapt_as_by_the_graph() -> None:
    names = ["base", "peft", "ours-frozen", "ours-adapt-frozen"]
    ready, notes = benchmark.ready_arms(arms_of_model("decode"), names, compiled=False)
    assert not notes
    assert [arm.name for arm in ready] == names


@pytest.mark.broad
def test_liger_changes_its_own_arm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    changed: list[Any] = []

    def call(model: Any, forward: Any, **arguments: Any) -> Any:
        changed.append(model)
        return forward(**arguments)

    def apply(model: Any, _: dict[str, Any]) -> None:  # as Liger does: the instance, and classes of the file
        model.forward = functools.partial(call, model, model.forward)
        modeling_llama.LlamaMLP = None  # type: ignore[misc, assignment]

    monkeypatch.setattr(benchmark_arms, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(benchmark_arms, "apply_liger_kernel", apply)
    of_model = arms_of_model("train")
    ready, notes = benchmark.ready_arms(of_model, ["base", "peft-liger", "peft"], compiled=False)
    assert not notes
    assert [arm.name for arm in ready] == ["base", "peft-liger", "peft"]
    assert set(changed) == {cast(Any, ready[1].run).base_model.model.model}
    assert modeling_llama.LlamaMLP is not None


def test_liger_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_arms, "is_liger_kernel_available", lambda: False)
    ready, notes = benchmark.ready_arms(arms("LoRA"), ["base", "peft-liger"], compiled=False)
    assert [arm.name for arm in ready] == ["base"]
    assert "liger-kernel is not installed" in notes["peft-liger"]


def test_the_pretrained_model_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = transformers.LlamaForCausalLM(tiny_llama())
    monkeypatch.setattr(finetune_model, "location", lambda model: {"pretrained_model_name_or_path": "the wheel"})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny)
    assert cases.CASES["smollm2"].build() is tiny


@pytest.mark.broad
def test_a_compiled_arm_agrees() -> None:
    ready, notes = benchmark.ready_arms(arms("LoRA", "forward"), ["base", "ours-compiled"], compiled=True)
    assert not notes
    assert [arm.name for arm in ready] == ["base", "ours-compiled"]


def test_the_adapter_changes_what_the_base_computes() -> None:
    base, ours = (arms("LoRA").make(name).results() for name in ("base", "ours"))
    assert "output" in report.disagreement(base, ours, 2e-2, trained=False)


def test_an_arm_that_disagrees_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = arms("LoRA")

    def wrong(self: Arms, name: str) -> Any:
        return self.graph if name == "merged" else right(self, name)

    right = Arms._module
    monkeypatch.setattr(Arms, "_module", wrong)
    ready, notes = benchmark.ready_arms(ours, ["base", "merged", "ours"], compiled=False)
    assert [arm.name for arm in ready] == ["base", "ours"]
    assert notes["merged"].startswith("disagrees: ")


def test_a_wrong_or_missing_gradient_is_a_disagreement() -> None:
    expected = arms("LoRA").make("ours").results()
    name = next(name for name in expected if name.startswith("gradient of "))
    wrong = {**expected, name: 1.01 * expected[name]}
    assert not report.disagreement(expected, expected, 1e-6, trained=True)
    assert name in report.disagreement(wrong, expected, 1e-3, trained=True)
    del wrong[name]
    assert "one arm alone" in report.disagreement(wrong, expected, 1e-3, trained=True)


def test_arms_that_have_not_begun_in_time_are_left_out_and_the_base_is_not() -> None:
    ready, notes = benchmark.ready_arms(arms("LoRA"), ["base", "base-again", "ours"], compiled=False, ends=0)
    assert [arm.name for arm in ready] == ["base", "base-again"]
    assert notes == {"ours": "left out: the time is over (--minutes)"}
    times = benchmark_measures.time_rounds(ready, 9, 0, "cpu", ends=0)
    assert len(times["base"]) == benchmark_measures.FEWEST_ROUNDS


# A GPU.


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("--device cuda: torch finds no CUDA device here")


def test_on_a_gpu_other_things_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = benchmark.parse_arguments(["--device", "cuda", "--variants", "LoRA"])
    assert (args.cases, args.variants, args.dtype) == (["llama-1b"], ["LoRA"], "bfloat16")
    assert args.arms == ["base", "base-again", *benchmark_cuda.DEFAULTS["arms"]]
    assert cases.shape_of("train-8x2048") == (8, 2048)
    assert cases.tokens_of("train-8x2048") == 16384
    assert (cases.shape_of("train-2048"), cases.shape_of("train"), cases.tokens_of("decode")) == (
        (1, 2048),
        (1, 256),
        1,
    )


def test_the_table_of_a_gpu_has_speed_and_peak(tmp_path: Path) -> None:
    seconds = {"base": [2.0] * 3, "base-again": [2.0] * 3, "ours": [2.5] * 3}
    times = report.of_rounds(result(measure="train-8x2048", notes={"peft-liger": "not there"}), seconds)
    peaks = report.of_values(result(measure="peak of train-8x2048", unit="B"), {"base": 2e9, "ours": 3e9})
    benchmark_cuda.write_table(tmp_path / "table.md", WHERE, [times, peaks])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| `ours` | 2.5 s | 1.250 | 6,554 | 3.0 GB |" in table
    assert "| `base-again` | 2.0 s | 1.000 | 8,192 |  |" in table
    assert "| `peft-liger` | not there | | | |" in table


# Counts.


@pytest.mark.parametrize("name", ["peft", "ours-plain", "ours"])
def test_products_added_in_place_are_counted(name: str) -> None:
    base = 3 * 4 * TOKENS * WIDTH**2
    lora = 3 * 6 * TOKENS * RANK * 2 * WIDTH
    assert benchmark_measures.flops(arms("LoRA").make("base")) == base
    assert benchmark_measures.flops(arms("LoRA").make(name)) == base + lora


def test_arms_with_kept_values_agree_and_are_not_there_in_training() -> None:
    names = ["base", "ours-frozen", "ours-exported"]
    ready, notes = benchmark.ready_arms(arms("DoRA", "forward"), names, compiled=False)
    assert not notes
    assert [arm.name for arm in ready] == names
    _, notes = benchmark.ready_arms(arms("DoRA"), names, compiled=False)
    assert notes == {
        "ours-frozen": "not there: nothing is kept in training",
        "ours-exported": "not there: a baked program does not train",
    }


def test_work_on_parameters_counts_in_every_step_but_once_in_a_frozen_scope() -> None:
    ours = arms("DoRA").make("ours")
    ours.results()
    assert benchmark_measures.flops(ours) == benchmark_measures.flops(ours)
    ours, plain = (arms("DoRA", "forward").make(name) for name in ("ours-frozen", "ours-plain"))
    ours.results()
    assert benchmark_measures.flops(ours) < benchmark_measures.flops(plain)


def test_saved_bytes_leave_out_parameters() -> None:
    assert benchmark_measures.saved(arms("LoRA").make("base")) == 0
    assert benchmark_measures.saved(arms("LoRA").make("ours-plain")) == 4 * TOKENS * (WIDTH + 3 * RANK)


@pytest.mark.broad
def test_one_graph_is_compiled_for_all_shapes() -> None:
    first, *others = benchmark_measures.compilations(arms("LoRA", "forward"), "ours")
    assert first == 1
    assert not any(others[:-1])  # the last shape, a batch of one, may need a graph of its own


# The command.


@pytest.mark.broad
def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    settings = "--cases tiny-qkv --variants LoRA --rounds 2 --seconds 0 --measures forward train saved flops"
    settings += " --arms peft ours merged"
    assert benchmark.main([*settings.split(), "--out", str(tmp_path / "run")]) == 0
    where, results = report.read([tmp_path / "run.json"])
    assert where["settings"]["rounds"] == 2
    assert [entry.measure for entry in results] == ["forward", "flops of forward", "train", "flops of train", "saved"]
    for entry in results:
        assert list(entry.values) == ["base", "base-again", "peft", "ours", "merged"]
    assert (tmp_path / "run.png").exists()


@pytest.mark.broad
@pytest.mark.parametrize("arm", ["ours", "peft", "base-exported"])
def test_what_comes_once_is_measured_in_a_process_of_its_own(arm: str) -> None:
    settings = f"--alone --cases tiny-qkv --variants LoRA --arms {arm}"
    measured = benchmark_alone.alone(benchmark.parse_arguments(settings.split()))
    assert measured.keys() == set(benchmark_alone.ALONE)
    assert measured["capture"] > 0
    assert measured["first-call"] > 0
    assert measured["compile"] == measured["capture"] + measured["first-call"]


@pytest.mark.parametrize("wrong", ["--cases nothing", "--arms theirs", "--variants Adapter", "--measures joy"])
def test_unknown_arguments_are_refused_by_name(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(wrong.split())
    assert wrong.split()[1] in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["nothing:LoRA", "tiny:Adapter", "tiny"])
def test_an_unknown_step_is_refused_by_name(wrong: str) -> None:
    assert benchmark_profile.step_name("tiny:LoRA") == "tiny:LoRA"
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{wrong}' is not a case and a variant"):
        benchmark_profile.step_name(wrong)


def test_a_profile_has_the_operators_that_differ_most_and_their_sums() -> None:
    prefix = "autograd::engine::evaluate_function: "
    found = {
        "base": Counter({"aten::mm": 5.0, "aten::add": 1.0}),
        "ours": Counter({"aten::mm": 5.5, "aten::add": 1.0, f"{prefix}Mm": 2.0, f"{prefix}Add": 3.0}),
    }
    title, *rows = benchmark_profile.table("tiny", found, 2)
    assert title.split() == ["tiny", "base", "ours", "ms", "a", "step"]
    assert [row.rsplit(maxsplit=2) for row in rows] == [
        ["  Add", "0.0", "3.0"],
        ["  Mm", "0.0", "2.0"],
        ["  the rest", "6.0", "6.5"],
        ["  all", "6.0", "11.5"],
    ]
