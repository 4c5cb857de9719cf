"""Time how long torch.compile takes for an adapted model: as a whole, or each kind of layer once.

    pip install -e ".[examples]" "peft>=0.20"
    python examples/compile_time.py                  # some minutes
    python examples/compile_time.py --quick          # few layers: that it runs

Each line is a process of its own with the caches of torch.compile off: the CPU seconds of the first training step, with
compilation, and the milliseconds of later ones. The last two lines show a warm start: `torch.compiler` saves what it
compiled as bytes, and another process loads these before its first step. One layer is also compiled merged and with
PEFT's adapter, which is the same but for its random values.

The model has the form of Llama, random weights, and a LoRA with r=16 at each linear.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lora_lite_fx as llfx

HOW = ("merged", "PEFT", "whole", "by layer")


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    if args.how is not None:
        run(args)
        return
    few, many = (2, 4) if args.quick else (4, 30)
    lines = [f"torch {torch.__version__}, 1 thread, d={args.width}, {args.tokens} tokens"]
    cases = [(how, 1, "off") for how in ("merged", "PEFT", "whole")]
    cases += [(how, layers, "off") for layers in (few, many) for how in ("whole", "by layer")]
    cases += [("by layer", few, cache) for cache in ("save", "load")]
    with tempfile.TemporaryDirectory() as folder:
        for how, layers, cache in cases:
            lines.append(of_process(args, how, layers, cache, Path(folder) / "cache"))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def of_process(args: argparse.Namespace, how: str, layers: int, cache: str, file: Path) -> str:
    """Return the line that another process prints."""
    command = [sys.executable, __file__, "--how", how, "--layers", str(layers), "--cache", cache, "--file", str(file)]
    command += ["--width", str(args.width), "--tokens", str(args.tokens), *(["--dynamic"] if args.dynamic else [])]
    with tempfile.TemporaryDirectory() as own:  # no cache of another process is found there
        off = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"} if cache == "off" else {}
        environment = {**os.environ, **off, "TORCHINDUCTOR_CACHE_DIR": own}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip()


def run(args: argparse.Namespace) -> None:
    """Compile one model, and print what it took."""
    torch.set_num_threads(1)
    if args.cache == "load":
        torch.compiler.load_cache_artifacts(args.file.read_bytes())
    model, parameters = compiled_model(args)
    ids = torch.randint(500, (1, args.tokens))
    before = time.process_time()
    expected = step(model, ids, parameters)
    first = time.process_time() - before
    later = []
    for _ in range(5):
        before = time.process_time()
        step(model, ids, parameters)
        later.append(time.process_time() - before)
    if args.cache == "save":
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        args.file.write_bytes(artifacts[0])
    cache = {"off": "", "save": ", saved", "load": ", loaded"}[args.cache]
    name = f"{args.how}{cache}"
    print(
        f"{name:18} {args.layers:3} layers: first step {first:6.1f} s, later {statistics.median(later) * 1000:8.1f} ms,"
        f" loss {expected:.5f}"
    )


def compiled_model(args: argparse.Namespace) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return a model that is compiled at its first call, and what is trained of it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        vocab_size=512,
    )
    frozen = transformers.LlamaForCausalLM(config)
    if args.how == "PEFT":
        model = peft.get_peft_model(frozen, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        return torch.compile(model, fullgraph=True, dynamic=args.dynamic), randomized(model.parameters())
    gm: Any = llfx.rewrite(frozen, llfx.LoRA(r=16)).train()
    parameters = randomized(llfx.adapter_parameters(gm))
    if args.how == "by layer":
        return llfx.compile_layers(gm, fullgraph=True, dynamic=args.dynamic), parameters
    if args.how == "merged":  # the frozen model, with a gradient of the hidden state as adapters have it
        gm = llfx.merge(gm).requires_grad_(False)
        parameters = [gm.get_parameter("model.embed_tokens.weight").requires_grad_()]
    return torch.compile(gm, fullgraph=True, dynamic=args.dynamic), parameters


def randomized(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return those that are trained, with random values."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.02)
    return trained


def step(model: Any, ids: torch.Tensor, parameters: list[torch.nn.Parameter]) -> float:
    """Run forward and backward; return the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return float(loss)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few layers")
    parser.add_argument("--width", type=int, default=576, help="of the hidden state, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--dynamic", action="store_true", default=None, help="compile for all sizes at once")
    parser.add_argument("--out", type=Path, help="write the lines to this file")
    parser.add_argument("--how", choices=HOW, help="of a process: what is compiled")
    parser.add_argument("--layers", type=int, default=4, help="of a process: how many layers the model has")
    parser.add_argument("--cache", choices=("off", "save", "load"), default="off", help="of a process: its cache")
    parser.add_argument("--file", type=Path, default=Path("cache"), help="of a process: the saved cache")
    return parser.parse_args()


if __name__ == "__main__":
    main()
