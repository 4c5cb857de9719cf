"""Choose the program that runs a call: by its arguments, the modes of modules, hooks, and the switches of adapters.

Read this file first, then `derive_program.py` and `run_program.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.bank import IDS, check_coefficients
from ..capture.asserted_decisions import is_other_decision
from ..capture.export import failed_guard
from ..capture.graph_calls import method_signature
from ..capture.recurrent_layers import fixed_length
from ..compat.torch import constant_when_compiled, outside_symbolic_trace, pytree, trace_is_active, transform_is_active
from ..errors import CallError
from ..graph.calls_and_traces import calling
from ..graph.modes import one_mode
from ..graph.sharded import is_sharded
from ..passes import Program as Kind
from ..passes import input_name
from .casting import describe_cast, describe_move
from .program_state import RunsPrograms
from .run_program import NUMBER, ROWS, Program

Switched = tuple[tuple[str, ...] | None, tuple[tuple[str, str | float], ...]]
"""What a program depends on of the switches: `acting` and `scales` of its `ProgramKey`."""


def forward_of_programs(plain: Callable[..., Any], gm: RunsPrograms) -> Callable[..., Any]:
    """Return the `forward` of a graph module: it runs the program for each call, and is called like the model.

    Args:
        plain: a function that torch.fx made, with the arguments of the graph. Its signature shows, also to tracers.
        gm: the graph module, which the function does not keep.
    """
    assert gm.execution is not None
    signature = gm.execution.signature
    optional = signature if signature is not None and signature.has_defaults else None

    def run(self: RunsPrograms, *args: Any, **kwargs: Any) -> Any:
        banks, ids = self.derived.banks, None
        if banks is not None:
            args, ids = banks.taken_out(args, kwargs, by_position=optional is None)
        values, left_out = ((args, kwargs), ()) if optional is None else optional.bind(args, kwargs)
        more = coefficients(self, *((args, kwargs) if optional is None else (values, {})))
        if banks is not None:
            more |= banks.further(self.switches, values, ids)
        program = choose_program(self, left_out, ids)
        if optional is None:
            return program.code(program.owner, *args, **kwargs, **more)
        results = program.code(program.owner, *values, **more)
        return optional.omission(left_out).returned(results) if left_out else results

    def forward(self: RunsPrograms, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return run(self, *args, **kwargs)
        with calling():
            try:
                return run(self, *args, **kwargs)
            except (RuntimeError, AssertionError) as error:
                if (message := _explained(error, self, args, kwargs)) is None:
                    raise
                raise CallError(message) from (None if is_other_decision(error) else error)

    # torch.compile counts recompilations by code object, so each module needs one of its own.
    forward.__code__ = forward.__code__.replace()
    forward = functools.update_wrapper(forward, plain)
    if signature is not None:
        of_method = method_signature(signature, (IDS,) if gm.derived.banks else ())
        forward.__signature__ = of_method  # type: ignore[attr-defined]
    return forward


def _explained(
    error: RuntimeError | AssertionError, gm: RunsPrograms, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return why a call failed and the way out, where the graph knows; None where it does not."""
    if isinstance(error, AssertionError):
        if (condition := failed_guard(error)) is None:
            return None
        fixed = fixed_length(gm.graph)
        because = ""
        if fixed is not None and condition.endswith(f"== {fixed[0]}"):
            because = f" {fixed[1]}; a capture without example_inputs leaves the length open."
        return (
            f"This graph holds for calls with {condition}, as in its example inputs, and not for this one.{because} The"
            " way out: capture a graph for calls like this one, with example_inputs of their shapes."
        )
    if is_other_decision(error):
        return str(error)
    signature = None if gm.execution is None else gm.execution.signature
    inputs = (str(node.target) for node in gm.graph.find_nodes(op="placeholder"))
    names = inputs if signature is None else signature.positional
    if move := describe_move(gm, gm.host, {**dict(zip(names, args, strict=False)), **kwargs}):
        return f"{move}."
    if not (cast := describe_cast(gm, gm.host)):
        return None
    way_out = "cast the model before it is adapted, model.to(torch.bfloat16)"
    if is_sharded(gm.host):
        cast += ": mp_policy of fully_shard casts parameters, as bf16=True of a Trainer asks it to"
        way_out += ", and shard it without param_dtype; its adapters are float32 then"
    return f"{cast}. The way out: {way_out}."


def choose_program(gm: RunsPrograms, left_out: tuple[str, ...], ids: object) -> Program:
    """Return the program for a call now.

    Args:
        gm: the graph that is called.
        left_out: the arguments that the call leaves out.
        ids: for banks, the slots that the call itself says; None if the switches say them.
    """
    derived, execution = gm.derived, gm.execution
    assert execution is not None
    fuses_loss = execution.fuse_loss and gm.training
    mode = one_mode(*derived.parts, *derived.read_parts(gm.host)) if derived.parts[0] else None
    kind: Kind = "checkpointed" if execution.checkpoint_layers and gm.training else "training"
    if torch.compiler.is_exporting():
        return gm.program("exported", left_out, (), fuses_loss, mode, *constant_switches(gm, "torch.export"))
    if not torch.compiler.is_compiling():
        if trace_is_active():
            with outside_symbolic_trace():
                switches = constant_switches(gm, "A trace of torch.fx")
                return gm.program("exported", left_out, (), fuses_loss, mode, *switches)
        if transform_is_active():
            kind = "plain"
    called, (acting, scales) = gm.called_for_hooks(), input_switches(gm)
    if kind != "plain" and gm.keeps_values and not torch.is_grad_enabled() and _may_keep(gm, ids):
        program = gm.program("inference", left_out, called, fuses_loss, mode, acting, scales)
        if program.kept is not None and program.kept.fit():
            return program
    return gm.program(kind, left_out, called, fuses_loss, mode, acting, scales)


def _may_keep(gm: RunsPrograms, ids: object) -> bool:
    """Return whether a call may use kept values: all modes are evaluation, and the rows are those of the scope."""
    if gm.training or gm.any_part_in_training():
        return False
    banks = gm.derived.banks
    if banks is None or not banks.acting(gm.switches):
        return True
    return ids is None and gm.switches.ids is not None and not torch.compiler.is_compiling()


def input_switches(gm: RunsPrograms) -> Switched:
    """Return what a program depends on of the switches, with coefficients as its inputs."""
    if gm.switches.acting is None and not gm.switches.scales:
        return None, ()
    scales = gm.switches.scales_of(gm.derived.names)
    return _acting(gm), tuple((name, ROWS if scale.dim() else NUMBER) for name, scale in scales.items())


@constant_when_compiled
def constant_switches(gm: RunsPrograms, purpose: str) -> Switched:
    """Return what a program depends on of the switches, with coefficients as its constants.

    Args:
        gm: the graph.
        purpose: says who needs constants, for the error if a coefficient has rows.
    """
    numbers = gm.switches.constants(purpose)
    return _acting(gm), tuple((name, numbers[name]) for name in gm.derived.names if name in numbers)


def _acting(gm: RunsPrograms) -> tuple[str, ...] | None:
    acting = tuple(name for name in gm.derived.names if gm.switches.acts(name))
    return None if acting == gm.derived.names else acting


def coefficients(gm: RunsPrograms, values: Any, named: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the coefficients of adapters that the program of a call takes as inputs.

    Args:
        gm: the graph that is called.
        values: the inputs of the call, in the order of the graph.
        named: those that come by name.

    Raises:
        CallError: there is one for each row of the batch, and the inputs have another number of rows.
    """
    if not gm.switches.scales:
        return {}
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and trace_is_active()):
        return {}  # they are constants of the program
    scales = gm.switches.scales_of(gm.derived.names)
    by_row = [scale for scale in scales.values() if scale.dim()]
    if by_row:
        leaves = pytree.tree_leaves(values)
        for index, name in gm.inputs_with_rows():
            value: Any = leaves[index] if index < len(leaves) else named.get(name)
            for scale in by_row if isinstance(value, Tensor) else ():
                check_coefficients(scale, value.shape[0])
    return {input_name(name): scale for name, scale in scales.items()}
