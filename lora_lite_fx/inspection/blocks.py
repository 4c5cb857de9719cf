"""Blocks: the sites of a model as the parts of a picture, with what repeats said once.

A *block* is the sites of one layer, `model.layers.3`, or of what stands outside layers. A *sublayer* is what
branches off the residual stream and comes back to it: an attention, a feed-forward, or sites in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sites.roles import GROUPS

if TYPE_CHECKING:
    from .rows import SiteRow

QKV = frozenset(["query", "key", "value"])
_COARSE = ("reader", "writer", "inner")


def main_roles(row: SiteRow) -> tuple[str, ...]:
    """The roles that tell most: the coarse ones only where there are no others, and `unknown` where there are none."""
    fine = tuple(role for role in row.roles if role not in _COARSE)
    return fine or row.roles or ("unknown",)


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
        kind: `attention`, `feed-forward`, `router`, or empty for sites in a row.
        path: the part of the name that its sites share, inside the block.
        stages: sites that stand side by side, stage after stage; of an attention always three, what comes before the
            projections (such as the first factors of those of low rank), these, and what comes after the operation in
            the middle; of a feed-forward two, before and after that. Some may be empty.
        times: how many equal ones follow each other (experts).
        last: the path of the last of these.
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
        parts: the sites of one layer, in order of execution; each stands for those of all the layers.
    """

    prefix: str
    layers: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        """Such as `model.layers.0-29`."""
        return f"{self.prefix}.{ranges(self.layers)}".lstrip(".") if self.layers else ""

    @property
    def home(self) -> str:
        """What the names of all in its first layer begin with; empty outside layers."""
        return f"{self.prefix}.{self.layers[0]}.".lstrip(".") if self.layers else ""

    def weights(self, sizes: Mapping[str, int]) -> int:
        """The number of weights of one layer, also of what is no site; outside layers, of the sites.

        Args:
            sizes: those of the model's parameters, by name.
        """
        own = {part.row.weight for part in self.parts}
        return sum(size for name, size in sizes.items() if (name.startswith(self.home) if self.home else name in own))

    def sublayers(self) -> list[Sublayer]:
        """Its steps along the residual stream, in order of execution."""
        home = self.home
        steps: list[list[Part]] = [[]]
        for part in self.parts:
            steps[-1].append(part)
            roles = part.row.roles
            # Sites without a role, and a router's experts, do not tell where the step ends: each is one by itself.
            if not roles or {"writer", "output", "down", "router"} & set(roles):
                steps.append([])
        found: list[Sublayer] = []
        for step in filter(None, steps):
            new = _sublayer(step, home)
            if found and not new.kind and not found[-1].kind:
                new = _in_a_row([*found.pop().parts, *new.parts], home)
            found.append(new)
        return _merged(found)


def blocks(rows: Sequence[SiteRow]) -> list[Block]:
    """The blocks of a model in order of execution, equal layers of one list taken together."""
    return _blocks([(index, row) for index, row in enumerate(rows)], 0)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers as text: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}\u2013{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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

    found = []
    for places in equal.values():
        prefix, number = places[0]
        columns = zip(*(layers[place] for place in places), strict=True)
        parts = tuple(Part(tuple(r for _, r in column), tuple(i for i, _ in column)) for column in columns)
        block = Block(prefix, tuple(n for _, n in places) if number >= 0 else (), parts)
        inner = _blocks(layers[places[0]], depth + 1) if len(places) == 1 and number >= 0 else []
        # A stage of layers: what repeats is inside. Experts repeat too, but belong to their layer.
        found += inner if any(len(one.layers) > 1 and _attends(one) for one in inner) else [block]
    return found


def _attends(block: Block) -> bool:
    return any(QKV & set(part.row.roles) for part in block.parts)


def _place(name: str, depth: int) -> tuple[str, int] | None:
    """The list and the index in it that a site is in: at the first number in its name, the second at depth 1."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    if len(numbers) <= depth:
        return None
    return ".".join(parts[: numbers[depth]]), int(parts[numbers[depth]])


def _sublayer(step: list[Part], home: str) -> Sublayer:
    roles = [set(part.row.roles) for part in step]
    present = set().union(*roles)
    named, path = _named(step, home)
    if QKV & present:
        middle = [part for part, own in zip(named, roles, strict=True) if own & QKV and not _is_first(own, roles)]
        after = [part for part, own in zip(named, roles, strict=True) if "output" in own and not own & QKV]
        before = [part for part in named if part not in middle and part not in after]
        return Sublayer("attention", path, (tuple(before), tuple(middle), tuple(after)))
    if set(GROUPS["mlp"]) & present:
        after = [part for part, own in zip(named, roles, strict=True) if "down" in own]
        return Sublayer("feed-forward", path, (tuple(part for part in named if part not in after), tuple(after)))
    if "router" in present:
        return Sublayer("router", path, tuple((part,) for part in named))
    return _in_a_row(step, home)


def _is_first(own: set[str], roles: Sequence[set[str]]) -> bool:
    """Whether a projection with the roles `own` is the first factor of one of low rank, among sites with `roles`."""
    return "reader" in own and any("inner" in other and other & QKV and other & QKV <= own for other in roles)


def _in_a_row(step: list[Part], home: str) -> Sublayer:
    named, path = _named(step, home)
    return Sublayer("", path, tuple((part,) for part in named))


def _named(step: list[Part], home: str) -> tuple[list[Part], str]:
    """The sites with the shortest names that tell them apart, and the path that they share."""
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
    """The same with equal neighbours, such as experts, taken together."""
    found: list[Sublayer] = []
    for new in sublayers:
        old = found[-1] if found else None
        if old is not None and old.kind == new.kind != "" and _shape(old) == _shape(new):
            stages = tuple(
                tuple(Part(a.rows + b.rows, a.indices + b.indices, a.name) for a, b in zip(*pair, strict=True))
                for pair in zip(old.stages, new.stages, strict=True)
            )
            found[-1] = Sublayer(old.kind, old.path, stages, old.times + 1, new.path)
        else:
            found.append(new)
    return found


def _shape(sublayer: Sublayer) -> object:
    """What equal sublayers have in common: everything but the numbers in their path."""
    path = [part for part in sublayer.path.split(".") if not part.isdigit()]
    has_number = len(path) < len(sublayer.path.split("."))
    sites = [
        [(p.name, p.row.roles, p.row.d_in, p.row.d_out, p.row.adapters, p.row.parameters) for p in stage]
        for stage in sublayer.stages
    ]
    return (path, sites) if has_number else object()
