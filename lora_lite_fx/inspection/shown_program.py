"""`program`: what a call of an adapted graph runs, as a graph of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import fx, nn

from ..adapters.placement import graph_of, placements
from ..capture.signature import CallSignature
from ..errors import AdapterError, CallError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..passes import Program
from .pass_reports import ProgramReport


def program(model: nn.Module, name: Program = "inference", *, without: Sequence[str] = ()) -> fx.GraphModule:
    """Return what a call of an adapted graph runs, as a flat graph to read, step through and draw.

    `gm.graph` is plain, because passes, files and exports read it. A call runs an optimized copy of it: a program, of
    which there is one for each kind of call. The result shows it as the passes leave it. Before its inputs stands what
    depends on parameters alone. It is called like the model, and returns the same results and gradients.

    Read `print(result.code)`, `result.print_readable()` with shapes and dtypes, and `print(result.meta["report"])`,
    what each pass did and why it left candidates as they are. `torch.fx.Interpreter(result)` runs it node by node, a
    debugger steps through its code, and `torch.fx.passes.graph_drawer` draws it.

    A call computes the same in another way. It calls layers as modules at their own paths, which do their own parameter
    work, and most operators by faster names. The `checkpointed` program runs a layer again in the backward pass. Inside
    `frozen` the inference program computes what stands before its inputs once. Hooks do not act on the result.

    Args:
        model: the result of `rewrite`, `load`, `capture` or `optimize`, which is not changed; or of `adapt`, of which
            the graph of its first call is shown: it takes and returns the tensors of that call by name.
        name: which program: `inference` (evaluation mode without gradients, inside `frozen`), `training` (other calls),
            `checkpointed` (training mode with checkpointed layers), or `plain` and `exported`, which no pass optimizes.
        without: the arguments that the call leaves out, such as `("labels",)`: each such kind of call has a program.

    Returns:
        A `GraphModule` with the parameters of the model, not copies of them. It is in evaluation mode for `inference`,
        in training mode for `checkpointed`, else in the modes of the model. Changes of its graph change nothing else.

    Raises:
        AdapterError: `model` is not an adapted graph, or there is no such program.
        CallError: the graph does not serve calls without these arguments.
    """
    graph = graph_of(model) if isinstance(model, nn.Module) else model
    if not isinstance(graph, AdaptedGraphModule) or graph.execution is None:
        raise AdapterError(
            "program shows what a graph runs that rewrite, load, capture or adapt returned, not"
            f" {shown(model)}.{_hint(model)}"
        )
    if name not in get_args(Program):
        raise AdapterError(f"There is no program {name!r}; the programs are {', '.join(get_args(Program))}.")
    left_out = _in_order((without,) if isinstance(without, str) else tuple(without), graph.execution.signature)
    result, reports = graph.program_graph(name, left_out)
    result.meta["report"] = ProgramReport(name, tuple(reports))
    if name in ("inference", "checkpointed"):
        result.train(name == "checkpointed")
    return result


def _in_order(left_out: tuple[str, ...], signature: CallSignature | None) -> tuple[str, ...]:
    """Return the arguments that a call leaves out in the order of the signature, which has to allow it."""
    if not left_out:
        return ()
    if signature is None:
        raise CallError(f"This graph takes all its inputs in every call; without={left_out!r} leaves some out.")
    signature.omission(left_out)
    return tuple(argument for argument in signature.captured if argument in left_out)


def _hint(model: object) -> str:
    if isinstance(model, fx.GraphModule):
        return " The way out: program(optimize(graph))."
    if isinstance(model, nn.Module) and placements(model):
        return " What wrap returns runs its modules as they are. The way out: rewrite in place of wrap."
    if isinstance(model, nn.Module):
        return " The way out: program(capture(model)), or program(rewrite(model, LoRA(r=8)))."
    return ""
