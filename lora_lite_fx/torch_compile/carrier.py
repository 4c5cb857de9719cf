"""Models that carry their adapters, to be inserted where `torch.compile` captures a graph of them.

Such a model is a copy of the user's, of the same class and with the weights shared. Its adapters' tensors are
registered where a rewritten graph has them, and every adapted module marks its input. The mark is an operator that
only the backend can take out of a graph: whatever runs a site otherwise runs into an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.placement import Placement, site_weight
from ..adapters.registry import from_config, to_config
from ..capture.share import share
from ..errors import AdapterError, ConfigError
from ..graph.tensors import tensor_of
from ..rewriting.plan import Plan
from ..sites.site import Site, is_called


def mark_sites(model: nn.Module, plans: Sequence[Plan]) -> nn.Module:
    """A copy of `model` with the adapters of `plans`, at their start.

    Args:
        model: left as it is. The copy has its class and mode, shares its weights, and has buffers of its own.
        plans: what to insert where, of a capture of this model.

    Returns:
        The copy. It runs under `torch.compile` with this library's backend only.

    Raises:
        ConfigError: a site is not a module that is called, which could not be watched.
    """
    copy = share(model)
    for module in copy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    for adapter, plan in enumerate(plans):
        for site in plan.sites:
            module = _marked(copy, site)
            weight = site_weight(copy, site)
            placement = Placement.of(plan.variant, adapter, site, len(module.placements))
            placement.register(copy, site, weight)
            placement.initialize(copy, site, weight, plan.statistics.get(site.name))
            module.placements.append(placement)
    for module in copy.modules():
        if hasattr(module, "placements"):
            _describe(copy, module)
    return copy


def _marked(copy: nn.Module, site: Site) -> Any:
    """The module that is `site`, which marks its input from now on."""
    if not is_called(copy, site):
        raise ConfigError(
            f"Site {site.name!r} is not a module that is called: a run of it outside a rewritten graph could not be"
            " noticed. The way out: leave it out of the targets; rewrite can adapt it."
        )
    module: Any = copy.get_submodule(site.name)
    if not hasattr(module, "placements"):
        module.placements = []
        module.site = replace(site, calls=())
        # On the module and not in a hook: what Dynamo compiles of a module by itself is its forward.
        module.unmarked_forward = module.forward
        # A code of its own, since torch.compile limits how often it compiles the same one.
        code = _forward.__code__.replace(co_name=f"forward of {site.name}")
        module.forward = MethodType(FunctionType(code, _forward.__globals__), module)
    return module


def _describe(copy: nn.Module, module: Any) -> None:
    """Write down what the mark of `module` says: which adapters it has, and their tensors."""
    module.carried = json.dumps(
        {
            "site": module.site.name,
            "roles": sorted(module.site.roles),
            "adapters": [
                {"adapter": p.adapter, "names": p.names, "config": to_config(p.variant)} for p in module.placements
            ],
        }
    )
    paths = [path for placement in module.placements for path in placement.tensors.values()]
    for path in paths:
        if "." not in path:  # shared with other sites
            module.register_buffer(path, tensor_of(copy, path), persistent=False)
    module.carried_names = tuple(path.rpartition(".")[2] for path in paths)


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise outside(module.site.name)
    (x,) = (*args, *kwargs.values())
    tensors = [getattr(module, name) for name in module.carried_names]
    return module.unmarked_forward(MARK(x, tensors, module.training, module.carried))


@torch.library.custom_op("lora_lite_fx::mark", mutates_args=())
def mark(x: Tensor, tensors: Sequence[Tensor], training: bool, carried: str) -> Tensor:
    """The input of an adapted site, in a graph that has not been rewritten: it cannot run."""
    raise outside(json.loads(carried)["site"])


@mark.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], training: bool, carried: str) -> Tensor:
    return torch.empty_like(x)


def _count(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, [None] * ctx.count, None, None


# It never runs, since the forward does not; but a backend asks for it when it compiles.
mark.register_autograd(_backward, setup_context=_count)

MARK = torch.ops.lora_lite_fx.mark.default


def outside(site: str) -> AdapterError:
    """The error of a site that runs where its adapters cannot be."""
    return AdapterError(
        f"Site {site!r} runs outside a rewritten graph, without its adapters: in eager mode, in a function that"
        " torch.compile leaves out (torch.compiler.disable, a construct it cannot trace), past the limit of"
        " recompilations (torch._dynamo.config.recompile_limit), or under another backend. The way out: compile the"
        ' adapted model with backend="lora_lite_fx", so that the site is in a graph; TORCH_LOGS="graph_breaks,'
        'recompiles" shows why it is not.'
    )


def no_linear(site: str) -> AdapterError:
    """The error of a site that runs in a graph in a form in which it is not found there."""
    return AdapterError(
        f"Site {site!r} is no linear in the graph that torch.compile captured: its adapter has no place. The way out:"
        " leave it out of the targets; rewrite may find it in the graph that torch.export captures."
    )


@dataclass(frozen=True)
class MarkedSite:
    """The adapters of a site, as a graph is to have them.

    Args:
        site: its qualified name.
        roles: its roles in the whole model.
        placements: the adapters, the innermost first.
        tensors: theirs, by qualified name.
        training: whether the site's module is in training mode.
    """

    site: str
    roles: frozenset[str]
    placements: tuple[Placement, ...]
    tensors: dict[str, Tensor]
    training: bool


def said_by(carried: str, tensors: Iterable[Tensor], training: bool, site: str) -> MarkedSite:
    """What a mark says, for the site that is called `site` in the graph."""
    said = json.loads(carried)
    placements = tuple(
        Placement(from_config(one["config"]), one["adapter"], site, position, tuple(one["names"]))
        for position, one in enumerate(said["adapters"])
    )
    paths = (path for placement in placements for path in placement.tensors.values())
    return MarkedSite(site, frozenset(said["roles"]), placements, dict(zip(paths, tensors, strict=True)), training)
