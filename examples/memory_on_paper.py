"""Count what a training step keeps and moves in models of 8 and 70 billion parameters, without their weights.

    pip install -e ".[examples]" "peft>=0.20"
    python examples/memory_on_paper.py                          # half an hour on one core, 8 GB
    python examples/memory_on_paper.py --models 8B --methods lora --tokens 2048

The model and its adapters are tensors without data. The same two counters count this library's graph and PEFT's model:
the bytes that autograd keeps of the forward pass, without parameters, and the bytes that the operators of the whole
step read and write. A test compares such counts with those of tensors that have data. What a step needs on a card is
the weights, what it keeps, the gradients and the states of the optimizer, and some working memory.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from counted_bytes import MovedBytes, kept_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers.models.llama import modeling_llama

import lora_lite_fx as llfx

SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}
"""Those of Llama 3.1, and a tiny one for tests."""
RANK, BLOCK = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, tuple[llfx.Variant, Callable[[], peft.PeftConfig]]] = {
    "lora": (
        llfx.LoRA(r=RANK),
        lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS),
    ),
    "dora": (
        llfx.DoRA(r=RANK),
        lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS, use_dora=True),
    ),
    "oft": (
        llfx.OFT(block_size=BLOCK),
        lambda: peft.OFTConfig(r=0, oft_block_size=BLOCK, target_modules=LINEARS, use_cayley_neumann=True),
    ),
}


@dataclass(frozen=True)
class Counts:
    """Of one step: bytes.

    Args:
        weights: of the frozen parameters.
        trained: of the trained ones.
        kept: by autograd, of the forward pass.
        moved: by the operators of the forward and the backward pass.
    """

    weights: int
    trained: int
    kept: int
    moved: int


def build(shape: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of a shape, in the mode of now: with data, or without."""
    sizes = SHAPES[shape]
    config = transformers.LlamaConfig(
        **sizes,
        num_key_value_heads=min(8, sizes["num_attention_heads"]),
        vocab_size=256 if shape == "tiny" else 128256,
        max_position_embeddings=131072,
    )
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).requires_grad_(False)


def counts(shape: str, method: str, tokens: int) -> dict[str, Counts]:
    """Return the counts of each implementation, by name.

    The model makes no mask, as for a text without padding: without data it could not tell that there is none.
    """
    found = {}
    with mock.patch.object(modeling_llama, "create_causal_mask", return_value=None):
        for name, model in arms(shape, method):
            found[name] = count(model, tokens)
            gc.collect()
    return found


def arms(shape: str, method: str) -> Iterator[tuple[str, Any]]:
    """Yield the adapted model of each implementation, by name."""
    ours, theirs = METHODS[method]
    example = inputs_of(3, 7)
    graph = llfx.capture(build(shape), example, verify=False)
    yield "this library", llfx.rewrite(graph, ours)
    yield "this library, fused loss", llfx.rewrite(graph, ours, fuse_loss=True)
    with unset_fake_temporarily(), torch.device("meta"):  # PEFT moves adapters in a way that stand-ins do not take
        of_peft = peft.get_peft_model(build(shape), theirs())
    for module in of_peft.modules():
        for name, tensor in [*module.named_parameters(recurse=False)]:
            made = torch.zeros(tensor.shape, dtype=tensor.dtype)
            module.register_parameter(name, nn.Parameter(made, requires_grad=tensor.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    yield "PEFT", of_peft


def inputs_of(rows: int, length: int) -> dict[str, Tensor]:
    """Return tokens, which are their labels too."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def count(model: Any, tokens: int) -> Counts:
    """Count one step of training on a text of so many tokens."""
    inputs = inputs_of(1, tokens)
    model.train()
    model(**inputs_of(1, 8))  # the first call derives the program
    parameters = {True: 0, False: 0}
    for parameter in model.parameters():
        parameters[parameter.requires_grad] += parameter.nbytes
    with MovedBytes() as moved:
        kept, loss = kept_bytes(lambda: model(**inputs, use_cache=False).loss, [model], inputs.values())
        loss.backward()
    return Counts(parameters[False], parameters[True], kept, moved.total)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8B", "70B"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        f"Llama 3.1, bfloat16, one text of {args.tokens} tokens, rank {RANK}, OFT in blocks of {BLOCK}; GB of 10^9"
        f" bytes; torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}.",
        "",
        "| model | method | | weights | trained | kept | moved in a step |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for shape in args.models:
        for method in args.methods:
            for line in rows(shape, method, args.tokens):
                print(line, flush=True)
                lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(shape: str, method: str, tokens: int) -> Iterator[str]:
    """Yield the lines of the table of one method in one model."""
    with FakeTensorMode():
        found = counts(shape, method, tokens)
    for name, counted in found.items():
        cells = (f"{value / 1e9:.3g}" for value in (counted.weights, counted.trained, counted.kept, counted.moved))
        yield f"| {shape} | {method} | {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
