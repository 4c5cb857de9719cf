"""Blocks: the sites of a model grouped as the parts of a picture, with equal layers taken together.

A *block* is the sites of one layer, `model.layers.3`, or sites outside layers. A *sublayer* is a branch that leaves the
residual stream and comes back to it: an attention, a feed-forward, or sites in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sites.roles import GROUPS
from ..text_table import ranges

if TYPE_CHECKING:
    from .site_rows import SiteRow

QKV = frozenset(["query", "key", "value"])
_COARSE = ("reader", "writer", "inner")


def main_roles(row: SiteRow) -> tuple[str, ...]:
    """Return the fine roles of a site; the coarse ones if it has no others; without any its kind, or `unknown`."""
    fine = tuple(role for role in row.roles if role not in _COARSE)
    return fine or row.roles or shown_roles(row)


def shown_roles(row: SiteRow) -> tuple[str, ...]:
    """Return the roles of a site. Only linears have any: of the other kinds, the kind."""
    return row.roles or ("unknown" if row.kind == "linear" else row.kind,)


@dataclass(frozen=True)
class Part:
    """One site of a block, or all the sites that stand at the same place in equal blocks.

    Args:
        rows: the sites, in order.
        indices: the index of each in the table.
        name: short name, unique in its sublayer.
    """

    rows: tuple[SiteRow, ...]
    indices: tuple[int, ...]
    name: str = ""

    @property
    def row(self) -> SiteRow:
        """The first of its sites; the others have the same sizes, roles and adapters."""
        return self.rows[0]


@dataclass(frozen=True)
class Sublayer:
    """Sites that form one step along the residual stream.

    Args:
        kind: `attention`, `feed-forward`, `router`, `experts` (with their router), or empty for sites in a row.
        path: the part of the name that its sites share, inside the block.
        stages: sites that stand side by side, stage after stage. An attention has always three: the sites before the
            projections (such as the first factors of low-rank ones), the projections, and the sites after the
            operation in the middle. A feed-forward has two, before and after its operation. Some may be empty.
        times: how many equal sublayers follow each other (experts).
        last: the path of the last of them.
    """

    kind: str
    path: str
    stages: tuple[tuple[Part, ...], ...]
    times: int = 1
    last: str = ""

    @property
    def parts(self) -> list[Part]:
        """All sites, stage after stage."""
        return [part for stage in self.stages for part in stage]


@dataclass(frozen=True)
class Block:
    """Equal layers of a model, or its sites outside layers.

    Args:
        prefix: name of the list of layers; empty outside layers.
        layers: the indices of the layers; empty outside layers.
        parts: the sites of one layer, in order of execution; each stands for the sites at this place in all the layers.
    """

    prefix: str
    layers: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        """The name of the layers, such as `model.layers.0-29`."""
        return f"{self.prefix}.{ranges(self.layers)}".lstrip(".") if self.layers else ""

    @property
    def home(self) -> str:
        """The beginning of all names in its first layer; empty outside layers."""
        return f"{self.prefix}.{self.layers[0]}.".lstrip(".") if self.layers else ""

    def weights(self, sizes: Mapping[str, int]) -> int:
        """Count the weights of one layer, also those that belong to no site; outside layers, those of the sites.

        Args:
            sizes: the number of elements of the model's parameters, by name.
        """
        of_sites = {part.row.weight for part in self.parts}
        names = [name for name in sizes if (name.startswith(self.home) if self.home else name in of_sites)]
        return sum(sizes[name] for name in names)

    def sublayers(self) -> list[Sublayer]:
        """Return its steps along the residual stream, in order of execution; norms are left out beside other sites."""
        home = self.home
        steps: list[list[Part]] = [[]]
        for part in [part for part in self.parts if part.row.kind != "norm"] or self.parts:
            steps[-1].append(part)
            roles = part.row.roles
            # Sites without a role, and routers, do not tell where the step ends, so each of them is a step by itself.
            if not roles or {"writer", "output", "down", "router"} & set(roles):
                steps.append([])
        sublayers: list[Sublayer] = []
        for step in filter(None, steps):
            new = _sublayer(step, home)
            of_experts = all(part.row.kind == "experts" for part in new.parts)
            if sublayers and of_experts and sublayers[-1].kind in ("router", "experts"):
                router = sublayers.pop()
                new = Sublayer("experts", router.path, (*router.stages, *new.stages))
            if sublayers and not new.kind and not sublayers[-1].kind:
                new = _in_a_row([*sublayers.pop().parts, *new.parts], home)
            sublayers.append(new)
        return _merged(sublayers)


def blocks(rows: Sequence[SiteRow]) -> list[Block]:
    """Return the blocks of a model in order of execution, with equal layers of one list taken together."""
    return _blocks([(index, row) for index, row in enumerate(rows)], 0)


def _blocks(sites: Sequence[tuple[int, SiteRow]], depth: int) -> list[Block]:
    layers: dict[tuple[str, int], list[tuple[int, SiteRow]]] = {}
    outside = 0
    for index, row in sites:
        place = _place(row.name, depth)
        if place is None:
            # Sites outside layers belong together as long as no layer comes between them.
            if not layers or next(reversed(layers))[1] >= 0:
                outside -= 1
            place = ("", outside)
        layers.setdefault(place, []).append((index, row))

    equal: dict[object, list[tuple[str, int]]] = {}
    for prefix, number in layers:
        home = f"{prefix}.{number}.".lstrip(".") if number >= 0 else ""
        shape = tuple(
            (row.name.removeprefix(home), row.roles, row.d_in, row.d_out, row.dtype, row.adapters, row.parameters)
            for _, row in layers[prefix, number]
        )
        equal.setdefault((prefix, number if number < 0 else 0, shape), []).append((prefix, number))

    result = []
    for places in equal.values():
        prefix, number = places[0]
        columns = zip(*(layers[place] for place in places), strict=True)
        parts = tuple(Part(tuple(r for _, r in column), tuple(i for i, _ in column)) for column in columns)
        block = Block(prefix, tuple(n for _, n in places) if number >= 0 else (), parts)
        inner = _blocks(layers[places[0]], depth + 1) if len(places) == 1 and number >= 0 else []
        # A layer with equal attentions inside is a stage of layers: show these. Experts belong to their layer.
        is_stage = any(len(part.layers) > 1 and _attends(part) for part in inner)
        result += inner if is_stage else [block]
    return result


def _attends(block: Block) -> bool:
    return any(QKV & set(part.row.roles) for part in block.parts)


def _place(name: str, depth: int) -> tuple[str, int] | None:
    """Return the list of layers that a site is in, and its index there: the first number in its name; at depth 1, the
    second.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    if len(numbers) <= depth:
        return None
    return ".".join(parts[: numbers[depth]]), int(parts[numbers[depth]])


def _sublayer(step: list[Part], home: str) -> Sublayer:
    named, path = _named(step, home)
    present = {role for part in named for role in part.row.roles}
    if QKV & present:
        middle = [part for part in named if QKV & set(part.row.roles) and not _is_first(part, named)]
        after = [part for part in named if "output" in part.row.roles and not QKV & set(part.row.roles)]
        before = [part for part in named if part not in middle and part not in after]
        return Sublayer("attention", path, (tuple(before), tuple(middle), tuple(after)))
    if set(GROUPS["mlp"]) & present:
        after = [part for part in named if "down" in part.row.roles]
        return Sublayer("feed-forward", path, (tuple(part for part in named if part not in after), tuple(after)))
    if "router" in present:
        return Sublayer("router", path, tuple((part,) for part in named))
    return _in_a_row(step, home)


def _is_first(part: Part, parts: Sequence[Part]) -> bool:
    """Check whether a projection is the first factor of a low-rank one, of which the second is among `parts`."""
    roles = set(part.row.roles)
    made = (QKV & set(other.row.roles) for other in parts if "inner" in other.row.roles)
    return "reader" in roles and any(second and second <= roles for second in made)


def _in_a_row(step: list[Part], home: str) -> Sublayer:
    named, path = _named(step, home)
    return Sublayer("", path, tuple((part,) for part in named))


def _named(step: list[Part], home: str) -> tuple[list[Part], str]:
    """Return the sites with the shortest names that tell them apart, and the path that they share."""
    names = [part.row.name.removeprefix(home).split(".") for part in step]
    shared = 0
    while all(len(name) > shared + 1 and name[shared] == names[0][shared] for name in names):
        shared += 1
    short = []
    for name in names:
        length = 1
        while length < len(name) and sum(other[-length:] == name[-length:] for other in names) > 1:
            length += 1
        short.append(".".join(name[-length:]))
    return [Part(part.rows, part.indices, name) for part, name in zip(step, short, strict=True)], ".".join(
        names[0][:shared]
    )


def _merged(sublayers: list[Sublayer]) -> list[Sublayer]:
    """Return the sublayers with equal neighbours, such as experts, taken together."""
    merged: list[Sublayer] = []
    for new in sublayers:
        old = merged[-1] if merged else None
        if old is not None and old.kind == new.kind != "" and _shape(old) == _shape(new):
            stages = tuple(
                tuple(Part(a.rows + b.rows, a.indices + b.indices, a.name) for a, b in zip(*pair, strict=True))
                for pair in zip(old.stages, new.stages, strict=True)
            )
            merged[-1] = Sublayer(old.kind, old.path, stages, old.times + 1, new.path)
        else:
            merged.append(new)
    return merged


def _shape(sublayer: Sublayer) -> object:
    """Return a value that is equal for sublayers that differ in the numbers of their path alone."""
    path = [part for part in sublayer.path.split(".") if not part.isdigit()]
    has_number = len(path) < len(sublayer.path.split("."))
    sites = [
        [(p.name, p.row.roles, p.row.d_in, p.row.d_out, p.row.adapters, p.row.parameters) for p in stage]
        for stage in sublayer.stages
    ]
    return (path, sites) if has_number else object()
