"""`wrap`: put the same variants on ordinary modules. The eager wrapper defines what a rewritten graph must compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..adapters.bank import check_rows, check_slots, ids_of
from ..adapters.beneath import is_beneath, require_tensors, rows_of_replaced
from ..adapters.changed_buffers import moved_buffers, put_buffers, warn_of_moving_buffers
from ..adapters.contract import rehearse
from ..adapters.dependencies import Dependencies
from ..adapters.frozen_site import FrozenSite
from ..adapters.named_configs import Config, as_adapters
from ..adapters.placement import Placement, adapter_tensor_names, placements
from ..adapters.state import adapter_values, load_adapter_values
from ..adapters.switches import Switches
from ..adapters.variant import adapter_namespace
from ..capture.capture_model import Inputs
from ..capture.origins.transformers_model import leave_out_clamps
from ..capture.shared_copy import shared_copy
from ..compat.torch import MODULES
from ..errors import AdapterError, ConfigError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.optimize import execution_of
from ..graph.provenance import inner_name, is_inserted
from ..graph.replacing import replace_modules
from ..graph.tensors import outside_inference_mode
from ..graph.writes import own_buffers, written_buffers
from ..sites.batch.batch_dimension import batch_dim, follow_rows
from ..sites.batch.follow_rows import RowFlow
from ..sites.computed import Computation, frozen_values
from ..sites.dataflow import SIZES, op_name
from ..sites.finding import find_sites
from ..sites.site import Site, is_called, span
from ..storage.dequantized import DequantizedLinear
from .calibration import Batches, check_calibration
from .capture import base_graph
from .plan import make_plans


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
        cfg, example_inputs, calibration: as for `rewrite`.

    Returns:
        The copy, in the model's mode. Only the adapters' parameters require grad.

    Raises:
        As `rewrite`. ConfigError also for a site that is not a module of its own, such as a weight used functionally
        or experts, and for a module that does more than multiply.
    """
    adapters = as_adapters(cfg)
    check_calibration(calibration)
    gm = base_graph(model, example_inputs)
    if isinstance(model, fx.GraphModule):
        model = _source_of(model)
    plans = make_plans(gm, adapters, calibration)
    wrapped, flow = _copy(model, gm), _flow(gm)
    warn_of_moving_buffers(wrapped, stacklevel=3)
    for adapter, plan in enumerate(plans):
        for site in plan.sites:
            module = _adapted(wrapped, site)
            inner = [each.adapter_name for each in module.placements]
            placement = Placement.of(plan.variant, adapter, site, inner, plan.adapter_name)
            weight = _add(module, placement, wrapped, site, gm, flow)
            bias = site.own_bias(module.frozen_bias())
            placement.initialize(wrapped, site, weight, bias, plan.statistics.get(site.name))
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
    slots = placement.local.slots
    module.add(placement, wrapped, rehearse(placement.local, site.with_bank(slots) if slots else site, gm))
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


class AdaptedLinear(nn.Module):
    """A frozen linear, embedding or convolution module with adapters around it.

    Args:
        base: the module, which is called unchanged.
        site: the site that the module is.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = replace(site, calls=())  # nodes of a graph, which a copy of this module would copy
        self.placements: list[Placement] = []
        self.batch: int | str = 0  # the dimension that counts the rows of the batch, or why it is not known
        self.dependencies: dict[int, Dependencies] = {}  # by the index of an adapter
        self.computed_weight = _inside(site, site.computed_weight)
        self.computed_bias = _inside(site, site.computed_bias)
        # A quantized linear casts its input to the type in which it multiplies, and the site is between the casts.
        self.inner_dtype: torch.dtype | None = None
        if isinstance(base, DequantizedLinear) and "val" in site.calls[0].x.meta:
            self.inner_dtype = base.compute_dtype
        self.training = base.training
        # Without a hook, nn.TransformerEncoderLayer may take its fast path, which reads the weights of its linears.
        self.register_forward_hook(_keep)

    def add(self, placement: Placement, model: nn.Module, dependencies: Dependencies) -> None:
        """Put an adapter around the present ones.

        Args:
            placement: the adapter. Its tensors are registered in `model`.
            model: contains this.
            dependencies: what its `forward` reads.

        Raises:
            ConfigError: it reads a weight, and the adapters below it leave none.
        """
        self.dependencies[placement.adapter] = dependencies
        for inner in self._beneath(placement, self.placements):
            require_tensors(inner.local, self.site, type(placement.variant).__name__)
        self.placements.append(placement)
        # Not a submodule: a tensor that all sites share is the model's alone, and read there when it is used.
        vars(self)["adapted_model"] = model

    def _dim_of_rows(self) -> int:
        """Return the dimension of the input and the output that counts the rows of the batch.

        Raises:
            AdapterError: the graph of the model does not tell which row is which there.
        """
        if isinstance(self.batch, str):
            raise AdapterError(self.batch)
        return self.batch

    def frozen_weight(self) -> Tensor:
        """Return the frozen weight as the site stores it: the module's, or computed from the module's tensors.

        With its gradient, for a parameter of the base that trains.
        """
        return self.weight if self.computed_weight is None else self.computed_weight.value(self.base)

    def frozen_bias(self) -> Tensor | None:
        """Return the frozen bias as the site stores it, or None."""
        return self.bias if self.computed_bias is None else self.computed_bias.value(self.base)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as the module stores it. Some models read it from outside."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias `(d_out,)`, or None."""
        return getattr(self.base, "bias", None)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped module, because models read some (`in_features`) from outside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = vars(self).get(MODULES, {})  # without the base while the wrapper is made, copied or read
            if "base" not in modules or name.startswith("__"):
                raise
            return getattr(modules["base"], name)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Compute the adapted module. Its one argument may have any name, as for the module that it wraps."""
        (x,) = (*args, *kwargs.values())
        switches: Switches = vars(self)["adapted_model"].switches
        frozen = FrozenSite(self.site, self.frozen_weight(), self.frozen_bias(), self.training)
        call: Callable[..., Tensor] = self._call
        acting = [placement for placement in self.placements if switches.acts(placement.adapter_name)]
        for index, placement in enumerate(acting):
            read = frozen
            for inner in self._beneath(placement, acting[:index]):
                own = inner.adapter_name == placement.adapter_name
                scale = None if own else switches.scales.get(inner.adapter_name)
                if scale is not None and scale.dim():
                    raise rows_of_replaced(self.site.name, inner.adapter_name, placement.adapter_name)
                read = read.with_adapter(inner.local, self._tensors(inner), scale)
            call = self._adapted(call, read, placement, switches)
        if self.inner_dtype in (None, x.dtype):
            return call(x)
        return call(x.to(self.inner_dtype)).to(x.dtype)

    def _beneath(self, placement: Placement, inner: list[Placement]) -> list[Placement]:
        """Return those of the adapters `inner` that make the weight and the bias that `placement` reads."""
        if not self.dependencies[placement.adapter].tensors:
            return []
        name = placement.adapter_name
        return [each for each in inner if is_beneath(each.adapter_name, self.dependencies[each.adapter].replaces, name)]

    def _adapted(
        self, call: Callable[..., Tensor], frozen: FrozenSite, placement: Placement, switches: Switches
    ) -> Callable[..., Tensor]:
        """Return the function `call` of the input with an adapter around it."""
        p, scale = self._tensors(placement), switches.scales.get(placement.adapter_name)
        rows = self._dim_of_rows() if placement.local.slots or (scale is not None and scale.dim()) else 0
        if placement.local.slots is None:
            return lambda x, **given: frozen.adapted(call, placement.local, p, x, scale=scale, rows=rows, **given)
        banked = replace(frozen, site=frozen.site.with_bank(placement.local.slots, rows))
        ids = ids_of(switches.ids)
        check_slots(ids, placement.local.slots)

        def adapted(x: Tensor, **given: Tensor) -> Tensor:
            check_rows(ids, x.shape[rows])
            return banked.adapted(call, placement.local, p, x, ids, scale=scale, rows=rows, **given)

        return adapted

    def _call(self, x: Tensor, **given: Tensor) -> Tensor:
        """Call the wrapped module, with a weight or bias in place of its own if they are given."""
        if given and isinstance(self.base, DequantizedLinear):  # which has no dense parameter to replace
            return self.base.product(x, **given)
        computed = {"weight": self.computed_weight, "bias": self.computed_bias}
        if any(computed[name] is not None for name in given):  # the module would compute its own
            weight, bias = given.get("weight"), given.get("bias")
            weight = self.frozen_weight() if weight is None else weight
            return self._product(x, weight, self.frozen_bias() if bias is None else bias)
        output: Tensor = functional_call(self.base, given, (x,)) if given else self.base(x)
        return output

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the wrapped module would compute with this weight and bias, given as it stores them."""
        kind = self.site.kind
        entered = kind.enter(x, weight.dtype, self.site.name)
        y = kind.result(kind.multiply(x, kind.factor(weight)), entered)
        bias = self.site.own_bias(bias)
        return kind.leave(y if bias is None else y + bias.type_as(y))

    def _tensors(self, placement: Placement) -> Any:
        # The qualified names end in the names of attributes here, wherever in the model this module is. Those without
        # a dot are of tensors that all sites share.
        return adapter_namespace(
            {
                name: getattr(self if "." in path else self.adapted_model, path.rpartition(".")[2])
                for name, path in placement.tensors.items()
            }
        )


def _inside(site: Site, computed: fx.Node | None) -> Computation | None:
    """Return how the module of `site` computes a weight or bias; None if that is a parameter of it.

    Raises:
        ConfigError: it is computed from tensors outside the module.
    """
    if computed is None:
        return None
    inside = Computation.of(computed).inside(site.name)
    if inside is None:
        raise ConfigError(
            f"Site {site.name!r} has a weight or bias that is computed from tensors outside its module"
            f" ({', '.join(Computation.of(computed).tensors)}), so it cannot be wrapped eagerly; rewrite can adapt it."
        )
    return inside


def _keep(*_: Any) -> None:
    """Change nothing: a hook."""


_ROWS = frozenset({"view", "reshape", "flatten", "unflatten", "contiguous"})
"""The operations by which a module makes a matrix of its input, and undoes that: part of its linear."""


def _is_all(site: Site) -> bool:
    """Return whether the modules called like `site` compute nothing from data but its calls, adapters left out."""
    graph = site.calls[0].node.graph
    own = {node for call in site.calls for node in span(call.x, call.y)} | frozen_values(graph)
    data: set[fx.Node] = set()  # what depends on inputs, and not on their sizes alone
    for node in graph.nodes:
        if node.op == "placeholder" or (op_name(node) not in SIZES and not data.isdisjoint(node.all_input_nodes)):
            data.add(node)
    others = (
        node
        for node in data - own
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
    weight = getattr(module, "weight", None)
    simple = module is not None and (
        site.kind.vector_dims > 0
        or (replaced_only and not computed)  # which the module would compute again
        or (type(module).forward in _PLAIN and getattr(module, "padding_mode", "zeros") == "zeros")
    )
    named = isinstance(weight, Tensor) or site.computed_weight is not None
    if module is None or not named or site.experts or not simple:
        raise ConfigError(
            f"Site {site.name!r} is not a module that is called and does nothing else, so it cannot be wrapped eagerly;"
            " rewrite can adapt it."
        )
    wrapper = AdaptedLinear(module, site)
    replace_modules(model, {module: wrapper})
    return wrapper
