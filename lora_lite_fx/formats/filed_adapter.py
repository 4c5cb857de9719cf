"""Adapters as a file has them, and how they get into a graph.

Each function that loads takes the same steps: read the file, capture the model, find its sites, turn what was read into
a list of `FiledAdapter` (here or in the reader's own file, where everything is checked), and `insert_filed`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn

from ..adapters.changed_buffers import check_same_buffers, put_buffers, warn_of_moving_buffers
from ..adapters.contract import check_contract, finalize
from ..adapters.listing import describe_adapters
from ..adapters.named_configs import check_free, check_name
from ..adapters.param_spec import ParamSpec
from ..adapters.placement import Placement, adapter_names, placements, site_bias, site_weight
from ..adapters.start_values import initialize
from ..adapters.variant import Variant
from ..errors import AdapterError, CheckpointError, ConfigError, counted
from ..execution.program_state import RunsPrograms
from ..graph.insertion import DEFAULT
from ..graph.sharded import copy_values
from ..graph.tensors import module_at, tensor_of
from ..log import phase
from ..rewriting.choose_sites import NewAdapter
from ..rewriting.named import act_as_before, acting_now
from ..rewriting.rewrite import insert_adapters
from ..sites.finding import find_sites
from ..sites.site import Site
from ..sites.unmatched import find_left_out


@dataclass(frozen=True)
class FiledAdapter:
    """An adapter of a file that fits a graph.

    Args:
        plan: its config, its sites in the graph, and its name.
        tensors: its tensors by site and by the variant's names. Those that are left out follow from the weight or the
            config.
    """

    plan: NewAdapter
    tensors: Mapping[str, Mapping[str, Tensor]]


class Fitting:
    """Fits the adapters of a file to a graph, the innermost first.

    Args:
        gm: the graph, which is not changed.
        path: of the file, for messages.
    """

    def __init__(self, gm: fx.GraphModule, path: Path) -> None:
        self.gm, self.path = gm, path
        self.adapters: list[FiledAdapter] = []  # those that fit
        with phase("found the sites", "finding the sites") as details:
            sites = gm.derived.sites if isinstance(gm, RunsPrograms) else {site.name: site for site in find_sites(gm)}
            details.append(f"{len(sites)} in the model")
        self.sites: Mapping[str, Site] = sites

    def add(self, variant: Variant, tensors: Mapping[str, Mapping[str, Tensor]], rest: Collection[str] = ()) -> None:
        """Check that an adapter of another library's file fits the graph, around those that were added before.

        Args:
            variant: the config.
            tensors: those of each site, by the variant's names.
            rest: names of tensors that the file may lack, because they follow from the frozen weight or the config.

        Raises:
            CheckpointError: the file's sites or tensors do not fit the model or the config.
        """
        if not tensors:
            raise CheckpointError(f"{self.path} holds no adapter.")
        self.check_sites_exist(tensors)
        targets = [site for name, site in self.sites.items() if name in tensors]
        inside = {site for adapter in self.adapters for site in adapter.tensors}
        try:
            variant = finalize(variant, targets, {})
            for site in targets:
                local = variant.for_site(site.name)
                local.check(site)
                _check_tensors(local.tensor_specs(site), tensors[site.name], rest, f"{self.path}: {site.name}")
            check_contract(variant, targets, self.gm, inside)  # after the sizes are known, because it makes tensors
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self.adapters.append(FiledAdapter(NewAdapter(variant, targets), tensors))

    def check_sites_exist(self, adapted: Iterable[str]) -> None:
        """Check that the graph has the sites of these names.

        Raises:
            CheckpointError: it lacks some; the message has the reason where it is known.
        """
        sites = self.sites
        missing = [name for name in adapted if name not in sites]
        if not missing:
            return
        present = [name for name, site in sites.items() if site.kind.name == "linear"] or list(sites)
        message = (
            f"{self.path} adapts {counted(len(missing), 'site')} that the model does not have"
            f" ({', '.join(missing[:3])}, ...); the model has {', '.join(present[:3])}, ..."
        )
        reasons = {each.name: each.reason for each in find_left_out(self.gm, sites.values())}
        if (name := next(filter(reasons.__contains__, missing), None)) is not None:
            message += f" For {name}: {reasons[name]}."
        elif len(prefixes := {_prefix_between(name, sites) for name in missing}) == 1 and (prefix := prefixes.pop()):
            message += (
                f" The names differ by the prefix {prefix!r} alone: one of the two models is a part of the other. The"
                " way out: load onto the class that was adapted, such as AutoModelForCausalLM in place of AutoModel."
            )
        raise CheckpointError(message)


def _prefix_between(name: str, sites: Iterable[str]) -> str | None:
    """Return what stands before the name of a site in another name of it, in whichever of the two it is longer."""
    for site in sites:
        short, long = sorted((name, site), key=len)
        if long.endswith(f".{short}"):
            return long.removesuffix(short)
    return None


def _check_tensors(
    specs: Mapping[str, ParamSpec], tensors: Mapping[str, Tensor], rest: Collection[str], where: str
) -> None:
    """Raise `CheckpointError` unless the tensors that a file has for a site are those that its config asks for.

    Before any is made: a config may ask for more than there is memory.
    """
    if lacking := specs.keys() - tensors.keys() - set(rest):
        raise CheckpointError(f"{where} lacks {', '.join(sorted(lacking))}.")
    if foreign := tensors.keys() - specs.keys():
        raise CheckpointError(f"{where} has {', '.join(sorted(foreign))}, against its config.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != specs[name].shape:
            raise CheckpointError(
                f"{where} has {name} of shape {tuple(tensor.shape)}; its config asks for {specs[name].shape}."
            )
        wanted = specs[name].dtype
        if wanted is not None and not wanted.is_floating_point:
            if tensor.dtype != wanted:
                raise CheckpointError(f"{where} has {name} in {tensor.dtype}; its config asks for {wanted}.")
        elif not tensor.is_floating_point():
            raise CheckpointError(f"{where} has {name} in {tensor.dtype}, which is not a floating-point type.")


def insert_filed(
    gm: fx.GraphModule,
    adapters: Sequence[FiledAdapter],
    path: Path,
    called: str,
    *,
    name: str | None,
    stack: bool,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> fx.GraphModule:
    """Insert the adapters of a file into a graph, with their values.

    Args:
        gm: the graph, which is changed.
        adapters: they fit the graph.
        path: of the file, for messages.
        called: the name of the function that loads, for messages.
        name, stack: as for `load`.
        buffers: those that differ from the base's where the adapters were trained.

    Returns:
        The graph.

    Raises:
        AdapterError, CheckpointError, ConfigError: as `load`.
    """
    present, acting = adapter_names(gm), acting_now(gm)
    names = list(dict.fromkeys(adapter.plan.adapter_name for adapter in adapters))
    if name is not None:
        if len(names) > 1:
            raise ConfigError(
                f"{path} has the adapters {', '.join(map(repr, names))}, and name={name!r} names one. The way out: load"
                " it without name."
            )
        check_free([check_name(name)], present)
        adapters = [replace(each, plan=replace(each.plan, adapter_name=name)) for each in adapters]
    elif names == [DEFAULT] and present and not stack:
        raise _has_adapters(gm, called, path)
    else:
        check_free((each for each in names if each != DEFAULT), present)
    if present:
        check_same_buffers(gm, buffers, path, CheckpointError)
    _insert(gm, adapters)
    if not present:
        put_buffers(gm, buffers)
        warn_of_moving_buffers(gm, stacklevel=3)
    elif stack and name is None and acting is not None:
        acting = (*acting, *names)
    act_as_before(gm, acting)
    return gm


def _insert(gm: fx.GraphModule, adapters: Sequence[FiledAdapter]) -> None:
    first = insert_adapters(gm, [adapter.plan for adapter in adapters])
    for placement in placements(gm):
        if placement.adapter < first:
            continue
        _fill(gm, gm, placement, adapters[placement.adapter - first])


def _fill(gm: fx.GraphModule, owner: nn.Module, placement: Placement, filed: FiledAdapter) -> None:
    """Write the values of a file into the tensors of a placement, which `owner` has, over the weights of a graph."""
    tensors = filed.tensors[placement.site]
    if set(placement.names) - tensors.keys():
        site = next(site for site in filed.plan.sites if site.name == placement.site)
        weight, bias = site_weight(gm, site), site_bias(gm, site)
        initialize(placement.local, site, weight, placement.namespace(owner), bias=bias)
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = tensor_of(owner, placement.tensors[name])
            copy_values(target, tensor.to(target.dtype))


def placed_alone(gm: fx.GraphModule, adapters: Sequence[FiledAdapter]) -> tuple[list[Placement], nn.Module]:
    """Return the adapters of a file in their places in a model that has them alone, without inserting them.

    Args:
        gm: a graph, which is not changed.
        adapters: they fit it.

    Returns:
        The places; and a module that has the tensors there, with their values.
    """
    owner, placed = nn.Module(), []
    inner: dict[str, list[str]] = defaultdict(list)  # the names of the adapters that are at a site already
    for index, filed in enumerate(adapters):
        name = filed.plan.adapter_name
        for site in filed.plan.sites:
            placement = Placement.of(filed.plan.variant, index, site, inner[site.name], name)
            inner[site.name].append(name)
            module_at(owner, site.name)
            placement.register(owner, site, site_weight(gm, site))
            _fill(gm, owner, placement, filed)
            placed.append(placement)
    return placed, owner


def _has_adapters(gm: fx.GraphModule, called: str, path: Path) -> AdapterError:
    """Return the error for a graph that has adapters, because those of the file would add to them silently."""
    call = f"llfx.{called}({{}}, {str(path)!r}{{}})"
    return AdapterError(
        f"The model has adapters already: {'; '.join(describe_adapters(gm))}. To put those of {path} around them, so"
        f" that both act: {call.format('model', ', stack=True')}. To load them beside the present ones, and let"
        f" llfx.active choose: {call.format('model', ', name=...')}. To load them in place of the present ones:"
        f" {call.format('llfx.remove(model)', '')}, or copy their values into those:"
        f" llfx.load_adapter_state_dict(model, llfx.adapter_state_dict({call.format('llfx.remove(model)', '')}))."
    )
