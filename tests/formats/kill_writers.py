"""Kill processes that write adapters: what they leave is old or new, never a mixture.

`python -m tests.formats.kill_writers 300` kills 300 writers at random moments, and prints what was found. The suite
kills writers just before each call that changes the disk, see `test_killed_writers.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import fx, nn

import lora_lite_fx as llfx


def table_of(gm: fx.GraphModule) -> Any:
    """A table of sites that differs between the versions: the first is shown without its adapter."""
    return llfx.inspect(gm if llfx.adapter_parameters(gm)[0].max() == VERSIONS[1] else llfx.remove(gm))


Writer = Callable[[fx.GraphModule, Path], None]

WRITERS: dict[str, Writer] = {
    "save": llfx.save,
    "save_lora_lite": llfx.save_lora_lite,
    "save_peft": llfx.save_peft,
    "save_html": lambda gm, path: table_of(gm).save_html(path),
}
CALLS = ("fsync", "link", "replace", "unlink", "fchmod", "fchown", "open")
"""The functions of `os` by which the writers change the disk, or come between changes."""

WIDTH = 64
VERSIONS = (2.0, 4.0)
"""The alpha of a version of the adapter, which is also the value of all its parameters."""


def make_versions() -> list[fx.GraphModule]:
    """Two versions of one adapter."""
    torch.manual_seed(0)
    base = llfx.capture(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    made = []
    for alpha in VERSIONS:
        made.append(llfx.rewrite(base, llfx.LoRA(r=8, alpha=alpha, target_names="0")))
        with torch.no_grad():
            for parameter in llfx.adapter_parameters(made[-1]):
                parameter.fill_(alpha)
    return made


def state_of(writer: str, path: Path, pages: list[str]) -> str:
    """What is at `path`: a version, `"nothing"`, `"an error"` where that is allowed, or what is wrong."""
    if not path.exists():
        return "nothing"
    if writer == "save_html":
        return f"version {pages.index(path.read_text())}" if path.read_text() in pages else "WRONG: not a page"
    tensors, config = path, path
    if writer == "save_peft":
        tensors, config = path / "adapter_model.safetensors", path / "adapter_config.json"
        if not config.exists():
            return "an error" if tensors.exists() else "nothing"
        if not tensors.exists():
            return "WRONG: a config without tensors"
    with safetensors.safe_open(tensors, framework="pt") as file:
        values = {float(value) for key in file.keys() for value in file.get_tensor(key).unique()}  # noqa: SIM118
        metadata = file.metadata()
    text = config.read_text() if writer == "save_peft" else json.dumps(metadata).replace("\\", "")
    (alpha,) = {float(found) for found in re.findall(r'"(?:lora_)?alpha": ([\d.]+)', text)}
    if values != {alpha}:
        return f"WRONG: values {values} with alpha {alpha}"
    read = {"save": llfx.load, "save_lora_lite": llfx.load_lora_lite, "save_peft": llfx.load_peft}[writer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = read(nn.Sequential(nn.Linear(WIDTH, WIDTH)), path)
    return f"version {VERSIONS.index(alpha)}" if llfx.adapter_parameters(loaded)[0].max() == alpha else "WRONG: loaded"


def litter(path: Path) -> list[str]:
    """The names that nobody asked for, beside `path` and in it."""
    folders = [path.parent, *([path] if path.is_dir() else [])]
    wanted = {path.name, "adapter_model.safetensors", "adapter_config.json"}
    return [name for folder in folders for name in os.listdir(folder) if name not in wanted]


def killed(child: Callable[[], None], after: float | None = None) -> bool:
    """Run `child` in a copy of this process. Kill it after so many seconds, or let it kill itself.

    Returns:
        Whether it was killed; it may have ended before that.
    """
    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def kill_before_call(number: int) -> None:
    """Let this process be killed just before its next call number `number` of one of `CALLS`."""
    calls = iter(range(number + 1))

    def guarded(name: str) -> Any:
        call = getattr(os, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls, number) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, guarded(name))


def pages_of(versions: list[fx.GraphModule]) -> list[str]:
    return [table_of(gm).to_html() for gm in versions]


def at_each_call(writer: str, folder: Path, *, over_old: bool) -> Iterator[tuple[str, list[str]]]:
    """Kill the writer before its first call, its second, and so on to its end.

    Args:
        writer: a key of `WRITERS`.
        folder: to write to.
        over_old: whether there is an older version.

    Returns:
        What is there afterwards, and what litter.
    """
    versions = make_versions()
    pages = pages_of(versions)
    for number in range(100):
        path = folder / f"{number}" / "adapter"
        path.parent.mkdir()
        if over_old:
            WRITERS[writer](versions[0], path)

        def child(number: int = number, path: Path = path) -> None:
            kill_before_call(number)
            WRITERS[writer](versions[1], path)

        if not killed(child):
            return
        yield state_of(writer, path, pages), litter(path)
    raise AssertionError("it never ended")


def at_random(writer: str, kills: int, folder: Path) -> Counter[str]:
    """Kill a process that writes both versions in turn, at random moments; count what is there afterwards."""
    versions = make_versions()
    pages = pages_of(versions)
    path = folder / writer / "adapter"
    path.parent.mkdir()
    began = time.perf_counter()
    for version in versions:
        WRITERS[writer](version, path)
    once = (time.perf_counter() - began) / 2
    found: Counter[str] = Counter()

    def child() -> None:
        while True:
            for version in versions:
                WRITERS[writer](version, path)

    for _ in range(kills):
        assert killed(child, random.uniform(0.001, 0.001 + 4 * once))
        state = state_of(writer, path, pages)
        found["version" if state.startswith("version") else state] += 1
        found["litter"] += len(litter(path))
        if state == "an error":
            WRITERS[writer](versions[0], path)
    return found


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for writer in WRITERS:
            print(writer, dict(at_random(writer, kills // len(WRITERS), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
