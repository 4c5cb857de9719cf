"""`loftq`: let LoRA on a quantized base start from what the quantization took away."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ..adapters.placement import Placement, graph_of, placements, site_weight
from ..adapters.state import adapter_values, load_adapter_values
from ..errors import AdapterError, ConfigError
from ..graph.tensors import outside_inference_mode
from ..sites.finding import find_sites
from ..sites.site import Site
from ..variants.lora import LoRA


@outside_inference_mode()
@torch.no_grad()
def loftq(model: nn.Module, dense: nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Let the LoRA of each quantized site start as the best factors of the quantization error, in place.

    With `W` the dense weight and `Q` the quantized one, `s B A` becomes the matrix of rank `r` that is nearest to
    `W - Q`, by its singular values: the step that LoftQ (https://arxiv.org/abs/2310.08659) repeats, for a base that is
    quantized already. So the adapted model starts nearer to the dense one than its base is. Other sites keep their
    start.

    Args:
        model: a result of `rewrite` or `adapt` with LoRA alone, before it is trained: its factors are overwritten.
        dense: the model before it was quantized, or its tensors by qualified name, as a state dict has them.

    Returns:
        By site, how far `Q` and how far `Q + s B A` is from `W`, as multiples of the norm of `W`.

    Raises:
        ConfigError: an adapter is not a LoRA without a bias.
        AdapterError: `model` has no graph or no adapter at a quantized site, or a dense weight is missing or of another
            shape. Nothing is changed.
    """
    gm = graph_of(model)
    if not isinstance(gm, fx.GraphModule):
        raise AdapterError(f"loftq takes a result of rewrite or adapt, not a {type(model).__name__}.")
    weights: Mapping[str, Tensor] = dense.state_dict() if isinstance(dense, nn.Module) else dense
    sites = {site.name: site for site in find_sites(gm) if site.computed_weight is not None}
    state: dict[str, Tensor] = {}
    distances: dict[str, tuple[float, float]] = {}
    for placement in placements(gm):
        if placement.site in sites:
            site = sites[placement.site]
            factors, distances[site.name] = _start(gm, site, placement, weights)
            state |= {placement.tensors[name]: tensor for name, tensor in factors.items()}
    if not state:
        raise AdapterError("loftq: the model has no adapter at a quantized site, so there is no error to start from.")
    load_adapter_values(model, {**adapter_values(model), **state})
    return distances


def _start(
    gm: fx.GraphModule, site: Site, placement: Placement, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Return the factors, and the distances before and after."""
    variant = placement.local
    if type(variant) is not LoRA or variant.bias:
        raise ConfigError(
            f"loftq starts LoRA without a bias, and {site.name!r} has {type(variant).__name__}. The way out: PiSSA and"
            " its like start from the quantized weight by themselves."
        )
    quantized = site_weight(gm, site)
    exact = weights.get(site.weight)
    if exact is None or exact.shape != quantized.shape or not exact.is_floating_point():
        there = "is not there" if exact is None else f"is {tuple(exact.shape)} of {exact.dtype}"
        raise AdapterError(
            f"loftq needs the dense weight {site.weight!r} {tuple(quantized.shape)}, which {there} in `dense`. The way"
            " out: pass the model before it was quantized, or its state dict."
        )
    exact = exact.to(quantized.device, torch.float32)
    error = exact - quantized.float()
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    root = values[: variant.r].sqrt()
    factors = {
        "lora_A": root[:, None] * right[: variant.r],
        "lora_B": left[:, : variant.r] * root / variant.scale,
    }
    norm = float(exact.norm())
    distances = (float(values.norm()) / norm, float(values[variant.r :].norm()) / norm)
    old = placement.namespace(gm)
    return {name: tensor.to(getattr(old, name)) for name, tensor in factors.items()}, distances
