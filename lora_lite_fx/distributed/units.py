"""The units that are sharded, the layers and the model, and the reasons why a model cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import fx, nn

from ..adapters.placement import graph_of
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.layers import pieces_of
from ..graph.sharded import is_sharded


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Args:
        path: qualified name of the module; empty for the model, which is the last unit.
        module: a layer, or the model.
        parameters: by their qualified names in the model, without those of layers that are units themselves.
    """

    path: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


@runtime_checkable
class RunsGraphs(Protocol):
    """A model that runs graphs without being one."""

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that there are now."""

    def bind_graphs(self) -> None:
        """Let the graphs have the tensors that the model has now, and no others."""


def graphs_of(model: nn.Module) -> list[AdaptedGraphModule]:
    """Return the graphs that a model runs: itself, or those of an adapted model, of which there is one at least."""
    first = graph_of(model)
    graphs = model.graphs if isinstance(model, RunsGraphs) else (first,)
    return [graph for graph in graphs if isinstance(graph, AdaptedGraphModule)]


def units_of(model: nn.Module, ignored: Collection[nn.Parameter]) -> list[Unit]:
    """Return the layers that the graphs of a model run as modules, and the model at the end.

    Args:
        model: an adapted model.
        ignored: the parameters that are not divided.
    """
    left_out = set(map(id, ignored))
    paths = {path for gm in graphs_of(model) for path, _ in pieces_of(gm, gm.flat_graph)}
    named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in left_out}
    units = []
    for path, module in model.named_modules():
        own = {name: named[name] for name in named if name.startswith(f"{path}.")} if path in paths else {}
        if own:
            units.append(Unit(path, module, own))
            named = {name: parameter for name, parameter in named.items() if name not in own}
    return [*units, Unit("", model, named)]


def problem_of(model: nn.Module, units: list[Unit], options: Mapping[str, Any]) -> str:
    """Return the reason why the model cannot be sharded in these units, with the way out; empty if it can."""
    if not graphs_of(model):
        return (
            f"{type(model).__name__} runs no graph. The way out, for a result of wrap: call fully_shard on its layers"
            " and on the model."
        )
    if is_sharded(model):
        return "its parameters are sharded already."
    ignored = options.get("ignored_params") or ()
    if any(parameter.requires_grad for parameter in ignored):
        return "ignored_params has a parameter that trains, whose gradient would be another one in each process."
    of_unit: dict[int, tuple[str, str]] = {}
    for unit in units:
        for name, parameter in unit.parameters.items():
            path, first = of_unit.setdefault(id(parameter), (unit.path, name))
            if path != unit.path:
                return (
                    f"{first} and {name} are one parameter, and stand in two units, each of which would divide it. The"
                    " way out: untie them before the model is captured."
                )
    return _of_parameters(units, options) or _of_reads(model, units)


def _of_parameters(units: list[Unit], options: Mapping[str, Any]) -> str:
    policy = options.get("mp_policy")
    cast = getattr(policy, "param_dtype", None)
    for unit in units:
        trained: dict[Any, str] = {}
        for name, parameter in unit.parameters.items():
            if parameter.requires_grad and parameter.dim() == 0:
                return f"{name} is a single number that trains, which fully_shard does not divide."
            if not parameter.is_contiguous():
                return (
                    f"{name} is not contiguous, and fully_shard divides memory. The way out: before the model is"
                    " captured, parameter.data = parameter.data.contiguous()."
                )
            if cast is not None and parameter.is_floating_point() and parameter.dtype != cast:
                return (
                    f"mp_policy casts parameters to {cast}, and {name} is {parameter.dtype}: a graph has the types of"
                    " the model that was captured in it. The way out: adapt a model that was cast before,"
                    f" model.to({cast}), and leave param_dtype out. Its adapters stay float32 without a dtype of their"
                    " own; reduce_dtype and output_dtype may be given."
                )
            if parameter.requires_grad:
                trained.setdefault(parameter.dtype, name)
        if len(trained) > 1:
            (type_of_one, one), (type_of_other, other) = list(trained.items())[:2]
            return (
                f"{one} is {type_of_one} and {other} is {type_of_other}: fully_shard takes parameters of one type to"
                " train in a unit. The way out: give the configs one dtype, LoRA(..., dtype=torch.float32)."
            )
    return ""


def _of_reads(model: nn.Module, units: list[Unit]) -> str:
    """Check that graphs read what a layer has in the layer alone, as it is gathered there alone."""
    unit_of = {name: unit.path for unit in units for name in unit.parameters if unit.path}
    for gm in graphs_of(model):
        for name in gm.tensors_read_outside_layers():
            if name in unit_of:
                return (
                    f"the graph reads {name} outside of the layer {unit_of[name]!r}, where it is not gathered: the"
                    " model uses it elsewhere too, or the layer does not run as one piece. The way out:"
                    f" ignored_params={{model.get_parameter({name!r})}} keeps it whole, if it is frozen."
                )
    return ""
