"""Models that carry their adapters and mark where these belong in the graphs that `torch.compile` captures.

Such a model is a copy of the user's, of the same class and with the weights shared. Its adapters' tensors are
registered where a rewritten graph has them. Every adapted module marks its input: it calls an operator that only this
library's backend can take out of a graph. Whatever else runs a site runs the operator, an error that names the site.
The text of a mark has the site's name, and leads to what is recorded of the module.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.listing import describe_adapters
from ..adapters.placement import Placement, site_bias, site_weight
from ..adapters.start_values import initialize
from ..adapters.switches import Switches
from ..adapters.variant import Variant
from ..capture.shared_copy import shared_copy
from ..compat.torch_modules import buffers_of
from ..errors import AdapterError, ConfigError, is_instance_of
from ..log import phase
from ..rewriting.choose_sites import NewAdapter
from ..sites.roles import ROLES
from ..sites.site import Site, is_called
from ..storage.dequantized import DequantizedLinear

# Marking a model.

ORIGINALS: list[weakref.ref[nn.Module]] = []
"""The models of which adapted copies were made in this process."""


def mark_sites(model: nn.Module, plans: Sequence[NewAdapter], called: Container[str]) -> nn.Module:
    """Return a copy of `model` that carries the adapters of `plans`, with their start values.

    A linear that was not called is marked too, if a config may mean it: a later call of it is an error.

    Args:
        model: it is not changed. The copy has its class and mode, shares its weights, and has buffers of its own.
        plans: what to insert where, of a capture of this model.
        called: the names of the modules that were called in that capture.

    Returns:
        The copy. It runs under `torch.compile` with this library's backend only.

    Raises:
        ConfigError: a site is not a module that is called, so that a run of it could not be noticed.
    """
    copy: nn.Module = shared_copy(model)
    base: dict[str, Tensor] = {}
    for path, module in copy.named_modules():
        for name, buffer in buffers_of(module).items():
            if buffer is not None:
                base[f"{path}.{name}" if path else name] = buffer
                buffers_of(module)[name] = buffer.clone()
    vars(copy)["base_buffers"] = base
    vars(copy)["not_pickled"] = NotPickled()
    vars(copy)["switches"] = Switches()
    with phase("inserted the adapters", "inserting the adapters") as details:
        for adapter, plan in enumerate(plans):
            for site in plan.sites:
                module = _marking(copy, site)
                weight = site_weight(copy, site)
                inner = [each.adapter_name for each in module.placements]
                placement = Placement.of(plan.variant, adapter, site, inner, plan.adapter_name)
                placement.register(copy, site, weight)
                observed, tensors = plan.statistics.get(site.name), placement.namespace(copy)
                initialize(placement.local, site, weight, tensors, observed, site_bias(copy, site))
                module.placements.append(placement)
        for site in _not_called(copy, [plan.variant for plan in plans], called):
            _marking(copy, site).is_site = False
        for module in copy.modules():
            if hasattr(module, "placements"):
                _describe(copy, module)
        details += describe_adapters(copy)
    ORIGINALS.append(weakref.ref(model))
    return copy


class NotPickled:
    """An attribute of a model that carries its adapters: it refuses to be pickled, and so does the model.

    Pickle finds methods by name, and cannot find those that were made for the sites: reading the file would fail.
    """

    def __reduce__(self) -> Any:
        raise AdapterError(
            "A model that carries its adapters for torch.compile cannot be pickled, and so neither by torch.save."
            " llfx.save(model, path) writes the adapters, which llfx.load reads, and copy.deepcopy copies the model."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NotPickled:
        return self


def _not_called(model: nn.Module, variants: Sequence[Variant], called: Container[str]) -> list[Site]:
    """Return the linears that were not called, and that a variant would adapt in some role."""
    linears = [
        Site(name, 0, 0)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, DequantizedLinear)) or is_instance_of(module, "transformers", "Conv1D")
    ]
    return [
        site
        for site in linears
        if site.name not in called
        and any(variant.selects(replace(site, roles=frozenset({role}))) for variant in variants for role in ROLES)
    ]


def _marking(copy: nn.Module, site: Site) -> Any:
    """Return the module that is `site`, and let it mark its input from now on."""
    if not is_called(copy, site):
        raise ConfigError(
            f"Site {site.name!r} is not a module that is called: a run of it outside a rewritten graph could not be"
            " noticed. The way out: leave it out of the targets; rewrite can adapt it."
        )
    module: Any = copy.get_submodule(site.name)
    if not hasattr(module, "placements"):
        module.placements = []
        module.is_site = True
        module.site = replace(site, calls=())
        # On the module and not in a hook, because Dynamo compiles the forward of a module that it compiles by itself.
        module.unmarked_forward = vars(module).get("forward")
        # A code object for each site, because torch.compile limits how often it compiles the same one.
        code = _marking_forward.__code__.replace(co_name=f"forward of {site.name}")
        module.forward = MethodType(FunctionType(code, _marking_forward.__globals__), module)
    return module


def _marking_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise runs_outside(module.site.name)
    (x,) = (*args, *kwargs.values())
    # The names without a dot are of tensors that all sites share, and that the model alone has.
    tensors = [
        getattr(module if "." in path else module.adapted_model, path.rpartition(".")[2])
        for path in module.marked_paths
    ]
    switches = module.adapted_model.switches
    acting = SCALED if switches.scales else ALL if switches.acting is None else ",".join(switches.acting)
    marked = MARK(x, tensors, module.training, module.mark_text, acting)
    if module.unmarked_forward is None:
        return type(module).forward(module, marked)  # of the class of now
    return module.unmarked_forward(marked)


# What a mark says.

ALL = "*"
"""Says in a mark that all adapters act; otherwise their names stand there."""

SCALED = "!"
"""Says in a mark that adapters are scaled, which the backend refuses."""


@dataclass(frozen=True, eq=False)
class MarkedSite:
    """A module that marks its input, as its mark leads to it.

    Args:
        site: its site.
        is_site: whether it was called when the adapters were inserted, and has them.
        placements: the adapters, the innermost first.
    """

    site: Site
    is_site: bool
    placements: tuple[Placement, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> MarkedSite:
        return self  # the modules of a copy make the same marks

    def acting(self, acting: str) -> list[Placement]:
        """Return the adapters that act, by what the mark says of them.

        Raises:
            AdapterError: adapters are scaled, or the module was not called when the adapters were inserted.
        """
        if not self.is_site:
            raise AdapterError(
                f"Site {self.site.name!r} did not run on the inputs that backend(cfg).adapt was given, so it has no"
                " adapters. The way out: give adapt inputs for which all of the model runs; or leave the site out of"
                " the targets (exclude_names)."
            )
        if acting == SCALED:
            raise AdapterError(
                "A model that carries its adapters for torch.compile does not scale them. The way out: leave the scope"
                " of scaled; rewrite or adapt make models that do."
            )
        return [each for each in self.placements if acting == ALL or each.adapter_name in acting.split(",")]


MARKED: weakref.WeakValueDictionary[str, MarkedSite] = weakref.WeakValueDictionary()
"""What marks lead to, by their text. The modules keep it."""

_numbers = itertools.count()


def _describe(copy: nn.Module, module: Any) -> None:
    """Write on `module` what its mark says, and the names of its adapters' tensors."""
    module.mark_text = f"{next(_numbers)} {module.site.name}"
    vars(module)["marked"] = MARKED[module.mark_text] = MarkedSite(
        module.site, module.is_site, tuple(module.placements)
    )
    module.marked_paths = tuple(path for placement in module.placements for path in placement.tensors.values())
    vars(module)["adapted_model"] = copy  # not a submodule


def site_in_mark(text: str) -> str:
    """Return the name of the site whose module made the mark."""
    return text.partition(" ")[2]


# The operator.


@torch.library.custom_op("lora_lite_fx::mark", mutates_args=())
def mark(x: Tensor, tensors: Sequence[Tensor], training: bool, text: str, acting: str) -> Tensor:
    """Stand for the input `x` of an adapted site in a graph that has not been rewritten. It cannot run."""
    raise runs_outside(site_in_mark(text))


@mark.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], training: bool, text: str, acting: str) -> Tensor:
    return torch.empty_like(x)


def _count(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, [None] * ctx.count, None, None, None


# It never runs, because the forward does not; but a backend asks for it when it compiles.
mark.register_autograd(_backward, setup_context=_count)

MARK = torch.ops.lora_lite_fx.mark.default


# Errors of a site whose adapters cannot be inserted.


def runs_outside(site: str) -> AdapterError:
    """Return the error of a site that runs where its adapters cannot be."""
    return AdapterError(
        f"Site {site!r} runs outside a rewritten graph, without its adapters: in eager mode, in a function that"
        " torch.compile leaves out (torch.compiler.disable, a construct it cannot trace), past the limit of"
        " recompilations (torch._dynamo.config.recompile_limit), or under another backend. The way out: compile the"
        ' adapted model with backend="lora_lite_fx", so that the site is in a graph; TORCH_LOGS="graph_breaks,'
        'recompiles" shows why it is not.'
    )


def not_a_linear(site: str) -> AdapterError:
    """Return the error of a site that a graph computes in a form in which it is not found."""
    return AdapterError(
        f"Site {site!r} is not a linear in the graph that torch.compile captured, so that its adapter has no place"
        " there. The way out: leave it out of the targets; rewrite may find it in the graph that torch.export captures."
    )
