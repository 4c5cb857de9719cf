"""Damaged, foreign and half-written adapter files: a clear error, and everything else as it was."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lora_lite_fx as llfx
from tests.formats.test_checkpoint import Net, edited, randomised, refuses, same_state
from tests.support.selection import broad_after
from tests.support.untouched import untouched

CFG = llfx.LoRA(r=2, target_names="fc1", alpha=4.0, dropout=0.25)

fuzz = settings(
    max_examples=40,
    phases=(Phase.explicit, Phase.generate),  # shrinking would capture for minutes
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def graph() -> nn.Module:
    """A captured model without adapters: loading into it captures nothing, which makes fuzzing cheap."""
    return llfx.capture(Net())


@pytest.fixture(scope="module")
def adapted(graph: nn.Module) -> nn.Module:
    adapted: nn.Module = randomised(llfx.rewrite(graph, CFG))
    return adapted


@pytest.fixture
def path(adapted: nn.Module, tmp_path: Path) -> Path:
    file = tmp_path / "adapter.safetensors"
    llfx.save(adapted, file)
    file.write_bytes(ordered(file.read_bytes()))
    return file


def ordered(data: bytes) -> bytes:
    """The same file with its metadata in a fixed order (safetensors writes it in a random one)."""
    header = json.loads(data[8 : header_length(data)])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(header_length(data) - 8)
    assert len(text) == header_length(data) - 8
    return data[:8] + text + data[header_length(data) :]


def load_or_refuse(model: nn.Module, path: Path) -> nn.Module | None:
    """What `load` returns, or None where it refuses; any error of another class is raised."""
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return llfx.load(model, path)
        except llfx.AdapterError:
            return None


# Damaged bytes.


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("keep", broad_after(2, [0, 1, 7, 8, 9, 0.5, "header", -1]))
def test_a_truncated_file_is_refused(keep: Any, graph: nn.Module, path: Path) -> None:
    data = path.read_bytes()
    length = {"header": header_length(data), 0.5: len(data) // 2}.get(keep, keep)
    path.write_bytes(data[:length])
    refuses(graph, path, "not a readable safetensors file (truncated, corrupt or foreign)")


def test_bytes_after_the_end_are_refused(graph: nn.Module, path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    refuses(graph, path, "not a readable safetensors file")


@pytest.mark.parametrize("claimed", [2**63, 2**40, 200_000_000, 10_000, 0])
def test_a_header_of_a_false_size_is_refused(claimed: int, graph: nn.Module, path: Path) -> None:
    path.write_bytes(claimed.to_bytes(8, "little") + path.read_bytes()[8:])
    refuses(graph, path, "not a readable safetensors file")


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3)


def flipped(data: bytes, changes: list[tuple[int, int]], start: int, stop: int) -> bytes:
    damaged = bytearray(data)
    for position, mask in changes:
        damaged[start + position % (stop - start)] ^= mask
    return bytes(damaged)


@fuzz
@given(changes=flips)
def test_flipped_bytes_in_the_header_raise_nothing_but_adapter_errors(
    graph: nn.Module, path: Path, changes: list[tuple[int, int]]
) -> None:
    data = path.read_bytes()
    try:
        path.write_bytes(flipped(data, changes, 0, header_length(data)))
        load_or_refuse(graph, path)
    finally:
        path.write_bytes(data)


@settings(fuzz, max_examples=25)
@given(changes=flips, in_header=st.booleans())
def test_a_file_with_flipped_bytes_is_refused_or_loads_what_was_saved(
    graph: nn.Module, adapted: nn.Module, path: Path, changes: list[tuple[int, int]], in_header: bool
) -> None:
    data = path.read_bytes()
    bounds = (0, header_length(data)) if in_header else (header_length(data), len(data))
    try:
        path.write_bytes(flipped(data, changes, *bounds))
        loaded = load_or_refuse(graph, path)
    finally:
        path.write_bytes(data)
    if loaded is not None:
        assert same_state(loaded, adapted)
        x = torch.linspace(-1, 1, 24).view(3, 8)
        assert torch.equal(loaded.eval()(x), adapted.eval()(x))


# Damaged metadata.

LEAF: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 3, 1e308, 10**400, "x", "IA3", [], ["x"], [[1]], {}, {"a": {}}]
)
REMOVED = object()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in JSON data."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_any_change_to_the_metadata_loads_or_is_an_adapter_error(
    graph: nn.Module, path: Path, data: st.DataObject
) -> None:
    whole = path.read_bytes()

    def edit(tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
        options = list(places(metadata))
        container, key = options[data.draw(st.integers(0, len(options) - 1), label="place")]
        value = data.draw(LEAF | st.just(REMOVED), label="value")
        if value is REMOVED:
            del container[key]
        else:
            container[key] = value

    try:
        edited(path, edit)
        load_or_refuse(graph, path)
    finally:
        path.write_bytes(whole)


def config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = metadata["adapters"][0]["config"]
    return config


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda m: m.clear(), ["metadata is damaged", "version"]),
        (lambda m: m.update(version=99), ["version 99", "reads version 1"]),
        (lambda m: m.update(adapters="NaN"), ["metadata is damaged"]),
        (lambda m: m.update(checksum="0"), ["is corrupt"]),
        (lambda m: m.update(adapters=[]), ["metadata is damaged"]),
        (lambda m: m.update(adapters={"config": {}}), ["metadata is damaged"]),
        (lambda m: m.update(fingerprint=[1]), ["metadata is damaged"]),
        (lambda m: m.pop("fingerprint"), ["metadata is damaged"]),
        (lambda m: m["adapters"][0].pop("sites"), ["metadata is damaged", "sites"]),
        (lambda m: m["adapters"][0].update(sites=[1]), ["metadata is damaged"]),
        (lambda m: m["adapters"][0].update(config="LoRA"), ["metadata is damaged"]),
        (
            lambda m: config_of(m).update(variant="Nope"),
            ["Unknown variant 'Nope'. If the class is your own", "The registered variants are", "DeLoRA"],
        ),
        (lambda m: config_of(m).update(variant=["LoRA"]), ["metadata is damaged"]),
        (lambda m: config_of(m).pop("variant"), ["Unknown variant None"]),
        (lambda m: config_of(m).update(rank=3), ["LoRA has no field 'rank'", "write r=3"]),
        (lambda m: config_of(m).update(r="2"), ["LoRA: r must be a positive integer", "'2'"]),
        (lambda m: config_of(m).update(r=9), ["lora_A", "(9, 8)"]),
        (lambda m: config_of(m).update(alpha=10**400), ["alpha must be a finite number"]),
        (lambda m: config_of(m).update(alpha=float("nan")), ["alpha must be a finite number"]),
        (lambda m: config_of(m).update(dtype="float7"), ["'float7' is not the name of a torch.dtype"]),
        (lambda m: config_of(m).update(target_names=["("]), ["'(' is not a regular expression"]),
        (lambda m: config_of(m).update(dropout="x"), ["LoRA", "dropout"]),
    ],
)
def test_damaged_metadata_is_named(
    edit: Callable[[dict[str, Any]], Any], parts: list[str], graph: nn.Module, path: Path
) -> None:
    edited(path, lambda tensors, metadata: edit(metadata))
    refuses(graph, path, *parts)


@pytest.mark.parametrize("text", ["", "[{", "[" * 100_000, "NaN", "5", "null", "[]", '"version"'])
def test_metadata_that_is_not_the_document_is_damaged(text: str, graph: nn.Module, path: Path) -> None:
    save_file({"fc1.lora_A": torch.zeros(2, 8)}, path, {"lora_lite_fx": text})
    refuses(graph, path, "metadata is damaged")


def test_a_config_that_asks_for_more_than_the_file_holds_is_refused_before_any_tensor_is_made(
    graph: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapter.safetensors"
    llfx.save(llfx.rewrite(graph, llfx.VeRA(r=2, target_names=("fc",))), path)
    edited(path, lambda _, document: document["adapters"][0]["config"].update(r=10**9, shared_r=10**9))

    def insert(*_: Any) -> None:
        raise AssertionError("tensors were about to be made")

    monkeypatch.setattr("lora_lite_fx.formats.filed_adapter.insert_adapters", insert)
    refuses(graph, path, "shape of", "1000000000")


def test_a_changed_config_does_not_pass_for_what_was_saved(graph: nn.Module, path: Path) -> None:
    """It fits the tensors, but computes something else."""
    edited(path, lambda tensors, document: config_of(document).update(alpha=5.0))
    refuses(graph, path, "corrupt")


# Foreign files.


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "safetensors": (lambda p: save_file({"a": torch.zeros(2)}, p), "not written by lora_lite_fx.save"),
    "other metadata": (lambda p: save_file({"a": torch.zeros(2)}, p, {"format": "pt"}), "not written by lora_lite_fx"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "not a readable safetensors file"),
    "torch": (lambda p: torch.save({"fc1.lora_A": Bomb()}, p), "not a readable safetensors file"),
    "text": (lambda p: p.write_text("hello, world\n" * 9), "not a readable safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
    "directory": (lambda p: p.mkdir(), "is not a file"),
    "missing": (lambda p: None, "is not a file"),
    "broken link": (lambda p: p.symlink_to("nowhere"), "is not a file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(kind: str, graph: nn.Module, tmp_path: Path) -> None:
    make, message = FOREIGN[kind]
    make(tmp_path / "foreign")
    refuses(graph, tmp_path / "foreign", message)


# Writing: whole or not at all.


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


def fail_half_way(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let files that are written by a descriptor take half of what is written to them, then fail."""
    opened = os.fdopen

    def opening(*args: Any, **kwargs: Any) -> Any:
        file = opened(*args, **kwargs)
        write = file.write

        class Failing:
            """Stands for the file: its attributes cannot be replaced."""

            def __enter__(self) -> Failing:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                write(data[: len(data) // 2])
                raise error

        return Failing()

    monkeypatch.setattr(os, "fdopen", opening)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file_and_no_other(
    moment: str, error: BaseException, adapted: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()
    expected = llfx.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    other = llfx.rewrite(Net(seed=1), llfx.IA3(target_names="fc"))
    with monkeypatch.context() as patched:
        if moment == "write":
            fail_half_way(patched, error)
        else:
            patched.setattr(os, moment, fail(error))
        with untouched(other), pytest.raises(expected) as caught:
            llfx.save(other, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    if isinstance(error, OSError):
        assert "could not be written" in str(caught.value)
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    llfx.save(other, path)
    assert path.read_bytes() != old


def test_two_that_save_at_once_both_succeed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [randomised(llfx.rewrite(Net(), llfx.IA3(target_names=name))) for name in ("fc1", "fc2")]
    contents = []
    for model in models:
        llfx.save(model, path)
        contents.append(path.read_bytes())
    both_wrote, fsync = threading.Barrier(2, timeout=5), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (both_wrote.wait(), fsync(file)))
    with ThreadPoolExecutor() as pool:
        for saving in [pool.submit(llfx.save, model, path) for model in models]:
            saving.result()
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.broad
def test_a_full_disk_leaves_the_old_file_and_no_other(path: Path) -> None:
    old = path.read_bytes()
    script = """
        import resource, signal, sys, torch, lora_lite_fx as llfx
        gm = llfx.rewrite(torch.nn.Sequential(torch.nn.Linear(512, 512)), llfx.LoRA(r=64, target_names="0"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            llfx.save(gm, sys.argv[1])
        except llfx.CheckpointError as error:
            print(error)
            sys.exit(7)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert f"{path} could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing parent", "parent is a file", "directory"])
def test_a_path_that_cannot_be_written_is_refused(where: str, adapted: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    target = {"missing parent": "no/adapter", "parent is a file": "file/adapter", "directory": "folder"}[where]
    with untouched(adapted), pytest.raises(llfx.CheckpointError, match="could not be written") as caught:
        llfx.save(adapted, tmp_path / target)
    assert str(tmp_path / target) in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "text"


def test_a_saved_file_has_the_permissions_of_any_new_file(path: Path) -> None:
    (path.parent / "other").write_text("")
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
