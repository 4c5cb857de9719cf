"""Write the pages of the variants, `docs/methods/*.md`, with a picture for each; or check that they are up to date.

    python docs/make_methods.py                # write them, after a variant or the prose has changed
    python docs/make_methods.py --check        # say which pages are not what this would write

What a program can know comes from the dataclasses, from the graph of each variant and from the committed results.
The rest is in `methods/prose.toml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant
from lora_lite_fx.formats.lora_lite import _FORMATS
from lora_lite_fx.formats.peft.methods import all_forms
from lora_lite_fx.inspection.insertion_picture import draw_insertion

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "examples" / "results"
PROSE = tomllib.loads((DOCS / "methods" / "prose.toml").read_text(encoding="utf-8"))
D_IN, D_OUT, SIDE = 512, 1024, 1024  # of the site in pictures and tables; of the square site that is counted
COMMON = {field.name for field in dataclasses.fields(Variant)}
MADE = "<!-- Made by docs/make_methods.py from prose.toml and the code: change these, and run it. -->"


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


# What a page says.


def page(cls: type[Variant]) -> str:
    """Return the page of a variant."""
    name, prose = cls.__name__, PROSE[cls.__name__]
    paper = " ".join((sys.modules[cls.__module__].__doc__ or "").split())
    formula, rest = documented(cls)
    when = "\n".join(wrapped(f"- {line}", "  ") for line in prose["when"])
    return f"""{MADE}

# {name}

{prose["idea"].strip()}

```text
{formula}
```

![{name} beside one frozen linear](images/{stem(cls)}.svg)

{wrapped(rest)}

**Paper:** {wrapped(linked(prose.get("paper", paper)))}

## When to use it

{when}

## What it costs

{costs(cls)}

Its tensors at a linear of {D_IN} inputs and {D_OUT:,} outputs, with the default options:

{tensors(cls)}

## Options

{options(cls)}

Which sites it adapts is chosen with the fields that all variants have: `target_roles`{default_roles(cls)},
`target_names`, `exclude_names`, `layers`, `target_kinds`, and `dtype` of its tensors.

## Use it

```python
{example(cls)}
```

## Files and hand-over

{files(cls)}

All variants: [the table](README.md). The code: [{stem(cls)}.py](../../lora_lite_fx/variants/{stem(cls)}.py).
"""


def documented(cls: type[Variant]) -> tuple[str, str]:
    """Return the formula of a variant's docstring, and the other sentences of it, without the arguments."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\nArgs:")[0].strip()
    first, _, rest = text.partition("\n\n")
    first = " ".join(first.split())
    match = re.match(r"((?:`[^`]+`|[^`.;]|\.(?=\S))*)[.;]?\s*(.*)", first)
    assert match, first
    formula = match[1].replace("`", "").strip().rstrip(",")
    said = re.sub(r"^https?://\S+\s*", "", match[2]).strip()
    said = re.sub(r"^((?:,? ?(?:equations?|section|algorithm) [\d to.]+)|, as in PEFT)\.?\s*", "", said)
    return formula, "\n\n".join(part for part in (said, rest) if part)


def costs(cls: type[Variant]) -> str:
    """Return a table: what is trained, computed and kept."""
    name, prose = cls.__name__, PROSE[cls.__name__]
    rows = []
    if cls is not llfx.TrainableTokens:
        trained = count(adapted(cls, d_in=SIDE, d_out=SIDE))
        formula = f" = {readable(prose)}" if readable(prose) else ""
        rows.append((f"trained at a linear of {SIDE:,} x {SIDE:,}", f"{trained:,}{formula}"))
        share = trained / (8 * 2 * SIDE)
        rows.append(("of what `LoRA(r=8)` trains there", f"{share:.1%}" if share < 0.995 else f"{share:.3g} times"))
    else:
        rows.append(("trained", f"{readable(prose)}"))
    if name in (counted := counted_costs()):
        trains, share_, file, forward, both = counted[name]
        rows += [
            ("SmolLM2-135M, rank 8, default roles", f"{trains} parameters ({share_}), a file of {file}"),
            ("multiplications of a call inside `frozen`", f"{forward} of the frozen model's"),
            ("multiplications of a training step", f"{both}; training through the frozen model is 2.00"),
        ]
    rows += measured(name)
    return table(("", ""), rows) + f"\n\n{wrapped(f'From {sources(name)}.')}"


def readable(prose: dict[str, Any]) -> str:
    """Return the formula of what is trained, as one reads it."""
    told = str(prose.get("trains_told") or prose["trains"])
    told = (
        told.replace("len(token_indices)", "tokens")
        .replace(" ** 2", "\u00b2")
        .replace(" // ", " / ")
        .replace(" * ", " ")
    )
    told = re.sub(r"\{[^}]*\}\[(\w+)\]", r"(1, 2 or 4, as \1 says)", told)
    return f"`{told}`"


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


def tensors(cls: type[Variant]) -> str:
    """Return a table of the adapter's tensors at one site."""
    gm = adapted(cls)
    rows = []
    trained = {id(parameter) for parameter in llfx.adapter_parameters(gm)}
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        own = name.rsplit(".", 1)[-1]
        if own.startswith("lora_"):
            whose = "all sites" if own.startswith("lora_shared_") else "each site"
            what = "trained" if id(tensor) in trained else "frozen"
            rows.append((f"`{own}`", f"`{tuple(tensor.shape)}`", what, whose))
    return table(("tensor", "shape", "", "one for"), rows)


def options(cls: type[Variant]) -> str:
    """Return a table of the fields that not all variants have."""
    meanings = dict(pair for base in reversed(cls.__mro__) for pair in arguments(base))
    own = [field for field in dataclasses.fields(cls) if field.name not in COMMON or field.name in vars(cls)]
    rows = []
    for field in sorted(own, key=lambda field: field.name not in ("r", "alpha")):
        required = field.default is dataclasses.MISSING
        default = "needed" if required else f"`{field.default!r}`"
        rows.append((f"`{field.name}`", default, meanings.get(field.name, "").replace("|", "\\|")))
    return table(("option", "default", "meaning"), rows) if rows else "It has none of its own."


def arguments(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the arguments that the docstring of a class explains, with their meanings."""
    _, _, text = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    for entry in re.split(r"\n(?=    \w)", text.split("\n\nRaises:")[0]):
        names, colon, meaning = entry.strip().partition(": ")
        if colon:
            for name in names.split(", "):
                yield name, " ".join(meaning.split())


def default_roles(cls: type[Variant]) -> str:
    """Return the roles that a variant adapts if its config names none."""
    return f" (by default {', '.join(cls.default_roles)})"


def example(cls: type[Variant]) -> str:
    """Return a program that adapts a small model."""
    if cls is llfx.TrainableTokens:
        return (
            "import torch\nfrom torch import nn\n\nimport lora_lite_fx as llfx\n\n"
            "model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))\n"
            "ids = torch.randint(64, (2, 8))\n"
            "gm = llfx.rewrite(model, llfx.TrainableTokens(token_indices=(62, 63)), (ids,))\n"
            'print(llfx.inspect(gm, kinds=("embedding",)))'
        )
    data = ", calibration=[(x,)]" if PROSE[cls.__name__].get("calibration") else ""
    return (
        "import torch\nfrom torch import nn\n\nimport lora_lite_fx as llfx\n\n"
        "model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))\n"
        "x = torch.randn(8, 512)\n"
        f'gm = llfx.rewrite(model, llfx.{cls.__name__}(target_names="."), (x,){data})  # all linears, by name\n'
        "gm(x).pow(2).mean().backward()\n"
        "print(llfx.inspect(gm))"
    )


def files(cls: type[Variant]) -> str:
    """Return a table: in which files it is written, and what can be made of it."""
    rows = [("`llfx.save`, `load`", "yes, as every variant")]
    forms = [form for form in all_forms() if form.variant is cls]
    told = dict.fromkeys(f"`{form.peft_type}`{constants(form)}" for form in forms)
    note = f"; {PROSE[cls.__name__]['peft']}" if "peft" in PROSE[cls.__name__] else ""
    rows.append(("PEFT: `save_peft`, `load_peft`", " or ".join(told) + note if told else "PEFT does not have it"))
    lite = [form.name for form in _FORMATS if form.variant is cls]
    rows.append(("lora-lite", " or ".join(f"`{name}`" for name in lite) if lite else "not in its files"))
    rows.append(("`to_lora`, for servers of plain LoRA", as_lora(cls)))
    rows.append(("`merge`", "yes: ordinary weights, which [every runtime](../hand_over/README.md) takes"))
    rows.append(("sites", ", ".join(kinds(cls))))
    return table(("", ""), rows)


def constants(form: Any) -> str:
    """Return the fields of PEFT that tell this form from others of its type."""
    said = [
        f"`{name}={value!r}`"
        for name, value in form.constants.items()
        if value not in (None, False) and (name, value) != ("init_lora_weights", True)
    ]
    return f" with {' and '.join(said)}" if said else ""


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


# The index.


def index() -> str:
    """Return the page that leads to the others."""
    lines = []
    for group in PROSE["group"]:
        rows = [row(variants()[name]) for name in group["variants"]]
        heads = ("variant", "computes", "trains per site", "start", "forward", "training", "PEFT")
        lines.append(f"### {group['name']}\n\n{wrapped(group['told'])}\n\n{table(heads, rows)}\n")
    path = (DOCS / "methods" / "path.md").read_text(encoding="utf-8").strip()
    return f"{MADE}\n\n{path}\n\n## All {len(variants())} variants\n\n{TABLE_HEAD}\n\n" + "\n".join(lines)


TABLE_HEAD = """\
`y = W x + b` is the frozen linear. *Forward* is a call inside `frozen`, and *training* is a step. Both are multiples of
the multiplications of the frozen model's forward pass, for SmolLM2-135M at rank 8
([counted](../../examples/results/variants.txt)). Training through the frozen model alone is 2.00. After `merge` no
variant costs anything. *PEFT* is the type in PEFT's files."""


def row(cls: type[Variant]) -> tuple[str, ...]:
    """Return the variant's row of the table."""
    text = inspect.cleandoc(cls.__doc__ or "")
    formula = documented(cls)[0].split(", `")[0]
    formula = re.split(
        r", (?=elementwise|norms|where|each|\* by|[A-Za-z_0-9']+ (?:=|of|made|sparse|from|the|and|orthonormal))",
        formula,
    )[0]
    start = "exact" if re.search(r"Identity\s+at\s+the\s+start,\s+exactly", text) else "to rounding"
    if re.search(r"[Nn]ear\s+(?:the\s+)?identity", text):
        start = "near"
    elif "*not* the identity" in text:
        start = "random" if "unless" in text else "near"
    forward, both = counted_costs().get(cls.__name__, ["", "", "", "\u2013", "\u2013"])[3:5]
    peft = " ".join(dict.fromkeys(f"`{form.peft_type}`" for form in all_forms() if form.variant is cls)) or "\u2013"
    return (
        f"[`{cls.__name__}`]({stem(cls)}.md)",
        f"`{formula}`".replace("|", "\\|"),
        readable(PROSE[cls.__name__]),
        start,
        forward,
        both,
        peft,
    )


# Text.


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table as Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells).replace("|  |", "| |") + " |" for cells in lines)


def wrapped(text: str, indent: str = "") -> str:
    """Return paragraphs in lines of 120 characters, each broken as its own."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines, words = [""], paragraph.split()
        for word in words:
            if len(lines[-1]) + 1 + len(word) > 120:
                lines.append(indent.rstrip("\n") + word if indent else word)
            else:
                lines[-1] = f"{lines[-1]} {word}".strip() if lines[-1].strip() else f"{lines[-1]}{word}"
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def linked(text: str) -> str:
    """Return text with its addresses as links."""
    return re.sub(r"(https?://[^\s),]+)", r"<\1>", text)


def made() -> dict[Path, str]:
    """Return the content of each file, by its path."""
    content = {DOCS / "methods" / "README.md": index()}
    for cls in variants().values():
        check_count(cls)
        content[DOCS / "methods" / f"{stem(cls)}.md"] = page(cls)
        content[DOCS / "methods" / "images" / f"{stem(cls)}.svg"] = draw_insertion(adapted(cls), "site")
    return {path: re.sub(r"\n{3,}", "\n\n", text) for path, text in content.items()}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is not up to date")
    check = parser.parse_args().check
    content = made()
    old = {path for path, text in content.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    old |= {path for path in (DOCS / "methods").glob("*.md") if path not in content and path.name != "path.md"}
    for path in sorted(old):
        print(f"{'not up to date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
        if not check and path in content:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content[path], encoding="utf-8")
    return int(bool(old) and check)


if __name__ == "__main__":
    sys.exit(main())
