"""Check what a variant must keep to, at the sites that it is to adapt, before anything is made of it.

`rewrite`, `wrap`, `adapt`, `backend` and the functions that load files all come by here. `forward` runs on stand-ins
without data, once for all sites that it cannot tell apart. Calls of an adapted model check nothing.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..capture.function_tracing.rehearsal import Stage, first_difference
from ..errors import ConfigError, shown
from ..graph.insertion import SHARED
from ..sites.site import Site, stored_bias, stored_weight
from .calibration_data import Statistic
from .declaration import check_fields
from .dependencies import Dependencies, Remembered
from .forward_run import Operands, run_forward
from .naming import described, naming
from .param_spec import ParamSpec
from .placement import adapter_tensor_names
from .promotion import not_innermost
from .variant import Variant

_OF_THE_SITE = frozenset(
    f"{prefix}{name}" for prefix in ("", "frozen_", "computed_") for name in ("weight", "bias")
) | {"training", "base", "site", "placements", "add", "adapted_model", "batch", "dependencies", "inner_dtype"}
"""Names that a site's module or its eager wrapper has, besides those that every module has."""


def check_contract(variant: Variant, sites: Iterable[Site], model: nn.Module, inside: Container[str] = ()) -> None:
    """Check that `variant` keeps to its contract at `sites`.

    Args:
        variant: the config, finalized.
        sites: the sites that it is to adapt.
        model: the graph that has them; it is not changed.
        inside: the names of sites that get another adapter before this one.

    Raises:
        ConfigError: a field that files cannot hold; a result of `params` that is not a mapping of names to `ParamSpec`,
            or a name that is taken; tensors to share that differ by site; or a `forward` that fails, does not call
            `base` exactly once, returns something else than a tensor like `base(x)`, writes to what it may only read,
            uses tensors that are not its own, or does not compute the same each time; or one that replaces the weight
            of a site and is not the innermost adapter there.
    """
    check_fields(variant)
    _check_functions(variant)
    modules, present = dict(model.named_modules()), set(adapter_tensor_names(model))
    shared: dict[str, tuple[Site, ParamSpec]] = {}
    checked: list[tuple[Variant, Site]] = []
    for site in sites:
        local = variant.for_site(site.name)
        if site.kind.by_update_only and not variant.by_update:
            raise ConfigError(
                f"{type(variant).__name__} cannot adapt {site.name!r}, which is {site.kind.article}: its factors have"
                " no rows that belong to a group. Variants whose update has the shape of the weight can, as LoHa."
            )
        specs = _specs(local, site)
        # Names of adapters that the site has already are no obstacle: further ones are numbered.
        module = modules.get(site.name)
        taken = {name for name in specs if hasattr(module, str(name)) and f"{site.name}.{name}" not in present}
        _check_names(local, site, specs, taken)
        _check_shared(local, site, specs, shared)
        checked.append((local, site))
    for local, site in checked:
        replaces = rehearse(local, site, model).replaces
        if replaces and site.name in inside:
            raise not_innermost(type(variant).__name__, site.name)
        if site.kind.replaced_only and not replaces:
            raise ConfigError(f"{type(variant).__name__} cannot adapt {site.name!r}, a norm: {site.kind.why}.")


def finalize(variant: Variant, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Variant:
    """Return what `variant.finalize` returns.

    Raises:
        ConfigError: it fails, or returns something else than a config.
    """
    with naming(variant, "finalize", None):
        finalized: object = variant.finalize(sites, statistics)
    if not isinstance(finalized, Variant):
        raise ConfigError(f"{type(variant).__name__}.finalize must return a config, not {shown(finalized)}.")
    return finalized


def _check_functions(variant: Variant) -> None:
    """Check that the variant has its two functions, and that `forward` can be called as it will be."""
    name = type(variant).__name__
    for function, arguments in (("params", "self, site"), ("forward", "self, x, base, p")):
        if getattr(type(variant), function) is getattr(Variant, function):
            raise ConfigError(f"{name} has no function {function}. Write def {function}({arguments}) in the class.")
    signature = inspect.signature(variant.forward)
    try:
        signature.bind(None, base=None, p=None)
    except TypeError as error:
        raise ConfigError(
            f"{name}.forward{signature} is called as forward(x, base=base, p=p), {error}."
            " Write def forward(self, x, base, p)."
        ) from error


def operands_of(variant: Variant, site: Site, model: nn.Module) -> Hashable:
    """Return all that a run of `forward` on stand-ins depends on but the site itself."""
    weight = stored_weight(model, site)
    x = _example(site, weight)
    tensors = tuple((name, spec.shape, spec.dtype) for name, spec in variant.params(site).items())
    return variant, tensors, site.kind, site.bias is None, weight.shape, weight.dtype, x.shape, x.dtype


def _specs(variant: Variant, site: Site) -> Mapping[str, ParamSpec]:
    """Return what `params` returns, if that is of the right form."""
    who = described(variant, "params", site)
    with naming(variant, "params", site):
        specs = variant.params(site)
    if not isinstance(specs, Mapping):
        raise ConfigError(f'{who} must return a dict such as {{"lora_A": ParamSpec((4, 8))}}, not {shown(specs)}.')
    for name, spec in specs.items():
        if not isinstance(spec, ParamSpec):
            raise ConfigError(f"{who} must map names to ParamSpec, and gives {shown(spec)} for {name!r}.")
    return specs


def _check_names(variant: Variant, site: Site, names: Iterable[str], taken: Set[str]) -> None:
    """Check the names of tensors; `taken` are those that the module of the site has."""
    for name in names:
        who = f"{described(variant, 'params', site)} calls a tensor {name!r}"
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigError(f"{who}, and forward could not read p.{name}: a name must be a Python identifier.")
        if name in _OF_THE_SITE or hasattr(nn.Module, name) or name in taken:
            better = "" if name.startswith("lora_") else f", such as 'lora_{name}'"
            raise ConfigError(
                f"{who}, and the module of the site has something of that name, which the tensor would hide."
                f" Choose another name{better}."
            )


def _check_shared(
    variant: Variant, site: Site, specs: Mapping[str, ParamSpec], shared: dict[str, tuple[Site, ParamSpec]]
) -> None:
    """Check the tensors that all sites share against those that earlier sites have put into `shared`."""
    for name, spec in specs.items():
        if not name.startswith(SHARED):
            continue
        if variant.slots and spec.trainable:
            raise ConfigError(
                f"{type(variant).__name__} cannot be a bank, because all its sites share a trained tensor, {name!r},"
                " of which the slots would have one together."
            )
        first, earlier = shared.setdefault(name, (site, spec))
        if _comparable(spec) != _comparable(earlier):
            raise ConfigError(
                f"{type(variant).__name__}.params: {name!r} is one tensor for all sites, and must be the same at each."
                f" It is {earlier} at {first.name!r} (d_in={first.d_in}, d_out={first.d_out}), and {spec} at"
                f" {site.name!r} (d_in={site.d_in}, d_out={site.d_out}). Give it the largest size and let each site use"
                " a part of it, or choose sites of one size."
            )


def _comparable(spec: ParamSpec) -> ParamSpec:
    # Functions are not compared: `params` may make a new one at each call.
    return replace(spec, init="zeros") if callable(spec.init) else spec


def _example(site: Site, stored: Tensor) -> Tensor:
    """Return an example input of the site, with as many dimensions as the model's."""
    example, _ = site.kind.example(stored)
    value = site.calls[0].x.meta.get("val") if site.calls else None
    if not isinstance(value, Tensor):
        return example
    more = value.dim() - example.dim()
    shape = (2,) * more + tuple(example.shape)[max(-more, 0) :]
    return torch.empty(shape, dtype=value.dtype, device=example.device)


_rehearsed: Remembered[Dependencies] = Remembered()


def rehearse(variant: Variant, site: Site, model: nn.Module) -> Dependencies:
    """Return what `forward` reads at a site apart from tensors.

    It is run once in a process for all sites that it cannot tell apart.

    Args:
        variant: the config for the site; its adapter is a bank if it has slots.
        site: the site.
        model: has its frozen tensors.

    Raises:
        ConfigError: `forward` fails or breaks a rule; or the site cannot have a bank.
    """
    site = site.with_bank(variant.slots) if variant.slots else site
    return _rehearsed.at(operands_of(variant, site, model), site, partial(_run_through, variant, site, model))


def _run_through(variant: Variant, site: Site, model: nn.Module) -> tuple[Dependencies, Dependencies]:
    """Run `forward` on stand-ins: twice in training mode and, if it reads the mode, in evaluation mode.

    Return what it reads, twice: it is the result of the run, and what the run depends on.
    """
    stored, bias = stored_weight(model, site), stored_bias(model, site)
    stage = Stage()
    x = stage.like(_example(site, stored))
    dtype = x.dtype if x.dtype.is_floating_point else stored.dtype
    shape = site.kind.factor(stored).shape
    with naming(variant, "params", site):
        specs, of_adapter = variant.tensor_specs(site).items(), variant.param_dtype(stored.dtype)
        tensors = stage.make(lambda: {name: spec.empty(of_adapter, stored.device).detach() for name, spec in specs})
    operands = Operands(
        x=x,
        weight=stage.like(stored),
        bias=None if bias is None else stage.like(bias),
        tensors=tensors,
        routing=stage.make(lambda: site.kind.example_routing(x, site.experts)),
        # The gradient tells whether the result depends on the product.
        factor=stage.make(lambda: torch.empty(shape, dtype=dtype, device=stored.device, requires_grad=True)),
    )
    read_only = {"x": x, "base.weight": operands.weight, "base.bias": operands.bias}
    read_only |= {f"p.{name}": tensor for name, tensor in tensors.items()}
    dependencies = Dependencies()

    def run(training: bool) -> list[str]:
        with naming(variant, "forward", site, {"x": x, **tensors}):
            run_here = partial(run_forward, variant, site, operands, training, dependencies, sizes_are_known=True)
            return stage.run(run_here, read_only)[1]

    if differ := first_difference(run(training=True), run(training=True)):
        raise ConfigError(
            f"{described(variant, 'forward', site)} does not compute the same at each call: it runs {differ[0]}, and"
            f" {differ[1]} the next time. A graph keeps the first. The way out: draw random numbers with torch, such as"
            " torch.rand_like(x), and keep what is the same at each call in fields of the config."
        )
    if dependencies.training:
        run(training=False)
    return dependencies, dependencies
