"""The wheel and the editable install: `lora_lite_fx.passes` is there, a global `passes` is not, and types are seen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

from lora_lite_fx import registry
from tests.support.selection import broad_after

ROOT = Path(__file__).resolve().parents[2]
NAME = "lora_lite_fx"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this process's import path; return its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> list[str]:
    """Return the files of the repository that git tracks or would track; links are not followed."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository, so that nothing is built in the checkout."""
    folder = tmp_path_factory.mktemp("repository")
    for name in sources():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def setuptools_is_new_enough() -> bool:
    """Return whether this environment can build without fetching a build environment."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("build") is None:
        pytest.fail("The packaging tests need the package `build`: pip install build.")
    out = tmp_path_factory.mktemp("dist")
    if setuptools_is_new_enough():
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=out)
    else:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, copy, cwd=out)
    (built,) = out.iterdir()
    return built


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment that sees the packages of this one, after its own."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        venv.create(folder, symlinks=True)
        environment = cls(folder)
        parents = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (environment.site_packages / "zz_parents.pth").write_text("\n".join(parents) + "\n")
        return environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (folder,) = self.folder.glob("lib/python*/site-packages")
        return folder

    def install(self, *arguments: str | Path) -> None:
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", self.python]
        run(*pip, "install", "--no-deps", "--ignore-installed", *arguments, cwd=self.folder)

    def execute(self, script: str, cwd: Path) -> str:
        return run(self.python, "-W", "ignore", "-c", script, cwd=cwd).strip()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("installed"))
    environment.install("--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def editable(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("editable"))
    offline = ["--no-build-isolation", "--no-index"] if setuptools_is_new_enough() else []
    environment.install(*offline, "-e", copy)
    return environment


@pytest.fixture(params=broad_after(1, ["editable", "installed"]))
def environment(request: pytest.FixtureRequest) -> Environment:
    environment: Environment = request.getfixturevalue(request.param)
    return environment


def expected_modules(names: Sequence[str]) -> set[str]:
    """Return the files of the package as a wheel has them: `passes/` below it, and nothing else."""
    package = {name for name in names if name.startswith(f"{NAME}/") and name.endswith((".html", ".py", "py.typed"))}
    return package | {f"{NAME}/{name}" for name in names if name.startswith("passes/") and name.endswith(".py")}


def test_the_wheel_holds_the_package_with_its_passes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        modules = {name for name in files if ".dist-info/" not in name}
        assert modules == expected_modules(sources())
        assert {
            f"{NAME}/py.typed",
            f"{NAME}/passes/__init__.py",
            f"{NAME}/passes/adaptation/insert_adapter.py",
        } <= modules
        assert {name.split("/")[0] for name in files} == {NAME, f"{NAME}-{version(archive)}.dist-info"}
        for name in modules:
            assert archive.read(name) == (ROOT / name).read_bytes(), name
            assert (files[name].external_attr >> 16) & 0o170000 in (0, 0o100000), f"{name} is not an ordinary file"


def version(archive: zipfile.ZipFile) -> str:
    return message_from_string(dist_info(archive, "METADATA"))["Version"]


def dist_info(archive: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
    return archive.read(path).decode()


def test_the_metadata_of_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(dist_info(archive, "METADATA"))
        assert dist_info(archive, "top_level.txt").split() == [NAME]
        assert dist_info(archive, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert metadata["Name"] == NAME
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"].startswith(">=3.")
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["regex", "safetensors", "torch"]
    built_in = [cls for cls in registry().values() if cls.__module__.startswith(f"{NAME}.")]
    assert f"LoRA and {len(built_in) - 1} other methods" in metadata["Summary"]
    assert metadata.get_all("Project-URL")
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(metadata['Version'])} \(\d{{4}}-\d\d-\d\d\)$", notes, re.MULTILINE)
    assert f"\nversion: {metadata['Version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_page_on_versions_names_every_lower_bound_as_a_version_that_was_run(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(dist_info(archive, "METADATA"))
    required = [re.match(r"([\w-]+).*>=([\d.]+)", line) for line in metadata.get_all("Requires-Dist", [])]
    bounds = {match[1]: match[2] for match in required if match}
    assert bounds.keys() >= {"torch", "transformers", "safetensors", "peft", "accelerate", "pytest"}
    run = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8").lower()
    missing = [name for name, bound in bounds.items() if not re.search(rf"\b{name} {re.escape(bound)}\b(?!\.\d)", run)]
    site = {"mkdocs", "mkdocs-material", "mkdocstrings-python"}
    assert set(missing) <= {"mypy", "pre-commit", "ruff"} | site, "tools, which no user of the package needs"


@pytest.mark.broad
def test_the_library_is_imported_from_where_it_was_installed(
    environment: Environment, installed: Environment, copy: Path, tmp_path: Path
) -> None:
    script = f"""
import {NAME}, {NAME}.passes, torch
gm = {NAME}.rewrite(torch.nn.Sequential(torch.nn.Linear(4, 4)), {NAME}.LoRA(r=2, target_names="0"))
assert len({NAME}.adapter_parameters(gm)) == 2
print({NAME}.__file__, {NAME}.passes.__file__, {NAME}.passes.InsertAdapter.__module__, sep="\\n")
"""
    package, passes, module = environment.execute(script, cwd=tmp_path).splitlines()
    home = environment.site_packages if environment == installed else copy
    assert Path(package).resolve() == home / NAME / "__init__.py"
    assert Path(passes).resolve() == (home / NAME / "passes" / "__init__.py").resolve()
    assert module == f"{NAME}.passes.adaptation.insert_adapter"


@pytest.mark.parametrize("name", ["passes", "tests", "examples"])
def test_no_other_folder_of_the_repository_can_be_imported(name: str, environment: Environment, tmp_path: Path) -> None:
    script = f"""
try:
    import {name}
except ModuleNotFoundError as error:
    print(error)
"""
    assert environment.execute(script, cwd=tmp_path) == f"No module named '{name}'"


CONSUMER = """
from lora_lite_fx import (LoRA, adapter_parameters, passes, rewrite)
reveal_type((LoRA(r=4).target_names, rewrite, adapter_parameters, passes.Pipeline.run))
LoRA(rank=4)
"""


@pytest.mark.broad
def test_the_wheel_passes_the_smoke_tests_outside_of_the_checkout(installed: Environment, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    smoke\n    broad\n    slow\nfilterwarnings =\n    ignore::DeprecationWarning\n"
    )
    script = f"""
import {NAME}, pytest, sys
assert "{installed.site_packages}" in {NAME}.__file__, {NAME}.__file__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "smoke", "tests/test_smoke.py"]))
"""
    assert re.search(r"\b\d+ passed\b", installed.execute(script, cwd=tmp_path))


@pytest.mark.broad
def test_a_type_checker_sees_the_types(environment: Environment, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    # Leave out the types of other packages, because following those of torch alone takes minutes.
    others = ",".join(f"{name}.*" for name in ("torch", "transformers", "numpy", "safetensors", "huggingface_hub"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{others}]\nfollow_imports = skip\n")
    checker = [sys.executable, "-m", "mypy", "--python-executable", environment.python, "--no-error-summary"]
    command = [*checker, "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache", "consumer.py"]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
    revealed, wrong = done.stdout.splitlines()
    assert "Sequence[str] | None" in revealed
    assert "list[" in revealed
    assert "lora_lite_fx.passes.pipeline.PassReport" in revealed
    assert 'Unexpected keyword argument "rank" for "LoRA"' in wrong, done.stdout


def test_nothing_was_built_in_the_checkout(installed: Environment, editable: Environment, copy: Path) -> None:
    assert not (ROOT / "build").exists()
    assert not (ROOT / "dist").exists()
    assert not list(ROOT.glob("*.egg-info"))
    assert (copy / "lora_lite_fx" / "passes").is_symlink()
    assert (copy / ".src" / "lora_lite_fx").is_symlink()
