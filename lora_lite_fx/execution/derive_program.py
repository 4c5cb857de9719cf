"""Derive a program from the flat graph: copy it, optimize the copy, cut it into what the modules of the host run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.capture_model import call_of
from ..capture.graph_calls import left_out_of_export, return_without
from ..compat.torch import is_wrapped
from ..errors import AdapterError
from ..graph.annotated import traceable_forward
from ..graph.calls_and_traces import collection_put_off
from ..graph.copies import Draft, copy_graph
from ..graph.modes import keep_mode
from ..graph.tensors import attribute_of
from ..graph.writes import overwrites, written_attributes
from ..log import phase
from ..passes import GraphPass, LeaveOutAdapters, LeaveOutInputs, PassReport, Pipeline, ScaleAdapters, read_ids
from .choose_program import constant_switches
from .cut_program import cut
from .layer_modules import GraphLayer, RunsParts, running_parts
from .program_state import RunsPrograms
from .run_program import NUMBER, ROWS, Program, ProgramKey, part_of


@collection_put_off()
def derive_program(gm: RunsPrograms, key: ProgramKey) -> Program:
    """Return a new program for the calls that have this key."""
    execution = gm.execution
    assert execution is not None
    name = f"program_{len(gm.derived.programs)}"
    if key.kind == "exported":
        program = Program(key, name, gm)
        program.code, program.owner = traceable_forward(gm, optimized_graph(gm, key)[0]), gm
        return program
    what = f"the {key.kind} program" + (f" for calls without {', '.join(key.left_out)}" if key.left_out else "")
    with phase(f"derived {what}", f"deriving {what}") as details:
        graph, _ = optimized_graph(gm, key)
        if key.kind == "plain":
            _ask_wrapped_tensors(graph)
        for path in key.called if gm.host is not gm else ():
            module = attribute_of(gm.host, path)
            if not isinstance(module, RunsParts):
                cls: Any = type(module)
                module.__class__ = running_parts(cls)
        compiler = None if key.kind == "plain" else execution.compiler
        memory = execution.memory if key.kind == "training" and compiler is None else "fast"
        unplanned = "the graph overwrites tensors" if memory != "fast" and overwrites(gm, graph) else ""
        pieces, values = cut(gm, gm.host, graph, key.called)
        graph.lint()  # every value is there before it is read, wherever passes of others put their nodes
        written = written_attributes(gm) if key.kind == "inference" else ()
        program = Program(key, name, gm.host, pieces, values, unplanned, written)
        paths = [piece.path for piece in pieces]
        for piece in pieces:
            if memory != "fast" and not unplanned:
                piece.part = program.planned_part(piece, memory)
            else:
                piece.part = part_of(piece, key.kind, compiler)
            layer = attribute_of(gm.host, piece.path)
            if isinstance(layer, GraphLayer) and key.kind not in ("inference", "plain"):
                layer.own_part = piece.part if paths.count(piece.path) == 1 else None
        program.compile(graph)
        details.append(f"{len(graph.nodes)} nodes")
    return program


def _ask_wrapped_tensors(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        node.target = _size


def _size(x: Tensor, dim: int) -> int | torch.SymInt:
    """Return a size as exports ask for it, or otherwise where `torch.func.vmap` has no rule for their operator."""
    return x.size(dim) if is_wrapped(x) else torch.ops.aten.sym_size.int(x, dim)


def optimized_graph(gm: RunsPrograms, key: ProgramKey) -> tuple[fx.Graph, list[PassReport]]:
    """Return an optimized copy of the flat graph, and the reports of the passes that optimized it."""
    execution, kind = gm.execution, key.kind
    assert execution is not None
    is_checked = execution.passes.check is not None  # a check calls the module
    draft = (fx.GraphModule if is_checked else Draft)(gm, copy_graph(gm.flat_graph))
    draft.meta["called"] = key.called
    if key.mode is not None:
        keep_mode(draft, draft.graph, key.mode)
    if key.left_out:
        assert execution.signature is not None
        Pipeline((LeaveOutInputs(execution.signature.omission(key.left_out)),)).run(draft, kind)
    if switches := _switch_passes(key):
        Pipeline(switches).run(draft, kind)
    ids, banks = gm.adapter_ids, gm.derived.banks
    if kind == "inference" and ids is not None and banks is not None and banks.acting(gm.switches):
        read_ids(draft, ids)
    reports: list[PassReport] = []
    if key.fuses_loss:
        fusing = replace(execution.passes.of(kind, "fuse_loss"), check=None)  # it leaves out a result
        reports += fusing.run(draft, kind)
    reports += _passes_for(gm, key).run(draft, kind)
    if execution.finish is not None:
        execution.finish(gm, draft.graph)
    draft.graph.owning_module = None  # torch.fx would ask it for modules, but the calls stand for methods
    return draft.graph, reports


def _switch_passes(key: ProgramKey) -> tuple[GraphPass, ...]:
    """Return the passes that make the flat graph, which has all adapters, one for the switches of a key."""
    passes: list[GraphPass] = [] if key.acting is None else [LeaveOutAdapters(key.acting)]
    if key.scales:
        inputs = {NUMBER: torch.empty((), device="meta"), ROWS: torch.empty(1, device="meta")}
        passes.append(ScaleAdapters({name: inputs[c] if isinstance(c, str) else c for name, c in key.scales}))
    return tuple(passes)


def _passes_for(gm: RunsPrograms, key: ProgramKey) -> Pipeline:
    """Return the passes that optimize a program, with the inputs of a check as the program takes them.

    The program is not checked if a call with these inputs does not run it, because it leaves other arguments out.
    """
    assert gm.execution is not None
    passes, signature = gm.execution.passes.of(key.kind), gm.execution.signature
    if passes.check is None:
        return passes
    if key.scales:  # the inputs of a check lack the coefficients
        return replace(passes, check=None)
    if signature is None:
        return passes
    values, without = signature.bind(*call_of(passes.check))
    if set(without) != set(key.left_out):
        return replace(passes, check=None)
    return replace(passes, check=tuple(values)) if key.left_out else passes


def graph_while_exporting(gm: RunsPrograms) -> fx.Graph:
    """Return the flat graph for the switches and the call of now, which torch.export runs.

    It runs `fx.Interpreter` on the graph of a graph module, in place of calling the module.
    """
    assert gm.execution is not None
    if gm.execution.finish is not None:
        raise AdapterError(
            "torch.export does not take DTensors, which the parameters of this graph are. The way out: export"
            " before parallelize; or save the adapters, and load them onto the whole model."
        )
    signature = gm.execution.signature
    left_out = left_out_of_export(signature)
    acting, scales = constant_switches(gm, "torch.export")
    key = ProgramKey("exported", left_out, acting=acting, scales=scales)
    if key == ProgramKey("exported"):
        return gm.flat_graph
    if key not in gm.derived.exported:
        draft = Draft(gm, copy_graph(gm.flat_graph))
        Pipeline(_switch_passes(key)).run(draft)
        if signature is not None and left_out:
            return_without(draft.graph, signature.omission(left_out))
        gm.derived.exported[key] = draft.graph
    return gm.derived.exported[key]
