"""CI runs the two commands of the README: it reads them from there and installs nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_lite_fx.compat.versions import PYTHON, TRIED
from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme_command() -> Callable[[str, str], str]:
    """The function of `.ci/readme_command.py`, which is a script beside CI's own and belongs to no package."""
    module = script(ROOT / ".ci" / "readme_command.py")
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
    before, installed = SCRIPT.split("installed() {")  # for other releases, and for the runtimes of the hand-over
    commands = before + installed.split("\n}\n", 1)[1]
    assert "pip install" not in commands
    assert "pytest" not in commands


def test_ci_tries_the_newest_and_the_oldest_releases() -> None:
    begun = ["begin check_main_job", "begin check_oldest", "begin check_benchmark"]
    assert re.findall(r"^begin \w+$", SCRIPT, re.MULTILINE) == begun
    assert len(re.findall(r"^finish \w+$", SCRIPT, re.MULTILINE)) == len(begun)
    assert re.findall(r"^check_\w+$", SCRIPT, re.MULTILINE) == ["check_newest"]
    oldest = {name: ".".join(tried.oldest.split(".")[:2]) for name, tried in TRIED.items()}
    assert f"'torch=={oldest['torch']}.*' 'transformers=={oldest['transformers']}.*'" in SCRIPT
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"torch>={TRIED['torch'].oldest}" in project["dependencies"]
    assert project["optional-dependencies"]["hf"] == [f"transformers>={TRIED['transformers'].oldest}"]
    assert project["requires-python"] == f">={'.'.join(map(str, PYTHON))}"


FAILURES = {
    "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool: Read timed out.": True,
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'": True,
    "ERROR: ResolutionImpossible: lora_lite_fx depends on torch>=2.12": False,
    "error: subprocess-exited-with-error": False,
}


PYTHON_WITHOUT_NETWORK = """#!/bin/bash
if [ "$1" != -m ]; then echo "make && run"; exit; fi
mkdir -p "$3/bin"
printf '#!/bin/bash\\necho "%s"; exit 1' >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.mark.parametrize(("failure", "is_forgiven"), FAILURES.items(), ids=["time", "connection", "conflict", "build"])
def test_only_a_download_that_does_not_come_is_forgiven(failure: str, is_forgiven: bool, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text(PYTHON_WITHOUT_NETWORK.replace("%s", failure))
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "newest"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert (done.returncode == 0) is is_forgiven, done.stderr
    assert ("warning: a download did not come" in done.stdout) is is_forgiven


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
    assert re.findall(r"run: (.*)", workflow) == ["bash .ci/run", "bash .ci/run ${{ matrix.releases }}"]


def test_the_site_is_built_with_warnings_as_errors() -> None:
    assert re.search(r"-m mkdocs build .*--strict", SCRIPT)
    assert "`python -m mkdocs serve`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
