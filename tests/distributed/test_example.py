"""`examples/finetune.py --shard` under torchrun: the losses of one process, and whole files whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import transformers

import lora_lite_fx as llfx
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
SECONDS = 300  # in which a run must begin to save, and must have ended
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, its tokenizer, and a text."""
    return write_tiny_folder(tmp_path_factory.mktemp("model"))


@dataclass
class Run:
    """A run of the example, and its workers in the order of their ranks once they are known."""

    process: subprocess.Popen[str]
    workers: list[int] = field(default_factory=list)

    def wait_for_saves(self, file: Path) -> None:
        """Wait for the second save of the run."""
        wait_for(lambda: file.exists() or self.process.poll() is not None, "the first save")
        assert self.process.poll() is None, self.process.communicate()[0]
        first = file.stat().st_ino
        self.workers = sorted((pid for pid in children(self.process.pid) if rank_of(pid)), key=rank_of)
        assert len(self.workers) == 2
        wait_for(lambda: file.stat().st_ino != first, "the second save")

    def end(self) -> str:
        """Wait for the end of torchrun, which must have failed, and of the workers; return what was printed."""
        printed, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode != 0
        wait_for(lambda: not any(map(is_alive, self.workers)), "the end of the workers")
        return printed


@contextmanager
def example(folder: Path, out: Path, *options: str, torchrun: bool = True) -> Iterator[Run]:
    """Start the example, and leave none of its processes behind."""
    command = [sys.executable, *(TORCHRUN if torchrun else ()), "examples/finetune.py", *(["--shard"] * torchrun)]
    command += ["--model", str(folder), "--data", str(folder / "text.txt"), "--out", str(out), "--prompt", "w1 w2"]
    command += ["--length", "8", "--batch", "4", *options]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = Run(process)
    try:
        yield run
    finally:
        for pid in (process.pid, *run.workers, *children(process.pid)):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((text[5:].decode() for text in variables if text.startswith(b"RANK=")), "")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {SECONDS} s"
        time.sleep(0.05)


def whole_adapter(folder: Path, file: Path) -> None:
    """Check that a file holds a trained adapter of the model, and that nothing else lies beside it."""
    gm = llfx.load(transformers.LlamaForCausalLM.from_pretrained(folder), file)
    trained = [tensor for name, tensor in llfx.adapter_state_dict(gm).items() if name.endswith("lora_B")]
    assert all(tensor.any() for tensor in trained)
    assert {path.name for path in file.parent.iterdir()} <= {file.name, "loss.png", "loss.txt"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_leaves_the_last_file_whole(rank: int, folder: Path, tmp_path: Path) -> None:
    with example(folder, tmp_path, "--steps", "100000", "--save-every", "1") as run:
        run.wait_for_saves(tmp_path / "adapter.safetensors")
        os.kill(run.workers[rank], signal.SIGKILL)
        run.end()
    whole_adapter(folder, tmp_path / "adapter.safetensors")


def test_an_interrupt_of_torchrun_saves_after_the_step(folder: Path, tmp_path: Path) -> None:
    with example(folder, tmp_path, "--steps", "100000", "--save-every", "1") as run:
        run.wait_for_saves(tmp_path / "adapter.safetensors")
        run.process.send_signal(signal.SIGINT)
        printed = run.end()
    assert "interrupted after" in printed, printed
    whole_adapter(folder, tmp_path / "adapter.safetensors")
    assert (tmp_path / "loss.txt").read_text().count("\n") > 1


def test_two_processes_have_the_losses_of_one(folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, torchrun in (("one", False), ("two", True)):
        with example(folder, tmp_path / name, "--steps", "8", torchrun=torchrun) as run:
            printed, _ = run.process.communicate(timeout=SECONDS)
        assert run.process.returncode == 0, printed
        losses.append([float(line) for line in (tmp_path / name / "loss.txt").read_text().split()])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=5e-5)
    assert max(losses[0]) - min(losses[0]) > 1e-3
