"""Write the pieces of pictures as SVG: lines, signs, texts and colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CHARACTER = 8.43  # width in 14 px monospace


def sum_sign(x: float, y: float, kind: str, r: float = 9) -> str:
    """Return a circle with a plus in it."""
    a = r * 0.55
    return (
        f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{r:g}"/>'
        f'<path class="{kind}" d="M{x - a:g} {y:g}h{2 * a:g}M{x:g} {y - a:g}v{2 * a:g}"/>'
    )


def line_through(*points: tuple[float, float], arrow: bool = True, kind: str = "line") -> str:
    """Return a line through the points, with round corners."""
    (x, y), *rest = points
    path = [f"M{x:g} {y:g}"]
    for i, (px, py) in enumerate(rest):
        if i + 1 < len(rest) and (px, py) != rest[i + 1] and (px, py) != (x, y):
            nx, ny = rest[i + 1]
            r = min(8.0, max(abs(px - x), abs(py - y)) / 2, max(abs(nx - px), abs(ny - py)) / 2)
            path.append(f"L{px - r * _sign(px - x):g} {py - r * _sign(py - y):g}")
            path.append(f"Q{px:g} {py:g} {px + r * _sign(nx - px):g} {py + r * _sign(ny - py):g}")
        else:
            path.append(f"L{px:g} {py:g}")
        x, y = px, py
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path class="{kind}" d="{"".join(path)}"{end}/>'


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def text_at(x: float, y: float, text: str, kind: str) -> str:
    """Return a text whose middle is at a point."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def shorten(text: str, most: int = 24) -> str:
    """Return `text`, without its middle if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[: most - 1 - half]}\u2026{text[-half:]}"


def fill(roles: Sequence[str]) -> str:
    """Return the id of the gradient that shows `roles` as stripes."""
    return "f-" + "-".join(roles)


def gradient(roles: Sequence[str]) -> str:
    """Return the definition of the gradient that shows `roles` as stripes."""
    stops = []
    for i, role in enumerate(roles):
        for edge in (i, i + 1):
            stops.append(f'<stop offset="{edge / len(roles):.3f}" style="stop-color:var(--{role})"/>')
    return f'<linearGradient id="{fill(roles)}">{"".join(stops)}</linearGradient>'
