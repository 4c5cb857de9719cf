"""The adapters that act, as tensors that a runtime gets at a call: their names are shared, their scale is in them."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.hyperparameters import WithScale
from ..adapters.placement import Placement, configs_of, placements
from ..adapters.state import check_unscaled
from ..adapters.switches import Switches, coefficients
from ..adapters.variant import Variant
from ..errors import AdapterError, ConfigError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.insertion import DEFAULT, INLET, OUTLET, PASSED, TENSOR, Insertion, insertions, record
from ..graph.tensors import register_tensor, tensor_of
from ..rewriting.rewrite import insert_placed, without_adapters
from ..sites.finding import find_sites
from ..sites.site import Site
from .foldable_options import OF_ALPHA, OF_RANK, WITHOUT_EFFECT, Folding, folding, rank_dims
from .served_graph import as_graph


@dataclass(frozen=True)
class ActingAdapter:
    """A config of an adapter that acts, at one site.

    Args:
        placed: its placement, under the name by which adapters are swapped.
        tensors: its tensors, by the variant's names.
        coefficient: its coefficient, see `scaled`.
        index: of its config in the model.
        folding: what its tensors can say.
    """

    placed: Placement
    tensors: Mapping[str, Tensor]
    coefficient: float
    index: int
    folding: Folding

    @property
    def config(self) -> Variant:
        """Its config for its site."""
        return self.placed.local

    @property
    def label(self) -> str:
        """Its variant, with all that it computes by and that is not in its tensors: `HRA(orthogonal=True)`."""
        config, told = self.placed.variant, []
        untold = set(WITHOUT_EFFECT)
        untold |= (OF_ALPHA if self.folding.scaled else set()) | (OF_RANK if self.folding.is_open else set())
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in untold and value != field.default:
                told.append(f"{field.name}={value!r}")
        return type(config).__name__ + (f"({', '.join(told)})" if told else "")

    @property
    def is_nothing_at_rank_one(self) -> bool:
        """Whether it does nothing where its tensors are zeros of rank one, which take the least time."""
        if not self.folding.is_addition or not self.folding.is_open:
            return False
        try:
            replace(self.config, r=1)  # type: ignore[call-arg]
        except ConfigError:  # of a variant whose rank is a multiple of another number
            return False
        return True

    def values(self) -> dict[str, Tensor]:
        """Return its tensors by qualified name, with the scale in them, for a graph of `swappable_graph`.

        Raises:
            AdapterError: it has a coefficient that its tensors cannot take.
        """
        scale, scaled = 1.0, self.folding.scaled
        if scaled and isinstance(self.config, WithScale):
            scale = self.config.scale
        if self.folding.is_addition:
            scale *= self.coefficient
        elif self.coefficient != 1:
            raise AdapterError(
                f"{type(self.config).__name__} at {self.placed.site!r} has the coefficient {self.coefficient:g} of"
                " llfx.scaled, which its tensors cannot take. The way out: bake=True in the file of the model."
            )
        values = {name: tensor * scale if name in scaled else tensor for name, tensor in self.tensors.items()}
        return {self.placed.tensors[name]: value.detach() for name, value in values.items()}

    def open_dims(self, site: Site) -> dict[str, list[int]]:
        """Return the dimensions of its tensors that may have any size, by qualified name."""
        if not self.folding.is_open or getattr(self.config, "r", 1) == 1:
            return {}  # torch.export takes a size of one for a constant
        return {self.placed.tensors[name]: dims for name, dims in rank_dims(self.config, site).items()}


def acting_adapters(model: nn.Module) -> list[ActingAdapter]:
    """Return the adapters of a graph or an adapted model that act.

    If they are of one name, they are placed as if they were the only ones and had no name, so that the tensors of each
    of a model's adapters have the same names.

    Raises:
        AdapterError: a coefficient is a part of the graph, or there is one for each row.
    """
    check_unscaled(model)
    by_name = coefficients(model, "A file of a runtime") if placements(model) else {}
    placed = [each for each in placements(model) if by_name is None or by_name.get(each.adapter_name) is not None]
    is_alone = len({each.adapter_name for each in placed}) == 1
    order = {index: place for place, index in enumerate(dict.fromkeys(each.adapter for each in placed))}
    foldings = {members[0].adapter: folding(variant) for variant, members in configs_of(placed, None)}
    adapters = []
    for each in placed:
        tensors = {name: tensor_of(model, path) for name, path in each.tensors.items()}
        coefficient = 1.0 if by_name is None else by_name[each.adapter_name]
        new = replace(each, adapter_name=DEFAULT, adapter=order[each.adapter]) if is_alone else each
        adapters.append(ActingAdapter(new, tensors, coefficient, each.adapter, foldings[each.adapter]))
    return adapters


@dataclass(frozen=True)
class SwappableGraph:
    """A graph whose adapters are to be swapped.

    Args:
        gm: the graph, with the adapters that act alone, and with scales of one where `ActingAdapter.values` has them.
        switches: names of the buffers of `gm` that let adapters act, by label: one, or zero to leave them out.
        open_dims: the dimensions of the tensors that may have any size, by qualified name.
    """

    gm: AdaptedGraphModule
    switches: Mapping[str, str]
    open_dims: Mapping[str, Sequence[int]]


def swappable_graph(
    gm: AdaptedGraphModule, swapped: Sequence[ActingAdapter], fixed: Sequence[ActingAdapter]
) -> SwappableGraph:
    """Return a graph over the same tensors in which adapters can be swapped.

    An adapter whose tensors say by themselves that it does nothing, as those of a LoRA that are zero, has no switch;
    nor has a bank, whose rows say it.

    Args:
        gm: the graph, which is not changed.
        swapped: its adapters that act and are to be swapped.
        fixed: those that act and stay as they are.
    """
    if not placements(gm):
        return SwappableGraph(gm, {}, {})
    base = as_graph(without_adapters(gm))
    sites = {site.name: site for site in find_sites(base)}
    tensors = {adapter.placed.tensors[name]: t for adapter in (*swapped, *fixed) for name, t in adapter.tensors.items()}
    placed = [*(adapter.placed for adapter in fixed), *_of_unit_scale(swapped)]
    insert_placed(base, placed, {name: site.roles for name, site in sites.items()}, tensors)
    base.switches = Switches(scales=_coefficients_of(fixed, swapped))
    switched = {
        (each.placed.adapter, each.placed.site): each.label
        for each in swapped
        if not each.folding.is_addition and not each.placed.variant.slots
    }
    labels = {label: f"acts_{index}" for index, label in enumerate(dict.fromkeys(switched.values()))}
    for insertion in insertions(base.flat_graph) if labels else ():
        if (label := switched.get((insertion.adapter, insertion.site))) is not None:
            _put_switch(base, insertion, labels[label])
    dims = dict[str, Sequence[int]]()
    for each in swapped:
        dims |= each.open_dims(sites[each.placed.site])
    return SwappableGraph(base, labels, dims)


def _coefficients_of(fixed: Sequence[ActingAdapter], swapped: Sequence[ActingAdapter]) -> dict[str, Tensor]:
    """Return the coefficients of the adapters that stay as they are.

    Raises:
        AdapterError: an adapter of several configs has one, and some of the configs do not stay.
    """
    scales = {each.placed.adapter_name: each.coefficient for each in fixed if each.coefficient != 1}
    if mixed := [each for each in swapped if each.placed.adapter_name in scales]:
        raise AdapterError(
            f"The adapter {mixed[0].placed.adapter_name!r} has the coefficient {mixed[0].coefficient:g} of llfx.scaled,"
            f" and is both {fixed[0].label}, which is constants of the file, and {mixed[0].label}, which is not. The"
            " way out: bake=True."
        )
    return {name: torch.tensor(scale, dtype=torch.float64) for name, scale in scales.items()}


def _of_unit_scale(adapters: Iterable[ActingAdapter]) -> list[Placement]:
    """Return placements of the adapters with the `alpha` that makes the scale one at each site."""
    by_index = defaultdict[int, list[ActingAdapter]](list)
    for adapter in adapters:
        by_index[adapter.placed.adapter].append(adapter)
    placed: list[Placement] = []
    for members in by_index.values():
        variant = members[0].placed.variant
        if members[0].folding.scaled and isinstance(variant, WithScale):
            alphas = {each.placed.site: 1 / _per_alpha(each.config) for each in members}
            usual = alphas[members[0].placed.site]
            others = {f"^{re.escape(site)}$": alpha for site, alpha in alphas.items() if alpha != usual}
            variant = replace(variant, alpha=usual, alpha_pattern=others)
        placed += (replace(each.placed, variant=variant) for each in members)
    return placed


def _per_alpha(config: Any) -> float:
    """Return the scale of a config for each unit of `alpha`."""
    return float(replace(config, alpha=1.0).scale)


def _put_switch(gm: fx.GraphModule, insertion: Insertion, name: str) -> None:
    """Let the readers of an adapter read what it replaces, where the buffer `name` is zero.

    Safe because the readers get one of the two values to the bit, so that what is not chosen may be NaN: a coefficient,
    as in a package of AOTInductor, would make NaN of it, and runs the linear again where the adapter changes its input.
    """
    sides = [(INLET, insertion.inlet, insertion.x), (OUTLET, insertion.outlet, insertion.y)]
    sides += [(TENSOR, *pair) for pair in insertion.tensors_replaced.items()]
    sides += [(PASSED, *pair) for pair in insertion.tensors_passed.items()]
    register_tensor(gm, name, torch.ones(1, device=next(gm.parameters()).device))
    for part, leaving, entered in sides:
        if leaving is None or entered is None:
            continue
        with gm.graph.inserting_before(leaving.next):
            switch = gm.graph.get_attr(name)
            acts = gm.graph.call_function(torch.ops.aten.ne.Scalar, (switch, 0))
            chosen = gm.graph.call_function(torch.ops.aten.where.self, (acts, leaving, entered))
        for node in (switch, acts, chosen):
            node.meta = {key: value for key, value in leaving.meta.items() if key not in ("val", "custom")}
            record(node, replace(insertion, part=part))
        chosen.meta["val"] = leaving.meta.get("val")
        for reader in [user for user in leaving.users if insertion.is_outside(user) and user is not chosen]:
            reader.replace_input_with(leaving, chosen)
