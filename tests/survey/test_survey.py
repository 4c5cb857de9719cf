"""A few models of the survey, one for each thing that was found by it, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.releases import cases_by_name
from tests.survey import table
from tests.survey.__main__ import RESULTS, read
from tests.survey.cases import FAMILIES, cases, diffusers_cases
from tests.survey.trial import STEPS, try_model

CASES = cases_by_name()


def outcome(name: str, *steps: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    try_model(CASES[name].builder(), steps or ("default",), known.update)
    return known


@pytest.mark.slow
def test_images_in_a_row_of_patches_are_captured_by_default() -> None:
    known = outcome("qwen2_vl")
    assert known["default"] == "yes"
    assert known["sites"] == known["linears"], known["left_out"]


@pytest.mark.broad
def test_casts_that_only_training_makes_are_followed() -> None:
    assert outcome("mamba")["default"] == "yes"


@pytest.mark.slow
def test_all_steps_are_equal() -> None:
    known = outcome("phimoe", *STEPS)
    assert {step: known[step] for step in STEPS} == dict.fromkeys(STEPS, "yes")


@pytest.mark.slow
def test_windows_of_images_are_adapted_as_they_are_captured() -> None:
    known = outcome("swin", "adapt", "generate")
    assert known["adapt"] == "yes"
    assert known["generate"] == "none: the class does not generate"


def test_a_model_of_diffusers_is_captured_and_adapted_with_the_inputs_of_a_call() -> None:
    pytest.importorskip("diffusers")
    known: dict[str, Any] = {}
    (case,) = (case for case in diffusers_cases() if case.name == "DiTTransformer2DModel")
    try_model(case.builder(), ("default", "inputs", "adapt", "generate"), known.update)
    assert (known.get("default"), known["inputs"], known["adapt"]) == (None, "yes", "yes")
    assert known["generate"] == "none: the class does not generate"
    assert known["sites"] == known["linears"] == 11


def test_every_type_is_tried_once_by_the_first_family_that_has_it() -> None:
    assert len(CASES) == len(cases()) > 500
    assert {case.family for case in CASES.values()} <= set(FAMILIES)
    assert CASES["bert"].model == "BertForMaskedLM"
    assert CASES["whisper"].family == "speech-seq2seq"


def test_the_readme_has_the_table_of_the_results() -> None:
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    assert rows
    assert table.README.read_text().rstrip().endswith(table.summary(rows))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("yes", "equal"),
        ("differs: it", "refused"),
        ("error: TypeError", "error"),
        ("timeout: 9", "over time"),
        ("none: it does not generate", ""),
        (None, ""),
    ],
)
def test_a_step_ends_in_one_word(said: str, kind: str) -> None:
    assert table.kind(said) == kind


def test_a_later_run_of_a_step_forgets_the_warnings_of_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    first = {"key": "a", "default": "yes", "default_warnings": ["old"], "fixed": "old", "adapt_warnings": ["kept"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, {"key": "a", "default": "yes"})))
    assert read(file) == [{"key": "a", "default": "yes", "adapt_warnings": ["kept"]}]
