"""What stands on the modules of a model besides their tensors: hooks, and ties between parameters."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..capture.origins.hooks import hook_name, hooks_on, weight_hooks_on
from ..compat.torch_modules import BACKWARD_HOOKS, FORWARD_HOOKS, hooks_of
from ..errors import AdapterError, is_instance_of
from ..graph.copies import copy_graph
from ..graph.layers import pieces_of, whole_of
from ..graph.modes import has_modes, keep_mode
from .layer_modules import GraphLayer
from .module_checks import check_modules
from .snapshot import Snapshot
from .tensor_reader import Reader, reader_of


@dataclass(frozen=True)
class HooksAndTies:
    """The modules of a model that its programs do not call as modules, and the parameters that have several names.

    Args:
        gm: the graph.
        graphs: the flat graph; or what it is in each mode if it runs other operations there, by words for the mode.
        modules: these modules by qualified name.
        hooks: their registries of hooks.
        ties: groups of names of one parameter.
        read: reads the parameters of all groups.
        of_graph: the modules of the graph, if it runs on its own.
    """

    gm: fx.GraphModule
    graphs: dict[str, fx.Graph]
    modules: dict[str, nn.Module]
    hooks: list[dict[int, Any]]
    ties: list[list[str]]
    read: Reader
    of_graph: Snapshot | None
    _alone: dict[str, list[str]] = field(default_factory=dict)
    _called: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: fx.GraphModule, host: nn.Module, absent: Collection[str] = ()) -> HooksAndTies:
        """Return those of the programs of `gm` that run on `host`.

        Raises:
            AdapterError: as `check_modules`.
        """
        graphs = {"": gm.graph}
        if has_modes(gm.graph):
            graphs = {" in training mode": copy_graph(gm.graph), " in evaluation mode": copy_graph(gm.graph)}
            for training, graph in zip((True, False), graphs.values(), strict=True):
                keep_mode(gm, graph, training)
        called = frozenset.intersection(*(whole_of(gm, graph) for graph in graphs.values()))
        modules = {name: module for name, module in host.named_modules() if name and name not in called}
        hooks = [hooks_of(module, kind) for module in modules.values() for kind in (*FORWARD_HOOKS, *BACKWARD_HOOKS)]
        names = defaultdict(list)
        for name, parameter in host.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        ties = [group for group in names.values() if len(group) > 1]
        # A host that is not the graph looks itself at its modules, which have code.
        of_graph = check_modules(gm, absent, called) if host is gm else None
        return cls(
            gm, graphs, modules, hooks, ties, reader_of(host, [name for group in ties for name in group]), of_graph
        )

    def hold(self) -> bool:
        """Return False if modules of the graph may have changed since."""
        return self.of_graph is None or self.of_graph.holds()

    def hooked(self) -> tuple[str, ...]:
        """Return the names of the modules outside layers on which hooks stand; warn of hooks elsewhere, once each."""
        if not any(self.hooks):
            return ()
        hooked = tuple(name for name, module in self.modules.items() if self._acts(name, module))
        if hooked not in self._called:
            self._called[hooked] = self._acting_beside(hooked)
        return self._called[hooked]

    def _acts(self, name: str, module: nn.Module) -> bool:
        """Tell whether hooks stand on a module, and act if none stand on others."""
        hooks = self._hooks_on(module)
        if hooks and name not in self._alone:
            self._alone[name] = idle = self._idle((name,))[name]
            if idle:
                where = idle[0] if len(idle) < len(self.graphs) else ""
                reason = "does not run that module as a module of its own"
                if where:
                    reason = "has no operation of that module alone there, as where it returns its input"
                _warn(name, hooks, where, f"{reason}. {_WHERE_HOOKS_ACT}")
        return bool(hooks) and len(self._alone[name]) < len(self.graphs)

    def _acting_beside(self, hooked: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of modules with hooks that act beside the others; warn of those that run inside these."""
        idle = self._idle(hooked)
        acting = tuple(name for name in hooked if len(idle[name]) < len(self.graphs))
        for name in hooked:
            if more := [mode for mode in idle[name] if mode not in self._alone[name]]:
                reason = "runs that module as a part of another one on which a hook stands, too, of: "
                reason += ", ".join(map(repr, acting))
                _warn(name, self._hooks_on(self.modules[name]), more[0] if name in acting else "", f"{reason}.")
        return acting

    def _hooks_on(self, module: nn.Module) -> list[Any]:
        hooks = hooks_on(module, (*FORWARD_HOOKS, *BACKWARD_HOOKS))
        # What computes a weight was put on a module of a graph after the capture, which traces such.
        return [*hooks, *weight_hooks_on(module)] if isinstance(module, GraphLayer) else hooks

    def _idle(self, hooked: tuple[str, ...]) -> dict[str, list[str]]:
        """Return for each of these modules the modes in which programs that call them do not call it as a whole.

        Raises:
            AdapterError: the parameters of one are sharded, and programs do not call it, which gathers them.
        """
        whole = {mode: whole_of(self.gm, graph, hooked) for mode, graph in self.graphs.items()}
        idle = {name: [mode for mode, names in whole.items() if name not in names] for name in hooked}
        if sharded := [name for name in hooked if is_instance_of(self.modules[name], "torch", "FSDPModule")]:
            pieces = {path for path, _ in pieces_of(self.gm, self.gm.graph, hooked)}
            for name in sharded:
                if name not in pieces:
                    raise _not_gathered(name)
                idle[name] = []  # its parameters are gathered for each of its pieces, and twice is as good as once
        return idle

    def check_ties(self, host: nn.Module) -> None:
        """Raise AdapterError if a parameter that has several names in `host` has been replaced under one of them."""
        if not self.ties:
            return
        values = iter(self.read(host))
        for group in self.ties:
            first, *others = [next(values) for _ in group]
            for name, other in zip(group[1:], others, strict=True):
                if other is not first:
                    raise AdapterError(
                        f"{group[0]} and {name} were one parameter when the graph was captured, and are two now. The"
                        " graph reads it under one of its names. The way out: replace it under all names, or capture"
                        " the model again."
                    )


_WHERE_HOOKS_ACT = (
    "Hooks act on the model, on its layers, and on modules outside of layers that run once, as the embedding and the"
    " head."
)


def _warn(name: str, hooks: Sequence[Any], where: str, reason: str) -> None:
    """Warn that hooks on a module do not act, with what the graph does in place of calling it."""
    names = ", ".join(map(hook_name, hooks))
    warnings.warn(f"A hook on {name!r} does not act{where}: {names}. The graph {reason}", stacklevel=3)


def _not_gathered(name: str) -> AdapterError:
    way_out = "call it on whole layers and on the model, as llfx.shard(model) does"
    if "_checkpoint_wrapped_module" in name:  # as accelerate's activation_checkpointing wraps layers
        way_out = "model.gradient_checkpointing_enable() in place of wrappers, as graphs run layers"
    return AdapterError(
        f"fully_shard was called on {name!r}, which the graph does not run as a module of its own, so that"
        f" its parameters would not be gathered. The way out: {way_out}."
    )
