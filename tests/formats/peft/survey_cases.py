"""Run PEFT's own test cases through its files and ours, and write the table `cases.md`.

    python -m tests.formats.peft.survey_cases PATH/TO/peft/tests/test_custom_models.py [--only WORDS] [--write]

The cases are read from a checkout of PEFT: its models and configurations stay there. For each case PEFT makes the
adapter, gets random values, and saves it. `load_peft` loads the file into the same base, and the outputs are compared;
then `save_peft` writes it, PEFT loads that, and the outputs are compared again. Then both are trained by one step, and
what the step changes in the tensors of the two files is compared, which is the gradients by the names of the files.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lite_fx.formats.peft.methods import all_forms
from tests.support.peft_round_trip import Outcome, round_trip

TABLE = Path(__file__).with_name("cases.md")


@dataclass(frozen=True)
class Result:
    """The outcome of one case."""

    name: str
    method: str
    outcome: Outcome


def cases_of(source: Path) -> tuple[list[tuple[str, str, type, dict[str, Any]]], dict[str, Any]]:
    """Return PEFT's cases, and the names that its test file defines for them."""
    wanted = []
    for node in ast.parse(source.read_text()).body:
        is_cases = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TEST_CASES"
        if (isinstance(node, ast.ClassDef) and not node.name.startswith("Test")) or is_cases:
            wanted.append(node)
    from peft.tuners.lora.config import BdLoraConfig

    names = {
        **vars(peft),
        "__name__": "cases",
        "torch": torch,
        "nn": nn,
        "Conv1D": Conv1D,
        "BdLoraConfig": BdLoraConfig,
    }
    for node in wanted:
        with contextlib.suppress(NameError):  # a class that needs more of the test file than the cases do
            exec(compile(ast.Module([node], []), str(source), "exec"), names)
    return names["TEST_CASES"], names


def run(case: tuple[str, str, type, dict[str, Any]], names: dict[str, Any]) -> Result:
    """Return the result of one case."""
    name, model_id, config_class, fields = case
    try:
        config = config_class(**fields)
    except ImportError as error:
        return Result(name, config_class.__name__, Outcome("PEFT fails", "", str(error)))
    model = names["MockTransformerWrapper"].from_pretrained(model_id).eval()
    x = torch.arange(90).view(9, 10)
    if "Emb" not in model_id:
        x = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    return Result(name, str(config.peft_type.value), round_trip(model, config, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--only", default="", help="an expression for names of cases")
    parser.add_argument("--write", action="store_true", help="write the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    cases, names = cases_of(arguments.source)
    results = []
    for case in cases:
        if not re.search(arguments.only, case[0]):
            continue
        began = time.perf_counter()
        try:
            result = run(case, names)
        except Exception as error:
            if arguments.only:
                traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
            result = Result(case[0], case[2].__name__, Outcome("wrong", "", why))
        results.append(result)
        outcome, seconds = result.outcome, time.perf_counter() - began
        print(
            f"{outcome.read:12} {outcome.written:10} {outcome.trained:10} {result.name} ({seconds:.1f} s) "
            f" {outcome.why[:200]}",
            flush=True,
        )
    print(summary(results))
    if arguments.write:
        TABLE.write_text(table(results))


def summary(results: list[Result]) -> str:
    """Return the counts, of all cases and of those of methods that there are here."""
    known = {form.peft_type for form in all_forms()}
    ours = [result for result in results if result.method in known]
    lines = []
    for what, members in (("methods that are here", ours), ("all methods", results)):
        read = Counter(result.outcome.read.split(" by ")[0] for result in members)
        written = Counter(result.outcome.written.split(" by ")[0] for result in members if result.outcome.written)
        trained = Counter(result.outcome.trained for result in members if result.outcome.trained)
        counts, back, steps = (
            ", ".join(f"{n} {word}" for word, n in c.most_common()) for c in (read, written, trained)
        )
        lines.append(f"{len(members)} cases of {what}: {counts}; written again: {back}; trained by a step: {steps}.")
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    """Return the results as Markdown."""
    head = [
        "# PEFT's test cases, through its files and ours",
        "",
        f"By `python -m tests.formats.peft.survey_cases`, with PEFT {peft.__version__} and torch {torch.__version__}.",
        "",
        *(f"- {line}" for line in summary(results).splitlines()),
        "",
        "`trained` compares what one step of gradient descent changes in the tensors of both files: `equal`; `said`,"
        " where it changes them otherwise and `load_peft` warns of that; `otherwise`, which must not be.",
        "",
        "| case | method | read | written | trained | why |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for result in results:
        outcome = result.outcome
        why = " ".join(outcome.why.replace("|", "/").split())[:160]
        cells = (result.name, result.method, outcome.read, outcome.written, outcome.trained, why)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(head + rows) + "\n"


if __name__ == "__main__":
    main()
