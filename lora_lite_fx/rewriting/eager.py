"""`wrap`: put the same variants on ordinary modules. The eager wrapper defines what a rewritten graph must compute."""

from __future__ import annotations

from torch import Tensor, fx, nn

from ..adapters.changed_buffers import moved_buffers, put_buffers, warn_of_moving_buffers
from ..adapters.contract import rehearse
from ..adapters.named_configs import Config, as_adapters
from ..adapters.placement import Placement, adapter_tensor_names, placements
from ..adapters.start_values import initialize
from ..adapters.state import adapter_values, load_adapter_values
from ..adapters.switches import Switches
from ..capture.capture_model import Inputs
from ..capture.origins.transformers_model import leave_out_clamps
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError, ConfigError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.insertion import inner_name, is_inserted
from ..graph.replacing import replace_modules
from ..graph.tensors import outside_inference_mode
from ..graph.writes import own_buffers, written_buffers
from ..sites.batch.batch_dimension import batch_dim, follow_rows
from ..sites.batch.follow_rows import RowFlow
from ..sites.computed import frozen_values
from ..sites.dataflow import nodes_with_data, op_name
from ..sites.finding import find_sites
from ..sites.site import Site, is_called, span
from ..storage.dequantized import DequantizedLinear
from .adapted_linear import AdaptedLinear
from .capture import base_graph
from .choose_sites import Batches, check_calibration, choose_sites
from .model_of_graph import model_of_graph


@outside_inference_mode()
def wrap(
    model: nn.Module,
    cfg: Config,
    example_inputs: Inputs | None = None,
    *,
    calibration: Batches | None = None,
) -> nn.Module:
    """Return a copy of `model`, of the same class and with the weights shared, whose targeted modules are wrapped.

    The copy computes the same as the result of `rewrite`, in plain eager modules. It is the reference for a rewritten
    graph, and a debugger can step through it. The sites are those of `rewrite`, so the model is captured once.

    Args:
        model: the model, which is not changed; or the graph that `capture` made of it.
        cfg: as for `rewrite`.
        example_inputs: as for `rewrite`.
        calibration: as for `rewrite`.

    Returns:
        The copy, in the model's mode. Only the adapters' parameters require grad.

    Raises:
        ConfigError: as `rewrite`; or a site is not a module of its own, such as a weight used functionally or experts;
            or a module does more than multiply.
        SelectionError, CaptureError: as `rewrite`.
    """
    adapters = as_adapters(cfg, model)
    check_calibration(calibration)
    gm = base_graph(model, example_inputs)
    if isinstance(model, fx.GraphModule):
        model = _source_of(model)
    new_adapters = choose_sites(gm, adapters, calibration)
    copied = _Copy(model, gm)
    wrapped = copied.model
    warn_of_moving_buffers(wrapped, stacklevel=3)
    for adapter, new_adapter in enumerate(new_adapters):
        for site in new_adapter.sites:
            module = copied.wrapper_of(site)
            inner = [each.adapter_name for each in module.placements]
            placement = Placement.of(new_adapter.variant, adapter, site, inner, new_adapter.adapter_name)
            weight = copied.add(module, placement, site)
            bias = site.own_bias(module.frozen_bias())
            observed, tensors = new_adapter.statistics.get(site.name), placement.namespace(wrapped)
            initialize(placement.local, site, weight, tensors, observed, bias)
    return wrapped


def wrap_again(gm: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Return a copy of `model` that has the adapters of `gm`, with their values, in wrapped modules.

    Args:
        gm: a rewritten graph.
        model: the model that it was made of; it is not changed.

    Raises:
        AdapterError: the model lacks a site of the graph.
        ConfigError: a site is not a module of its own.
    """
    sites = {site.name: site for site in find_sites(gm)}
    copied = _Copy(model, gm)
    modules = dict(model.named_modules())
    for placement in placements(gm):
        site = sites.get(placement.site)
        if site is None or placement.site.partition(".sites.")[0] not in modules:
            missing = f"{type(model).__name__} has no site {placement.site!r}, at which the graph has an adapter."
            raise AdapterError(f"{missing} The way out: pass the model that the graph was made of.")
        copied.add(copied.wrapper_of(site), placement, site)
    wrapped = copied.model
    load_adapter_values(wrapped, adapter_values(gm))
    put_buffers(wrapped, moved_buffers(gm))
    if isinstance(gm, AdaptedGraphModule):
        vars(wrapped)["switches"] = gm.switches
    return wrapped


_PLAIN = (nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class _Copy:
    """A copy of a model over the same weights, whose modules get adapters.

    Args:
        model: the model, which is not changed.
        gm: its graph, which has the sites. The copy has buffers of its own where the graph writes to them.
    """

    def __init__(self, model: nn.Module, gm: fx.GraphModule) -> None:
        self.model: nn.Module = shared_copy(model)
        self._gm = gm
        leave_out_clamps(self.model)
        # A constant that was lifted into the graph is not among the buffers of the model.
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        base = {name: buffers[name] for name in written_buffers(gm) if name in buffers}
        own_buffers(self.model, base)
        vars(self.model)["base_buffers"] = base
        vars(self.model)["switches"] = Switches()
        self._flow: RowFlow | str  # where the rows of the batch are in the graph, or why that cannot be told
        try:
            self._flow = follow_rows(gm.graph)
        except AdapterError as error:
            self._flow = str(error)

    def add(self, module: AdaptedLinear, placement: Placement, site: Site) -> Tensor:
        """Add an adapter, whose tensors are not filled yet, to the wrapper of a site. Return the frozen weight."""
        module.batch = self._rows(site)
        if placement.local.slots:
            module._dim_of_rows()
        weight = module.site.kind.matrix(module.frozen_weight().detach())
        placement.register(self.model, module.site, weight)
        module.add(placement, self.model, rehearse(placement.local, site, self._gm))
        return weight

    def wrapper_of(self, site: Site) -> AdaptedLinear:
        """Return the wrapper of the module that is `site`; put it in the place of the module if it is new.

        Raises:
            ConfigError: the site is not a module that can be wrapped.
        """
        replaced_only = site.kind.replaced_only  # whatever else the module computes
        computed = site.computed_weight is not None or site.computed_bias is not None
        module = self.model.get_submodule(site.name) if is_called(self.model, site) else None
        if isinstance(module, AdaptedLinear):
            return module
        if not (replaced_only or isinstance(module, DequantizedLinear) or _is_all(site)):
            module = None
        simple = module is not None and (
            site.kind.vector_dims > 0
            or (replaced_only and not computed)  # which the module would compute again
            or (type(module).forward in _PLAIN and getattr(module, "padding_mode", "zeros") == "zeros")
        )
        named = site.computed_weight is not None or isinstance(getattr(module, "weight", None), Tensor)
        if module is None or not named or site.experts or not simple:
            raise ConfigError(
                f"Site {site.name!r} is not a module that is called and does nothing else, so it cannot be wrapped"
                " eagerly; rewrite can adapt it."
            )
        wrapper = AdaptedLinear(module, site)
        replace_modules(self.model, {module: wrapper})
        return wrapper

    def _rows(self, site: Site) -> int | str:
        """Return the dimension that counts the rows of the batch in all calls of a site, or why it cannot be told."""
        if isinstance(self._flow, str):
            return self._flow
        try:
            dims = {batch_dim(self._flow, call.y, site.name) for call in site.calls}
        except AdapterError as error:
            return str(error)
        if len(dims) == 1:
            return dims.pop()
        return (
            f"{site.name!r} has the rows of the batch in several dimensions of its calls, so a bank, or coefficients of"
            " rows, cannot be wrapped eagerly there; rewrite can adapt it."
        )


def _source_of(graph: fx.GraphModule) -> nn.Module:
    """Return the model that `graph` was captured from; the graph itself if it was not captured here."""
    if adapter_tensor_names(graph):
        raise AdapterError(
            "wrap takes a model, or a graph that capture returned, and this graph has adapters. The way out:"
            " wrap(model, [cfg, ...]) with all configs at once."
        )
    if not isinstance(graph, AdaptedGraphModule):
        return graph
    model: nn.Module = model_of_graph(graph, "wrap", "wrap(model, cfg)")[0]
    return model


_ROWS = frozenset({"view", "reshape", "flatten", "unflatten", "contiguous"})
"""The operations by which a module makes a matrix of its input, and undoes that: part of its linear."""


def _is_all(site: Site) -> bool:
    """Return whether the modules called like `site` compute nothing from data but its calls, adapters left out."""
    graph = site.calls[0].node.graph
    own = {node for call in site.calls for node in span(call.x, call.y)} | frozen_values(graph)
    others = (
        node
        for node in nodes_with_data(graph) - own
        if node.op != "placeholder" and node.users and op_name(node) not in _ROWS and not is_inserted(node)
    )
    return all(inner_name(node) != site.name for node in others)
