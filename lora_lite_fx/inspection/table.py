"""`inspect`: the sites of a model, as a table, as data and as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.placement import adapter_tensor_names, graph_of
from ..capture.capture import Inputs
from ..formats.files import write_atomically
from ..graph.provenance import Insertion, insertions, outermost
from ..graph.tensors import tensor_of
from ..rewriting.base_graph import base_graph
from ..sites.finding import find_sites
from ..sites.roles import ROLES
from .page import render
from .rows import SiteRow


@dataclass(frozen=True)
class SiteTable(Sequence[SiteRow]):
    """The sites of a model; prints as a table.

    Args:
        rows: one for each site, in order of execution.
        total: number of all parameters of the model, adapters included.
        model: class name of the model.
        sizes: number of elements of each frozen parameter, by qualified name; those of no listed site too.
    """

    rows: tuple[SiteRow, ...]
    total: int
    model: str
    sizes: Mapping[str, int]

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(row.parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready data.

        Returns:
            `model`, `parameters` (of the whole model), `trainable`, and `sites`: one dict for each row, with the
            fields of `SiteRow` as keys.
        """
        return {
            "model": self.model,
            "parameters": self.total,
            "trainable": self.trainable,
            "sites": [asdict(row) for row in self.rows],
        }

    def to_html(self) -> str:
        """The table as one HTML page that needs nothing else: the model as a picture, its sites, and their reasons."""
        return render(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html()` to a file.

        Args:
            path: of the file; its folder must exist.

        Raises:
            CheckpointError: the file cannot be written; what was there before is unchanged.
        """
        write_atomically(Path(path), self.to_html().encode())

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
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    kinds: Sequence[str] = ("linear",),
) -> SiteTable:
    """The table of a model's sites, with the adapters it has.

    Args:
        model: any module, which is captured for that and not changed; or what `rewrite`, `adapt` or `load` returned.
        example_inputs, dynamic_shapes: as for `rewrite`.
        kinds: of the sites to list, as in `target_kinds`; adapted sites are listed whatever their kind.

    Raises:
        CaptureError: the model cannot be captured.
    """
    model_or_graph = model if isinstance(model, ExportedProgram) else graph_of(model)
    gm = base_graph(model_or_graph, example_inputs, dynamic_shapes, checkpoint_layers=False)
    at: dict[str, dict[int, Insertion]] = {}
    for insertion in insertions(gm.graph):
        at.setdefault(insertion.site, {}).setdefault(insertion.adapter, insertion)
    rows = []
    for site in find_sites(gm):
        here = list(at.get(site.name, {}).values())
        if site.kind.name not in kinds and not here:
            continue
        tensors = [tensor_of(gm, name) for insertion in here for name in insertion.tensors.values()]
        x, _ = outermost(here, site.calls[0].x, site.calls[0].y)
        rows.append(
            SiteRow(
                name=site.name,
                roles=tuple(role for role in ROLES if role in site.roles),
                d_in=site.d_in,
                d_out=site.d_out,
                adapters=tuple(insertion.config["variant"] for insertion in here),
                parameters=sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)),
                reasons={role: site.reasons[role] for role in ROLES if role in site.reasons},
                weight=site.weight,
                dtype=str(gm.get_parameter(site.weight).dtype).removeprefix("torch."),
                bias=site.bias is not None,
                calls=len(site.calls),
                reads=x.name,
                kind=site.kind.name,
                experts=site.experts,
            )
        )
    total = sum(parameter.numel() for parameter in gm.parameters())
    adapters = set(adapter_tensor_names(gm))
    sizes = {name: parameter.numel() for name, parameter in gm.named_parameters() if name not in adapters}
    return SiteTable(tuple(rows), total, _class_name(model, gm), sizes)


def _class_name(model: nn.Module | ExportedProgram, gm: fx.GraphModule) -> str:
    """The name of the class that was captured. A graph has it in the module stack of its nodes, if it was exported."""
    if not isinstance(model, (fx.GraphModule, ExportedProgram)):
        return type(model).__name__
    for node in gm.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path == "":
                return str(getattr(kind, "__qualname__", kind)).rpartition(".")[2]
    return "GraphModule"
