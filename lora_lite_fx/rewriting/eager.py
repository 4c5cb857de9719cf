"""`wrap`: the eager wrapper, the same variants on ordinary modules. It defines what a rewritten graph must compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters.adapted_site import FrozenSite
from ..adapters.placement import Placement
from ..adapters.variant import adapter_namespace
from ..capture.capture import Inputs
from ..capture.share import share
from ..errors import ConfigError
from ..graph.tensors import tensor_of
from ..graph.writes import written_buffers
from ..sites.site import Site, is_called
from .base_graph import base_graph
from .calibration import Batches, check_calibration
from .plan import make_plans
from .rewrite import Config, as_variants


def wrap(
    model: nn.Module,
    cfg: Config,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    calibration: Batches | None = None,
) -> nn.Module:
    """A copy of `model`, of the same class and with the weights shared, whose targeted linears are wrapped.

    It computes what `rewrite` computes, in plain eager modules: the reference semantics, and a way to step through
    a variant in a debugger. The sites are found as `rewrite` finds them, which captures the model once.

    Args:
        model, cfg, example_inputs, dynamic_shapes, calibration: as for `rewrite`; `model` is not changed.

    Returns:
        The copy, in the model's mode. Only the adapters' parameters require grad.

    Raises:
        As `rewrite`; ConfigError also for a site that is no module of its own (a weight used functionally, experts).
    """
    variants = as_variants(cfg)
    check_calibration(calibration)
    gm = base_graph(model, example_inputs, dynamic_shapes, checkpoint_layers=False)
    plans = make_plans(gm, variants, calibration)
    wrapped = share(model)
    for name in written_buffers(gm):
        path, _, leaf = name.rpartition(".")
        setattr(wrapped.get_submodule(path), leaf, getattr(wrapped.get_submodule(path), leaf).clone())
    for adapter, plan in enumerate(plans):
        for site in plan.sites:
            module = _adapted(wrapped, site)
            names = tuple(plan.variant.for_site(site.name).tensor_specs(site))
            placement = Placement(plan.variant, adapter, site.name, len(module.placements), names)
            placement.register(wrapped, site, module.weight.dtype, module.weight.device)
            module.add(placement, wrapped)
            placement.initialize(
                wrapped, site, site.kind.matrix(module.weight.detach()), plan.statistics.get(site.name)
            )
    return wrapped


class AdaptedLinear(nn.Module):
    """A frozen linear, embedding or convolution module with adapters around it.

    Args:
        base: the module; called as it is.
        site: the site it is.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.placements: list[Placement] = []
        self.train(base.training)
        # nn.TransformerEncoderLayer's fast path reads the weights of its linears, unless there is a hook.
        self.register_forward_hook(_keep)

    def add(self, placement: Placement, model: nn.Module) -> None:
        """Put an adapter around those there are. Its tensors must be registered in `model`, of which this is a part."""
        self.placements.append(placement)
        for path in placement.tensors.values():
            if "." not in path:  # shared with other sites
                self.register_buffer(path, tensor_of(model, path), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as the module stores it; some models read it from outside."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias `(d_out,)`, or None."""
        return getattr(self.base, "bias", None)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The adapted linear; its one argument may be passed by any name, as to the module it wraps."""
        (x,) = (*args, *kwargs.values())
        around = [(placement.local, self._tensors(placement)) for placement in self.placements]
        return FrozenSite(self.site, self.weight, self.bias, self.training).adapted(self.base, around, x)

    def _tensors(self, placement: Placement) -> Any:
        # The qualified names end in attributes of this module, wherever in the model it is.
        return adapter_namespace(
            {name: getattr(self, path.rpartition(".")[2]) for name, path in placement.tensors.items()}
        )


def _keep(*_: Any) -> None:
    """A hook that changes nothing."""


_PLAIN = (nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward)


def _adapted(model: nn.Module, site: Site) -> AdaptedLinear:
    """The wrapper of the module that is `site`, put in its place wherever it is registered."""
    module = model.get_submodule(site.name) if is_called(model, site) else None
    if isinstance(module, AdaptedLinear):
        return module
    weight = getattr(module, "weight", None)
    simple = module is not None and (
        site.kind.name == "linear"
        or (type(module).forward in _PLAIN and getattr(module, "padding_mode", "zeros") == "zeros")
    )
    if module is None or not isinstance(weight, Tensor) or site.experts or not simple:
        raise ConfigError(
            f"Site {site.name!r} is not a module that is called and does nothing else, so it cannot be wrapped eagerly;"
            " rewrite can adapt it."
        )
    wrapper = AdaptedLinear(module, site)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module and parent is not wrapper:
                parent._modules[name] = wrapper
    return wrapper
