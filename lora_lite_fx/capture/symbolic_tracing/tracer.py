"""Capture a model by symbolic tracing, without example inputs."""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from ...compat.torch import SET_GRAD_ENABLED, schema_of
from ...errors import CaptureError
from ...graph.calls_and_traces import tracing
from ..autograd_functions import keeping_functions
from ..process_state.python_state import PythonState
from ..refusal import is_of_others, refusal
from .attention_module import attend, attend_in_function, is_attention
from .proxies import PLAIN, AskedTypes, Proxy
from .traced_regions import RecordedRegions, go_back_to_the_caller

aten = torch.ops.aten


INLINED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The modules of torch that symbolic tracing looks into."""


class _Tracer(fx.Tracer):
    """Trace into the modules whose weights may be adapted or tied; keep dropout and norms as leaf modules.

    Args:
        inline: whether to trace into what computes parametrized weights and into `nn.MultiheadAttention` too.
    """

    # Record writes to buffers in the graph instead of doing them while the model is traced.
    proxy_buffer_attributes = True

    def __init__(self, values: Mapping[str, Any], inline: bool) -> None:
        super().__init__()
        self.values = values
        self.inline = inline
        # A graph that is only compared needs none, and they take most of the time.
        self.records_lines = not values
        self._refused: Exception | None = None

    @contextmanager
    def noting_refusals(self) -> Iterator[None]:
        """Note what cannot be traced, because the model may catch the error and go another way."""
        try:
            yield
        except Exception as error:
            self._refused = error
            raise

    def to_bool(self, obj: fx.Proxy) -> bool:
        with self.noting_refusals():
            return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        with self.noting_refusals():
            return super().iter(obj)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # Dynamo lists the functions of Python when it is imported, as torch does it for the first line of a trace. It
        # would list those of `AskedTypes` in their place, and torch.compile would follow no code that asks for types.
        from ...compat import dynamo  # noqa: F401

        with AskedTypes():
            graph = super().trace(root, concrete_args)
        if self._refused is not None:
            raise self._refused
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self.records_lines:
            node.stack_trace = "".join(traceback.format_list(_own_frames()))
        return node

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        # The placeholder of an argument with a value stays in the graph, so that graphs of one model can be compared.
        root, arguments = super().create_args_for_root(*args, **kwargs)
        return root, [
            self.values.get(str(argument.node.target), argument) if isinstance(argument, fx.Proxy) else argument
            for argument in arguments
        ]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if not super().is_leaf_module(module, name) or isinstance(module, INLINED):
            return False
        return not (self.inline and (is_attention(module) or _is_traceable(module)))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.inline and is_attention(m):
            forward = partial(attend, m)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if self.inline and target is nn.functional.multi_head_attention_forward:
            result = attend_in_function(self, args, kwargs)
            if result is not None:
                return result
        if kind == "call_function":
            target = getattr(target, PLAIN, target)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)


def _own_frames() -> list[traceback.FrameSummary]:
    """Return the frames of the model's own code that run now. torch.fx leaves out `forward` of the model itself."""
    frames, frame = list[traceback.FrameSummary](), sys._getframe(1)
    while frame is not None and frame.f_code is not _Tracer.trace.__code__:
        if not is_of_others(frame):
            frames.append(traceback.FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return frames[::-1]


def _is_traceable(module: nn.Module) -> bool:
    """Return whether `module` computes a parametrized weight in a way that looks at no shapes and no mode."""
    if isinstance(module, ParametrizationList):
        own = (type(step) for step in module)
        return all(_is_weight_norm(step) or not step.__module__.startswith("torch.") for step in own)
    return _is_weight_norm(type(module))


def _is_weight_norm(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("torch.nn.utils.parametrizations", "_WeightNorm")


# The functions that symbolic tracing records for the operators that make a site, and these operators.
_ATEN_FUNCTIONS: dict[Any, Any] = {
    nn.functional.linear: aten.linear.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
    torch.addmm: aten.addmm.default,
    torch.bmm: aten.bmm.default,
    torch.mm: aten.mm.default,
}
_ATEN_METHODS = {
    "matmul": aten.matmul.default,
    "t": aten.t.default,
    "bmm": aten.bmm.default,
    "transpose": aten.transpose.int,
}
_CONVOLUTIONS = {
    nn.functional.conv1d: aten.conv1d,
    nn.functional.conv2d: aten.conv2d,
    nn.functional.conv3d: aten.conv3d,
}


def symbolic_trace(model: nn.Module, values: Mapping[str, Any] = MappingProxyType({})) -> fx.GraphModule:
    """Return the graph of `model`.

    Args:
        model: any module; it is not changed.
        values: constants in the place of arguments, by their names.

    Raises:
        CaptureError: the model cannot be traced.
    """
    if "forward" in vars(model):  # torch.fx traces that of the class
        raise CaptureError(
            f"forward of this {type(model).__name__} was replaced on the instance, and symbolic tracing (no"
            " example_inputs were given) follows that of its class. The way out: pass example_inputs, so that"
            " torch.export captures the replaced one; or subclass the model."
        )
    with torch.enable_grad():
        gm = recorded(model, values)
    if gm.graph.find_nodes(op="call_function", target=SET_GRAD_ENABLED):
        with torch.no_grad():
            without = recorded(model, values)
        go_back_to_the_caller(gm.graph, without.graph, type(model).__name__)
        gm.recompile()
    return gm


@tracing()
def recorded(model: nn.Module, values: Mapping[str, Any] = MappingProxyType({})) -> fx.GraphModule:
    """Return the graph of `model` as a trace in the mode of autograd of now records it; see `symbolic_trace`."""
    attributes, state = set(vars(model)), PythonState(model)
    with keeping_functions():
        try:
            graph = _trace(model, values, inline=True)
        except Exception:
            state.restore()
            try:  # what has to look at shapes or values is a leaf, and its weights are listed as left out
                graph = _trace(model, values, inline=False)
            except Exception as error:
                raise refusal(model, error, "symbolic tracing (no example_inputs were given)") from error
    use_aten(graph)
    gm = fx.GraphModule(model, graph)
    # Remove the constant tensors that the tracer stored on the model, under a new name at each trace.
    for name in {str(node.target) for node in graph.find_nodes(op="get_attr")} & (set(vars(model)) - attributes):
        delattr(model, name)
    return gm


def _trace(model: nn.Module, values: Mapping[str, Any], inline: bool) -> fx.Graph:
    tracer = _Tracer(values, inline)
    with RecordedRegions(tracer):
        return tracer.trace(model)


def trace_into_linears(model: nn.Module) -> fx.Graph:
    """Return the graph of `model` in which linears, embeddings and convolutions are functions."""
    tracer = _Tracer({}, inline=False)
    tracer.records_lines = False  # `model` is a graph, and no code of the user's
    with keeping_functions():
        return tracer.trace(model)


def use_aten(graph: fx.Graph) -> None:
    """Replace the functions and methods of torch that make a site by the aten operators that they call, in place."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _ATEN_FUNCTIONS and "out" not in node.kwargs:
            node.target = _ATEN_FUNCTIONS[node.target]
        elif node.op == "call_method" and node.target in _ATEN_METHODS:
            node.op, node.target = "call_function", _ATEN_METHODS[node.target]
        elif node.op == "call_function" and node.target is getattr and node.args[1:] in (("T",), ("mT",)):
            node.target, node.args = (aten.numpy_T if node.args[1] == "T" else aten.mT).default, node.args[:1]
        elif node.op == "call_function" and node.target in _CONVOLUTIONS:
            packet = _CONVOLUTIONS[node.target]
            by_name = any(value in ("same", "valid") for value in (*node.args, *node.kwargs.values()))
            node.target = packet.padding if by_name else packet.default
            _make_lists(node)
        elif node.target is nn.functional.embedding and node.kwargs.get("max_norm") is None and len(node.args) == 2:
            ids, weight = node.args
            padding = node.kwargs.get("padding_idx")
            node.target, node.args, node.kwargs = (
                aten.embedding.default,
                (weight, ids, -1 if padding is None else padding),
                {},
            )
        elif node.target is torch.functional.einsum:
            equation, *operands = node.args
            if isinstance(equation, str) and all(isinstance(operand, fx.Node) for operand in operands):
                node.target, node.args = aten.einsum.default, (equation, list(operands))
        if node.kwargs and node.target in _ATEN_FUNCTIONS.values():
            _pass_by_position(node)


def _make_lists(node: fx.Node) -> None:
    """Pass the one number that is for all dimensions of a convolution as a list, which the operator takes."""
    sizes = {argument.name: argument.N for argument in schema_of(node.target).arguments}

    def as_list(name: str, value: Any) -> Any:
        return [value] * sizes[name] if sizes[name] and isinstance(value, int) else value

    node.args = tuple(map(as_list, sizes, node.args))
    node.kwargs = {name: as_list(name, value) for name, value in node.kwargs.items()}


def _pass_by_position(node: fx.Node) -> None:
    """Pass the arguments of an operator by position, as far as its schema lets them."""
    names = [argument.name for argument in schema_of(node.target).arguments if not argument.kwarg_only]
    kwargs = {names[0] if name == "input" else name: value for name, value in node.kwargs.items()}
    args = list(node.args)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs
