"""Which sites PEFT adapts as we do: where it computes something else, a file is neither read nor written."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...adapters.variant import Variant
from ...errors import ConfigError
from ...graph.provenance import inner_name
from ...sites.dataflow import op_name
from ...sites.kinds.convolution import Convolution
from ...sites.matching import Call
from ...sites.site import Site
from ...variants import IA3, OFT, FourierFT, SHiRA, WaveFT
from .form import PeftFormat
from .variants import format_of


def check_site(variant: Variant, site: Site, as_module: bool = True) -> None:
    """Raise `ConfigError` if PEFT does not have `variant` at `site`, or computes something else there.

    Args:
        variant: the config.
        site: the site.
        as_module: whether PEFT would adapt its module, and not a parameter.
    """
    reason = next(_reasons(variant, site), None) if as_module else None
    if reason is not None:
        raise ConfigError(f"{type(variant).__name__}: PEFT {reason}, and {site.name!r} is {site.kind.article}.")


def _reasons(variant: Variant, site: Site) -> Iterator[str]:
    """Yield the reasons against a site, in words that follow "PEFT"."""
    form, kind = format_of(variant), site.kind
    if isinstance(variant, OFT) and isinstance(kind, Convolution):
        if not all(_is_one_patch(kind, call) for call in site.calls):
            yield "turns patches and adds up their overlaps, which no weight computes"
        return
    if kind.name not in form.kinds:
        yield f"has it for {', '.join(form.kinds)} only"
    if kind.name == "embedding" and getattr(variant, "bias", False):
        yield "has no bias at an embedding"
    if (
        isinstance(variant, SHiRA)
        and variant.for_site(site.name).params(site)["lora_S"].shape[0] == site.d_in * site.d_out
    ):
        yield "wants fewer entries of SHiRA than the weight has"
    if isinstance(variant, (FourierFT, WaveFT)) and variant.for_site(site.name).n_frequency > site.d_in * site.d_out:
        yield "wants no more coefficients than the weight has entries"
    if isinstance(kind, Convolution):
        yield from _reasons_of_convolution(variant, form, site, kind)


def _reasons_of_convolution(variant: Variant, form: PeftFormat, site: Site, kind: Convolution) -> Iterator[str]:
    if len(kind.kernel) not in form.kernels:
        yield f"has it for convolutions of {' or '.join(map(str, form.kernels))} dimensions"
    if not isinstance(variant, IA3) and any(_pads_before(site, call) for call in site.calls):
        yield "pads with zeros where the module pads otherwise"
    if form.own_conv:
        if set(kind.dilation) != {1}:
            yield "has no dilation there"
        if form.kernels == (2,) and any(len(set(setting)) > 1 for setting in (kind.kernel, kind.stride, kind.padding)):
            yield "takes one kernel size, stride and padding for all dimensions there"


def _pads_before(site: Site, call: Call) -> bool:
    """Return whether the module of a convolution pads its input itself, which it does unless that is with zeros."""
    return "pad" in op_name(call.x) and inner_name(call.x) == site.name


def _is_one_patch(kind: Convolution, call: Call) -> bool:
    """Return whether no two patches of a convolution overlap, because there is one, or each is a point."""
    if set(kind.kernel) == {1}:
        return True
    value = call.x.meta.get("val")
    sizes = tuple(value.shape[-len(kind.kernel) :]) if isinstance(value, Tensor) else ()
    fixed = all(type(size) is int for size in sizes)
    return len(kind.kernel) == 2 and set(kind.padding) == {0} and fixed and sizes == kind.kernel
