"""Find out what the pages of the variants say: from models of one site, and from the committed results."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "examples" / "results"
PROSE = tomllib.loads((DOCS / "methods" / "prose.toml").read_text(encoding="utf-8"))
D_IN, D_OUT, SIDE = 512, 1024, 1024  # of the site in pictures and tables; of the square site that is counted


def variants() -> dict[str, type[Variant]]:
    """Return the package's own variants by name, in the order of the index."""
    known = {name: cls for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")}
    named = [name for group in PROSE["group"] for name in group["variants"]]
    assert sorted(named) == sorted(known), f"prose.toml and the registry differ: {set(named) ^ set(known)}"
    return {name: known[name] for name in named}


def stem(cls: type[Variant]) -> str:
    """Return the name of a variant's page, which is that of its file."""
    return cls.__module__.rsplit(".", 1)[-1]


# A model of one site for each kind.


def model_of(kind: str, d_in: int = D_IN, d_out: int = D_OUT) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a model of one site, called `site`, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential()
    layers: dict[str, tuple[Any, torch.Tensor]] = {
        "linear": (lambda: nn.Linear(d_in, d_out), torch.randn(8, d_in)),
        "embedding": (lambda: nn.Embedding(64, 32), torch.arange(24).view(3, 8)),
        "conv": (lambda: nn.Conv2d(16, 32, 3), torch.randn(2, 16, 8, 8)),
        "grouped_conv": (lambda: nn.Conv2d(16, 32, 3, groups=4), torch.randn(2, 16, 8, 8)),
        "norm": (lambda: nn.LayerNorm(32), torch.randn(8, 32)),
        "experts": (lambda: Experts(), torch.randn(4, 8, 32)),
    }
    module, x = layers[kind]
    model.add_module("site", module())
    return model, (x,)


class Experts(nn.Module):
    """Four matrices, each for its part of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x (4, tokens, 32)` with the experts."""
        return torch.bmm(x, self.weight)


def adapted(cls: type[Variant], kind: str = "", **sizes: int) -> Any:
    """Return the graph of a model of one site with an adapter."""
    fields: dict[str, Any] = {"target_names": "."}
    if cls is llfx.TrainableTokens:
        kind, fields = "embedding", {"token_indices": (1, 2, 3)}
    elif kind:
        fields["target_kinds"] = kind
        small = {"r": 2, "block_size": 2, "group_size": 2, "vector_length": 2, "n_frequency": 4}
        fields |= {name: value for name, value in small.items() if name in {f.name for f in dataclasses.fields(cls)}}
    model, x = model_of(kind or "linear", **sizes)
    calibration = [x] if PROSE[cls.__name__].get("calibration") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llfx.rewrite(model, cls(**fields), x, calibration=calibration, verify=False)


# What is counted, measured and tried.


def count(gm: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in llfx.adapter_parameters(gm))


def check_count(cls: type[Variant]) -> None:
    """Check the formula of what is trained against the adapter of one site."""
    if not (formula := PROSE[cls.__name__]["trains"]):
        return
    gm = adapted(cls)
    config = llfx.adapters(gm)[0].config
    known: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    known |= {"d_in": D_IN, "d_out": D_OUT if cls is not llfx.TrainableTokens else 32, "ceil": math.ceil}
    known |= {"min": min, "len": len}
    value = eval(formula, {"__builtins__": {}}, known)
    assert value == count(gm), f"{cls.__name__}: {formula} is {value}, and {count(gm)} are trained"


def counted_costs() -> dict[str, list[str]]:
    """Return the rows of `examples/variants.py` by variant."""
    lines = (RESULTS / "variants.txt").read_text(encoding="utf-8").splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `"))
    return {row[0].strip("`"): row[1:] for row in cells}


def measured(name: str) -> Iterator[tuple[str, str]]:
    """Yield rows of measured training steps, beside PEFT's."""
    told = {"train": "a training step of 6 layers, rank 16", "saved": "kept for its backward pass"}
    for result in json.loads((RESULTS / "cpu-training.json").read_text(encoding="utf-8"))["results"]:
        if result["case"] == "smollm2-6-body" and result["variant"] == name and result["measure"] in told:
            ours, peft = (result["ratios"][arm] for arm in ("ours", "peft"))
            yield told[result["measure"]], f"{ours:.2f} of the frozen model's; with PEFT {peft:.2f}"


def sources(name: str) -> str:
    """Return where the figures of a table come from."""
    said = []
    if name in counted_costs():
        said.append("[counted multiplications](../../examples/results/variants.txt)")
    if list(measured(name)):
        data = json.loads((RESULTS / "cpu-training.json").read_text(encoding="utf-8"))
        said.append(f"[times](../../examples/results/cpu-training.txt) on {data['machine']}, {data['date']}")
    return " and ".join(said) or "the shapes of its tensors"


def as_lora(cls: type[Variant]) -> str:
    """Return what `to_lora` makes of an adapter with other values than those at the start."""
    small = {} if cls is llfx.TrainableTokens else {"d_in": D_IN, "d_out": D_OUT}
    gm = adapted(cls, **small)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.add_(0.02 * torch.randn_like(parameter))
    try:
        lora, _ = llfx.to_lora(gm)
    except llfx.AdapterError as error:
        return "no: " + " ".join(str(error).split()).split(". ")[0].rstrip(".")
    rank = llfx.adapters(lora)[0].config.r
    own = getattr(llfx.adapters(gm)[0].config, "r", None)
    if rank == own:
        return "exact, with the same rank"
    rank_here = f"`r={own}`" if own else "the default options"
    if rank > 0.9 * min(D_IN, D_OUT):
        return "exact at the full rank, that of the smaller side of the weight; `to_lora(gm, r)` approximates it"
    return f"exact at a rank of {rank}, with {rank_here}; `to_lora(gm, r)` approximates it with a smaller one"


def kinds(cls: type[Variant]) -> Iterator[str]:
    """Yield the kinds of sites that the variant accepts, tried out."""
    for kind in ("linear", "embedding", "conv", "grouped_conv", "experts", "norm"):
        try:
            adapted(cls, kind)
        except llfx.AdapterError:
            continue
        yield kind
        if cls is llfx.TrainableTokens:
            return
