"""Call a captured graph by the arguments of its model, of which some may be left out.

A graph has an input for every argument that it was captured with. A model's optional arguments stay optional all the
same: `optional.py` finds the sets of arguments that may be left out, and a constant for each of them. Such calls are
served by a program that has the constants built in and computes only the results that the model returns then.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..compat.torch import PyTreeCodeGen, assert_async, codegen_of, pytree
from ..errors import AdapterError, CallError, shown
from ..graph.direct_calls import can_read_values


@dataclass(frozen=True)
class Fill:
    """A constant tensor in the place of an input.

    Args:
        value: of all its elements.
        sizes: of its dimensions: a number, or the input and the dimension of it that has the same size.
        dtype, device: its own.
    """

    value: int
    sizes: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self, inputs: Sequence[Any]) -> Tensor:
        """Return the constant for a call with these inputs."""
        sizes = [size if isinstance(size, int) else inputs[size[0]].shape[size[1]] for size in self.sizes]
        return torch.full(sizes, self.value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Omission:
    """A call that leaves arguments out.

    Args:
        fills: the constant in the place of each of them, by the index of the graph's input.
        outputs: indices of the graph's results that the model returns all the same.
        out_spec: the structure in which the model returns them.
    """

    fills: Mapping[int, Fill]
    outputs: tuple[int, ...]
    out_spec: pytree.TreeSpec

    def returned(self, results: Sequence[Any]) -> Any:
        """Return the results as the model does, for instance as its output class."""
        return pytree.tree_unflatten(list(results), self.out_spec)


def return_as(graph: fx.Graph, out_spec: pytree.TreeSpec | None) -> None:
    """Let `graph` return its results in this structure, or as a flat tuple, and take all its inputs.

    It forgets the structure and the optional arguments that capture recorded.
    """
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        info, further = codegen.pytree_info._replace(out_spec=out_spec), further_inputs(graph)
        graph.set_codegen(_WithFurtherInputs(info, further) if further else PyTreeCodeGen(info))


def names_of_results(graph: fx.Graph) -> tuple[str, ...]:
    """Return the keys of the dict that `graph` returns."""
    codegen = codegen_of(graph)
    return tuple(codegen.pytree_info.out_spec.context)


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
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        _set_further(graph, (*further_inputs(graph), name))
    return node


def drop_input(graph: fx.Graph, node: fx.Node) -> None:
    """Undo `add_input`: take an input, which nothing reads any more, out of `graph`."""
    graph.erase_node(node)
    if isinstance(codegen_of(graph), PyTreeCodeGen):
        _set_further(graph, tuple(name for name in further_inputs(graph) if name != node.target))


def further_inputs(graph: fx.Graph) -> tuple[str, ...]:
    """Return the names of the inputs that `add_input` has given a graph which has a structure of inputs."""
    codegen = codegen_of(graph)
    return codegen.further if isinstance(codegen, _WithFurtherInputs) else ()


def leaves_of(values: Any) -> list[Any]:
    """Return the leaves of nested inputs in the order of the inputs of a graph. None is one."""
    return pytree.tree_leaves(values)


def count_arguments(graph: fx.Graph) -> int:
    """Return how many arguments `graph` takes, however they are nested."""
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        return len(codegen.pytree_info.orig_args)
    return len(graph.find_nodes(op="placeholder"))


def _set_further(graph: fx.Graph, further: tuple[str, ...]) -> None:
    codegen = codegen_of(graph)
    info, before = codegen.pytree_info, further_inputs(graph)
    info = info._replace(orig_args=[*(name for name in info.orig_args if name not in before), *further])
    if isinstance(codegen, _CalledLikeTheModel):
        graph.set_codegen(_CalledLikeTheModel(info, codegen.signature, further))
    else:
        graph.set_codegen(_WithFurtherInputs(info, further) if further else PyTreeCodeGen(info))


class _WithFurtherInputs(PyTreeCodeGen):
    """Writes a function that has inputs beside those which the structure of the module's inputs tells."""

    def __init__(self, pytree_info: Any, further: tuple[str, ...]) -> None:
        super().__init__(pytree_info)
        self.further = further

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        if not self.further:
            return super().gen_var_bindings(fn_args, free_vars, expanded_def)
        nested = [name for name in free_vars if name.split(":")[0].strip() not in self.further]
        return super().gen_var_bindings(fn_args[: -len(self.further)], nested, expanded_def)


class _CalledLikeTheModel(_WithFurtherInputs):
    """Lets `torch.fx.Interpreter`, and so `torch.export`, call a graph as its model is called.

    Both hand a graph the values of the arguments. Arguments that are left out become constants before the graph runs,
    and the results that the model does not return without them are not returned.
    """

    def __init__(self, pytree_info: Any, signature: CallSignature, further: tuple[str, ...] = ()) -> None:
        super().__init__(pytree_info, further)
        self.signature = signature
        self.omission: Omission | None = None
        self.returns_all = True
        self.module: Callable[[], Any] = lambda: None

    def process_inputs(self, *inputs: Any) -> Any:
        if torch.compiler.is_exporting():
            args, kwargs = _exported_call(self.signature, inputs)
        else:
            own, more = inputs[: len(self.signature.captured)], inputs[len(self.signature.captured) :]
            if len(more) > len(self.further):
                own, more = inputs, ()  # too many, which the signature says
            args, kwargs = (), self.signature.by_position(own) | dict(zip(self.further, more, strict=False))
        further = [self._further_input(name, kwargs) for name in self.further]
        values, left_out = self.signature.bind(
            args, {name: kwargs[name] for name in kwargs if name not in self.further}
        )
        flat = [*super().process_inputs(*values), *further]
        self.omission = self.signature.omission(left_out) if left_out else None
        if self.omission is not None:
            for place, fill in self.omission.fills.items():
                flat[place] = fill.tensor(flat)
        return flat

    def _further_input(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """Return an input that the call has, or the module: an export must not keep that of the module."""
        value, module = kwargs.get(name), self.module()
        if value is None and module is not None:
            value = None if torch.compiler.is_exporting() else getattr(module, name, None)
            if value is None and any(n.target == name and n.users for n in module.graph.find_nodes(op="placeholder")):
                raise CallError(f"{name} is missing, which is an input of this graph.")
        return value

    def process_outputs(self, out: Any) -> Any:
        if self.omission is None:
            return super().process_outputs(out)
        return self.omission.returned([out[index] for index in self.omission.outputs] if self.returns_all else out)


_NO_TENSORS = (Mapping, list, tuple, str, bytes, bool, int, float)
"""What is passed by mistake where a graph takes a tensor."""


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


_noted = threading.local()
_NO_CALL: Any = None, 0, (), ()


def left_out_of_export(signature: CallSignature | None) -> tuple[str, ...]:
    """Return the arguments that the call leaves out which torch.export is about to trace."""
    noted, _, _, left_out = getattr(_noted, "call", _NO_CALL)
    return left_out if noted is signature else ()


def return_without(graph: fx.Graph, omission: Omission) -> None:
    """Let `graph`, which is called like the model, compute only what a call returns that leaves these arguments out."""
    output, codegen = graph.output_node(), codegen_of(graph)
    results: Any = output.args[0]
    output.args = (tuple(results[index] for index in omission.outputs),)
    graph.eliminate_dead_code()
    assert isinstance(codegen, _CalledLikeTheModel)
    codegen.returns_all = False


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


def take_further_inputs_from(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Let what interprets `graph`, that of `module`, take further inputs that a call does not have from `module`."""
    codegen = codegen_of(graph)
    if isinstance(codegen, _CalledLikeTheModel):
        codegen.module = weakref.ref(module)


def call_like_the_model(graph: fx.Graph, signature: CallSignature) -> None:
    """Let what interprets `graph` call it by `signature`."""
    codegen = codegen_of(graph)
    if isinstance(codegen, PyTreeCodeGen):
        graph.set_codegen(_CalledLikeTheModel(codegen.pytree_info, signature))


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
    if isinstance(codegen, _CalledLikeTheModel):
        return codegen.signature.bind(args, kwargs)[0]
    if isinstance(codegen, PyTreeCodeGen):
        return [*args, *kwargs.values()]
    bound = parameters.bind(*args, **kwargs)
    return [*bound.args, *bound.kwargs.values()]


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a captured graph, as those of its model.

    Args:
        model: the class of the model, for messages.
        parameters: of the model's `forward`, in order, without `self` and `**kwargs`.
        positional: names of those that may be passed by position.
        captured: names of the arguments that the graph has, in the order in which it takes them.
        constants: of these, the ones that are not tensors; their values are part of the graph.
        accepted: values of arguments that the graph does not have which say what it does anyway.
        omissions: for each set of arguments that a call may leave out, what it computes.
        refusals: for each argument that it may not leave out although the model has a default, why.
        layouts: further arguments of a call, whose values are part of the graph; `layouts.py` says which.
        tensors: of the captured arguments, those that are tensors.
    """

    model: str
    parameters: Mapping[str, inspect.Parameter]
    positional: tuple[str, ...]
    captured: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    accepted: Mapping[str, Any] = field(default_factory=dict)
    omissions: Mapping[frozenset[str], Omission] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> CallSignature:
        return self  # nothing in it changes

    @property
    def of_method(self) -> inspect.Signature:
        """The signature of a `forward` method: that of the model's, less `**kwargs`."""
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return inspect.Signature([itself, *self.parameters.values()])

    def of_method_with(self, further: Sequence[str]) -> inspect.Signature:
        """Return the signature of a `forward` method that takes further arguments, by keyword."""
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in further]
        signature = _NotesExport([*self.of_method.parameters.values(), *more])
        signature.call_signature = self
        return signature

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
        """Return the graph's arguments in its order, and the names of those that the call leaves out.

        Args:
            args, kwargs: as the model takes them.

        Raises:
            CallError: the graph cannot serve the call.
        """
        passed = dict(zip(self.positional, args, strict=False))
        if len(args) > len(passed) or any(name in passed for name in kwargs):
            raise self._unfit(args, kwargs)
        passed.update(kwargs)
        for name, layout in self.layouts.items():
            self._check_layout(name, layout, passed.pop(name, None))
        for name, value in passed.items():
            if name not in self.captured and not self._says_nothing_new(name, value):
                raise self._not_captured(name)
        values: list[Any] = []
        left_out: tuple[str, ...] = ()
        for name in self.captured:
            value = passed[name] if name in passed else self._default(name)
            if name in self.constants:
                self._check_constant(name, value)
                value = self.constants[name]
            elif value is None:
                left_out = (*left_out, name)
            elif name in self.tensors and isinstance(value, _NO_TENSORS):
                raise self._no_tensor(name, value)
            values.append(value)
        return values, left_out

    @property
    def has_defaults(self) -> bool:
        """Tell whether there are arguments that a call may leave out, if only because they are not captured."""
        return any(parameter.default is not inspect.Parameter.empty for parameter in self.parameters.values())

    def by_position(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments by name, from their values in the order in which the graph takes them."""
        if len(values) > len(self.captured):
            raise CallError(f"{len(values)} arguments are too many. {self._captured_with}")
        return dict(zip(self.captured, values, strict=False)) | dict(self.layouts)

    def omission(self, left_out: Sequence[str]) -> Omission:
        """Return what a call without these arguments computes.

        Raises:
            CallError: the graph does not serve such calls.
        """
        for name in left_out:
            if name not in self.captured:
                raise CallError(f"{name} is not an argument that this graph has. {self._captured_with}")
        omission = self.omissions.get(frozenset(left_out))
        if omission is None:
            name = next((name for name in left_out if name in self.refusals), left_out[0])
            reason = self.refusals.get(name, "the graph was not compared with the model for such calls")
            message = f"{name} cannot be left out, because {reason}. {self._captured_with}"
            if "raises" not in reason:
                message += f" To leave it out, {self._capture_another(without=left_out)}"
            raise CallError(message)
        return omission

    def _default(self, name: str) -> Any:
        default = self.parameters[name].default
        if default is inspect.Parameter.empty:
            raise CallError(f"{name} is missing. {self._captured_with} {self.model}.forward has no default for it.")
        return default

    def _says_nothing_new(self, name: str, value: Any) -> bool:
        if name in self.parameters and value is self.parameters[name].default:
            return True
        return name in self.accepted and not isinstance(value, Tensor) and bool(value == self.accepted[name])

    def _no_tensor(self, name: str, value: Any) -> CallError:
        if isinstance(value, Mapping) and any(key in self.parameters for key in value):
            way_out = "pass what is in it by name, as in model(**inputs)"
        else:
            way_out = 'pass a tensor; a tokenizer makes some with return_tensors="pt"'
        return CallError(f"{name} must be a tensor, not {shown(value)}. The way out: {way_out}.")

    def _check_constant(self, name: str, value: Any) -> None:
        constant = self.constants[name]
        if isinstance(value, Tensor) or type(value) is not type(constant) or value != constant:
            raise CallError(
                f"{name}={value!r} differs from {name}={constant!r}, which this graph was captured with and which is"
                f" part of it. For another value, {self._capture_another()}"
            )

    def _check_layout(self, name: str, layout: Tensor, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise CallError(f"{name} is missing. {self._captured_with}")
        way_out = f"For images of other sizes, {self._capture_another()}"
        if value.shape == layout.shape:
            same = (value == layout.to(value.device)).all()
            if not can_read_values(value):
                # What traces or compiles this call has no values yet; nothing public asserts them when it runs.
                assert_async(same, f"{name} differs from that of the graph, which is part of it. {way_out}")
                return
            if same:
                return
        raise CallError(
            f"{name}={value.tolist()} differs from {layout.tolist()}, which this graph was captured with and which is"
            f" part of it. {way_out}"
        )

    def _unfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallError:
        try:
            self.of_method.bind(None, *args, **kwargs)
        except TypeError as error:
            return CallError(f"The call does not fit {self.model}.forward: {error}. {self._captured_with}")
        raise AssertionError("a call that fits was refused")

    def _not_captured(self, name: str) -> CallError:
        if name in self.accepted and name not in self.parameters:
            return CallError(
                f"{name} differs from {name}={self.accepted[name]!r}, which this graph was captured with and which is"
                f" part of it. The way out: set model.config.{name} before the capture; or adapt(model, cfg), which"
                " captures a graph for each kind of call."
            )
        if name not in self.parameters:
            return CallError(f"{name} is not an argument that this graph has. {self._captured_with}")
        way_out = self._capture_another(more=[name])
        return CallError(f"{name} was not captured. {self._captured_with} For calls with it, {way_out}")

    @property
    def _captured_with(self) -> str:
        return f"The graph of {self.model} was captured for calls with {', '.join((*self.captured, *self.layouts))}."

    def _capture_another(self, more: Sequence[str] = (), without: Sequence[str] = ()) -> str:
        example = ", ".join(f"{name!r}: ..." for name in (*self.captured, *self.layouts, *more) if name not in without)
        return (
            f"capture such a call: rewrite(model, cfg, example_inputs={{{example}}}); or, of a Hugging Face model,"
            " adapt(model, cfg), which captures a graph for each kind of call."
        )
