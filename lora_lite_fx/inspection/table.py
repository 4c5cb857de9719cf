"""`inspect`: the sites of a model, as a table, as data and as a page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.accounting import account_for
from ..adapters.placement import adapter_tensor_names, graph_of
from ..capture.capture_model import Inputs
from ..errors import counted
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..formats.atomic_writing import write_atomically
from ..graph.insertion import DEFAULT, Insertion, surrounding
from ..graph.queries import model_name
from ..graph.tensors import tensor_of
from ..rewriting.capture import base_graph
from ..rewriting.unadapted import Unadapted, find_unadapted
from ..sites.computed import Computation
from ..sites.roles import ROLES
from ..sites.site import Site, stored_weight
from ..sites.unmatched import LeftOut, find_left_out
from ..text_table import Folded, fold, text_table
from .shown_program import ProgramReport, program
from .site_rows import LeftOutRow, SiteRow

Row = TypeVar("Row", SiteRow, LeftOutRow)


@dataclass(frozen=True)
class SiteTable(Sequence[SiteRow]):
    """The sites of a model; prints as a table, which tells equal sites of equal layers once: `layers.0-29.up x 30`.

    Iterate over it for all sites; `to_dict` has them too. A printed row has the parameters of one site.

    Args:
        rows: one for each site, in order of execution.
        total: number of all parameters of the model, adapters included.
        model: class name of the model.
        sizes: number of elements of each frozen parameter, by qualified name, also outside the listed sites.
        unfrozen: number of parameters outside the adapters that the user lets train.
        programs: the reports of the passes, by program; empty unless `inspect` was asked for them.
        left_out: one for each weight that multiplies data and is not a site, of the kinds asked for.
        repeated: number of parameters that train and that a row before has counted, because sites share them.
        unadapted: the sites without an adapter that default targets leave out although a user may expect them, by sort.
        of_other_kinds: how many sites there are of each kind that was not asked for.
    """

    rows: tuple[SiteRow, ...]
    total: int
    model: str
    sizes: Mapping[str, int]
    unfrozen: int = 0
    programs: tuple[ProgramReport, ...] = ()
    left_out: tuple[LeftOutRow, ...] = ()
    repeated: int = 0
    unadapted: tuple[Unadapted, ...] = ()
    of_other_kinds: Mapping[str, int] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """The number of parameters that train. Those that sites share count once."""
        return sum(row.parameters for row in self.rows) - self.repeated + self.unfrozen

    @property
    def is_quantized(self) -> bool:
        """Tell whether a weight takes less memory than its dtype says."""
        return any(0 < row.bits < 8 * getattr(torch, row.dtype).itemsize for row in self.rows if row.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready data.

        Returns:
            `model`, `parameters` (of the whole model), `trainable`, and `sites`: one dict for each row, with the
            fields of `SiteRow` as keys. With weights that are not sites also `left_out`: one dict for each
            `LeftOutRow`. With sites that default targets leave out also `unadapted`: one dict for each sort. With
            reports of passes also `programs`: one dict for each `ProgramReport`.
        """
        data = {
            "model": self.model,
            "parameters": self.total,
            "trainable": self.trainable,
            "sites": [asdict(row) for row in self.rows],
        }
        if self.left_out:
            data["left_out"] = [asdict(row) for row in self.left_out]
        if self.unadapted:
            data["unadapted"] = [asdict(sort) for sort in self.unadapted]
        if self.programs:
            data["programs"] = [report.to_dict() for report in self.programs]
        return data

    def to_html(self) -> str:
        """Return the table as one HTML page that needs no other file: a picture of the model, and its sites."""
        from .page import render  # here, because few programs draw

        return render(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html()` to a file.

        Args:
            path: of the file; its folder must exist.

        Raises:
            CheckpointError: the file cannot be written; an older file of that name is unchanged.
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
        head = ["site", "roles", "d_in", "d_out", "adapters", "parameters"]
        head += ["bits"] if self.is_quantized else []
        body = [
            (
                str(name),
                ", ".join(row.roles) or "unknown",
                str(row.d_in),
                str(row.d_out),
                " + ".join(row.adapters) or "-",
                f"{row.parameters:,}",
                *([f"{row.bits:.2f}"] if self.is_quantized else []),
            )
            for name, row in _folded(self.rows)
        ]
        lines = text_table(head, body, right=(2, 3, 5, 6))
        share = 100 * self.trainable / self.total if self.total else 0.0
        outside = f", {self.unfrozen:,} of them outside the adapters" if self.unfrozen else ""
        lines.append(
            f"{counted(len(self.rows), 'site')}; {self.trainable:,} of {self.total:,} parameters train"
            f" ({share:.3f}%){outside}"
        )
        if self.of_other_kinds:
            kinds = ", ".join(f"{kind} x {count}" for kind, count in self.of_other_kinds.items())
            example = ("linear", next(iter(self.of_other_kinds)))
            lines.append(f"not listed: {kinds}; inspect(..., kinds={example}) lists more")
        if self.is_quantized:
            held, entries = sum(r.bytes for r in self.rows), sum(r.bytes * 8 / r.bits for r in self.rows if r.bits)
            lines.append(f"the weights of the sites take {held:,} bytes, {8 * held / entries:.2f} bits each")
        lines += ["", "not sites, though they multiply data:"] if self.left_out else []
        lines += [f"  {name}: {row.reason}" for name, row in _folded(self.left_out)]
        lines += ["", "without an adapter, because default targets leave them out:"] if self.unadapted else []
        lines += [f"  {sort.told()}" for sort in self.unadapted]
        text = "\n".join(line.rstrip() for line in lines)
        return "\n\n".join([text, *map(str, self.programs)])


def inspect(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    kinds: Sequence[str] = ("linear",),
    passes: bool = False,
) -> SiteTable:
    """Return the table of a model's sites, with its adapters.

    Args:
        model: any module, which is captured and not changed; or the result of `rewrite`, `adapt` or `load`.
        example_inputs: as for `capture`.
        kinds: of the sites to list, as in `target_kinds`; adapted sites are listed whatever their kind. Weights that
            multiply data and are not sites are listed too, each with the reason.
        passes: whether to report the optimizing passes too: for the training program and the inference program, the
            edits and the seconds of each pass, and why it left candidates as they are, as `program` has them. The
            graph stays as it is.

    Raises:
        CaptureError: the model cannot be captured.
    """
    model_or_graph = model if isinstance(model, ExportedProgram) else graph_of(model)
    gm = base_graph(model_or_graph, example_inputs)
    account = account_for(gm)
    around = {site.name: account.insertions.get(site.name, ()) for site in account.sites}
    around |= dict.fromkeys(account.lost.keys() & around.keys(), ())
    listed = [site for site in account.sites if site.kind.name in kinds or around[site.name]]
    rows = [_row(gm, site, around[site.name]) for site in listed]
    rows += [_lost_row(gm, name, account.insertions[name], why) for name, why in account.lost.items()]
    entries = _entries(gm, account.sites)
    adapters = set(adapter_tensor_names(gm))
    counts = {name: entries.get(name, parameter.numel()) for name, parameter in gm.named_parameters()}
    trained = sum(tensor.numel() for name in adapters if (tensor := tensor_of(gm, name)).requires_grad)
    not_sites = find_left_out(gm, account.sites)
    others = Counter(site.kind.name for site in account.sites) - Counter(site.kind.name for site in listed)
    return SiteTable(
        rows=tuple(rows),
        total=sum(counts.values()),
        model=model_name(gm) if isinstance(model, (fx.GraphModule, ExportedProgram)) else type(model).__name__,
        sizes={name: count for name, count in counts.items() if name not in adapters},
        unfrozen=_unfrozen(model, adapters),
        programs=_reports(model_or_graph, gm) if passes else (),
        left_out=tuple(_left_out_row(weight) for weight in not_sites if weight.kind.name in kinds),
        repeated=sum(row.parameters for row in rows) - trained,
        unadapted=tuple(find_unadapted(gm, account.sites, not_sites, {row.name for row in rows if row.adapters})),
        of_other_kinds=dict(sorted(others.items())),
    )


def _folded(rows: Sequence[Row]) -> Iterator[tuple[Folded, Row]]:
    """Yield the first of the rows that differ in an index of their names alone, with the names of all."""
    for name in fold((row.name, row.beside_name) for row in rows):
        yield name, rows[name.members[0]]


def _row(gm: fx.GraphModule, site: Site, around: Sequence[Insertion]) -> SiteRow:
    _, x, _ = surrounding(around, site.calls[0].x, site.calls[0].y)
    dtype, entries, held = _weight(gm, site)
    return SiteRow(
        name=site.name,
        roles=_in_order(site.roles),
        d_in=site.d_in,
        d_out=site.d_out,
        reasons={role: site.reasons[role] for role in ROLES if role in site.reasons},
        weight=site.weight,
        dtype=str(dtype).removeprefix("torch."),
        bias=site.bias is not None,
        calls=len(site.calls),
        reads=x.name,
        kind=site.kind.name,
        experts=site.experts,
        bytes=held,
        bits=8 * held / entries,
        **_adapters(gm, around),
    )


def _left_out_row(weight: LeftOut) -> LeftOutRow:
    return LeftOutRow(weight.name, weight.weight, weight.reason, _in_order(weight.roles), weight.kind.name)


def _in_order(roles: frozenset[str]) -> tuple[str, ...]:
    return tuple(role for role in ROLES if role in roles)


def _unfrozen(model: object, adapters: Iterable[str]) -> int:
    """Return how many parameters outside the adapters train, in a model that has adapters."""
    if not isinstance(model, nn.Module) or not adapters:
        return 0
    of_adapters = {id(tensor_of(model, name)) for name in adapters}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in of_adapters)


def _reports(model: object, gm: fx.GraphModule) -> tuple[ProgramReport, ...]:
    """Return the reports of the programs of a model that runs; of another model those that its graph would have."""
    running = model if isinstance(model, AdaptedGraphModule) else gm
    assert isinstance(running, AdaptedGraphModule)
    assert running.execution is not None
    return tuple(program(running, which).meta["report"] for which in running.execution.programs)


def _weight(gm: fx.GraphModule, site: Site) -> tuple[torch.dtype, int, int]:
    """Return the dtype of the weight of a site, the number of its entries, and the bytes of what holds it."""
    if site.computed_weight is None:
        weight = tensor_of(gm, site.weight)
        tensors = [weight]
    else:
        value = site.computed_weight.meta.get("val")
        weight = value if isinstance(value, Tensor) else stored_weight(gm, site)
        tensors = [tensor_of(gm, name) for name in Computation.of(site.computed_weight).tensors]
    return weight.dtype, weight.numel(), sum(tensor.nbytes for tensor in tensors)


def _entries(gm: fx.GraphModule, sites: Iterable[Site]) -> dict[str, int]:
    """Return how many entries of weights the tensors of quantized sites count for: the scales for none."""
    counts: dict[str, int] = {}
    for site in sites:
        tensors = () if site.computed_weight is None else Computation.of(site.computed_weight).tensors
        dtypes = [tensor_of(gm, name).dtype for name in tensors]
        if any(dtype.itemsize == 1 or not dtype.is_floating_point for dtype in dtypes):
            counts |= {**dict.fromkeys(tensors, 0), site.weight: site.d_in * site.d_out}
    return counts


def _adapters(gm: fx.GraphModule, around: Sequence[Insertion]) -> dict[str, Any]:
    """Return the fields of a row that tell of the adapters `around` its site."""
    once = {insertion.adapter: insertion for insertion in around}.values()  # a site may be called several times
    tensors = [tensor_of(gm, name) for insertion in once for name in insertion.tensors.values()]
    return {
        "adapters": tuple(_label(insertion) for insertion in once),
        "parameters": sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
    }


def _label(insertion: Insertion) -> str:
    """Return the variant of an adapter, after its name if it was given one."""
    named = "" if insertion.adapter_name == DEFAULT else f"{insertion.adapter_name}: "
    return f"{named}{insertion.variant}"


def _lost_row(gm: fx.GraphModule, name: str, around: Sequence[Insertion], why: str) -> SiteRow:
    """Return the row of adapters whose site the graph does not show any more."""
    reads = next((value.name for insertion in around if (value := insertion.x or insertion.y)), "")
    fields: dict[str, Any] = {"d_in": 0, "d_out": 0, "weight": "", "dtype": "", "bias": False, "kind": "not found"}
    return SiteRow(
        name=name,
        roles=(),
        reasons={"not found": why},
        calls=len({insertion.call for insertion in around}),
        reads=reads,
        **fields,
        **_adapters(gm, around),
    )
