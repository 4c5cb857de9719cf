"""Write the pages of the variants, `docs/methods/*.md`, with a picture for each; or check that they are up to date.

    python docs/make_methods.py                # write them, after a variant or the prose has changed
    python docs/make_methods.py --check        # say which pages are not what this would write
    python docs/make_methods.py --check DoRA   # of these variants alone, and of the index

What a program can know comes from the dataclasses, from the graph of each variant and from the committed results.
The rest is in `methods/prose.toml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from method_facts import (
    D_IN,
    D_OUT,
    DOCS,
    PROSE,
    SIDE,
    adapted,
    as_lora,
    check_count,
    count,
    counted_costs,
    kinds,
    measured,
    sources,
    stem,
    variants,
)
from method_pictures import draw_insertion

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant
from lora_lite_fx.formats.lora_lite import _FORMATS
from lora_lite_fx.formats.peft.methods import all_forms

COMMON = {field.name for field in dataclasses.fields(Variant)}
MADE = "<!-- Made by docs/make_methods.py from prose.toml and the code: change these, and run it. -->"


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
    fill = functools.partial(
        textwrap.fill, width=120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n\n".join(map(fill, text.split("\n\n")))


def linked(text: str) -> str:
    """Return text with its addresses as links."""
    return re.sub(r"(https?://[^\s),]+)", r"<\1>", text)


def made(chosen: Iterable[type[Variant]]) -> dict[Path, str]:
    """Return the content of the index, and that of each file of the variants, by path."""
    content = {DOCS / "methods" / "README.md": index()}
    for cls in chosen:
        check_count(cls)
        content[DOCS / "methods" / f"{stem(cls)}.md"] = page(cls)
        content[DOCS / "methods" / "images" / f"{stem(cls)}.svg"] = draw_insertion(adapted(cls), "site")
    return {path: re.sub(r"\n{3,}", "\n\n", text) for path, text in content.items()}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is not up to date")
    names = [*variants(), []]  # argparse looks for its default there too
    parser.add_argument("variants", nargs="*", choices=names, metavar="VARIANT", help="all by default")
    options = parser.parse_args()
    check = options.check
    content = made(variants()[name] for name in options.variants or variants())
    old = {path for path, text in content.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    if not options.variants:
        old |= {path for path in (DOCS / "methods").glob("*.md") if path not in content and path.name != "path.md"}
    for path in sorted(old):
        print(f"{'not up to date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
        if not check and path in content:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content[path], encoding="utf-8")
    return int(bool(old) and check)


if __name__ == "__main__":
    sys.exit(main())
