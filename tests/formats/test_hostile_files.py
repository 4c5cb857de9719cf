"""Files of a stranger who means harm: each is an error within seconds, and takes no memory to speak of."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import patterns
from tests.support.selection import broad_after
from tests.support.untouched import untouched

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "layer" + "a" * 60
"""The name of a module in which some patterns can be matched in very many ways."""

EVIL = "(a|aa)+$!"


@pytest.fixture(autouse=True)
def within_seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test that hangs fail. Nothing here waits for the clock."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    patterns._search.cache_clear()

    def hung(*_: Any) -> None:
        raise TimeoutError("it hangs")

    previous = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    model = nn.Sequential()
    model.add_module(LAYER, nn.Linear(4, 4))
    return llfx.capture(model)


@pytest.fixture(scope="module")
def good(graph: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    adapted = llfx.rewrite(graph, llfx.LoRA(r=2, target_names=LAYER))
    llfx.save(adapted, folder / "file")
    llfx.save_lora_lite(adapted, folder / "lite")
    llfx.save_peft(adapted, folder / "peft")
    return folder


@pytest.fixture
def files(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "files"))


READERS: dict[str, tuple[str, Callable[[fx.GraphModule, Path], fx.GraphModule]]] = {
    "load": ("file", lambda graph, files: llfx.load(graph, files / "file")),
    "load_lora_lite": ("lite", lambda graph, files: llfx.load_lora_lite(graph, files / "lite")),
    "load_peft, config": (f"peft/{CONFIG}", lambda graph, files: llfx.load_peft(graph, files / "peft")),
    "load_peft, tensors": (f"peft/{TENSORS}", lambda graph, files: llfx.load_peft(graph, files / "peft")),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_good_files_load(reader: str, graph: fx.GraphModule, files: Path) -> None:
    """Without this, what follows might test other refusals."""
    READERS[reader][1](graph, files)


def sparse(size: int, start: bytes = b"") -> Callable[[Path], None]:
    """A file of that size that takes no place on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def header(document: Any, size: int | None = None) -> Callable[[Path], None]:
    """A safetensors file with that header and no data."""

    def make(path: Path) -> None:
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text)

    return make


def link_to_pipe(path: Path) -> None:
    os.mkfifo(f"{path}-pipe")
    path.symlink_to(f"{path.name}-pipe")


THINGS: dict[str, Callable[[Path], Any]] = {
    "a named pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "a directory": os.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a pipe": link_to_pipe,
    "nothing": lambda path: None,
    "an empty file": lambda path: path.write_bytes(b""),
    "16 GiB": sparse(16 * 2**30),
    "2 TiB": sparse(2 * 2**40),
    "16 GiB of a document": sparse(16 * 2**30, b'{"peft_type": "LORA", "x": "'),
    "16 GiB after a header": sparse(16 * 2**30, struct.pack("<Q", 2) + b"{}"),
    "a header of 2^63 bytes": header({}, 2**63),
    "a header that is deep": header(b"[" * 100_000),
    "a tensor beyond the end": header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "a tensor of 2^126 elements": header({"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 0]}}),
    "ten thousand empty tensors": header(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
    ),
    "metadata that is not text": header({"__metadata__": {"lora_lite_fx": 5, "cfg": []}}),
    "a document that is deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "a list": lambda path: path.write_bytes(b"[]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\xd8"),
    "a script": lambda path: path.write_text("#!/bin/sh\nexit 1\n"),
}


@pytest.mark.parametrize("thing", broad_after(24, THINGS))
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_an_adapter_is_refused(reader: str, thing: str, graph: fx.GraphModule, files: Path) -> None:
    name, read = READERS[reader]
    (files / name).unlink()
    THINGS[thing](files / name)
    tracemalloc.start()
    try:
        with untouched(graph), pytest.raises(llfx.CheckpointError) as caught:
            read(graph, files)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()
    assert str(files) in str(caught.value)
    assert len(str(caught.value)) < 2000


def in_peft(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of PEFT's config, of which the tensors know nothing."""

    def edit(files: Path) -> None:
        folder = files / "peft"
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})

    return edit


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "targets that hang": (in_peft(lambda c: c.update(target_modules=f".*{EVIL}|{LAYER}")), ""),
    "ranks that hang": (in_peft(lambda c: c.update(rank_pattern={f"layer{EVIL}": 4})), "takes too long"),
    "alphas that hang": (in_peft(lambda c: c.update(alpha_pattern={f"layer{EVIL}": 4})), "takes too long"),
    "a thousand patterns": (
        in_peft(lambda c: c.update(rank_pattern={f"layer{EVIL}{i}": 4 for i in range(1000)})), "takes too long"
    ),
    "a pattern of a megabyte": (in_peft(lambda c: c.update(rank_pattern={"(" * 10**6: 4})), "not a regular expression"),
    "a pattern that repeats": (in_peft(lambda c: c.update(rank_pattern={"((a{0,999}){0,999}){0,999}!": 4})), ""),
    "a fuzzy pattern": (in_peft(lambda c: c.update(rank_pattern={"(?:layer){e<=50}": 4})), "read in several ways"),
    "a rank of a billion": (in_peft(lambda c: c.update(r=10**9)), "its config asks for"),
    "alpha is not a number": (in_peft(lambda c: c.update(lora_alpha=float("nan"))), "finite number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_means_harm_is_refused_or_does_none(kind: str, graph: fx.GraphModule, files: Path) -> None:
    change, message = CONFIGS[kind]
    change(files)
    if not message:
        llfx.load_peft(graph, files / "peft")
        return
    with untouched(graph), pytest.raises(llfx.CheckpointError, match=message) as caught:
        llfx.load_peft(graph, files / "peft")
    assert len(str(caught.value)) < 2000


# The two files of a PEFT directory.


def pair_of(folder: Path, graph: fx.GraphModule, alpha: float, value: float) -> Path:
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, alpha=alpha, target_names=LAYER))
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.fill_(value)
    llfx.save_peft(gm, folder)
    return folder


@pytest.mark.parametrize("mixed", [CONFIG, TENSORS])
def test_files_of_two_adapters_are_not_read_as_one(mixed: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    old = pair_of(tmp_path / "old", graph, 4.0, 1.0)
    new = pair_of(tmp_path / "new", graph, 8.0, 2.0)
    shutil.copy(new / mixed, old / mixed)
    with pytest.raises(llfx.CheckpointError, match=rf"{TENSORS} was not saved with this {CONFIG}.*on purpose"):
        llfx.load_peft(graph, old)


def test_a_config_may_be_written_anew_and_may_name_another_base(graph: fx.GraphModule, tmp_path: Path) -> None:
    """Both are done by hand and by tools, and do not change what the adapter computes."""
    folder = pair_of(tmp_path / "adapter", graph, 4.0, 1.0)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"base_model_name_or_path": "someone/base", "revision": "main", "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps(config, indent=7))
    llfx.load_peft(graph, folder)
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": 5.0}))
    with pytest.raises(llfx.CheckpointError, match="was not saved with this"):
        llfx.load_peft(graph, folder)
    # The way out that the message names.
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
    llfx.load_peft(graph, folder)
