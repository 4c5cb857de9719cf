"""Check the modules of a graph: it reads their tensors by name, and does not run their code."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx, nn
from torch.nn import functional

from ..adapters.placement import adapter_tensor_names
from ..compat.torch import OpOverload, schema_of
from ..compat.torch_modules import buffers_of, children_of, parameters_of
from ..errors import AdapterError
from .layer_modules import WRAPPED, GraphLayer
from .snapshot import Snapshot

_TENSORS_ALONE = (nn.Linear, nn.Embedding)
"""Classes of which an equal module differs in nothing but its tensors."""


def absent_tensors(model: nn.Module) -> tuple[str, ...]:
    """Return the names under which the modules of a model have a place for a parameter or buffer, and none in it."""
    return tuple(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, tensor in (*parameters_of(module).items(), *buffers_of(module).items())
        if tensor is None
    )


def check_modules(gm: fx.GraphModule, absent: Collection[str], called: Collection[str]) -> Snapshot:
    """Check that a graph computes what its modules say now, and return a snapshot of them.

    Args:
        gm: the graph.
        absent: the names of `absent_tensors` of the model that it was captured from.
        called: the names of the modules that its programs call.

    Raises:
        AdapterError: a tensor is set where the model had none; one is taken away that more reads than its module's
            operator; or a module is another one.

    Warns:
        UserWarning: `forward` of a module was replaced that programs do not call.
    """
    read = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    runs = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}  # with their own code
    modules = {name: module for name, module in gm.named_modules() if name not in runs}
    absent = {*absent}.difference(read, adapter_tensor_names(gm))
    required = _required(gm.graph).difference(adapter_tensor_names(gm))
    _check_tensors(modules, absent)
    _check_classes(modules, {name.rpartition(".")[0] for name in read}, _classes_in(gm.graph))
    _check_required(modules, required)
    replaced = [name for name, module in modules.items() if name not in called and "forward" in vars(module)]
    if replaced:
        others = f" and {len(replaced) - 1} other modules" if replaced[1:] else ""
        warnings.warn(
            f"forward was replaced on {replaced[0]!r}{others}, and does not act, because the graph does not call that."
            " It acts on layers and on the graph. The way out: replace it on the model, and capture that again.",
            stacklevel=2,
        )
    return Snapshot(dict(gm.named_modules()), tensors=absent | required)


def _required(graph: fx.Graph) -> set[str]:
    """Return the names of the tensors that a graph passes to what takes no None in their place."""
    reads = graph.find_nodes(op="get_attr")
    return {str(node.target) for node in reads if not all(_takes_none(user, node) for user in node.users)}


def _takes_none(user: fx.Node, read: fx.Node) -> bool:
    """Return whether `user`, an operator or a function of torch, has arguments that may be None wherever `read` is."""
    if not isinstance(user.target, OpOverload):
        return getattr(user.target, "__module__", None) == functional.__name__ and "bias" in str(read.target)
    arguments = schema_of(user.target).arguments
    given = {**dict(zip((argument.name for argument in arguments), user.args, strict=False)), **user.kwargs}
    kinds = [argument.type for argument in arguments if given.get(argument.name) is read]
    return bool(kinds) and all(isinstance(kind, torch.OptionalType) for kind in kinds)  # none: it is in a list


def _check_tensors(modules: Mapping[str, nn.Module], absent: Collection[str]) -> None:
    for name in sorted(absent):
        path, _, leaf = name.rpartition(".")
        if path in modules and getattr(modules[path], leaf, None) is not None:
            raise AdapterError(
                f"{name!r} is set, and the model had none there when the graph was captured, so that the graph does not"
                " read it. The way out: set it in the model, and capture the model again."
            )


def _check_required(modules: Mapping[str, nn.Module], required: Iterable[str]) -> None:
    for name in sorted(required):
        path, _, leaf = name.rpartition(".")
        if path in modules and getattr(modules[path], leaf, None) is None:
            raise AdapterError(
                f"{name!r} was taken away, and the graph computes with it, as for adapters that replace a bias or scale"
                " it (Full, DoRA). The way out: zeros in its place; or take it away in the model, and adapt that again."
            )


def _check_classes(modules: Mapping[str, nn.Module], owners: Collection[str], kinds: Mapping[str, str]) -> None:
    """Raise AdapterError if a module has code that the graph does not run.

    Args:
        modules: those of the graph by name.
        owners: the names of those of which it reads tensors.
        kinds: the names of the classes in the model, of the modules that were called there.
    """
    for path, module in modules.items():
        kind = type(module)
        runs_no_code = isinstance(module, GraphLayer) or kind.forward is nn.Module.forward
        is_equal = kind in _TENSORS_ALONE and kinds.get(path) == _name_of(kind)
        is_around = any(name in children_of(module) for name in WRAPPED)
        if path and (path in owners or path in kinds) and not (runs_no_code or is_equal or is_around):
            raise AdapterError(
                f"{path!r} is a {kind.__name__} since the graph was captured. The graph reads the tensors of modules by"
                " name, and does not run their code. The way out: replace the tensors alone; or replace the module in"
                " the model, and capture that again."
            )


def _classes_in(graph: fx.Graph) -> dict[str, str]:
    """Return the names of the classes of the modules that a graph was captured in, by qualified name."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in graph.nodes)
    return {
        path: kind if isinstance(kind, str) else _name_of(kind) for stack in stacks for path, kind in stack.values()
    }


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
