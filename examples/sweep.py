"""Compare many configs from one capture: ranks and targets, with a picture of the gradients by site.

    pip install -e ".[examples]"
    python examples/sweep.py                    # 20 configs on a random model of 12 layers: a minute, 2 cores
    python examples/sweep.py --model gpt2 --text notes.txt
    python examples/sweep.py --ranks 4 16 --layers 4 --out sweep.png

A capture takes most of the time of `rewrite`, so the model is captured once and each config rewrites that graph. The
script prints a line for each config: the number of sites and of parameters that train, the loss, the norm of the
gradient, and the seconds. OUT shows the norm of each site's gradient in its first step, by config: where an adapter
would learn most.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from finetune_options import positive
from matplotlib import pyplot
from torch import Tensor, fx
from tqdm import tqdm

import lora_lite_fx as llfx

TARGETS: dict[str, tuple[str, ...]] = {
    "q, v": ("query", "value"),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all": ("attention", "mlp"),
}


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    torch.manual_seed(0)
    model, ids = load(args)
    start = time.perf_counter()
    base = llfx.capture(model)
    sites = llfx.inspect(base)
    print(f"captured {len(sites)} sites in {time.perf_counter() - start:.1f} s")
    configs = {
        f"{name}, r={rank}": llfx.LoRA(r=rank, target_roles=roles)
        for name, roles in TARGETS.items()
        for rank in args.ranks
    }
    norms: dict[str, dict[str, float]] = {}
    lines = [f"{'config':>16} {'sites':>5} {'trains':>10} {'loss':>7} {'gradient':>9} {'seconds':>7}"]
    start = time.perf_counter()
    for name, cfg in tqdm(configs.items(), desc="configs"):
        began = time.perf_counter()
        gm = llfx.rewrite(base, cfg)
        loss, norms[name] = gradient_by_site(gm, ids)
        total = sum(norm**2 for norm in norms[name].values()) ** 0.5
        trains = sum(p.numel() for p in llfx.adapter_parameters(gm))
        seconds = time.perf_counter() - began
        lines.append(f"{name:>16} {len(norms[name]):5} {trains:10,} {loss:7.3f} {total:9.2e} {seconds:7.1f}")
    print(*lines, sep="\n")
    print(f"{len(configs)} configs in {time.perf_counter() - start:.1f} s")
    draw([site.name for site in sites], norms, args.out)
    print(f"wrote {args.out}")


def gradient_by_site(gm: fx.GraphModule, ids: Tensor) -> tuple[float, dict[str, float]]:
    """Run one step on `ids (batch, length)`, and return the loss and the norm of the gradient at each site."""
    loss = gm(input_ids=ids, labels=ids).loss
    loss.backward()
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in gm.named_parameters():
        if parameter.grad is not None:
            squares[name.rpartition(".")[0]] += parameter.grad.double().pow(2).sum().item()
    return loss.item(), {site: square**0.5 for site, square in squares.items()}


def draw(names: list[str], norms: dict[str, dict[str, float]], path: Path) -> None:
    """Write the picture: a row for each adapted site, in the order of `names`, and a column for each config."""
    adapted = {site for by_site in norms.values() for site in by_site}
    sites = [name for name in names if name in adapted]
    values = torch.full((len(sites), len(norms)), float("nan"))
    for column, by_site in enumerate(norms.values()):
        for site, norm in by_site.items():
            values[sites.index(site), column] = norm
    figure, axes = pyplot.subplots(figsize=(3 + 0.4 * len(norms), 2 + 0.14 * len(sites)), layout="constrained")
    image = axes.imshow(values, aspect="auto", norm="log", interpolation="nearest")
    axes.set_xticks(range(len(norms)), list(norms), rotation=90)
    axes.set_yticks(range(len(sites)), sites, fontsize=6)
    axes.set_title("gradient norm in the first step")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def load(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """Return the model and a batch of tokens."""
    if args.model:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    else:
        config = transformers.LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
    if args.text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        return model, tokenizer(args.text.read_text(), return_tensors="pt")["input_ids"][:, :256]
    return model, torch.randint(model.config.vocab_size, (4, 64))


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a random one)")
    parser.add_argument(
        "--text", type=Path, help="a file to compute the loss on; needs --model (default: random tokens)"
    )
    parser.add_argument("--layers", type=positive, default=12, help="of the random model (default: %(default)s)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8, 16, 32], metavar="R")
    parser.add_argument("--out", type=Path, default=Path("sweep.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    if args.text and not args.model:
        parser.error("--text needs --model, because its tokenizer reads the text")
    matplotlib.use("Agg")
    return args


if __name__ == "__main__":
    main()
