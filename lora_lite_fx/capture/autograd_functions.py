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

# The parent of `Function`, through which `apply` goes last, also where a model has looked `apply` up before. Nothing
# public stands between a model and its functions.
from torch.autograd.function import _SingleLevelFunction

from ..compat.torch import pytree, trace_is_active, version_of
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
    with _changing:
        _listening.append(listener)
        _parent.apply = classmethod(_apply)
    try:
        yield
    finally:
        with _changing:
            _listening.remove(listener)
            _leave_apply()


def _leave_apply() -> None:
    if not _keeping and not _listening:
        del _parent.apply


@contextmanager
def keeping_functions() -> Iterator[Kept]:
    """Let traces in the body record each call of an autograd function as one; `Kept.put_calls` finishes the graphs."""
    kept = Kept()
    with _changing:
        _keeping.append(kept)
        _parent.apply = classmethod(_apply)
    try:
        yield kept
    finally:
        with _changing:
            _keeping.remove(kept)
            _leave_apply()
        for number in kept.numbers:
            del _calls[number]


_parent: Any = _SingleLevelFunction
_changing = threading.Lock()
_keeping: list[Kept] = []
"""The traces that run, of all threads."""
_listening: list[tuple[int, Callable[[Any, tuple[Any, ...]], None]]] = []
"""The threads that are to be told of calls, and whom to tell."""


def _apply(function: Any, *args: Any) -> Any:
    """Record a call of an autograd function in the trace of this thread; run it if there is none."""
    for thread, tell in _listening:
        if thread == threading.get_ident():
            tell(function, args)
    run = functools.partial(super(_parent, function).apply, *args)
    kept = next((kept for kept in reversed(_keeping) if kept.thread == threading.get_ident()), None)
    leaves = pytree.tree_leaves(args)
    if kept is None or kept.running or not _gets_gradients(function, leaves):
        return run()
    others = (leaf for leaf in leaves if not isinstance(leaf, (Tensor, torch.SymInt, *_IN_GRAPHS)))
    if (other := next(others, None)) is not None:
        _warn_of_other(function, other)
        return run()
    proxy = next((leaf for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
    if proxy is not None:
        return proxy.tracer.create_proxy("call_function", calling(function), args, {})
    return kept.record(calling(function), args, {})


def _gets_gradients(function: Any, leaves: Sequence[Any]) -> bool:
    """Return whether a function of the model's may pass gradients to its arguments."""
    if function.__module__.startswith("torch."):  # such as those that torch makes for operators: derivatives
        return False
    return any(isinstance(leaf, fx.Proxy) or _is_float(leaf) for leaf in leaves)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _warn_of_other(function: Any, argument: object) -> None:
    warnings.warn(
        f"{function.__name__}.apply takes an argument of type {type(argument).__name__}, which a graph cannot hold. So"
        " the graph has the operations of its forward, and gradients are those of its forward, not of its backward. The"
        f" way out, if they differ: pass it tensors and numbers alone, or {COMPILE_INSTEAD}.",
        stacklevel=4,
    )


# The operator that stands for a call in a trace, because torch.export takes no other functions into a graph.


@torch.library.custom_op("lora_lite_fx::autograd_function", mutates_args=())
def stand_in(tensors: Sequence[Tensor], sizes: Sequence[int], number: int) -> list[Tensor]:
    """Run a call that is being traced."""
    return _run(tensors, sizes, number)


def _run(tensors: Sequence[Tensor], sizes: Sequence[int], number: int) -> list[Tensor]:
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


stand_in.register_fake(_run)
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
