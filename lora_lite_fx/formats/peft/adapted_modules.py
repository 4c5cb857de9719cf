"""Which of PEFT's modules holds a site: its own, an `nn.MultiheadAttention`, or a parameter that is wrapped.

PEFT names tensors by modules. It has one adapter for the three projections of an attention module, and it wraps the
module of a parameter (`target_parameters`, for stacks of experts), several times if it adapts several parameters.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.placement import Placement
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...graph.insertion import inner_name
from ...sites.site import Site
from ...variants import LoRA
from ..filed_adapter import Fitting
from .form import PeftForm

_WRAPPER = ".base_layer"  # stands in a path for each module that PEFT puts around another
_PROJECTIONS = "in_proj_weight"
_TIMES = 2
"""How often PEFT 0.21 adds the update of an attention module's output projection to its weight."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PeftModule:
    """The tensors that a file has for one module.

    Args:
        path: of the module, as the file's keys have it.
        name: the module, or the parameter, that the config targets.
        tensors: by our names, in our layout.
        sites: the sites that it holds.
        overrides: the fields that have another value here than in the config.
        is_parameter: whether the config targets a parameter.
    """

    path: str
    name: str
    tensors: Tensors
    sites: tuple[Site, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    is_parameter: bool = False

    @property
    def is_empty(self) -> bool:
        """Tell whether a LoRA of it does nothing."""
        b = self.tensors.get("lora_B")
        return b is not None and not b.any()


# Reading.


def modules_at_sites(fitting: Fitting, modules: Mapping[str, Tensors], targets: Iterable[str]) -> dict[str, PeftModule]:
    """Return what a file has for each site of a graph, by the site's name; also for modules that are not a site.

    Args:
        fitting: the graph and the file.
        modules: the tensors by PEFT's modules.
        targets: the parameters that the config targets.

    Raises:
        CheckpointError: a module holds a site that is not there.
    """
    sites, path = fitting.sites, fitting.path
    wrapped = {place: name for name, place in _wrapped(fitting.gm, targets).items()}
    of_weight = {site.weight: site for site in sites.values()}
    at_sites: dict[str, PeftModule] = {}
    attention: list[PeftModule] = []
    for module, tensors in modules.items():
        if module in wrapped:
            parameter = wrapped[module]
            site = of_weight.get(parameter)
            if site is None:
                raise CheckpointError(f"{path} adapts the parameter {parameter}, which is not a site of the model.")
            factors = _of_parameter(site, *_factors(tensors, parameter, path), path)
            at_sites[site.name] = PeftModule(module, parameter, factors, (site,), is_parameter=True)
        elif module in sites:
            at_sites[module] = PeftModule(module, module, tensors, (sites[module],))
        elif projections := _of_attention(module, tensors, sites, path):
            attention += projections
            at_sites |= {held.sites[0].name: held for held in projections}
        else:
            at_sites[module] = PeftModule(module, module, tensors, ())
    if attention:
        warnings.warn(
            f"The adapter of {attention[0].name!r} computes the same here as in PEFT, and trains otherwise. PEFT has"
            " one lora_A for the query, key and value of an attention module, where each has its own here. And it adds"
            f" the update of the output projection {_TIMES} times, where it is added once here.",
            stacklevel=4,
        )
    return at_sites


def _of_attention(module: str, tensors: Tensors, sites: Mapping[str, Site], path: object) -> list[PeftModule]:
    """Return the projections that PEFT's module holds if that is an attention module or its output projection."""
    name = module.replace(_WRAPPER, "")
    projections = [site for site in sites.values() if site.weight == f"{name}.{_PROJECTIONS}"]
    if not projections and name not in sites:
        return []
    a, b = _factors(tensors, name, path)
    if not projections:
        owner = name.rpartition(".")[0]
        return [PeftModule(module, owner, {"lora_A": a, "lora_B": _TIMES * b}, (sites[name],))]
    factors = [{"lora_A": a, "lora_B": b[slice(*(site.kind.rows or (None,)))]} for site in projections]
    return [PeftModule(module, name, own, (site,)) for site, own in zip(projections, factors, strict=True)]


def _factors(tensors: Tensors, name: str, path: object) -> tuple[Tensor, Tensor]:
    a, b = tensors.get("lora_A"), tensors.get("lora_B")
    if a is None or b is None or len(tensors) > 2 or a.dim() != 2 or b.dim() != 2:
        raise CheckpointError(f"{path}: {name} needs the two factors of a LoRA, and has {sorted(tensors)}.")
    return a, b


def _wrapped(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Return PEFT's module for each parameter that the targets name: the last of a module is wrapped outermost."""
    endings = tuple(f".{target}" for target in targets)
    by_owner: dict[str, list[str]] = defaultdict(list)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if endings and f".{name}".endswith(endings):
            by_owner[name.rpartition(".")[0]].append(name)
    return {
        name: owner + _WRAPPER * (len(names) - 1 - index)
        for owner, names in by_owner.items()
        for index, name in enumerate(names)
    }


def _of_parameter(site: Site, a: Tensor, b: Tensor, path: object) -> Tensors:
    """Return the factors of an update of a stored weight, as those of the site's matrix or matrices.

    PEFT multiplies `B A` for a weight `(outputs, inputs)`, whatever its dimensions are for; of experts, either order.
    """
    if site.experts:
        if a.shape[0] % site.experts or b.shape[1] % site.experts:
            raise CheckpointError(f"{path}: the factors of {site.weight} are not those of {site.experts} experts.")
        a = a.unflatten(0, (site.experts, -1))
        b = b.unflatten(1, (-1, site.experts)).permute(2, 0, 1)
        if site.d_in == site.d_out and site.transposed:
            raise CheckpointError(
                f"{path}: which factor of {site.weight} is for its inputs cannot be told, because its matrices are"
                " square and stored with the inputs first."
            )
        turned = a.shape[-1] != site.d_in
    else:
        turned = site.transposed
    return {"lora_A": b.mT, "lora_B": a.mT} if turned else {"lora_A": a, "lora_B": b}


# Writing.


def peft_modules(
    model: nn.Module,
    form: PeftForm,
    variant: Variant,
    placed: Sequence[Placement],
    sites: Mapping[str, Site],
    state: Mapping[str, Tensor],
) -> list[PeftModule]:
    """Return the modules that hold an adapter in a file.

    Args:
        model: the adapted model.
        form: the form of the adapter.
        variant: its config.
        placed: its places.
        sites: the model's adapted sites by name.
        state: its tensors.

    Raises:
        ConfigError: PEFT cannot adapt one of the sites.
    """
    modules = []
    attention: dict[str, list[tuple[Site, Tensors]]] = defaultdict(list)
    parameters: list[tuple[Site, Tensors]] = []
    for placement in placed:
        site = sites[placement.site]
        tensors: Tensors = {own: state[path] for own, path in placement.tensors.items() if path in state}
        if _class_at(site) == "MultiheadAttention":
            attention[_attention_of(site)].append((site, tensors))
        elif site.experts or _is_plain_parameter(site):
            parameters.append((site, tensors))
        else:
            check_module(form, site)
            modules.append(PeftModule(site.name, site.name, tensors, (site,), variant.overrides(site.name)))
    for name, members in attention.items():
        modules += _attention(variant, name, members)
    places = _wrapped(model, [site.weight for site, _ in parameters])
    for site, tensors in parameters:
        if site.tied:
            raise ConfigError(
                f"{type(variant).__name__}: {site.name!r} is not a module of its own. PEFT would adapt its parameter"
                f" {site.weight}, and with it {', '.join(site.tied)}, where the adapter is not."
            )
        _check_plain_lora(variant, site, "a parameter")
        factors = _as_parameter(site, tensors)
        overrides = variant.overrides(site.name)
        modules.append(PeftModule(places[site.weight], site.weight, factors, (site,), overrides, is_parameter=True))
    return modules


_ADAPTED = frozenset(
    {
        "Conv1D",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "DequantizedLinear",  # stands for a quantized linear, which PEFT wraps
        "Embedding",
        "Linear",
        "NonDynamicallyQuantizableLinear",
    }
)


def _class_at(site: Site) -> str:
    """Return the name of the class of the module in which a site runs; empty if the graph does not say."""
    stack = site.calls[0].node.meta.get("nn_module_stack") if site.calls else None
    kind = list(stack.values())[-1][1] if stack else ""
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def _is_plain_parameter(site: Site) -> bool:
    """Return whether a linear is a product with a parameter in a module of a class that PEFT cannot adapt."""
    name = _class_at(site)
    owner = site.weight.rpartition(".")[0]
    runs = {inner_name(call.node) for call in site.calls}
    unknown = name not in ("", "MultiheadAttention") and name not in _ADAPTED
    return site.kind.vector_dims > 0 and site.kind.rows is None and unknown and runs == {owner}


def check_module(form: PeftForm, site: Site) -> None:
    """Raise `ConfigError` if PEFT cannot adapt the module of a site."""
    name = form.name
    if not site.weight.startswith(f"{site.name}."):
        raise ConfigError(f"{name}: PEFT adapts modules, and site {site.name!r} is not a module of its own.")
    if any(inner_name(call.node) not in (None, site.name) for call in site.calls):
        raise ConfigError(
            f"{name}: PEFT adapts the calls of modules, and the model reads the weight of {site.name!r} without"
            " calling that module."
        )
    if site.transposed and not form.conv1d:  # a file is read there: it is of an ordinary linear
        raise ConfigError(f"{name}: PEFT has it for ordinary linears only, and {site.name!r} is a Conv1D.")


def _check_plain_lora(variant: Variant, site: Site, what: str) -> None:
    """Raise `ConfigError` unless PEFT has the variant where it folds factors into a weight at each call."""
    plain = type(variant) is LoRA and not variant.bias and not variant.dropout
    if not plain:
        raise ConfigError(
            f"{type(variant).__name__}: at {what} such as {site.weight} PEFT has LoRA without dropout and bias only."
        )


def _attention_of(site: Site) -> str:
    """Return the name of the attention module that a site belongs to."""
    owner = site.weight.rpartition(".")[0]
    return owner.rpartition(".")[0] if owner == site.name else owner


def _attention(variant: Variant, name: str, members: list[tuple[Site, Tensors]]) -> list[PeftModule]:
    """Return the two modules of an attention module, whose projections have one rank in PEFT and are all adapted.

    A factor `A` that all input projections have is that of their whole weight. Otherwise their ranks add up, each with
    its rows of `B`. Zeros fill up what is not adapted here.
    """
    site = members[0][0]
    for member, _ in members:
        _check_plain_lora(variant, member, "an attention module")
        if variant.overrides(member.name) != variant.overrides(site.name):
            raise ConfigError(f"LoRA: PEFT has one rank and alpha for all of {name!r}, which has several.")
        if not member.weight.endswith((f".{_PROJECTIONS}", ".out_proj.weight")):
            raise ConfigError(f"LoRA: PEFT has no adapter for {member.weight}, an attention module's own weight.")
    local = variant.for_site(site.name)
    assert isinstance(local, LoRA)
    inputs = [(member, tensors) for member, tensors in members if member.weight.endswith(f".{_PROJECTIONS}")]
    a = [tensors["lora_A"] for _, tensors in inputs]
    shared = all(torch.equal(other, a[0]) for other in a)
    count = len(a) if not shared else 1
    empty = members[0][1]["lora_A"].new_zeros
    width, rank = site.d_in, count * local.r
    b = empty(3 * width, rank)
    for index, (member, tensors) in enumerate(inputs):
        columns = slice(None) if shared else slice(index * local.r, (index + 1) * local.r)
        b[slice(*(member.kind.rows or (None,))), columns] = tensors["lora_B"]
    factors = {"lora_A": torch.cat(a) if count > 1 else a[0] if a else empty(rank, width), "lora_B": b}
    out_a, out_b = empty(rank, width), empty(width, rank)
    for member, tensors in members:
        if member.weight.endswith(".out_proj.weight"):
            out_a[: local.r], out_b[:, : local.r] = tensors["lora_A"], tensors["lora_B"] / _TIMES
    alpha = local.alpha * (count**0.5 if local.rank_stabilized else count)
    overrides = {"r": rank, "alpha": alpha} if count > 1 else variant.overrides(site.name)
    sites = tuple(member for member, _ in members)
    output = f"{name}{_WRAPPER}.out_proj"
    return [
        PeftModule(name, name, factors, sites, overrides),
        PeftModule(output, name, {"lora_A": out_a, "lora_B": out_b}, sites, overrides),
    ]


def _as_parameter(site: Site, tensors: Tensors) -> Tensors:
    """Return the factors of a site's matrix or matrices as those of its stored weight: the inverse of `_of_parameter`.

    Of experts, PEFT takes the order of a weight from its module. Where that says that the inputs come first, it has the
    factors of the matrices; so do the modules of transformers.
    """
    a, b = tensors["lora_A"], tensors["lora_B"]
    if not site.experts:
        return {"lora_A": b.t(), "lora_B": a.t()} if site.transposed else {"lora_A": a, "lora_B": b}
    if site.transposed and site.d_in == site.d_out:
        raise ConfigError(
            f"LoRA: {site.weight} has square matrices with the inputs first, so its factors could be taken for one"
            " another in PEFT."
        )
    return {"lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}
