"""List the adapters of a model: their configs, their sites, and how many parameters they have and train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..errors import AdapterError
from ..graph.insertion import DEFAULT, insertions
from ..graph.tensors import tensor_of
from ..text_table import fold, text_table
from .adapted_site import AdaptedSite
from .placement import placements
from .registry import recorded_variant, to_config
from .state import adapter_tensors
from .switches import HasSwitches
from .variant import Variant

_MOST_SHOWN = 12


@dataclass(frozen=True)
class AdapterRow:
    """One config of an adapter of a model; an adapter that was given several configs has a row for each.

    Args:
        index: its place in the order in which they were added.
        fields: its config as JSON-ready data: the name of the variant under `"variant"`, then its fields.
        sites: the sites that it adapts.
        trainable: number of its parameters that train now. A tensor that its sites share counts once.
        parameters: number of elements of all its tensors, frozen ones included.
        name: the name of the adapter.
        acts: whether it acts now, see `active`.
    """

    index: int
    fields: Mapping[str, Any] = field(repr=False)
    sites: tuple[AdaptedSite, ...] = field(repr=False)
    trainable: int
    parameters: int
    name: str = DEFAULT
    acts: bool = True

    @property
    def variant(self) -> str:
        """The name of its variant."""
        return str(self.fields["variant"])

    @property
    def config(self) -> Variant:
        """Its config: `config.r`, `config.alpha`; `config.for_site(name)` has those of a site.

        Raises:
            ConfigError: the class of the variant is not known to this process, or its code has changed.
        """
        return recorded_variant(self.fields)

    @property
    def label(self) -> str:
        """Its variant with rank, alpha and slots, such as `LoRA(r=8, alpha=16)`."""
        shown = [
            f"{name}={self.fields[name]:g}" for name in ("r", "alpha", "slots") if self.fields.get(name) is not None
        ]
        return f"{self.variant}({', '.join(shown)})"

    def __str__(self) -> str:
        plural = "s" if len(self.sites) > 1 else ""
        named = "" if self.name == DEFAULT else f"{self.name}: "
        off = "" if self.acts else ", does not act"
        return f"{named}{self.label} at {len(self.sites)} site{plural}, {self.trainable:,} parameters{off}"


class AdapterTable(tuple[AdapterRow, ...]):
    """The adapters of a model, a row for each, in the order in which they were added; prints as a table."""

    @property
    def rows(self) -> tuple[AdapterRow, ...]:
        """One row for each adapter."""
        return self

    def __str__(self) -> str:
        named = any(row.name != DEFAULT or not row.acts for row in self)
        head = ("", *(("name", "acts") if named else ()), "adapter", "sites", "trainable", "parameters")
        body = (
            (
                str(row.index),
                *((row.name, "yes" if row.acts else "no") if named else ()),
                row.label,
                str(len(row.sites)),
                f"{row.trainable:,}",
                f"{row.parameters:,}",
            )
            for row in self
        )
        numbers = range(len(head) - 3, len(head))
        return "\n".join(text_table(head, body, right=(0, *numbers)))


def adapters(model: nn.Module) -> AdapterTable:
    """Return the adapters of a model: their names, configs and sites, the numbers of their parameters, and which act.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`, or the `model` of a `backend`.

    Returns:
        The table, one row for each adapter: `adapters(model)[0].config.alpha`, `adapters(model)[0].sites[3].name`.
        Parameters count as trainable if they require grad now.

    Raises:
        AdapterError: the model has no adapters.
    """
    adapter_tensors(model)  # refuses a model without adapters, and says what to pass instead of one around it
    return AdapterTable(_rows(model))


def describe_adapters(model: nn.Module, with_sites: bool = False) -> list[str]:
    """Return a line for each adapter of `model`, such as `LoRA(r=8, alpha=16) at 14 sites, 43,008 parameters`.

    A module that is still being made, as a debugger shows it, has no lines. A model whose modules another library has
    changed has one line that says so.

    Args:
        model: any module.
        with_sites: whether lines with its sites follow that of an adapter: `  layers.0-1.up x 2`.
    """
    try:
        lines = []
        for row in _rows(model):
            lines += [str(row), *(f"  {site}" for site in (_shown_sites(row) if with_sites else ()))]
        return lines
    except AttributeError:
        return []
    except AdapterError as error:
        return [f"adapters that cannot be read: {error}"]


def _shown_sites(row: AdapterRow) -> list[str]:
    """Return the sites of an adapter, those of equal layers once, and no more than fit on a screen."""
    shown = [str(site) for site in fold((site.name, (site.trainable, site.parameters)) for site in row.sites)]
    return shown if len(shown) <= _MOST_SHOWN else [*shown[: _MOST_SHOWN - 1], "..."]


def _rows(model: nn.Module) -> list[AdapterRow]:
    # A graph knows its configs also where the variant's class is not known to this process.
    if isinstance(model, fx.GraphModule):
        records = [(i.adapter, i.adapter_name, i.fields, i.site, i.tensors) for i in insertions(model.graph)]
    else:
        records = [(p.adapter, p.adapter_name, to_config(p.variant), p.site, p.tensors) for p in placements(model)]
    by_index: dict[int, tuple[str, dict[str, Any], dict[str, dict[str, str]]]] = {}
    for index, adapter_name, fields, site, tensors in records:
        by_index.setdefault(index, (adapter_name, fields, {}))[2][site] = tensors
    acts = model.switches.acts if isinstance(model, HasSwitches) else lambda name: True
    rows = []
    for index, (adapter_name, fields, sites) in sorted(by_index.items()):
        names = [name for tensors in sites.values() for name in tensors.values()]
        at_sites = (AdaptedSite(site, tensors, *_sizes(model, tensors.values())) for site, tensors in sites.items())
        sizes = _sizes(model, names)
        rows.append(AdapterRow(index, fields, tuple(at_sites), *sizes, adapter_name, acts(adapter_name)))
    return rows


def _sizes(model: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    """Return the number of elements of the tensors of these names that train, and of all of them."""
    tensors = [tensor_of(model, name) for name in dict.fromkeys(names)]
    return sum(t.numel() for t in tensors if t.requires_grad), sum(t.numel() for t in tensors)
