"""Pictures: one sublayer of a model as SVG, branching off the residual stream that runs along its lower edge.

Lengths are in pixels. Names stand in a monospaced font, so that their width is known without measuring them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

from .blocks import QKV, Part, Sublayer, main_roles, shown_roles
from .svg import CHARACTER, fill, line_through, shorten, sum_sign, text_at

if TYPE_CHECKING:
    from .site_rows import SiteRow

_LOW, _HIGH = 62.0, 100.0  # the height of a site's side, from no feature to the most
_GAP = 60.0  # between columns: the adapter's branch, then the lines that meet
_ROW = 16.0  # between sites above each other
_PILL = 32.0  # the room of an adapter above its site
_TOP = 8.0
_MARGIN = 26.0
_LIFT = 30.0  # from the sites down to the stream
_SCALE = 1.15  # of the whole picture, where there is room
_LEAST = 0.79  # of a picture that stands beside others
_ROOM = 1170.0  # for pictures side by side, in a window of 1280 pixels


@dataclass(frozen=True)
class _Box:
    """A site or an operation at its place: `x` left, `y` the middle, `w` wide."""

    part: Part | None
    x: float
    y: float
    w: float
    text: str = ""

    @property
    def right(self) -> float:
        return self.x + self.w


def largest(parts: Iterable[Part]) -> int:
    """Return the most features that a site reads or writes, heads' outputs left out; heights are relative to it."""
    sizes = [max(p.row.d_in, 0 if "head" in p.row.roles else p.row.d_out) for p in parts]
    return max(sizes, default=1)


def draw(sublayer: Sublayer, in_layer: bool, most: int, below: float) -> str:
    """Return a sublayer as SVG.

    Args:
        sublayer: the sublayer to draw.
        in_layer: whether it stands in a layer; sites outside with no known branch stand on the stream itself.
        most: the number of features that the highest side has.
        below: height under the stream, the same for all that stand side by side.
    """
    if is_inline(sublayer, in_layer):
        return _inline(sublayer, most, below)
    return _branch(sublayer, most, below)


def rows_of_pictures(pictures: Sequence[str]) -> list[list[str]]:
    """Return pictures as rows: as many side by side as can be read in a window of 1280 pixels."""
    rows: list[list[str]] = []
    for picture in pictures:
        if rows and (_LEAST / _SCALE) * total_width([*rows[-1], picture]) <= _ROOM:
            rows[-1].append(picture)
        else:
            rows.append([picture])
    return rows


def total_width(pictures: Iterable[str]) -> int:
    """Return the width of pictures side by side, in full size."""
    return sum(int(picture.partition('<svg width="')[2].partition('"')[0]) for picture in pictures)


def is_inline(sublayer: Sublayer, in_layer: bool) -> bool:
    """Check whether the sites stand on the stream and do not branch off it."""
    roles = {role for part in sublayer.parts for role in part.row.roles}
    return not sublayer.kind and not (in_layer and roles & {"reader", "writer"})


def room_below(inline: bool) -> float:
    """Return the height that the picture needs under the stream."""
    return _HIGH / 2 + 12 if inline else _MARGIN


# The two ways to stand at the stream.


def _inline(sublayer: Sublayer, most: int, below: float) -> str:
    parts = sublayer.parts
    stream = _TOP + _pill(parts) + max(_height(part, most) for part in parts) / 2
    x, boxes = _MARGIN + 30, []
    for part in parts:
        boxes.append(_Box(part, x, stream, _width(part)))
        x += boxes[-1].w + _GAP
    width = max(x - _GAP + _MARGIN + 30, _title_width(sublayer))
    edges = [0.0, *(edge for box in boxes for edge in (box.x, box.right)), width + 1]  # of the stream between boxes
    ends = zip(edges[::2], edges[1::2], strict=True)
    lines = [line_through((left, stream), (right, stream), arrow=False, kind="stream") for left, right in ends]
    return _svg(sublayer, width, stream + below, [*lines, *(_site(box, most) for box in boxes)])


def _branch(sublayer: Sublayer, most: int, below: float) -> str:
    columns = _columns(sublayer)
    crossing = _crossing(sublayer)
    items = [item for column in columns for item in column]
    pill, tall = _pill(items), max(_height(item, most) for item in items)
    # All columns are centered on one line and have the same rows, so that straight lines join the sites of a row.
    pitch = pill + tall + _ROW
    spread = (max(map(len, columns)) - 1) * pitch
    centre = _TOP + pill + (tall + spread) / 2
    stream = centre + (tall + spread) / 2 + _LIFT
    bus = _MARGIN
    x = bus + (100.0 if crossing else 44.0)
    placed: list[list[_Box]] = []
    for column in columns:
        width = max(_width(item) for item in column)
        top = centre - (len(column) - 1) * pitch / 2
        placed.append([])
        for i, item in enumerate(column):
            part, text = (item, "") if isinstance(item, Part) else (None, item)
            placed[-1].append(_Box(part, x, top + i * pitch, width, text))
        x += width + _GAP
    end = x - _GAP + 44
    drawn = [
        line_through((0, stream), (max(end + _MARGIN, _title_width(sublayer)) + 1, stream), arrow=False, kind="stream")
    ]

    for box in placed[0]:
        if box.part in crossing:
            drawn += _port(box, bus + 16, bus + 12, "other input")
        else:
            drawn.append(line_through((bus, stream), (bus, box.y), (box.x, box.y)))
    for left, right in pairwise(placed):
        meet = max(box.right for box in left) + 36
        for target in right:
            if target.part and not _follows(target.part, left):
                drawn += _port(target, target.x - 26, target.x - 48, "stream")
                if sublayer.kind != "experts":  # which read the stream, and the router's choice
                    continue
            for box in left:
                if _feeds(box, target):
                    drawn.append(
                        line_through((box.right, box.y), (meet, box.y), (meet, target.y), (target.x, target.y))
                    )
    writes = sublayer.kind == "experts" or any(
        {"writer", "output", "down"} & set(part.row.roles) for part in sublayer.parts
    )
    returns = "line" if writes else "open"
    for box in placed[-1]:
        drawn.append(line_through((box.right, box.y), (end, box.y), (end, stream - 9), kind=returns))
    drawn.append(f'<circle class="dot" cx="{bus:g}" cy="{stream:g}" r="4"/>')
    drawn.append(sum_sign(end, stream, "join" if returns == "line" else "join open"))
    drawn += [_site(box, most) if box.part else _operation(box) for column in placed for box in column]
    return _svg(sublayer, max(end + _MARGIN, _title_width(sublayer)), stream + below, drawn)


def _columns(sublayer: Sublayer) -> list[list[Part | str]]:
    """Return the sites stage after stage, with the operation between them as a text."""
    columns: list[list[Part | str]] = [list(stage) for stage in sublayer.stages]
    if sublayer.kind == "attention":
        columns.insert(2, ["attention"])
    elif sublayer.kind == "feed-forward":
        gated = any("gate" in part.row.roles for part in sublayer.parts)
        columns.insert(1, ["act(gate) \u00d7 up" if gated else "activation"])
    elif sublayer.kind == "router":
        columns.append(["experts"])
    elif sublayer.kind == "experts" and len(columns) > 2:
        columns.insert(-1, ["activation"])
    return [column for column in columns if column]


def _crossing(sublayer: Sublayer) -> list[Part]:
    """Return the keys and values that read another value than the queries do, as in cross-attention."""
    if sublayer.kind != "attention" or sublayer.stages[0]:
        return []
    queries = {part.row.reads for part in sublayer.stages[1] if "query" in part.row.roles}
    others = [part for part in sublayer.stages[1] if "query" not in part.row.roles]
    read = {part.row.reads for part in others}
    return others if len(read) == 1 and queries.isdisjoint(read) else []


def _follows(part: Part, before: list[_Box]) -> bool:
    """Check whether `part` reads the results of the sites before it, and not their inputs."""
    return part.row.reads not in {box.part.row.reads for box in before if box.part}


def _feeds(box: _Box, target: _Box) -> bool:
    """Check whether a line goes from `box` to `target`: a first factor feeds the projections of its roles."""
    if box.part is None or target.part is None:
        return True
    roles = QKV & set(box.part.row.roles)
    return not roles or not roles.isdisjoint(target.part.row.roles)


# Pieces.


def _site(box: _Box, most: int) -> str:
    part = box.part
    assert part is not None
    row, roles = part.row, main_roles(part.row)
    left, right = _side(row.d_in, most) / 2, _side(row.d_out, most) / 2
    x, y, end = box.x, box.y, box.right
    corners = f"{x:g},{y - left:g} {end:g},{y - right:g} {end:g},{y + right:g} {x:g},{y + left:g}"
    middle = x + box.w / 2
    sizes = _sizes(row)
    label = f"{row.name}: {', '.join(shown_roles(row))}, {row.d_in} to {row.d_out}"
    if row.experts:
        label += f", {row.experts} experts"
    if row.adapters:
        label += f", {' + '.join(row.adapters)}, {row.parameters} parameters train"
    indices = " ".join(map(str, part.indices))
    unknown = " none" if roles == ("unknown",) else ""
    style = f"fill:url(#{fill(roles)});stroke:var(--{roles[0]})"
    pieces = [
        f'<polygon class="site{unknown}" points="{corners}" style="{style}"/>',
        text_at(middle, y - 11, shorten(part.name), "name"),
        text_at(middle, y + 6, " \u00b7 ".join(roles), "role"),
        text_at(middle, y + 23, sizes, "size"),
    ]
    if row.adapters:
        pieces.append(_adapter(box, max(left, right)))
    return (
        f'<g class="s" tabindex="0" role="button" data-s="{indices}" aria-label="{escape(label)}">{"".join(pieces)}</g>'
    )


def _sizes(row: SiteRow) -> str:
    times = f"{row.experts} \u00d7 " if row.experts else ""
    return f"{times}{row.d_in:,} \u2192 {row.d_out:,}"


def _adapter(box: _Box, half: float) -> str:
    """Return the branch of the adapters at a site: around it, from its input to its output."""
    assert box.part is not None
    text = _adapter_text(box.part)
    width = 7.25 * len(text) + 20
    y = box.y - half - 18
    middle = box.x + box.w / 2
    before, after = box.x - 14, box.right + 14
    path = f"M{before:g} {box.y:g}V{y + 8:g}q0 -8 8 -8H{after - 8:g}q8 0 8 8V{box.y - 7:g}"
    return (
        f'<path class="adapter" d="{path}"/><circle class="tap" cx="{before:g}" cy="{box.y:g}" r="3"/>'
        f'<rect class="pill" x="{middle - width / 2:g}" y="{y - 11:g}" width="{width:g}" height="22" rx="11"/>'
        f"{text_at(middle, y + 4, text, 'pilltext')}{sum_sign(after, box.y, 'tapsum', 6)}"
    )


def _adapter_text(part: Part) -> str:
    names = part.row.adapters
    shown = " + ".join(names) if len(names) < 3 else f"{names[0]} + {len(names) - 1} more"
    return f"{shown} {part.row.parameters:,}"


def _operation(box: _Box) -> str:
    return (
        f'<rect class="op" x="{box.x:g}" y="{box.y - 21:g}" width="{box.w:g}" height="42" rx="21"/>'
        f"{text_at(box.x + box.w / 2, box.y + 4.5, box.text, 'optext')}"
    )


def _port(box: _Box, x: float, x_of_text: float, text: str) -> list[str]:
    """Return the line into a box from a value that is not drawn, which `text` names."""
    port = f'<circle class="port" cx="{x:g}" cy="{box.y:g}" r="4"/>'
    return [line_through((x, box.y), (box.x, box.y)), port, text_at(x_of_text, box.y + 17, text, "small")]


def _svg(sublayer: Sublayer, width: float, height: float, pieces: list[str]) -> str:
    title, path = map(escape, _titles(sublayer))
    # Whole pixels, and the lower edge exact: the streams of neighbours meet without a seam.
    w, h = ceil(_SCALE * width), ceil(_SCALE * height)
    view = f"0 {height - h / _SCALE:.2f} {w / _SCALE:.2f} {h / _SCALE:.2f}"
    return (
        f"<figure><figcaption><b>{title}</b><code>{path}</code></figcaption>"
        f'<svg width="{w}" height="{h}" style="--w:{w}" viewBox="{view}">{"".join(pieces)}</svg></figure>'
    )


def _titles(sublayer: Sublayer) -> tuple[str, str]:
    times = f" \u00d7 {sublayer.times}" if sublayer.times > 1 else ""
    path = sublayer.path + (f" \u2026 {sublayer.last}" if sublayer.last else "")
    return sublayer.kind + times, shorten(path, 40)


# Sizes.


def _side(features: int, most: int) -> float:
    return _LOW + (_HIGH - _LOW) * min(1.0, features / most)


def _height(item: Part | str, most: int) -> float:
    return max(_side(item.row.d_in, most), _side(item.row.d_out, most)) if isinstance(item, Part) else 42.0


def _pill(items: Iterable[Part | str]) -> float:
    """Return the room for adapters above each site, which is the same for all sites."""
    return _PILL if any(isinstance(item, Part) and item.row.adapters for item in items) else 0.0


def _width(item: Part | str) -> float:
    if isinstance(item, str):
        return 8.2 * len(item) + 32
    row = item.row
    texts = [
        CHARACTER * len(shorten(item.name)),
        6.9 * len(" \u00b7 ".join(main_roles(row))),
        7.25 * len(_sizes(row)),
        7.25 * len(_adapter_text(item)) + 12 if row.adapters else 0.0,
    ]
    return max(120.0, max(texts) + 26)


def _title_width(sublayer: Sublayer) -> float:
    title, path = _titles(sublayer)
    return max(10 * len(title), 7.3 * len(path)) + 2 * _MARGIN
