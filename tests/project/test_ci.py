"""CI runs the two commands of the README: it reads them from there and installs nothing else."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme_command() -> Callable[[str, str], str]:
    """The function of `.ci/readme_command.py`, which is a script beside CI's own and belongs to no package."""
    spec = importlib.util.spec_from_file_location("readme_command", ROOT / ".ci" / "readme_command.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command: Callable[[str, str], str] = module.readme_command
    return command


def test_the_commands_are_found_in_the_readme(readme_command: Callable[[str, str], str]) -> None:
    main_job, tests = (readme_command(name, README) for name in ("main-job", "tests"))
    assert main_job.endswith(" && python examples/finetune.py")
    assert " && python -m pytest " in tests
    for command in (main_job, tests):
        assert command in README
        assert command.startswith("pip install -e ")


def test_ci_installs_nothing_beside_the_commands() -> None:
    assert "main_job=$(python3 .ci/readme_command.py main-job)" in SCRIPT
    assert "tests=$(python3 .ci/readme_command.py tests)" in SCRIPT
    assert "install -" not in SCRIPT
    assert "pip install" not in SCRIPT
    assert "pytest" not in SCRIPT


def test_a_changed_readme_changes_the_commands(readme_command: Callable[[str, str], str]) -> None:
    readme = "```bash\nmake job\n```\ntext\n```sh\nanother\n```\n```bash\nmake tests && run\n```\n"
    assert readme_command("main-job", readme) == "make job"
    assert readme_command("tests", readme) == "make tests && run"


@pytest.mark.parametrize(
    ("name", "readme", "message"),
    [
        ("job", README, "unknown command 'job'"),
        ("tests", "", "must have 2 bash blocks"),
        ("tests", "```bash\none\n```\n", "must have 2 bash blocks"),
        ("tests", README + "\n```bash\na third\n```\n", "must have 2 bash blocks"),
        ("main-job", "```bash\ntwo\nlines\n```\n```bash\nmake tests\n```\n", "of one line"),
    ],
)
def test_a_readme_without_the_two_commands_is_an_error(
    name: str, readme: str, message: str, readme_command: Callable[[str, str], str]
) -> None:
    with pytest.raises(ValueError, match=message):
        readme_command(name, readme)


def test_the_quick_checks_before_a_commit_are_among_those_of_ci() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"entry: (.*)", hooks)
    assert entries == ["ruff format", "ruff check --fix", "mypy"]
    for entry in entries:
        assert f'run_in tests "{entry.removesuffix(" --fix")}' in SCRIPT


def test_the_workflow_calls_this_script_and_nothing_else() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (.*)", workflow) == ["bash .ci/run"]


def test_contributing_builds_the_api_reference_as_ci_does() -> None:
    (command,) = re.findall(r"-m (pdoc .*)\"", SCRIPT)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`python -m {command.replace('$work/', '')}`" in contributing
