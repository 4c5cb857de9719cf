"""`program`: what a call of an adapted graph runs, as a graph of its own, with the reports of the passes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import fx, nn

from ..adapters.placement import graph_of, placements
from ..capture.signature import CallSignature
from ..errors import AdapterError, CallError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..passes import Declined, PassReport, Program
from ..text_table import ranges


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


@dataclass(frozen=True)
class ProgramReport:
    """The reports of the passes that derived one program of a model; prints as a table.

    Args:
        program: `training`, `checkpointed` or `inference`.
        passes: one report for each pass, in the order in which they ran.
    """

    program: Program
    passes: tuple[PassReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data, with the fields of `PassReport` for each pass."""
        return asdict(self)

    def __str__(self) -> str:
        width = max((len(report.name) for report in self.passes), default=0)
        lines = [f"passes of the {self.program} program"]
        for report in self.passes:
            edits = f"{report.edits} edit{'s' * (report.edits != 1)}" if report.edits else "no edits"
            lines.append(f"  {report.name:{width}}  {edits:>9}  {1000 * report.seconds:7.1f} ms")
            lines += [f"    {line}" for line in summarized(report.declined)]
        return "\n".join(lines)


def summarized(declined: Iterable[Declined]) -> list[str]:
    """Return the records as lines, with equal layers taken together: `q, k; gate, up: different inputs (layers.0-3)`.

    Semicolons separate the candidates. The name of a site is cut after the first number in it, which is its layer's.
    """
    layers: dict[tuple[str, str, str], list[int]] = {}
    for record in declined:
        prefix, number, names = _split(record.sites)
        layers.setdefault((record.why, prefix, ", ".join(names)), []).extend(number)
    lines: dict[tuple[str, str], list[str]] = {}
    for (why, prefix, candidate), numbers in layers.items():
        where = f" ({prefix}{ranges(set(numbers))})" if numbers else ""
        lines.setdefault((why, where), []).append(candidate)
    return [f"{'; '.join(candidates)}: {why}{where}".removeprefix(": ") for (why, where), candidates in lines.items()]


def _split(sites: Sequence[str]) -> tuple[str, list[int], tuple[str, ...]]:
    """Return the path of the list of layers that `sites` are in, the number of their layer, and their names there.

    Sites of several layers, or outside layers, have no number and keep their names.
    """
    matches = [re.fullmatch(r"((?:[^.\d][^.]*\.)*)(\d+)\.(.+)", site) for site in sites]
    split = [(match[1], int(match[2]), match[3]) for match in matches if match is not None]
    if len(split) == len(sites) and len({(prefix, number) for prefix, number, _ in split}) == 1:
        prefix, number, _ = split[0]
        return prefix, [number], tuple(name for _, _, name in split)
    return "", [], tuple(sites)
