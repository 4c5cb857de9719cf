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
from ..execution.optimize import execution_of
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
        model: the model, which is not changed; or the graph that `capture` made of it, as long as the model exists.
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
    adapters = as_adapters(cfg)
    check_calibration(calibration)
    gm = base_graph(model, example_inputs)
    if isinstance(model, fx.GraphModule):
        model = _source_of(model)
    new_adapters = choose_sites(gm, adapters, calibration)
    wrapped, flow = _copy(model, gm), _flow(gm)
    warn_of_moving_buffers(wrapped, stacklevel=3)
    for adapter, new_adapter in enumerate(new_adapters):
        for site in new_adapter.sites:
            module = _adapted(wrapped, site)
            inner = [each.adapter_name for each in module.placements]
            placement = Placement.of(new_adapter.variant, adapter, site, inner, new_adapter.adapter_name)
            weight = _add(module, placement, wrapped, site, gm, flow)
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
    wrapped, flow = _copy(model, gm), _flow(gm)
    modules = dict(model.named_modules())
    for placement in placements(gm):
        site = sites.get(placement.site)
        if site is None or placement.site.partition(".sites.")[0] not in modules:
            missing = f"{type(model).__name__} has no site {placement.site!r}, at which the graph has an adapter."
            raise AdapterError(f"{missing} The way out: pass the model that the graph was made of.")
        _add(_adapted(wrapped, site), placement, wrapped, site, gm, flow)
    load_adapter_values(wrapped, adapter_values(gm))
    put_buffers(wrapped, moved_buffers(gm))
    if isinstance(gm, AdaptedGraphModule):
        vars(wrapped)["switches"] = gm.switches
    return wrapped


def _copy(model: nn.Module, gm: fx.GraphModule) -> nn.Module:
    """Return a copy of `model` over the same weights, with buffers of its own where its graph `gm` writes to them."""
    copied: nn.Module = shared_copy(model)
    leave_out_clamps(copied)
    buffers = dict(copied.named_buffers(remove_duplicate=False))  # a constant that was lifted into the graph is none
    base = {name: buffers[name] for name in written_buffers(gm) if name in buffers}
    own_buffers(copied, base)
    vars(copied)["base_buffers"] = base
    vars(copied)["switches"] = Switches()
    return copied


def _flow(gm: fx.GraphModule) -> RowFlow | str:
    """Return where the rows of the batch are in the graph of a model, or why that cannot be told."""
    try:
        return follow_rows(gm.graph)
    except AdapterError as error:
        return str(error)


def _add(
    module: AdaptedLinear,
    placement: Placement,
    wrapped: nn.Module,
    site: Site,
    gm: fx.GraphModule,
    flow: RowFlow | str,
) -> Tensor:
    """Add an adapter, whose tensors are not filled yet, to a wrapper in `wrapped`; return the frozen weight there.

    Args:
        module: the wrapper.
        placement: the adapter.
        wrapped: the model that gets its tensors.
        site: its site in `gm`.
        gm: the graph of the model.
        flow: the rows of the batch in `gm`, or why they cannot be told.
    """
    module.batch = _rows(flow, site)
    if placement.local.slots:
        module._dim_of_rows()
    weight = module.site.kind.matrix(module.frozen_weight().detach())
    placement.register(wrapped, module.site, weight)
    module.add(placement, wrapped, rehearse(placement.local, site, gm))
    return weight


def _rows(flow: RowFlow | str, site: Site) -> int | str:
    """Return the dimension that counts the rows of the batch in all calls of a site, or why it cannot be told."""
    if isinstance(flow, str):
        return flow
    try:
        dims = {batch_dim(flow, call.y, site.name) for call in site.calls}
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
    source = execution_of(graph).source()
    if source is None:
        raise AdapterError("wrap needs the model that the graph was captured from, and it does not exist any more.")
    return source


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


_PLAIN = (nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _adapted(model: nn.Module, site: Site) -> AdaptedLinear:
    """Return the wrapper of the module that is `site`; put it in the place of the module if it is new.

    Raises:
        ConfigError: the site is not a module that can be wrapped.
    """
    replaced_only = site.kind.replaced_only  # whatever else the module computes
    computed = site.computed_weight is not None or site.computed_bias is not None
    module = model.get_submodule(site.name) if is_called(model, site) else None
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
            f"Site {site.name!r} is not a module that is called and does nothing else, so it cannot be wrapped eagerly;"
            " rewrite can adapt it."
        )
    wrapper = AdaptedLinear(module, site)
    replace_modules(model, {module: wrapper})
    return wrapper
