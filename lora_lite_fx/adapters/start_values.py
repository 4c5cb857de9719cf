"""Let a variant observe data and write the start values of its tensors, and check what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.rehearsal import Watch, has_values
from ..errors import ConfigError, shown
from ..graph.provenance import SHARED
from ..sites.site import Site
from .maths import wide
from .naming import described, naming
from .param_spec import ParamSpec
from .variant import Statistic, Variant, of_expert


@torch.no_grad()
def initialize(variant: Variant, site: Site, weight: Tensor, p: Any, statistic: Statistic | None = None) -> None:
    """Write all start values into `p`, in place, except those of shared tensors.

    Args:
        variant: the config for this site.
        site: the site.
        weight: its frozen weight `(d_out, d_in)`; of experts, `(experts, d_out, d_in)`.
        p: the adapter's tensors there.
        statistic: the variant's observation of the site on calibration data, or None without such data.

    Raises:
        ConfigError: the variant fails, writes to the weight, puts another tensor in the place of its own, or leaves
            values that are not finite.
    """
    if weight.dim() == 3:
        for expert, matrix in enumerate(weight):
            initialize(variant, site, matrix, of_expert(p, expert), statistic)
        return
    tensors: dict[str, Tensor] = vars(p)
    for name, spec in variant.params(site).items():
        if not name.startswith(SHARED):
            fill(variant, site, name, spec, tensors[name])
    function, start = ("init", Variant.init) if statistic is None else ("calibrate", Variant.calibrate)
    if getattr(type(variant), function) is start:
        return
    frozen = wide(weight)
    read_only = {"weight": frozen} | {f"p.{name}": t for name, t in tensors.items() if name.startswith(SHARED)}
    places = {name: (tensor.untyped_storage(), tensor.shape) for name, tensor in tensors.items()}
    with naming(variant, function, site, {"weight": weight, **tensors}), Watch(read_only):
        if statistic is None:
            variant.init(site, frozen, p)
        else:
            variant.calibrate(site, frozen, p, statistic)
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
