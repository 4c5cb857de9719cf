"""Keep each call of a `torch.autograd.Function` one call in the graph, because it has a backward pass of its own.

Tracers run the `forward` of such a function and record its operations. Autograd then differentiates these, which is
another gradient than that of the function's `backward` where this is not the derivative: for straight-through
estimators, for gradients that are scaled or bounded, for approximations.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import pytree, trace_is_active, transform_is_active, version_of
from ..errors import COMPILE_INSTEAD, CaptureError

_IN_GRAPHS = (*fx.node.base_types, type(None), type(...), fx.Proxy)
"""What a graph can hold as an argument."""


@dataclass
class _Call:
    """A call that is being traced.

    Args:
        target: what is called; `apply` of a function, or Dynamo's operator for that.
        leaves: its arguments, with None in the place of tensors and sizes.
        spec: their structure.
        tensors, sizes: the places of these among the leaves.
        trace: that it is part of.
        results: what it returned, when it was traced last.
    """

    target: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    tensors: list[int]
    sizes: list[int]
    trace: Kept
    results: Any = None

    def arguments(self, tensors: Sequence[Any], sizes: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments with these tensors and sizes, or nodes for them."""
        leaves = list(self.leaves)
        for place, leaf in zip((*self.tensors, *self.sizes), (*tensors, *sizes), strict=True):
            leaves[place] = leaf
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


_calls: dict[int, _Call] = {}
_number = itertools.count()


@dataclass(eq=False)
class Kept:
    """The calls that are kept in one trace."""

    thread: int = field(default_factory=threading.get_ident)
    numbers: list[int] = field(default_factory=list)
    running: bool = False

    def record(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one operator for the call `target(*args, **kwargs)`, and return its results."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
        others = [None if i in (*tensors, *sizes) else leaf for i, leaf in enumerate(leaves)]
        call = _Call(target, others, spec, tensors, sizes, self)
        number = next(_number)
        _calls[number] = call
        self.numbers.append(number)
        results = iter(_STAND_IN([leaves[i] for i in tensors], [leaves[i] for i in sizes], number))
        return pytree.tree_map(lambda leaf: next(results) if isinstance(leaf, Tensor) else leaf, call.results)

    def put_calls(self, gm: nn.Module) -> None:
        """Put the calls in the place of the operators that were recorded for them, in all graphs of `gm`."""
        for module in list(gm.modules()):
            if isinstance(module, fx.GraphModule):
                nodes = module.graph.find_nodes(op="call_function", target=_STAND_IN)
                for node in nodes:
                    _put_call(module, node, _calls[node.args[2]])
                if nodes:
                    module.recompile()


@contextmanager
def telling_functions(tell: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell of each autograd function that this thread calls in the body, with its arguments; all run as they are."""
    listener = threading.get_ident(), tell
    _listening.append(listener)
    try:
        with _standing_before_forwards():
            yield
    finally:
        _listening.remove(listener)


@contextmanager
def keeping_functions() -> Iterator[Kept]:
    """Let traces in the body record each call of an autograd function as one; `Kept.put_calls` finishes the graphs.

    Raises:
        CaptureError: the model defines such a function while it runs, so that its calls were not seen.
    """
    kept = Kept()
    known = _functions()
    _keeping.append(kept)
    try:
        with _standing_before_forwards():
            yield kept
    finally:
        _keeping.remove(kept)
        for number in kept.numbers:
            del _calls[number]
    for function in _functions() - known:
        if "<locals>" in function.__qualname__:
            raise CaptureError(
                f"{function.__qualname__} is an autograd function that is defined while the model runs, anew in each"
                " call, so that a graph cannot keep its backward pass. The way out: define it in its module, outside of"
                f" functions, or {COMPILE_INSTEAD}."
            )


_changing = threading.Lock()
_replaced: dict[Any, Any] = {}
"""The functions that a `_Before` stands before, each with its own `forward`, or None if it inherits one."""
_watches = 0
_keeping: list[Kept] = []
"""The traces that run, of all threads."""
_listening: list[tuple[int, Callable[[Any, tuple[Any, ...]], None]]] = []
"""The threads that are to be told of calls, and whom to tell."""


def _functions() -> set[Any]:
    """Return all autograd functions that are not torch's own; torch's are derivatives of operators."""
    found: set[Any] = set()
    open_ends: list[Any] = [torch.autograd.Function]
    while open_ends:
        for function in open_ends.pop().__subclasses__():
            open_ends.append(function)
            if not function.__module__.startswith("torch."):
                found.add(function)
    return found


@contextmanager
def _standing_before_forwards() -> Iterator[None]:
    """Let `_Before` come before `forward` of each autograd function in the body.

    It is the only place that all calls pass in all releases, also those by an `apply` that the model has looked up
    before. Threads that trace nothing run what they would run. A process without autograd functions is left alone.
    """
    global _watches
    with _changing:
        _watches += 1
        forwards = {function: function.forward for function in _functions() - _replaced.keys()}
        for function, forward in forwards.items():
            _replaced[function] = vars(function).get("forward")
            plain = forward.forward if isinstance(forward, _Before) else forward  # of a class that it extends
            function.forward = staticmethod(_Before(function, plain))
    try:
        yield
    finally:
        with _changing:
            _watches -= 1
            while _replaced and not _watches:
                function, own = _replaced.popitem()
                if own is None:
                    del function.forward
                else:
                    function.forward = own


@dataclass(frozen=True)
class _Before:
    """What stands in the place of `forward` of an autograd function."""

    function: Any
    forward: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Record a call of the function in the trace of this thread; run its `forward` if there is none.

        `apply` has switched gradients off when it comes to `forward`. A model that calls `forward` itself wants its
        operations, and inside a transform of torch.func they are what can be traced.
        """
        function, thread = self.function, threading.get_ident()
        if torch.is_grad_enabled() or transform_is_active():
            return self.forward(*args)
        takes_context = function.setup_context is torch.autograd.Function.setup_context
        inputs = args[1:] if takes_context else args
        for listening, tell in _listening:
            if listening == thread:
                tell(function, inputs)
        kept = next((kept for kept in reversed(_keeping) if kept.thread == thread), None)
        leaves = pytree.tree_leaves(inputs)
        if kept is None or kept.running or not any(map(_may_get_gradients, leaves)):
            return self.forward(*args)
        others = (leaf for leaf in leaves if not isinstance(leaf, (Tensor, torch.SymInt, *_IN_GRAPHS)))
        if (other := next(others, None)) is not None:
            _warn_of_other(function, other)
            return self.forward(*args)
        proxy = next((leaf for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", calling(function), inputs, {})
        return kept.record(calling(function), inputs, {})


def _may_get_gradients(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() or leaf.is_complex()
    return isinstance(leaf, fx.Proxy)


def _warn_of_other(function: Any, argument: object) -> None:
    warnings.warn(
        f"{function.__name__}.apply takes an argument of type {type(argument).__name__}, which a graph cannot hold. So"
        " the graph has the operations of its forward, and gradients are those of its forward, not of its backward. The"
        f" way out, if they differ: pass it tensors and numbers alone, or {COMPILE_INSTEAD}.",
        stacklevel=3,
    )


# The operator that stands for a call in a trace, because torch.export takes no other functions into a graph.


def _run(tensors: Sequence[Tensor], sizes: Sequence[int], number: int) -> list[Tensor]:
    """Run a call that is being traced."""
    call = _calls[number]
    versions = [version_of(tensor) for tensor in tensors]
    args, kwargs = call.arguments(tensors, sizes)
    call.trace.running = True  # what the function calls itself is not recorded
    try:
        call.results = call.target(*args, **kwargs)
    finally:
        call.trace.running = False
    if versions != [version_of(tensor) for tensor in tensors]:
        raise CaptureError(
            f"{call.target.__name__.removesuffix('_apply')} is an autograd function that writes to its arguments in"
            " place, where a graph cannot keep its backward pass. The way out: let its forward return a new tensor, or"
            f" {COMPILE_INSTEAD}."
        )
    # Clones, because an operator must not return its arguments or views of them.
    return [leaf.clone() for leaf in pytree.tree_leaves(call.results) if isinstance(leaf, Tensor)]


torch.library.custom_op("lora_lite_fx::autograd_function", mutates_args=())(_run).register_fake(_run)
_STAND_IN = torch.ops.lora_lite_fx.autograd_function.default


def _put_call(gm: fx.GraphModule, node: fx.Node, call: _Call) -> None:
    """Put a call in the place of the operator `node`."""
    graph = gm.graph

    def as_argument(leaf: Any) -> Any:
        if not isinstance(leaf, nn.Module):
            return leaf
        name = next(f"function_body_{i}" for i in itertools.count() if not hasattr(gm, f"function_body_{i}"))
        gm.add_submodule(name, leaf)
        return graph.get_attr(name)

    tensors: Any = node.args[0]
    sizes: Any = node.args[1]
    with graph.inserting_before(node):
        args, kwargs = pytree.tree_map(as_argument, call.arguments(tensors, sizes))
        new = graph.call_function(call.target, args, kwargs)
    new.meta = dict(node.meta)
    if isinstance(call.results, Tensor):
        new.meta["val"] = node.meta["val"][0]
        for item in list(node.users):
            item.replace_all_uses_with(new)
            graph.erase_node(item)
    else:
        places = [i for i, leaf in enumerate(call.results) if isinstance(leaf, Tensor)]
        values = iter(node.meta["val"])
        new.meta["val"] = tuple(next(values) if isinstance(leaf, Tensor) else leaf for leaf in call.results)
        for item in list(node.users):
            assert item.target is operator.getitem
            item.args = (new, places[item.args[1]])  # type: ignore[index]
    graph.erase_node(node)


# What stands in a finished graph.


@functools.cache
def calling(function: Any) -> Callable[..., Any]:
    """Return the function that calls `function.apply` from a graph, the same at each call."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():  # which cannot warn
            _warn_of_export([function])
        return function.apply(*args)

    call.__name__ = call.__qualname__ = f"{function.__name__}_apply"
    call.__module__ = function.__module__  # so that the code of a graph names it
    vars(call)["autograd_function"] = function
    return call


def warn_of_trace(graph: fx.Graph) -> None:
    """Warn if another tracer takes `graph` apart, and loses the backward pass of a function in it."""
    if not (torch.compiler.is_exporting() and trace_is_active()):  # else the calls warn when they are traced
        functions = (getattr(node.target, "autograd_function", None) for node in graph.nodes)
        _warn_of_export([function for function in functions if function is not None])


def _warn_of_export(functions: Sequence[Any]) -> None:
    names = ", ".join(dict.fromkeys(function.__name__ for function in functions))
    if names and not _keeping:
        warnings.warn(
            f"The graph calls {names}, with a backward of its own, which torch.export and make_fx leave out. What they"
            " return computes the same results, but gradients through it are those of the operations of forward. To"
            " train, use the graph itself or torch.compile.",
            stacklevel=3,
        )
