"""Captured models, each of which is captured once in a process: captures take half of the time of tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx

Model = TypeVar("Model", bound=nn.Module)

_store: dict[Any, tuple[Any, Any]] = {}


def captured(build: Callable[..., Model], *arguments: Any, inputs: Any = None, **options: Any) -> tuple[Model, Any]:
    """Return the model `build(*arguments)` and its graph, captured by the first test that asks for it.

    Both are copies of what is stored, which share their weights as model and graph do, so that no test can disturb
    another. The graph stands for the model wherever one is adapted: `rewrite`, `wrap` and `load` take it.

    Args:
        build: makes the model from `arguments`; it is called right after `torch.manual_seed(0)`. A function of a
            module, because the store knows the model by it.
        inputs: the example inputs of `capture`.
        options: further ones of `capture`.
    """
    key = (build, _key(arguments), _key(inputs), _key(options))
    if key not in _store:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(*arguments)
            _store[key] = model, llfx.capture(model, inputs, **options)
    return twins(*_store[key])


def twins(model: Model, graph: fx.GraphModule) -> tuple[Model, Any]:
    """Return copies of a model and of the graph that was captured from it, over weights that the copies share."""
    twin = copy.deepcopy(model)
    originals, copies = _tensors(model), _tensors(twin)
    memo: dict[int, Any] = {}
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if name in originals and originals[name].data_ptr() == tensor.data_ptr():
            shared = copies[name].detach()
            memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    graph_twin: Any = copy.deepcopy(graph, memo)
    return twin, graph_twin


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _key(value: Any) -> Any:
    """Return something to tell `value` by: of a tensor its values, of what cannot be hashed how it is printed."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, tuple(value.flatten().tolist())
    if isinstance(value, (tuple, list)):
        return type(value), *map(_key, value)
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in value.items())
    return value if value.__hash__ else repr(value)
