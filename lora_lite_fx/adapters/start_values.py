"""Let a variant observe data and write the start values of its tensors, and check what it does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture.function_tracing.rehearsal import Watch
from ..errors import ConfigError, shown
from ..graph.insertion import SHARED
from ..graph.tensors import has_values
from ..sites.site import Site
from .calibration_data import Statistic
from .maths import wide
from .naming import described, naming
from .param_spec import ParamSpec, one_of
from .variant import Variant


@torch.no_grad()
def initialize(
    variant: Variant,
    site: Site,
    weight: Tensor,
    p: Any,
    statistic: Statistic | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write all start values into `p`, in place, except those of shared tensors.

    Args:
        variant: the config for this site.
        site: the site.
        weight: its frozen weight `(d_out, d_in)`; of experts, `(experts, d_out, d_in)`.
        p: the adapter's tensors there.
        statistic: the variant's observation of the site on calibration data, or None without such data.
        bias: the frozen bias `(d_out,)`, if there is one.

    Raises:
        ConfigError: the variant fails, writes to the weight, puts another tensor in the place of its own, or leaves
            values that are not finite.
    """
    if weight.dim() == 3:
        for expert, matrix in enumerate(weight):
            initialize(variant, site, matrix, one_of(p, expert), statistic)
        return
    if variant.slots:
        one = dataclasses.replace(variant, slots=None)
        for slot in range(variant.slots):
            initialize(one, site, weight, one_of(p, slot), statistic, bias)
        return
    tensors: dict[str, Tensor] = vars(p)
    for name, spec in variant.params(site).items():
        if not name.startswith(SHARED):
            fill(variant, site, name, spec, tensors[name])
    if bias is not None and type(variant).init_bias is not Variant.init_bias:
        with _writing(variant, "init_bias", site, p, bias=bias):
            variant.init_bias(site, bias, p)
    if statistic is None and type(variant).init is not Variant.init:
        with _writing(variant, "init", site, p, weight=(frozen := wide(weight))):
            variant.init(site, frozen, p)
    elif statistic is not None and type(variant).calibrate is not Variant.calibrate:
        with _writing(variant, "calibrate", site, p, weight=(frozen := wide(weight))):
            variant.calibrate(site, frozen, p, statistic)


@torch.no_grad()
def initialize_shared(variant: Variant, site: Site, weight: Tensor, p: Any) -> None:
    """Write the start values that follow from the weight into the tensors `p`, which all sites share.

    Args:
        variant, site, weight: as for `initialize`, at the first site.
        p: the shared tensors.

    Raises:
        ConfigError: as `initialize`.
    """
    if type(variant).init_shared is not Variant.init_shared:
        with _writing(variant, "init_shared", site, p, shared=True, weight=(frozen := wide(weight))):
            variant.init_shared(site, frozen, p)


@contextmanager
def _writing(
    variant: Variant, function: str, site: Site, p: Any, shared: bool = False, **frozen: Tensor
) -> Iterator[None]:
    """Let a function of `variant` write to the tensors `p` in the body, and check that it does so in place.

    Args:
        variant, site, p: as for `initialize`.
        function: its name.
        shared: whether it may write to tensors that sites share.
        frozen: what it may only read, by name.
    """
    tensors: dict[str, Tensor] = vars(p)
    of_all = {} if shared else {f"p.{name}": t for name, t in tensors.items() if name.startswith(SHARED)}
    read_only = frozen | of_all
    places = {name: (tensor.untyped_storage(), tensor.shape) for name, tensor in tensors.items()}
    with naming(variant, function, site, {**frozen, **tensors}), Watch(read_only):
        yield
    who = described(variant, function, site)
    for name, tensor in tensors.items():
        storage, shape = places[name]
        if tensor.untyped_storage() is not storage or tensor.shape != shape:
            raise ConfigError(
                f"{who} put another tensor {tuple(tensor.shape)} in the place of p.{name} {tuple(shape)} (.data = ...)."
                f" Write to it in place: p.{name}.copy_(...)."
            )
        _check_finite(tensor, f"{who} left {{}} of {name!r} NaN or infinite. Nothing would train from there.")


def observer_of(variant: Variant, site: Site, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the function by which `variant` observes the inputs of `site`, with checks around it; None without one.

    Args:
        variant: the config for this site.
        site: the site.
        weight: its frozen weight `(d_out, d_in)`.

    Raises:
        ConfigError: the variant fails, or writes to the weight. The function raises it too, also for a result that is
            not a tensor, or not of the size of earlier ones.
    """
    frozen = wide(weight)
    with naming(variant, "observer", site, {"weight": weight}), Watch({"weight": frozen}):
        observe = variant.observer(site, frozen)
    if observe is None:
        return None
    who = described(variant, "observer", site)
    shapes: set[torch.Size] = set()

    @functools.wraps(observe)
    def checked(inputs: Tensor, *more: Any) -> Tensor:
        if inputs.shape[-1] != site.d_in:  # of a batch that does not fit the model
            return observe(inputs, *more)
        with naming(variant, "observer", site, {"inputs": inputs}), Watch({"its inputs": inputs, "weight": weight}):
            observed = observe(inputs, *more)
        if not isinstance(observed, Tensor):
            raise ConfigError(f"{who}: the function must return a tensor to be summed up, not {shown(observed)}.")
        shapes.add(observed.shape)
        if len(shapes) > 1:
            sizes = " and ".join(sorted(str(tuple(shape)) for shape in shapes))
            raise ConfigError(
                f"{who}: the function returned tensors {sizes}, which cannot be summed up over batches. Sum over the"
                " tokens, as in x.T @ x."
            )
        return observed

    return checked


@torch.no_grad()
def fill(variant: Variant, site: Site, name: str, spec: ParamSpec, tensor: Tensor) -> None:
    """Write the start that `spec` gives into the tensor called `name`.

    Raises:
        ConfigError: the function of the spec fails, or leaves values that are not finite.
    """
    with naming(variant, "params", site, {name: tensor}):
        spec.fill(tensor)
    if callable(spec.init):
        who = f"{described(variant, 'params', site)}: the function init of {name!r}"
        _check_finite(tensor, f"{who} left {{}} NaN, infinite or unwritten. It must fill its argument in place.")


def _check_finite(tensor: Tensor, message: str) -> None:
    """Raise ConfigError with `message`, into which the number of values is put, if some are not finite."""
    if has_values(tensor) and not (finite := torch.isfinite(tensor)).all():
        raise ConfigError(message.format(f"{int((~finite).sum())} of {tensor.numel()} values"))
