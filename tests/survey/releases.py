"""Print a column of the table in docs/versions.md: which features work with the releases of this environment.

Each row is a smoke test, or a test of what some release cannot do. `python -m tests.survey.releases` runs them all.
"""

from __future__ import annotations

import contextlib
import io
import platform
import sys

import pytest

from lora_lite_fx.compat.versions import found_version

GENERATION = "tests/hugging_face/test_generation.py"
ROLES = "tests/sites/test_architectures.py::test_sites_and_roles_are_those_of_the_table"
FEATURES = {
    "rewrite, train": "tests/test_smoke.py::test_rewrite_trains_the_adapters_alone",
    "capture, wrap, verify": "tests/test_smoke.py::test_capture_and_wrap_and_verify",
    "adapt, generate": "tests/test_smoke.py::test_adapt_generates",
    "own files": "tests/test_smoke.py::test_own_files",
    "files of PEFT": "tests/test_smoke.py::test_files_of_peft",
    "files of lora-lite": "tests/test_smoke.py::test_files_of_lora_lite",
    "merge, remove": "tests/test_smoke.py::test_merge_and_remove",
    "torch.compile": "tests/test_smoke.py::test_compile",
    "torch.export": "tests/test_smoke.py::test_export",
    "inspect, program": "tests/test_smoke.py::test_inspect_and_program_and_trainable_parameters",
    "command line": "tests/test_smoke.py::test_the_command_line",
    "active, scaled, add, delete, combine": "tests/test_smoke.py::test_adapters_by_name",
    "Bank": "tests/test_smoke.py::test_a_bank",
    "to_lora, reconfigure": "tests/test_smoke.py::test_an_adapter_becomes_another",
    "own variants": "tests/test_smoke.py::test_a_variant_of_ones_own",
    "backend": "tests/test_smoke.py::test_the_backend_of_torch_compile",
    "memory plans, fused loss": "tests/test_smoke.py::test_less_memory_and_a_fused_loss",
    "Trainer": "tests/test_smoke.py::test_trainer_takes_an_adapted_model",
    "backward passes of autograd functions": "tests/capture/test_autograd_functions.py",
    "layers compiled once for each kind": "tests/execution/test_recompiling.py",
    "regions without autocast": "tests/capture/quirks/test_autocast_regions.py",
    "a static cache": f"{GENERATION}::test_a_static_cache_is_written_in_place_by_one_graph",
    "long RoPE over its border": f"{GENERATION}::test_a_causal_model_generates_and_trains[longrope]",
    "DeBERTa": f"{ROLES}[deberta-v2]",
}


class Outcomes:
    """Collects what became of each test."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test, or of what it needs."""
        if report.when == "call" or report.outcome != "passed":
            self.seen.add(report.outcome)


def main() -> int:
    """Run the tests of all features, and print a line for each."""
    libraries = ", ".join(f"{name} {found_version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"Python {platform.python_version()}, {libraries}")
    failed = False
    for feature, test in FEATURES.items():
        outcomes = Outcomes()
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main(["-m", "", "-p", "no:cacheprovider", test], plugins=[outcomes])
        word = "no" if code else "skipped" if outcomes.seen == {"skipped"} else "yes"
        failed = failed or word == "no"
        print(f"{feature:40} {word}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
