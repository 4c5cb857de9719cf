"""`examples/finetune.py`: its options, its data, its checkpoints, and `--resume`, which changes no bit of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import finetune
import finetune_checkpoints as checkpoints
import finetune_data
import finetune_options
import finetune_training
import pytest
import torch
from finetune_data import DataError, Example, encoded
from finetune_training import NOT_COUNTED, counted, to_blocks

import lora_lite_fx as llfx
from tests.support.selection import slow_after
from tests.support.tiny_folder import PARAGRAPHS, TEMPLATE, tokenizer, write_tiny_folder

ROOT = Path(__file__).parents[2]

# Options.


def parse(monkeypatch: pytest.MonkeyPatch, *options: object) -> Any:
    """Return what the options are parsed to."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
    return finetune_options.parse(None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like that of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_variants_are_those_of_the_library() -> None:
    built_in = {name for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")}
    assert set(finetune_options.VARIANTS) == built_in
    assert len(finetune_options.VARIANTS) == len(built_in)


WRONG = {
    "--variant lorra": "unknown variant 'lorra'; did you mean LoRA",
    "--variant zzz": "unknown variant 'zzz'; the variants are AdaLoRA, ",
    "--data missing.txt": "missing.txt cannot be read: No such file or directory",
    "--data text.json": "text.json: a text or a .jsonl file is read",
    "--data wrong.jsonl": "wrong.jsonl, line 2: not JSON",
    "--model ./missing": "--model ./missing: there is no such folder",
    "--model empty": "--model empty: the folder has no config.json",
    "--out text.txt": "--out text.txt is not a folder",
    "--resume": "--resume: there is no checkpoint in out",
    "--out ended": "ended/checkpoint-3 is of a run that has not ended: go on with --resume, or delete it",
    "--length 4": "--length 4 is too short; use at least 8",
    "--steps 0": "'0' is not a positive integer",
    "--lr -1": "'-1' is not a positive number",
    "--lr x": "'x' is not a positive number",
    "--alpha nan": "--alpha nan is not a finite number",
    "--merged --quantise nf4": "--merged is for a base that is not quantized here",
    "--shard": "--shard needs processes: torchrun",
    "--text text.txt": "unrecognized arguments: --text",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_one_line(
    options: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "ended" / "checkpoint-3").mkdir(parents=True)
    default = [] if "--model" in options else ["--model", model]
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, *default, *options.split())
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert last.startswith("finetune.py: error: ")
    assert WRONG[options] in last


@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        (2, [], "2 processes would all do the same; add --shard"),
        (2, ["--shard", "--batch", 3], "--batch 3 cannot be divided among 2 processes"),
        (2, ["--shard", "--resume"], "--resume goes on in one process; with --shard no checkpoints are written"),
    ],
)
def test_processes_and_options_must_fit(
    processes: int,
    options: Sequence[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit):
        parse(monkeypatch, *options)
    assert message in capsys.readouterr().err


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "transformers", "matplotlib", "lora_lite_fx"):
    sys.modules[name] = None  # so that importing it is an error
sys.argv = ["finetune.py", *sys.argv[1:]]
sys.path.insert(0, "examples")
runpy.run_path("examples/finetune.py", run_name="__main__")
"""


def test_options_are_checked_before_torch_is_imported() -> None:
    for options, code, message in ((["--help"], 0, "--resume"), (["--variant", "lorra"], 2, "did you mean LoRA")):
        command = [sys.executable, "-c", WITHOUT_TORCH, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert message in done.stdout + done.stderr
        assert "importing torch" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "ia3", "--rank", 4], "--rank: IA3 has none"),
        (["--variant", "ia3", "--alpha", 4], "--alpha: IA3 has none"),
        (["--roles", "querry"], "querry"),
        (["--device", "mps"], "--device mps: torch finds no such device here; it finds cpu"),
    ],
)
def test_what_torch_and_the_variant_know_is_checked_before_a_model_is_loaded(
    options: Sequence[object],
    message: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    args = parse(monkeypatch, "--model", model, *options)  # which holds no model
    with pytest.raises(SystemExit) as ended:
        finetune.main(args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_stays_on_its_device(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse(monkeypatch, "--model", model, "--device", "cpu")
    args.run, args.checkpoint = {"device": "cuda"}, Path("out/checkpoint-1")
    with pytest.raises(SystemExit):
        finetune.main(args)
    assert "the run in out/checkpoint-1 is on cuda, and this one would be on cpu" in capsys.readouterr().err


def test_a_look_up_at_the_hub_says_so(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Late(threading.Timer):
        def start(self) -> None:
            self.function(*self.args, **self.kwargs)

    monkeypatch.setattr(threading, "Timer", Late)
    for name, lines in ((str(model), 1), (None, 1), ("owner/name", 2)):
        with finetune_options.loading("the model", name):
            time.sleep(0.05)
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "loading the model ..."
        assert len(said) == lines
    assert "Hugging Face hub: owner/name; HF_HUB_OFFLINE=1" in said[1]


# Data.


def jsonl(path: Path, *lines: object) -> Path:
    """Write lines of JSON."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_text_is_divided_by_its_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(["a", "b", "c ", "d", "c"]))
    data = finetune_data.read(file)
    assert [example.text for example in data.train] == ["a\n\nb\n\nd"]  # without what is held out
    assert [example.text for example in data.held] == ["c"]
    assert data.digest != finetune_data.read(None).digest


def test_lines_are_divided_and_their_tokens_counted(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "w5", "content": "w3"}]
    lines = [{"text": "w1 w2"}, {"prompt": "w1 w2", "completion": "w3"}, {"messages": messages, "id": 7}]
    data = finetune_data.read(jsonl(tmp_path / "a.jsonl", *lines, {"text": "w8"}, {"text": "w4"}, {"text": "w4"}))
    assert [example.text for example in data.held] == ["w4", "w4"]
    assert len(data.train) == 4
    words = tokenizer(eos_token="w7", chat_template=TEMPLATE)
    tokens = [encoded(words, example) for example in data.train]
    assert tokens[0] == ([1, 2, 7], [True] * 3)
    assert tokens[1] == ([1, 2, 3, 7], [False, False, True, True])
    assert tokens[2] == ([39, 1, 2, 9, 5, 3, 9], [True] * 7)  # the template has its own end
    assert encoded(words, Example("w1 w2")) == ([1, 2], [True] * 2)  # a whole text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not JSON"),
        ("[1]", "an object is needed"),
        ("{}", "needs text, or messages, or prompt and completion; it has nothing"),
        ('{"prompt": "a"}', "it has prompt"),
        ('{"text": "a", "messages": []}', "it has text, messages"),
        ('{"text": 3}', "text must be a text that is not empty, not 3"),
        ('{"text": ""}', "text must be a text that is not empty, not ''"),
        ('{"prompt": "a", "completion": ["b"]}', "completion must be a text"),
        ('{"messages": "a"}', "messages must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', "a message needs role and content"),
        ("\udcff", "not UTF-8 (byte 0xff)"),
    ],
)
def test_an_error_names_the_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(f'{{"text": "a"}}\n\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as refused:
        finetune_data.read(file)
    assert f"{file}, line 3: " in str(refused.value)
    assert message in str(refused.value)


def test_messages_need_a_template_that_takes_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w1"}]
    example = finetune_data.read(jsonl(tmp_path / "a.jsonl", {"messages": messages}, {"text": "w1"})).train[0]
    with pytest.raises(DataError, match="line 1: messages need a chat template, and the tokenizer has none"):
        encoded(tokenizer(), example)
    with pytest.raises(DataError, match="line 1: the chat template refuses the messages: no users"):
        encoded(tokenizer(chat_template="{{ raise_exception('no users') }}"), example)


def test_too_little_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few lines: 1"):
        finetune_data.read(jsonl(tmp_path / "a.jsonl", {"text": "w1"}))
    with pytest.raises(DataError, match="has 2 tokens, and --length is 8"):
        to_blocks(tokenizer(), [Example("w1 w2")], 8)
    with pytest.raises(DataError, match="only prompts"):
        to_blocks(tokenizer(), [Example("w1", prompt=" ".join(["w2"] * 16))], 8)


def test_blocks_hold_tokens_and_labels() -> None:
    examples = [Example("w1 w2 w3", prompt=" ".join(["w4"] * 9)), Example("w5 w6 w7 w8")]
    blocks = to_blocks(tokenizer(), examples, 4)
    assert blocks[0].tolist() == [[4, 1, 2, 3], [5, 6, 7, 8]]  # two blocks have no token that counts
    assert blocks[1].tolist() == [[NOT_COUNTED, 1, 2, 3], [5, 6, 7, 8]]
    assert counted(blocks).tolist() == [3, 3]  # of the second block not the first, which nothing predicts


# Checkpoints.


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with checkpoints.writing(tmp_path, 9, {"losses": [0.1]}) as folder:
        (folder / "state").write_text("nine")
        assert checkpoints.newest(tmp_path) is None
    with pytest.raises(RuntimeError), checkpoints.writing(tmp_path, 10, {"losses": [0.1, 0.2]}):
        raise RuntimeError("as a kill")
    assert (found := checkpoints.newest(tmp_path)) == tmp_path / "checkpoint-9"
    assert found is not None
    assert checkpoints.read(found) == {"losses": [0.1]}
    with checkpoints.writing(tmp_path, 11, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]
    (tmp_path / "checkpoint-notes").mkdir()  # the user's
    checkpoints.delete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-notes"]


def test_a_run_is_gone_on_with_its_own_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join("abcdefgh"))
    first = parse(monkeypatch, "--model", model, "--data", "text.txt", "--variant", "dora", "--roles", "query,value")
    run = {"options": finetune_options.saved_options(first), "data": first.texts.digest, "losses": [1.5]}
    (tmp_path / "out").mkdir()
    with checkpoints.writing(tmp_path / "out", 1, run):
        pass
    again = parse(monkeypatch, "--resume")
    assert finetune_options.saved_options(again) == finetune_options.saved_options(first)
    assert (again.run, again.checkpoint) == (json.loads(json.dumps(run)), Path("out/checkpoint-1"))
    same = parse(monkeypatch, "--resume", "--variant", "DoRA", "--roles", "query", "value", "--save-every", 7)
    assert same.save_every == 7
    wrong: list[tuple[list[object], str]] = [
        (["--rank", 4], "--rank 4: the run in out/checkpoint-1 has --rank None; leave it out to go on"),
        (["--steps", 61], "--steps 61: the run in out/checkpoint-1 has --steps 60"),
        (["--lr", 0.5], "--lr 0.5: the run in out/checkpoint-1 has --lr 0.004"),
        (["--compile"], "--compile True: the run in out/checkpoint-1 has --compile False"),
    ]
    for options, message in wrong:
        with pytest.raises(SystemExit):
            parse(monkeypatch, "--resume", *options)
        assert message in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("another")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--resume")
    assert "text.txt has changed since the run in out/checkpoint-1 began" in capsys.readouterr().err
    (tmp_path / "out" / "checkpoint-1" / "run.json").write_text("{")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--resume")
    assert "run.json is damaged" in capsys.readouterr().err


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with dropout, whose random numbers a run must go on with."""
    return write_tiny_folder(tmp_path_factory.mktemp("model"), attention_dropout=0.3)


Run = Callable[..., int]


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the example in this process, up to a step if one is given."""
    step = finetune_training.Training.step

    def run(out: str, *options: object, end: Callable[[], object] | None = None, at: int = 0) -> int:
        def ending(self: Any, *rest: Any) -> bool:
            if end is not None and len(self.losses) == at:
                end()
            return step(self, *rest)

        monkeypatch.setattr(finetune_training.Training, "step", ending)
        place = ["--model", folder, "--data", folder / "text.txt", "--prompt", "w1 w2"]
        sizes = ["--length", 8, "--batch", 4, "--steps", 10, "--save-every", 2]
        given = ["--resume"] if "--resume" in options else [*place, *sizes]
        return finetune.main(parse(monkeypatch, "--out", tmp_path / out, *given, *options))

    return run


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def state(out: Path, step: int) -> dict[str, Any]:
    """Return all that a checkpoint holds, and the adapter beside it."""
    found = checkpoints.newest(out)
    assert found == out / f"checkpoint-{step}"
    assert (found / "adapter.safetensors").read_bytes() == (out / "adapter.safetensors").read_bytes()
    training = torch.load(found / "training.pt", weights_only=True)
    flat, _ = torch.utils._pytree.tree_flatten(training)
    tensors = [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
    return {"adapter": (out / "adapter.safetensors").read_bytes(), "training": tensors, **checkpoints.read(found)}


@pytest.mark.broad
@pytest.mark.parametrize("variant", slow_after(1, ["vera", "lora", "dora"]))
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(
    variant: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "finish", lambda *_: None)  # it deletes the checkpoint
    assert run("whole", "--variant", variant) == 0
    expected = state(tmp_path / "whole", 10)
    assert len(set(expected["losses"])) == 10
    with pytest.raises(Killed):
        run("killed", "--variant", variant, end=kill, at=5)  # after the checkpoint of step 4
    capsys.readouterr()
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    assert run("killed", "--resume", end=interrupt, at=6) == 130  # after step 7
    assert f"to go on: python examples/finetune.py --out {tmp_path / 'killed'} --resume" in capsys.readouterr().out
    assert (tmp_path / "killed" / "loss.txt").read_text().count("\n") == 7
    assert state(tmp_path / "killed", 7)["losses"] == expected["losses"][:7]
    assert run("killed", "--resume") == 0
    assert state(tmp_path / "killed", 10) == expected
    # Without the dropout's state, the losses are others.
    monkeypatch.setattr(finetune_training, "set_random_states", lambda states: None)
    with pytest.raises(Killed):
        run("other", "--variant", variant, end=kill, at=5)
    assert run("other", "--resume") == 0
    assert state(tmp_path / "other", 10)["losses"] != expected["losses"]


@pytest.mark.broad
def test_a_run_ends_with_its_files_and_what_to_do_next(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = jsonl(tmp_path / "a.jsonl", *({"prompt": text[:20], "completion": text[20:]} for text in PARAGRAPHS))
    assert run("out", "--data", lines, "--merged") == 0
    printed = capsys.readouterr().out
    said = (
        "loading the tokenizer",
        "loading the model",
        "capturing the model",
        "loading the adapter",
        "merging",
        "exporting",
    )
    assert all(f"\n{line}" in f"\n{printed}" for line in said)  # before what takes seconds
    out = tmp_path / "out"
    names = ["adapter.safetensors", "loss.png", "loss.txt", "merged", "model.pt2"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(f" MB  {out / name}\n" in printed for name in names)
    assert f"{(out / 'model.pt2').stat().st_size / 1e6:9.3f} MB" in printed
    differences = [float(line.split()[1]) for line in printed.splitlines() if line.startswith("  reloaded ")]
    assert differences == [0.0]
    assert "next, with `model` from transformers:\n  load it:  " in printed
    with pytest.raises(SystemExit):  # the checkpoint is deleted
        run("out", "--resume")


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "examples/finetune.py", "--out", str(tmp_path)]
    place = ["--model", str(folder), "--data", str(folder / "text.txt"), "--length", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}

    def until(first: int, number: signal.Signals, *options: str) -> int:
        process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not ((found := checkpoints.newest(tmp_path)) and _step(found) > first):
            time.sleep(0.05)
        process.send_signal(number)
        process.wait()
        assert process.returncode == (-number if number == signal.SIGKILL else 130)
        found = checkpoints.newest(tmp_path)
        assert found is not None
        return _step(found)

    killed = until(3, signal.SIGKILL, *place, "--steps", "100000", "--save-every", "1")
    assert until(killed + 3, signal.SIGINT, "--resume") > killed + 3
    last = checkpoints.newest(tmp_path)
    assert last is not None
    assert len(checkpoints.read(last)["losses"]) == _step(last)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
