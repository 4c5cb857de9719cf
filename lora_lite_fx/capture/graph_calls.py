"""Let what interprets a graph, such as `torch.export`, call it as its model is called.

`torch.fx` hands a graph the values of the arguments in the order of a call, and its code generator (`PyTreeCodeGen`)
makes the inputs of the graph of them. The one here takes further inputs too, puts constants in the place of arguments
that are left out, and returns the results that the model has without them.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compat.torch import PyTreeCodeGen, codegen_of, pytree
from ..errors import AdapterError, CallError
from .signature import CallSignature, Omission


class _Arguments(PyTreeCodeGen):
    """Makes the inputs of a graph of the arguments of its model.

    Args:
        pytree_info: the structure of the arguments and results, as torch.export has it.
        further: names of inputs that this structure does not tell. They come last, and by keyword.
        signature: that of the model; None for a graph that takes all of its inputs.
    """

    def __init__(self, pytree_info: Any, further: tuple[str, ...], signature: CallSignature | None) -> None:
        super().__init__(pytree_info)
        self.further = further
        self.signature = signature
        self.omission: Omission | None = None
        self.returns_all = True
        self.module: Callable[[], Any] = lambda: None

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        if not self.further:
            return super().gen_var_bindings(fn_args, free_vars, expanded_def)
        nested = [name for name in free_vars if name.split(":")[0].strip() not in self.further]
        return super().gen_var_bindings(fn_args[: -len(self.further)], nested, expanded_def)

    def process_inputs(self, *inputs: Any) -> Any:  # type: ignore[override, unused-ignore]
        if self.signature is None:
            return super().process_inputs(*inputs)
        if torch.compiler.is_exporting():
            args, kwargs = _exported_call(self.signature, inputs)
        else:
            count = len(self.signature.captured)
            own, more = inputs[:count], inputs[count:]
            if len(more) > len(self.further):
                own, more = inputs, ()  # too many, which the signature says
            args, kwargs = (), self.signature.by_position(own) | dict(zip(self.further, more, strict=False))
        further = [self._further_input(name, kwargs.pop(name, None)) for name in self.further]
        values, left_out = self.signature.bind(args, kwargs)
        flat = [*super().process_inputs(*values), *further]
        self.omission = self.signature.omission(left_out) if left_out else None
        if self.omission is not None:
            for place, fill in self.omission.fills.items():
                flat[place] = fill.tensor(flat)
        return flat

    def _further_input(self, name: str, value: Any) -> Any:
        """Return an input that the call has, or the module: an export must not keep that of the module."""
        module = self.module()
        if value is None and module is not None:
            value = None if torch.compiler.is_exporting() else getattr(module, name, None)
            if value is None and any(n.target == name and n.users for n in module.graph.find_nodes(op="placeholder")):
                raise CallError(f"{name} is missing, which is an input of this graph.")
        return value

    def process_outputs(self, out: Any) -> Any:
        if self.omission is None:
            return super().process_outputs(out)
        return self.omission.returned([out[index] for index in self.omission.outputs] if self.returns_all else out)


def call_like_the_model(graph: fx.Graph, signature: CallSignature) -> None:
    """Let what interprets `graph` call it by `signature`."""
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        _set(graph, codegen.pytree_info, further_inputs(graph), signature)


def return_as(graph: fx.Graph, out_spec: pytree.TreeSpec | None) -> None:
    """Let `graph` return its results in this structure, or as a flat tuple, and take all its inputs.

    It forgets the structure and the optional arguments that capture recorded.
    """
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        _set(graph, codegen.pytree_info._replace(out_spec=out_spec), further_inputs(graph), None)


def return_without(graph: fx.Graph, omission: Omission) -> None:
    """Let `graph`, which is called like the model, compute only what a call returns that leaves these arguments out."""
    output, codegen = graph.output_node(), codegen_of(graph)
    results: Any = output.args[0]
    output.args = (tuple(results[index] for index in omission.outputs),)
    graph.eliminate_dead_code()
    assert isinstance(codegen, _Arguments)
    codegen.returns_all = False


def names_of_results(graph: fx.Graph) -> tuple[str, ...]:
    """Return the keys of the dict that `graph` returns."""
    return tuple(codegen_of(graph).pytree_info.out_spec.context)


def count_arguments(graph: fx.Graph) -> int:
    """Return how many arguments `graph` takes, however they are nested."""
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        return len(codegen.pytree_info.orig_args)
    return len(graph.find_nodes(op="placeholder"))


_FURTHER = "further_input"
"""The metadata of an input that was added. A graph that was traced symbolically has no structure that tells these."""


def add_input(graph: fx.Graph, name: str, value: Tensor | None) -> fx.Node:
    """Let `graph` take a further input, the last one, by keyword.

    Args:
        graph: changed in place.
        name: of the input.
        value: a tensor like it, without data, if that is known.

    Raises:
        AdapterError: the graph has an input of that name.
    """
    present = graph.find_nodes(op="placeholder")
    if any(node.target == name for node in present):
        raise AdapterError(
            f"The model has an input {name!r}, and this library would add one of that name. The way out: another name"
            " for the adapter, or a module around the model that calls its argument otherwise."
        )
    with graph.inserting_after(present[-1]):
        node = graph.placeholder(name)
    if value is not None:
        node.meta["val"] = value
    _set_further(graph, (*further_inputs(graph), name))
    node.meta[_FURTHER] = True
    return node


def drop_input(graph: fx.Graph, node: fx.Node) -> None:
    """Undo `add_input`: take an input, which nothing reads any more, out of `graph`."""
    graph.erase_node(node)
    _set_further(graph, tuple(name for name in further_inputs(graph) if name != node.target))


def further_inputs(graph: fx.Graph) -> tuple[str, ...]:
    """Return the names of the inputs that `add_input` has given a graph."""
    codegen = codegen_of(graph)
    if isinstance(codegen, _Arguments):
        return codegen.further
    return tuple(str(node.target) for node in graph.find_nodes(op="placeholder") if node.meta.get(_FURTHER))


def take_further_inputs_from(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Let what interprets `graph`, that of `module`, take further inputs that a call does not have from `module`."""
    codegen = codegen_of(graph)
    if isinstance(codegen, _Arguments):
        codegen.module = weakref.ref(module)


def _set_further(graph: fx.Graph, further: tuple[str, ...]) -> None:
    codegen, before = codegen_of(graph), further_inputs(graph)
    if isinstance(codegen, PyTreeCodeGen):
        info = codegen.pytree_info
        info = info._replace(orig_args=[*(name for name in info.orig_args if name not in before), *further])
        _set(graph, info, further, codegen.signature if isinstance(codegen, _Arguments) else None)


def _set(graph: fx.Graph, info: Any, further: tuple[str, ...], signature: CallSignature | None) -> None:
    is_special = further or signature is not None
    graph.set_codegen(_Arguments(info, further, signature) if is_special else PyTreeCodeGen(info))


def values_of_call(
    graph: fx.Graph, parameters: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return the arguments of a call as `torch.fx.Interpreter` takes them for `graph`: by position.

    Args:
        graph: the graph.
        parameters: the signature of the model's `forward`, which a graph has that was traced symbolically.
        args, kwargs: as the model takes them.

    Raises:
        CallError: the graph does not serve the call.
    """
    codegen = codegen_of(graph)
    if isinstance(codegen, _Arguments) and codegen.signature is not None:
        return codegen.signature.bind(args, kwargs)[0]
    if isinstance(codegen, PyTreeCodeGen):
        return [*args, *kwargs.values()]
    bound = parameters.bind(*args, **kwargs)
    return [*bound.args, *bound.kwargs.values()]


class _NotesExport(inspect.Signature):
    """The signature of a `forward` method, which notes how a call that is exported passes its arguments.

    torch.export interprets a graph module on the values of its keyword arguments, in the order in which the caller
    wrote them, and without their names. Written in another order they would take each other's places unnoticed. But
    before that it binds the call to the signature of `forward`.
    """

    call_signature: CallSignature

    def replace(self, **changes: Any) -> _NotesExport:
        """Return a signature with these changes, as `inspect` makes one without `self`."""
        changed = super().replace(**changes)
        changed.call_signature = self.call_signature
        return changed

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """Bind a call, and note it."""
        bound = super().bind(*args, **kwargs)
        own = self.call_signature
        left_out = (name for name in own.captured if name not in own.constants and bound.arguments.get(name) is None)
        _noted.call = own, len(args), tuple(kwargs), tuple(left_out)
        return bound


def method_signature(signature: CallSignature, further: Sequence[str]) -> inspect.Signature:
    """Return the signature of a `forward` method that takes further arguments, by keyword."""
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in further]
    of_method = _NotesExport([*signature.of_method.parameters.values(), *more])
    of_method.call_signature = signature
    return of_method


_noted = threading.local()
_NO_CALL: Any = None, 0, (), ()


def left_out_of_export(signature: CallSignature | None) -> tuple[str, ...]:
    """Return the arguments that the call leaves out which torch.export is about to trace."""
    noted, _, _, left_out = getattr(_noted, "call", _NO_CALL)
    return left_out if noted is signature else ()


def _exported_call(signature: CallSignature, inputs: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments of the call that torch.export traces, from their values.

    Raises:
        CallError: torch.export has not bound the call to the signature before.
    """
    noted, count, names, _ = vars(_noted).pop("call", _NO_CALL)  # not for another export, if that binds none
    if noted is not signature or count + len(names) != len(inputs):
        raise CallError(
            "The names of the arguments of this export are not known, because torch.export of torch"
            f" {torch.__version__} does not bind them to the signature of forward. The way out:"
            " torch.export.export(graph, args, kwargs, strict=True), or another release of torch."
        )
    return inputs[:count], dict(zip(names, inputs[count:], strict=True))
