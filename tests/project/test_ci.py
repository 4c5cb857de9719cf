"""CI runs the two commands of the README, within limits of time, and judges a landing by releases that were tried."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import checks
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from raise_bounds import CONSTRAINTS, raised
from readme_command import readme_command

from lora_lite_fx.compat.versions import PYTHON, TRIED

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LANDING = (*checks.LANDING, *checks.BESIDE_LANDING)


def commands(*steps: checks.Step) -> list[str]:
    """Return all commands of steps."""
    return [command for step in steps for command in (step.downloads, *step.commands) if command is not None]


# The commands of the README.


def test_the_commands_are_found_in_the_readme() -> None:
    main_job, tests = (readme_command(name, README) for name in ("main-job", "tests"))
    assert main_job.endswith(" && python examples/finetune.py")
    assert " && python -m pytest " in tests
    for command in (main_job, tests):
        assert command in README
        assert command.startswith("pip install -e ")


def test_a_landing_runs_both_commands_of_the_readme() -> None:
    ran = commands(*LANDING)
    assert any(command.startswith(readme_command("main-job", README)) for command in ran)
    assert f"{checks.INSTALLS} && {checks.TESTS}" == readme_command("tests", README)
    assert checks.INSTALLS in ran
    assert checks.TESTS in ran
    assert all(checks.TESTS in command for command in ran if "pytest" in command)


def test_a_changed_readme_changes_the_commands() -> None:
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
def test_a_readme_without_the_two_commands_is_an_error(name: str, readme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        readme_command(name, readme)


# Which releases a check installs.


def test_only_the_main_job_of_a_landing_is_installed_without_bounds() -> None:
    installs = [command for command in commands(*LANDING) if "pip install" in command]
    (free,) = [command for command in installs if checks.BOUNDS not in command]
    assert free.startswith(checks.MAIN_JOB)
    assert "-c " not in " ".join(command for command in commands(*checks.NEWEST) if "pip install" in command)


def test_the_oldest_releases_are_those_that_the_ranges_begin_with() -> None:
    oldest = {name: ".".join(tried.oldest.split(".")[:2]) for name, tried in TRIED.items()}
    assert f"'torch=={oldest['torch']}.*' 'transformers=={oldest['transformers']}.*'" in str(checks.OLDEST.downloads)
    assert f"torch>={TRIED['torch'].oldest}" in PROJECT["dependencies"]
    assert PROJECT["optional-dependencies"]["hf"] == [f"transformers>={TRIED['transformers'].oldest}"]
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, PYTHON))}"


def requirements(texts: list[str]) -> list[Requirement]:
    """Return the requirements of other packages, those of the extras that are named included."""
    found = []
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["name"]:
            found += requirements(
                [each for extra in requirement.extras for each in PROJECT["optional-dependencies"][extra]]
            )
        else:
            found.append(requirement)
    return found


def test_each_package_of_the_checks_has_an_upper_bound_and_nothing_else() -> None:
    lines = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+<=[\w.]+", line) for line in lines), "an upper bound, without a local version"
    bounds = {canonicalize_name(name): Version(bound) for name, bound in (line.split("<=") for line in lines)}
    assert len(bounds) == len(lines)
    for requirement in requirements([*PROJECT["dependencies"], "lora_lite_fx[dev,runtimes,clients]"]):
        bound = bounds[canonicalize_name(requirement.name)]
        assert bound in requirement.specifier, f"{requirement} is wanted, and at most {bound}"


def test_bounds_are_raised_to_what_is_installed_and_never_lowered() -> None:
    before = "# text<=1\ntorch<=2.9.0\nold-one<=3.0\nabsent<=1.2\n"
    installed = {"torch": "2.15.0+cu130", "old-one": "2.8"}
    assert raised(before, installed.get) == "# text<=1\ntorch<=2.15.0\nold-one<=3.0\nabsent<=1.2\n"
    assert raised("post<=1.0\n", {"post": "1.0.post1"}.get) == "post<=1.0.post1\n"


# Steps that end.


def outcome(step: checks.Step, folder: Path) -> checks.Outcome:
    """Run a step in the active environment."""
    return checks.Runner(folder).run(step, folder)


def test_a_step_that_is_cut_off_names_itself_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "TIMES_IDLE", 1)
    command = "trap 'echo where it stood; exit 1' TERM; sleep 600 & echo $! >child; wait"
    done = outcome(checks.Step("an endless step", 1, (command, "touch after"), None), tmp_path)
    assert done.failed
    assert "== an endless step: cut off (limit 1 s, idle 1 s)" in (printed := capfd.readouterr().out)
    assert "where it stood" in printed
    assert not (tmp_path / "after").exists()
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_step_that_fails_runs_no_further_command(tmp_path: Path) -> None:
    assert (
        outcome(checks.Step("fails", 9, ("exit 3", "touch after"), None), tmp_path).said == "failed with exit status 3"
    )
    assert not (tmp_path / "after").exists()


FAILURES = {
    "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool: Read timed out.": True,
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'": True,
    "ERROR: ResolutionImpossible: lora_lite_fx depends on torch>=2.12": False,
    "error: subprocess-exited-with-error": False,
}


@pytest.mark.parametrize(("failure", "is_forgiven"), FAILURES.items(), ids=["time", "connection", "conflict", "build"])
def test_only_a_download_that_does_not_come_is_forgiven(failure: str, is_forgiven: bool, tmp_path: Path) -> None:
    step = checks.Step("other releases", 9, ("touch after",), None, f'echo "{failure}"; exit 1')
    assert outcome(step, tmp_path).failed is not is_forgiven
    assert not (tmp_path / "after").exists()


def test_steps_beside_others_fail_the_whole_and_are_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = checks.Step("bad", 9, ("echo from beside; exit 1",), None)
    good = checks.Step("good", 9, ("true",), None)
    (tmp_path / "work").mkdir()
    (tmp_path / "checkout").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "checkout")
        assert not checks.check((good,), (bad,), tmp_path / "work")
    printed = capfd.readouterr().out
    assert "from beside" in printed
    assert re.search(r"good: passed$", printed, re.MULTILINE)
    assert re.search(r"bad: failed with exit status 1$", printed, re.MULTILINE)


def test_a_check_that_is_not_known_is_an_error_with_the_names() -> None:
    done = subprocess.run(["bash", ROOT / ".ci" / "run", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'nonsense' is not a check" in done.stderr
    assert all(f"bash .ci/run {name}" in done.stderr for name in checks.CHECKS)


# What else calls the checks.


def test_the_quick_checks_before_a_commit_are_among_those_of_ci() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"entry: (.*)", hooks)
    assert entries == ["ruff format", "ruff check --fix", "mypy"]
    for entry in entries:
        assert any(command.startswith(entry.removesuffix(" --fix")) for command in checks.STYLE.commands)


def test_the_workflows_call_the_script() -> None:
    called = {
        name: re.findall(r"run: (.*)", (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
        for name in ("ci", "releases")
    }
    assert called == {
        "ci": ["bash .ci/run", "bash .ci/run oldest"],
        "releases": ["bash .ci/run ${{ matrix.releases }}"],
    }


def test_the_site_is_built_with_warnings_as_errors() -> None:
    assert any(re.search(r"-m mkdocs build .*--strict", command) for command in commands(*LANDING))
    assert "`python -m mkdocs serve`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
