"""The page of `inspect`: one HTML file that needs no other file, made from the template `page.html`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..sites.roles import ROLES
from .blocks import Block, blocks, main_roles, shown_roles
from .picture import draw, is_inline, largest, room_below, rows_of_pictures, total_width
from .svg import gradient

if TYPE_CHECKING:
    from ..rewriting.unadapted import Unadapted
    from .site_rows import LeftOutRow, SiteRow


class PageData(Protocol):
    """The data of a page: the rows of a table, and its counts."""

    @property
    def rows(self) -> tuple[SiteRow, ...]: ...
    @property
    def model(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def trainable(self) -> int: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def left_out(self) -> tuple[LeftOutRow, ...]: ...
    @property
    def unadapted(self) -> tuple[Unadapted, ...]: ...


_UNKNOWN = "the graph does not tell, so nothing is guessed"
_KINDS = {
    "embedding": "an embedding, chosen by its kind: only linears have roles",
    "conv": "a convolution, chosen by its kind: only linears have roles",
    "grouped_conv": "a convolution with groups, chosen by its kind: only linears have roles",
    "experts": "a stack of experts, chosen by its kind: only linears have roles",
    "norm": "a norm, chosen by its kind: only linears have roles",
}


def render(table: PageData) -> str:
    """Return `table` as one HTML page; the same table gives the same page, bit for bit."""
    all_blocks = blocks(table.rows)
    most = largest(part for block in all_blocks for part in block.parts)
    combinations = dict.fromkeys(main_roles(row) for row in table.rows)
    share = 100 * table.trainable / table.total if table.total else 0.0
    repeated = [block for block in all_blocks if len(block.layers) > 1]
    fields = {
        "model": escape(table.model),
        "parameters": _short(table.total),
        "parameters_exact": f"{table.total:,}",
        "sites": f"{len(table.rows):,}",
        "layers": f" in {sum(len(block.layers) for block in repeated)} layers" if repeated else "",
        "trainable": _short(table.trainable),
        "trainable_exact": f"{table.trainable:,}",
        "idle": "" if table.trainable else " hidden",
        "share": f"{share:.3g}%" if share else "0%",
        "bar": f"{share:.4f}",
        "gradients": "".join(map(gradient, combinations)),
        "legend": _legend(table),
        "blocks": "\n".join(_card(block, most, table) for block in all_blocks),
        "rows": "\n".join(_row(index, row) for index, row in enumerate(table.rows)),
        "left_out": _listed(
            "Weights that cannot have an adapter, and why",
            [f"<code>{escape(row.name)}</code> {escape(row.reason)}" for row in table.left_out],
        )
        + _listed(
            "Sites without an adapter, because the default targets leave them out",
            [escape(sort.told()) for sort in table.unadapted],
        ),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # One substitution for all fields, because the text of a field may look like a field itself.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _legend(table: PageData) -> str:
    counts = Counter(role for row in table.rows for role in shown_roles(row))
    return "".join(
        f'<button type="button" class="key" data-q="{role}" title="{escape(why)}" style="--c:var(--{role})">'
        f"<i></i>{role}<b>{counts[role]}</b></button>"
        for role, why in {**ROLES, **_KINDS, "unknown": _UNKNOWN}.items()
        if counts[role]
    )


def _card(block: Block, most: int, table: PageData) -> str:
    """Return the card of a block; a block of several equal layers has a strip for each of them below."""
    sublayers = block.sublayers()
    inline = [is_inline(sublayer, bool(block.layers)) for sublayer in sublayers]
    below = room_below(any(inline))
    rows = rows_of_pictures([draw(sublayer, bool(block.layers), most, below) for sublayer in sublayers])
    flows = "".join(f'<div class="flow" style="--all:{total_width(row)}">{"".join(row)}</div>' for row in rows)
    times = len(block.layers)
    train = sum(part.row.parameters for part in block.parts)
    runs = max(part.row.calls for part in block.parts)
    weights = block.weights(table.sizes)
    facts = f"{_short(weights) if weights else 'no'} weights{'' if weights else ' of its own'}" + (
        f", {_short(train)} train" if train else ""
    )
    facts = (f"each: {facts}" if times > 1 else facts) + (f"; runs {runs} times" if runs > 1 else "")
    names = ", ".join(part.row.name for part in block.parts)
    head = f"<h2>{escape(block.label or (names if len(block.parts) < 3 else 'outside of layers'))}</h2>"
    head += f'<b class="times">\u00d7 {times}</b>' if times > 1 else ""
    many = " many" if times > 1 else ""
    return (
        f'<section class="card{many}"><header>{head}<span>{facts}</span></header>'
        f"{flows}{_strips(block) if times > 1 else ''}</section>"
    )


def _strips(block: Block) -> str:
    lines = []
    for i, number in enumerate(block.layers):
        chips = "".join(
            f'<i data-s="{part.indices[i]}" style="--c:var(--{main_roles(part.row)[0]})"'
            f"{' class=a' if part.row.adapters else ''}></i>"
            for part in block.parts
        )
        lines.append(f"<div><span>{number}</span>{chips}</div>")
    summary = f"<summary>each of the {len(lines)} layers</summary>"
    return f'<details>{summary}<div class="strips">{"".join(lines)}</div></details>'


def _row(index: int, row: SiteRow) -> str:
    roles = "".join(f'<span class="tag" style="--c:var(--{role})">{role}</span>' for role in shown_roles(row))
    reasons = "".join(f"<li><b>{role}</b> {escape(why)}</li>" for role, why in row.reasons.items())
    (first, *_) = shown_roles(row)
    reasons = reasons or f"<li><b>{first}</b> {_KINDS.get(first, _UNKNOWN)}</li>"
    calls = f" \u00d7 {row.experts}" if row.experts else ""
    calls += f" \u00d7 {row.calls}" if row.calls > 1 else ""
    return (
        f'<tr id="s{index}"><td><code>{escape(row.name)}</code>{calls}</td><td>{roles}</td><td>{row.d_in}</td>'
        f"<td>{row.d_out}</td><td>{escape(' + '.join(row.adapters))}</td><td>{row.parameters:,}</td>"
        f"<td><ul>{reasons}</ul></td></tr>"
    )


def _listed(title: str, items: list[str]) -> str:
    return f"\n<h3>{title}</h3>\n<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _short(number: int) -> str:
    """Return a number with three digits: `135 M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return str(number)
