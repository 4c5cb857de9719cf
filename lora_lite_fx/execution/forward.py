"""The `forward` method of a graph module that runs programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..capture.asserted_decisions import is_other_decision
from ..capture.export import failed_guard
from ..capture.graph_calls import method_signature
from ..errors import CallError
from ..graph.sharded import is_sharded
from ..graph.turns import calling
from .casting import describe_cast
from .execution import Execution


def forward_of_programs(
    plain: Callable[..., Any], execution: Execution, further: tuple[str, ...]
) -> Callable[..., Any]:
    """Return the `forward` of a graph module: it runs the program for each call, and is called like the model.

    Args:
        plain: the function that torch.fx made of the graph, whose signature shows.
        execution: how the graph is run.
        further: the names of inputs that it takes by keyword beside those of the model.
    """
    signature = execution.signature
    optional = signature if signature is not None and signature.has_defaults else None

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        banks, ids = self._banks, None
        if banks is not None:
            args, ids = banks.taken_out(args, kwargs, by_position=optional is None)
        values, left_out = ((args, kwargs), ()) if optional is None else optional.bind(args, kwargs)
        more = self._coefficients(*((args, kwargs) if optional is None else (values, {})))
        if banks is not None:
            more |= banks.further(self.switches, values, ids)
        program = getattr(self, self._method_for(left_out, ids))
        if optional is None:
            return program(*args, **kwargs, **more)
        results = program(*values, **more)
        return optional.omission(left_out).returned(results) if left_out else results

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return run(self, *args, **kwargs)
        with calling():
            try:
                return run(self, *args, **kwargs)
            except RuntimeError as error:
                if is_other_decision(error):
                    raise CallError(str(error)) from None
                if not (cast := describe_cast(self, self.host)):
                    raise
                way_out = "cast the model before it is adapted, model.to(torch.bfloat16)"
                if is_sharded(self.host):
                    cast += ": mp_policy of fully_shard casts parameters, as bf16=True of a Trainer asks it to"
                    way_out += ", and shard it without param_dtype; its adapters are float32 then"
                raise CallError(f"{cast}. The way out: {way_out}.") from error
            except AssertionError as error:
                if (condition := failed_guard(error)) is None:
                    raise
                raise CallError(
                    f"This graph holds for calls with {condition}, as in its example inputs, and not for this one. The"
                    " way out: capture a graph for calls like this one, with example_inputs of their shapes."
                ) from error

    # torch.compile counts recompilations by code object, so each module needs one of its own.
    forward.__code__ = forward.__code__.replace()
    forward = functools.update_wrapper(forward, plain)  # the signature of `plain` shows
    if signature is not None:
        forward.__signature__ = method_signature(signature, further)  # type: ignore[attr-defined]
    return forward
