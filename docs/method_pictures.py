"""Draw one adapter at its site: what runs for each input, and what is computed from parameters alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from math import ceil

from torch import Tensor, fx, nn

from lora_lite_fx.graph.insertion import SHARED, Insertion, insertions
from lora_lite_fx.graph.tensors import attribute_of
from lora_lite_fx.inspection.svg import CHARACTER, line_through, shorten, sum_sign, text_at

_HEIGHT = 46.0  # of a box
_PITCH = 84.0  # from row to row
_GAP = 40.0  # between columns, where the lines turn
_MARGIN = 24.0
_OF_SHAPE = frozenset(
    [
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "t",
        "to",
        "transpose",
        "type_as",
        "unflatten",
        "unsqueeze",
        "view",
        "_to_copy",
        "mT",
        "mH",
        "T",
        "conj",
    ]
)
_PRODUCTS = frozenset(["bmm", "einsum", "linear", "matmul", "mm", "convolution", "conv1d", "conv2d", "conv3d"])
_NAMES = {"fft_rfft": "FFT", "fft_irfft": "inverse FFT", "fft_rfft2": "FFT", "fft_irfft2": "inverse FFT"}
_SIGNS = {"add": "+", "sub": "\u2212", "mul": "\u00d7", "div": "\u00f7"}
_STYLE = """
svg { --card: #fff; --ink: #16191d; --soft: #5b6470; --wire: #7b8694; --adapter: #b3005e; --on-adapter: #fff;
  --site: #d5e8f3; --edge: #0072b2; }
@media (prefers-color-scheme: dark) { svg { --card: #191e24; --ink: #edf0f3; --soft: #a3adb9; --wire: #8793a1;
  --adapter: #ff6fb5; --on-adapter: #2a0016; --site: #1c3a4c; --edge: #56b4e9; } }
.card { fill: var(--card); }
text { font: 13px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--ink); text-anchor: middle; }
text.name { font: 600 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text.size { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text.on { fill: var(--on-adapter); }
text.key { fill: var(--soft); text-anchor: start; font-size: 12px; }
.line { stroke: var(--wire); stroke-width: 1.7; fill: none; }
marker path { fill: var(--wire); }
.site { fill: var(--site); stroke: var(--edge); stroke-width: 2; stroke-linejoin: round; }
.trained { fill: var(--adapter); stroke: var(--adapter); stroke-width: 2; }
.frozen { fill: var(--card); stroke: var(--wire); stroke-width: 2; }
.computed { fill: var(--card); stroke: var(--adapter); stroke-width: 2; stroke-dasharray: 6 4; }
.op { fill: var(--card); stroke: var(--wire); stroke-width: 1.5; }
circle.join { fill: var(--card); stroke: var(--wire); stroke-width: 2; }
path.join { fill: none; stroke: var(--wire); stroke-width: 2; }
""".strip()
_KEYS = (("trained", "trained"), ("frozen", "frozen"), ("computed", "computed from parameters, once inside frozen"))


@dataclass
class _Step:
    """One box: an operation on activations, with what it takes from parameters."""

    node: fx.Node
    kind: str  # a class of the style: site, trained, frozen, computed, op or join
    label: str
    note: str = ""
    column: int = 0
    row: int = 0
    x: float = 0.0
    before: tuple[fx.Node, ...] = ()

    @property
    def width(self) -> float:
        if self.kind == "join":
            return 18.0
        return max(54.0, CHARACTER * len(self.label) + 22, 6.8 * len(self.note) + 20)


def draw_insertion(gm: fx.GraphModule, site: str) -> str:
    """Return a picture of the adapter at a site of `gm` as one SVG file, in a light and a dark form.

    Args:
        gm: a graph with an adapter at `site`, and nothing beside it: the graph of a model of one linear.
        site: the name of the site.
    """
    insertion = next(each for each in insertions(gm.graph) if each.site == site)
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    steps = _steps(gm, insertion, first)
    _place(steps, first)
    return _svg(steps, first, f"{insertion.variant} at {site}")


# What there is to draw.


def _steps(gm: fx.GraphModule, insertion: Insertion, first: fx.Node) -> dict[fx.Node, _Step]:
    """Return a step for each operation that the input reaches and that is more than a change of shape or type."""
    stands_for: dict[fx.Node, fx.Node] = {first: first}  # the step, or the input, whose value a node has
    steps: dict[fx.Node, _Step] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        read = [value for value in node.all_input_nodes if value in stands_for]
        if not read:
            continue
        if _operation(node) in _OF_SHAPE:
            stands_for[node] = stands_for[read[0]]
            continue
        stands_for[node] = node
        step = steps[node] = _step(gm, insertion, node, [v for v in node.all_input_nodes if v not in stands_for])
        step.before = tuple(dict.fromkeys(stands_for[value] for value in read))
    last = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes[0]
    needed = _reached(steps, stands_for[last])
    return {node: step for node, step in steps.items() if node in needed}


def _reached(steps: dict[fx.Node, _Step], last: fx.Node) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in steps and node not in reached:
            reached.add(node)
            waiting += steps[node].before
    return reached


def _operation(node: fx.Node) -> str:
    """Return the name of an operator: `add` of `aten.add.Tensor`."""
    parts = str(node.target).split(".")
    return parts[-2 if len(parts) > 1 else 0].rstrip("_")


def _step(gm: fx.GraphModule, insertion: Insertion, node: fx.Node, given: list[fx.Node]) -> _Step:
    """Return the step of a node, which reads `given` besides activations."""
    name = _operation(node)
    leaves = [leaf for value in given for leaf in _leaves(value)]
    attributes = list(dict.fromkeys(str(leaf.target) for leaf in leaves))
    own = {target: _symbol(tensor, insertion.variant) for tensor, target in insertion.tensors.items()}
    symbols = [own.get(target) or ("b" if target.endswith("bias") else "W") for target in attributes]
    trained = [isinstance(attribute_of(gm, target), nn.Parameter) and target in own for target in attributes]
    sign = _SIGNS.get(name, "")
    if not given:
        numbers = [arg for arg in node.args if isinstance(arg, int | float)]
        if sign and not numbers:
            return _Step(node, "join", sign)
        return _Step(node, "op", f"{sign} {numbers[0]:g}" if sign and numbers else _NAMES.get(name, name))
    if name in ("linear", "embedding") and set(attributes) <= {f"{insertion.site}.weight", f"{insertion.site}.bias"}:
        shape = tuple(attribute_of(gm, attributes[0]).shape)
        return _Step(node, "site", ", ".join(sorted(symbols)), f"{shape[1]:,} \u2192 {shape[0]:,}")
    direct = [value for value in given if _direct(value) is not None]
    prefix = f"{sign} " if sign else "" if name in _PRODUCTS else f"{name} "
    if len(direct) == len(given) and len(symbols) == 1:
        shape = tuple(attribute_of(gm, attributes[0]).shape)
        return _Step(node, "trained" if trained[0] else "frozen", prefix + symbols[0], str(shape))
    told = shorten(", ".join(symbols), 26)
    kind = "computed" if any(trained) else "frozen"
    if len(direct) == len(given):
        return _Step(node, kind.replace("computed", "trained"), prefix + told)
    return _Step(node, kind, prefix + f"f({told})")


def _symbol(tensor: str, variant: str) -> str:
    """Return how a formula calls a tensor: `A` for `lora_A`, `c` for `lora_shared_gain_c`."""
    if tensor.startswith(SHARED):
        return tensor.rsplit("_", 1)[-1]
    return tensor.removeprefix("lora_").removeprefix(f"{variant.lower()}_")


def _leaves(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors of the model that a value is computed from."""
    if node.op == "get_attr":
        yield node
    read = node.all_input_nodes
    for value in read[:1] if _operation(node) == "type_as" else read:
        yield from _leaves(value)


def _direct(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a value is, but for its shape and type; None if it is computed."""
    while node.op != "get_attr":
        if _operation(node) not in _OF_SHAPE or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


# Where it stands.


def _place(steps: dict[fx.Node, _Step], first: fx.Node) -> None:
    """Give each step a column, after all that it reads; and a row, where chains go on and the frozen site is lowest."""
    for step in steps.values():
        step.column = max((steps[node].column for node in step.before if node in steps), default=0) + 1
    free = dict(steps)
    site = next((node for node, step in steps.items() if step.kind == "site"), None)
    row = 0
    while free:
        chain = _through(free, site, first) if row == 0 and site is not None else _longest(free)
        for node in chain:
            free.pop(node).row = row
        row += 1
    for column in range(1, max(step.column for step in steps.values()) + 1):
        rows = [step for step in steps.values() if step.column == column]
        assert len({step.row for step in rows}) == len(rows)
    x = _MARGIN + 46
    for column in range(1, max(step.column for step in steps.values()) + 1):
        inside = [step for step in steps.values() if step.column == column]
        wide = max(step.width for step in inside)
        for step in inside:
            step.x = x + (wide - step.width) / 2
        x += wide + _GAP


def _through(steps: dict[fx.Node, _Step], site: fx.Node, first: fx.Node) -> list[fx.Node]:
    """Return the shortest way from the input through the frozen site to the output."""
    before = _shortest({node: step.before for node, step in steps.items()}, site, first)
    after: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, step in steps.items():
        for value in step.before:
            after[value] = (*after.get(value, ()), node)
    last = next(reversed(steps))
    return [*reversed([node for node in before if node in steps]), *_shortest(after, site, last)[1:]]


def _shortest(edges: dict[fx.Node, tuple[fx.Node, ...]], start: fx.Node, end: fx.Node) -> list[fx.Node]:
    ways = [[start]]
    seen = {start}
    for way in ways:
        if way[-1] is end:
            return way
        for node in edges.get(way[-1], ()):
            if node not in seen:
                seen.add(node)
                ways.append([*way, node])
    return [start]


def _longest(steps: dict[fx.Node, _Step]) -> list[fx.Node]:
    """Return the longest chain of steps of which each reads the one before."""
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node, step in steps.items():
        longest = max((chains[value] for value in step.before if value in chains), key=len, default=[])
        chains[node] = [*longest, node]
    return max(chains.values(), key=len)


# The drawing.


def _svg(steps: dict[fx.Node, _Step], first: fx.Node, label: str) -> str:
    rows = max(step.row for step in steps.values()) + 1
    keys = [(kind, told) for kind, told in _KEYS if any(step.kind == kind for step in steps.values())]
    end = max(step.x + step.width for step in steps.values())
    width = ceil(max(end + 76, 40 + sum(34 + 7 * len(told) for _, told in keys)))
    height = ceil(rows * _PITCH + (44 if keys else 8))

    def y(step: _Step) -> float:
        return (rows - step.row - 1) * _PITCH + _PITCH / 2 + 4

    lowest = (rows - 1) * _PITCH + _PITCH / 2 + 4
    drawn = [text_at(_MARGIN + 4, lowest + 5, "x", "name")]
    for step in steps.values():
        for node in step.before:
            start = (_MARGIN + 16, lowest) if node is first else (steps[node].x + steps[node].width, y(steps[node]))
            # A line leaves its row right behind its start if it goes up, and right before its end if it goes down.
            rises = y(step) < start[1]
            turn = start[0] + 14 if rises else step.x - _GAP / 2
            if abs(start[1] - y(step)) < 1:
                drawn.append(line_through(start, (step.x, y(step))))
            elif not rises and step.kind == "join":
                middle = step.x + step.width / 2
                drawn.append(line_through(start, (middle, start[1]), (middle, y(step) - 9)))
            else:
                drawn.append(line_through(start, (turn, start[1]), (turn, y(step)), (step.x, y(step))))
    last = next(reversed(steps.values()))
    drawn.append(line_through((last.x + last.width, y(last)), (end + 40, y(last))))
    drawn.append(text_at(end + 54, y(last) + 5, "y", "name"))
    drawn += [_box(step, y(step)) for step in steps.values()]
    x = _MARGIN
    for kind, told in keys:
        drawn.append(f'<rect class="{kind}" x="{x:g}" y="{height - 29:g}" width="16" height="14" rx="4"/>')
        drawn.append(text_at(x + 24, height - 17, told, "key"))
        x += 34 + 7 * len(told)
    arrow = '<path d="M0 .5 8 4 0 7.5z"/></marker>'
    marker = f'<marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">{arrow}'  # noqa: E501
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' role="img" aria-label="{escape(label)}">\n<style>{_STYLE}</style>\n<defs>{marker}</defs>\n'
        f'<rect class="card" width="{width}" height="{height}" rx="12"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def _box(step: _Step, y: float) -> str:
    if step.kind == "join":
        if step.label == "+":
            return sum_sign(step.x + 9, y, "join")
        circle = f'<circle class="join" cx="{step.x + 9:g}" cy="{y:g}" r="11"/>'
        return circle + text_at(step.x + 9, y + 5, step.label, "name")
    middle, w, h = step.x + step.width / 2, step.width, _HEIGHT
    on = " on" if step.kind == "trained" else ""
    if step.kind == "site":
        x = step.x
        corners = f"{x:g},{y - 17:g} {x + w:g},{y - 26:g} {x + w:g},{y + 26:g} {x:g},{y + 17:g}"
        shape = f'<polygon class="site" points="{corners}"/>'
    else:
        round_by = 21 if step.kind == "op" else 8
        shape = (
            f'<rect class="{step.kind}" x="{step.x:g}" y="{y - h / 2:g}" width="{w:g}" height="{h:g}" rx="{round_by}"/>'
        )
    if not step.note:
        return shape + text_at(middle, y + 5, step.label, f"name{on}")
    return shape + text_at(middle, y - 3, step.label, f"name{on}") + text_at(middle, y + 14, step.note, f"size{on}")
