"""Bring a graph that others made into the form of a capture: `torch.fx.symbolic_trace`, Dynamo, or a user's pass.

Such graphs call linears as modules or as functions of torch, and Dynamo has names of its own for modules and tensors.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...compat.torch import pytree
from ...compat.torch_modules import BACKWARD_HOOKS, FORWARD_HOOKS
from ...errors import CaptureError
from ...graph.insertion import recorded
from ...graph.queries import argument_of
from ...graph.tensors import attribute_of, name_tensors, tensor_names
from ...graph.walk import ancestors
from ..origins.hooks import hooks_on
from .tracer import INLINED, trace_into_linears, use_aten

# Dynamo names a module by the expression for it in the code that it traced: the argument self, or a global.
_EXPRESSION = re.compile(r"^[LG]\['\w+'\]\.?")
_OF_SELF = "L__self___"


def normalize(gm: fx.GraphModule) -> None:
    """Let `gm` compute linears, embeddings and convolutions by aten operators, under the names of its model, in place.

    Raises:
        CaptureError: the graph takes parameters as inputs, so that it has no weights.
    """
    _refuse_parameters_as_inputs(gm.graph)
    for node in gm.graph.nodes:
        _normalize_record(node)
    _inline_linears(gm)
    use_aten(gm.graph)
    _read_past_dropouts(gm.graph)
    _name_tensors_as_the_model(gm)


def _read_past_dropouts(graph: fx.Graph) -> None:
    """Let all but an adapter itself read the input of its dropout where that drops nothing.

    In evaluation the two are one tensor, and `torch.export` of torch 2.14 and later writes the result for both.
    """
    for dropout in graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        own = recorded(dropout)
        if own is None or argument_of(dropout, "train") is not False:
            continue
        for user in list(dropout.users):
            insertion = recorded(user)
            if insertion is None or insertion.call != own.call:
                user.replace_input_with(dropout, argument_of(dropout, "input"))


def _refuse_parameters_as_inputs(graph: fx.Graph) -> None:
    inputs = graph.find_nodes(op="placeholder")
    parameters = [n for n in inputs if isinstance(n.meta.get("example_value", n.meta.get("val")), nn.Parameter)]
    if parameters:
        raise CaptureError(
            f"The graph takes {len(parameters)} parameters as inputs ({parameters[0].target}), as Dynamo passes them to"
            " a backend, so it has no weights to adapt. The way out: rewrite the model itself; or compile a model"
            " that carries its adapters, torch.compile(lora_lite_fx.backend(cfg).adapt(model, *inputs),"
            " backend='lora_lite_fx')."
        )


def _normalize_record(node: fx.Node) -> None:
    """Rename the modules that Dynamo noted at `node` as the model does, and note the value where captures note it."""
    if stack := node.meta.get("nn_module_stack"):
        node.meta["nn_module_stack"] = {
            key: (_EXPRESSION.sub("", path) if isinstance(path, str) else path, *rest)
            for key, (path, *rest) in stack.items()
        }
    if "example_value" in node.meta and "val" not in node.meta:
        detached = lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf  # noqa: E731
        node.meta["val"] = pytree.tree_map(detached, node.meta["example_value"])


def _inline_linears(gm: fx.GraphModule) -> None:
    """Replace the calls of linears, embeddings and convolutions by what these modules compute.

    A module with hooks stays, because its hooks act where it is called, and so does one with a `forward` of its own.
    """
    calls = [node for node in gm.graph.find_nodes(op="call_module") if _is_plain(gm.get_submodule(str(node.target)))]
    if not calls:
        return
    operands = list(dict.fromkeys(operand for call in calls for operand in call.all_input_nodes))
    graph = fx.Graph()
    inputs = {operand: graph.placeholder(f"input_{index}") for index, operand in enumerate(operands)}
    graph.output(tuple(graph.node_copy(call, inputs.__getitem__) for call in calls))
    traced = trace_into_linears(fx.GraphModule(gm, graph))  # at once, because each trace takes some milliseconds
    placeholders = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    names = tensor_names(gm)
    results: Any = traced.output_node().args[0]
    for call, result in zip(calls, results, strict=True):
        copies: dict[fx.Node, fx.Node] = dict(placeholders)
        for node in sorted(set(ancestors([result], stop=placeholders.__contains__)).difference(placeholders)):
            with gm.graph.inserting_before(call):
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":  # a tied parameter goes by the first of its names
                copies[node].target = names.get(id(attribute_of(gm, str(node.target))), node.target)
            copies[node].meta = {**call.meta, "nn_module_stack": _stack(call)}
            if node is not result:
                copies[node].meta.pop("val", None)
        call.replace_all_uses_with(copies[result])
        gm.graph.erase_node(call)
        for node, operand in placeholders.items():
            placeholders[node] = copies[result] if operand is call else operand


def _is_plain(module: nn.Module) -> bool:
    has_own_forward = type(module).forward not in [kind.forward for kind in INLINED]
    return (
        isinstance(module, INLINED) and not has_own_forward and not hooks_on(module, (*FORWARD_HOOKS, *BACKWARD_HOOKS))
    )


def _stack(call: fx.Node) -> dict[str, Any]:
    """Return the modules that a call of a module is in, with that module as the last of them."""
    path = str(call.target)
    stack = call.meta.get("nn_module_stack") or {}
    return stack if stack and list(stack.values())[-1][0] == path else {**stack, path: (path, nn.Module)}


def _name_tensors_as_the_model(gm: fx.GraphModule) -> None:
    """Register the tensors to which Dynamo gave names at the root under the names that they have in their modules."""
    names: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        # The innermost of the modules around it that the name begins with.
        for path in reversed(["", *(path for path, *_ in stack.values() if path)]):
            owner = f"{_OF_SELF}{path.replace('.', '_')}_" if path else _OF_SELF
            leaf = target.removeprefix(owner)
            if leaf and leaf != target and isinstance(attribute_of(gm, target), Tensor):
                names.setdefault(target, f"{path}.{leaf}" if path else leaf)
                break
    tensors = {target: attribute_of(gm, target) for target in names}
    name_tensors(gm, {id(tensor): names[target] for target, tensor in tensors.items()})
    for target in names:
        delattr(gm, target)
