"""Each private name keeps its promise in a release that lacks it, and versions that were not tried are refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lora_lite_fx.compat as compat
from lora_lite_fx.compat import names, versions
from lora_lite_fx.errors import AdapterError
from tests.support.selection import broad_after

FOLDER = Path(compat.__file__).parent
FILES = ("torch", "dynamo", "transformers")


def loaded_anew(file: str) -> ModuleType:
    """Run a file of the wing once more, beside the module that everybody uses."""
    name = f"{compat.__name__}.{file}_anew"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of(file: str) -> dict[str, names.PrivateName]:
    """The private names that a file looks up, by path."""
    before = dict(names.NAMES)
    names.NAMES.clear()
    try:
        loaded_anew(file)
        return dict(names.NAMES)
    finally:
        names.NAMES.clear()
        names.NAMES.update(before)


CASES = [(file, path, name) for file in FILES for path, name in names_of(file).items()]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let look-ups of a path fail, as in a release that does not have it."""
    find = names.find

    def take_away(path: str) -> None:
        def found(other: str) -> Any:
            if other == path:
                raise AttributeError(path)
            return find(other)

        monkeypatch.setattr(names, "find", found)

    return take_away


def test_every_kind_of_promise_is_made() -> None:
    promises = {name.without.partition(":")[0] for _, _, name in CASES}
    assert promises == {"an ImportError that names the release", "the public way", "a refusal"}
    assert len(CASES) > 50


@pytest.mark.parametrize(("file", "path", "name"), CASES, ids=[path for _, path, _ in CASES])
def test_a_release_without_the_name(file: str, path: str, name: names.PrivateName, without: Any) -> None:
    assert name.public
    library = path.partition(".")[0]
    assert versions.tried_range(library)
    without(path)
    if name.without.startswith("an ImportError"):
        with pytest.raises(ImportError, match=rf"uses {path.replace('(', '.').replace(')', '.')}, which {library} "):
            loaded_anew(file)
        return
    module = loaded_anew(file)
    stand_ins = [value for value in vars(module).values() if getattr(value, "__name__", "") == "refuse"]
    if not name.without.startswith("a refusal"):
        assert stand_ins == []
        return
    (refuse,) = stand_ins
    with pytest.raises(AdapterError) as error:
        refuse(None, mode="reduce-overhead")
    text = str(error.value)
    assert text.startswith(name.without.partition(": ")[2])
    assert f"{path}, which {library} {versions.found_version(library)} does not have" in text
    assert "The way out: pip install -U lora_lite_fx" in text


def test_tensors_of_an_older_interface_are_not_there_without_a_question_for_them(without: Any) -> None:
    without("torch._C._functorch.is_legacy_batchedtensor")
    module = loaded_anew("torch")
    assert not module.is_wrapped(torch.ones(1))
    assert torch.func.vmap(lambda row: torch.tensor(module.is_wrapped(row)))(torch.ones(2, 1)).all()


@pytest.mark.parametrize(
    ("library", "version"),
    [("torch", "2.11.0"), ("torch", "2.8.0+cu128"), ("transformers", "5.11.3"), ("transformers", "4.57.1")],
)
def test_a_release_older_than_those_that_were_tried_is_refused_at_import(library: str, version: str) -> None:
    text = imported_with(library, version)
    assert text.startswith("ImportError: lora_lite_fx needs")
    assert f"needs {library} {versions.TRIED[library].oldest} or newer, and {version} is installed" in text
    assert f"pip install '{library}>={versions.TRIED[library].oldest},<" in text


@pytest.mark.parametrize(
    ("library", "version"),
    broad_after(
        1,
        [("torch", "2.17.0.dev20261129+cu132"), ("transformers", None), ("torch", "2.12.0"), ("transformers", "6.0.0")],
        several=True,
    ),
)
def test_other_releases_are_imported(library: str, version: str | None) -> None:
    assert imported_with(library, version) == "imported"


def test_an_older_python_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(ImportError, match=r"needs Python 3\.11 or newer, and this is 3\.10\.4"):
        versions.check_versions()


def imported_with(library: str, version: str | None) -> str:
    """Import the package where a library has another version, or is not installed; return the end of what it says."""
    code = f"""
from importlib import metadata
find = metadata.version
def version(name):
    if name != {library!r}:
        return find(name)
    if {version!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {version!r}
metadata.version = version
try:
    import lora_lite_fx
except ImportError as error:
    print("ImportError:", error)
else:
    lora_lite_fx.rewrite
    print("imported")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_way_out_admits_the_newest_release_that_was_tried() -> None:
    assert versions.way_out("torch").endswith("pip install 'torch>=2.12,<2.16'")
    assert versions.way_out("optimum").endswith("'optimum-quanto>=0.2.7,<0.2.8'")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.16.0.dev20261129", (2, 16, 0)), ("5.24", (5, 24)), ("unknown", ())],
)
def test_numbers_of_a_release(version: str, numbers: tuple[int, ...]) -> None:
    assert versions.release(version) == numbers
