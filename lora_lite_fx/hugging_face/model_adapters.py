"""The adapters of an adapted model, which all its graphs have: their places, and their tensors in the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.changed_buffers import BaseBuffers
from ..adapters.placement import Placement, adapter_tensor_names, placements
from ..adapters.switches import Switches
from ..capture.origins.hooks import take_hooks_off
from ..capture.origins.origin import is_hugging_face
from ..capture.shared_copy import shared_copy
from ..compat.torch import name_of_transform
from ..errors import AdapterError, CaptureError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.layer_modules import plain_class
from ..graph.modes import add_flagged_modules
from ..graph.tensors import delete_tensor, has_attribute, register_tensor, tensor_of
from ..rewriting.rewrite import insert_placed
from ..sites.finding import find_sites
from ..sites.site import Site
from .own_forward import forget_replaced_forward
from .positions import forget_positions


class ModelAdapters:
    """The adapters of a model that runs graphs.

    Args:
        model: has their tensors.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.placements: list[Placement] = []
        self.switches = Switches()
        self.sites: dict[str, Site] = {}  # as the first graph has them
        self.base_buffers: BaseBuffers = {}  # of the user's model; the graphs write to those of this one
        self._owned: set[str] = set()  # the tensors that the model has from graphs

    def of_copy(self, model: Any) -> ModelAdapters:
        """Return the adapters of a copy of the model."""
        twin = copy.copy(self)
        twin.model, twin._owned = model, {*self._owned}
        return twin

    def start(self, gm: AdaptedGraphModule) -> None:
        """Take the adapters of the first graph, and register their tensors in the model."""
        self._owned.clear()  # the buffers that calls change are those of this graph, which a file may have brought
        self.bind(gm)
        self.placements = placements(gm)

    def insert_into(self, base: fx.GraphModule) -> None:
        """Insert the adapters into another graph of the model, over the tensors of the model."""
        if not self.placements:  # the first graph, which is made before there are any
            return
        sites = {site.name: site for site in find_sites(base)}
        read = {
            str(node.target)
            for node in base.graph.find_nodes(op="get_attr")
            if any(user.target is not torch.ops.aten.embedding.default for user in node.users)
        }
        tensors: dict[str, Tensor] = {}
        for placement in self.placements:
            name = placement.site
            if name in sites:
                _check_tensors(placement, sites[name])
            elif self.sites[name].weight in read:
                raise CaptureError(f"{name} runs in a form that is not known as a linear, so its adapter has no place.")
            for path in placement.tensors.values():
                if (tensor := tensor_at(self.model, path)) is None:
                    raise AdapterError(
                        f"The adapter of {name!r} is gone: {type(self.model).__name__} has no {path} any more. The way"
                        " out: replace modules before adapt; or put back the one that has the adapter."
                    )
                tensors[path] = tensor
        insert_placed(base, self.placements, self.roles, tensors)

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """The roles of all sites by name."""
        return {name: site.roles for name, site in self.sites.items()}

    def add(self, placed: Sequence[Placement], tensors: Mapping[str, Tensor]) -> None:
        """Register the tensors of further adapters."""
        for name, tensor in tensors.items():
            register_tensor(self.model, name, tensor)
            self._owned.add(name)
        self.placements = [*self.placements, *placed]

    def delete(self, names: Sequence[str]) -> None:
        """Delete the adapters of these names with their tensors."""
        gone = [path for each in self.placements if each.adapter_name in names for path in each.tensors.values()]
        for path in dict.fromkeys(gone):  # some are shared by several sites
            delete_tensor(self.model, path)
            self._owned.discard(path)
        self.placements = [each for each in self.placements if each.adapter_name not in names]

    def bind(self, gm: AdaptedGraphModule) -> None:
        """Let the graph have the tensors of the model, and the model the adapters and what the graph writes to.

        What runs reads the tensors of the model. Passes, `merge` and files read those of the graph.
        """
        adapters = set(adapter_tensor_names(gm))
        written = [
            name for name in {**dict.fromkeys(gm.derived.written_buffers), **gm.base_buffers} if name not in self._owned
        ]
        self.base_buffers = {**{name: gm.base_buffers.get(name) for name in written}, **self.base_buffers}
        gm.base_buffers = self.base_buffers
        for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
            of_model = tensor_at(self.model, name)
            if name in written or (of_model is None and name in adapters):
                register_tensor(self.model, name, tensor)
                self._owned.add(name)
            elif isinstance(tensor, nn.Parameter) and not isinstance(of_model, nn.Parameter) and of_model is not None:
                register_tensor(gm, name, nn.Parameter(of_model.detach(), requires_grad=False))  # parametrized since
            elif of_model is not None:
                register_tensor(gm, name, of_model)
        add_flagged_modules(self.model, gm.graph)  # of adapters at what the model has no module for

    def plain_model(self, own_buffers: bool = False) -> Any:
        """Return a copy of the model without adapters, of its own class, over the same weights.

        Args:
            own_buffers: whether it gets copies of the buffers.
        """
        copied = shared_copy(self.model, [name for name, _ in self.model.named_buffers()] if own_buffers else ())
        for name in (name for placement in self.placements for name in placement.tensors.values()):
            if has_attribute(copied, name):  # some are shared by several sites, as are modules
                delete_tensor(copied, name)
        for module in copied.modules():
            module.__class__ = _plain_class_of(module)
            for attribute in ("_graphs", "_path"):
                vars(module).pop(attribute, None)
        if is_hugging_face(copied):
            from ..compat.transformers import KEYS_TO_IGNORE_ON_SAVE

            vars(copied).pop(KEYS_TO_IGNORE_ON_SAVE, None)
        forget_replaced_forward(copied)
        return copied

    def shadow(self, own_buffers: bool = False) -> Any:
        """Return a copy of the model to be run for facts: without adapters, and without hooks, which act in calls.

        Args:
            own_buffers: as for `plain_model`.

        Raises:
            AdapterError: a transform of `torch.func` or a trace of `torch.jit` runs, which would run the copy too.
        """
        if transform := name_of_transform():
            raise AdapterError(
                f"{transform} meets the first call of its kind (its arguments, their types, the mode), of which no"
                f" graph can be captured inside {transform}. The way out: call the model once like this before, outside"
                f" of {transform}; torch.no_grad() is enough."
            )
        copied = self.plain_model(own_buffers)
        take_hooks_off(copied)
        forget_positions(copied)
        return copied


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of that qualified name; None for a constant that only the graph has."""
    try:
        return tensor_of(model, name)
    except AttributeError:
        return None


def _check_tensors(placement: Placement, site: Site) -> None:
    """Raise AdapterError if the adapter would have other tensors at the site as it is now: Full trains its bias."""
    needed = placement.local.tensor_specs(site).keys()
    for name in sorted(needed ^ set(placement.names)):
        what, instead = ("has no place for", "zeros in its place") if name in placement.names else ("needs", "None")
        raise AdapterError(
            f"{site.name!r} {what} {name} of {type(placement.variant).__name__} since its bias is another than at"
            f" adapt. The way out: {instead}, which leaves the adapter as it was; or change the bias before adapt."
        )


def _plain_class_of(module: nn.Module) -> Any:
    """Return the class that a module has without adapters: of one that is parametrized since, with its parametrization.

    `torch.nn.utils.parametrize` gives a module a subclass of its own, with properties.
    """
    cls: Any = type(module)
    plain = plain_class(cls)
    if plain is cls or not is_parametrized(module) or plain_class(cls.__base__) is cls.__base__:
        return plain
    return type(cls.__name__, (plain,), {name: value for name, value in vars(cls).items() if name != "__dict__"})
