"""`inspect`: the table of sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn
from torch.export import ExportedProgram

from .adapters import tensor_of
from .capture import Inputs
from .provenance import Insertion, insertions
from .rewrite import base_graph
from .roles import ROLES
from .site import find_sites


@dataclass(frozen=True)
class SiteRow:
    """One site of a model.

    Args:
        name: qualified name.
        roles: what it does, in the order of `roles.ROLES`; empty if the dataflow leaves a doubt.
        d_in: size of the last dimension of the input.
        d_out: size of the last dimension of the output.
        adapters: names of the variants at it, the innermost first.
        parameters: number of trainable adapter parameters at it.
        reason: why it has its roles.
    """

    name: str
    roles: tuple[str, ...]
    d_in: int
    d_out: int
    adapters: tuple[str, ...]
    parameters: int
    reason: str


@dataclass(frozen=True)
class SiteTable(Sequence[SiteRow]):
    """The sites of a model; prints as a table.

    Args:
        rows: one for each site, in order of execution.
        total: number of all parameters of the model, adapters included.
    """

    rows: tuple[SiteRow, ...]
    total: int

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(row.parameters for row in self.rows)

    @overload
    def __getitem__(self, index: int) -> SiteRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SiteRow]: ...
    def __getitem__(self, index: int | slice) -> SiteRow | Sequence[SiteRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = ("site", "roles", "d_in", "d_out", "adapters", "parameters")
        body = [
            (
                row.name,
                ", ".join(row.roles) or "unknown",
                str(row.d_in),
                str(row.d_out),
                " + ".join(row.adapters) or "-",
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(w) if i in (2, 3, 5) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, tuple("-" * width for width in widths), *body)
        ]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(f"{len(self.rows)} sites; {self.trainable:,} of {self.total:,} parameters train ({share:.3f}%)")
        return "\n".join(line.rstrip() for line in lines)


def inspect(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | None = None, *, dynamic_shapes: Any = "auto"
) -> SiteTable:
    """The table of a model's sites, with the adapters it has.

    Args:
        model: any module, which is captured for that and not changed; or what `rewrite` or `load` returned.
        example_inputs, dynamic_shapes: as for `rewrite`.

    Raises:
        CaptureError: the model cannot be captured.
    """
    gm = base_graph(model, example_inputs, dynamic_shapes)
    at: dict[str, dict[int, Insertion]] = {}
    for insertion in insertions(gm.graph):
        at.setdefault(insertion.site, {})[insertion.adapter] = insertion
    rows = []
    for site in find_sites(gm):
        here = at.get(site.name, {}).values()
        tensors = [tensor_of(gm, name) for insertion in here for name in insertion.tensors.values()]
        rows.append(
            SiteRow(
                site.name,
                tuple(role for role in ROLES if role in site.roles),
                site.d_in,
                site.d_out,
                tuple(insertion.config["variant"] for insertion in here),
                sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)),
                "; ".join(f"{role}: {site.reasons[role]}" for role in ROLES if role in site.reasons),
            )
        )
    return SiteTable(tuple(rows), sum(parameter.numel() for parameter in gm.parameters()))
