"""`split`: cut an adapted graph at its layers into stages of a pipeline, which `torch.distributed.pipelining` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from ..adapters.placement import Placement, graph_of, placements
from ..adapters.state import adapter_tensors
from ..capture.graph_calls import count_arguments, return_as
from ..errors import AdapterError, CallError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.copies import copy_graph
from ..graph.cut import Part, cut_at, spans_of, value_is_tensor
from ..graph.layers import A_LAYER, pieces_of
from ..graph.queries import reads_tensor
from ..graph.sharded import refuse_sharded
from ..graph.tensors import keep_registration, tensor_of
from ..graph.writes import overwritten_tensors
from ..passes import LeaveOutInputs, Pipeline
from ..sites.batch.batch_dimension import note_lost_rows


@dataclass(frozen=True)
class StageOf:
    """What a stage knows of the model that it is a part of.

    Args:
        index: its number, from 0.
        count: the number of stages.
        placed: all adapters of the model.
    """

    index: int
    count: int
    placed: tuple[Placement, ...]


class Stage(AdaptedGraphModule):
    """A stage of a pipeline: it takes what the stage before it returns, and the model's inputs by name."""

    stage_of: StageOf | None = None


def split(
    model: nn.Module, stages: int | Sequence[str], *, without: str | Sequence[str] = ()
) -> list[AdaptedGraphModule]:
    """Cut an adapted graph at its layers into stages of a pipeline.

    `torch.distributed.pipelining` runs them: each process keeps its stage, gives it to `PipelineStage`, and that to a
    schedule. Every process passes all inputs of the model by name, `schedule.step(input_ids=ids, attention_mask=mask)`:
    masks and positions, which depend on inputs alone, are computed in each stage, and the hidden state alone travels.
    The last stage returns the model's results, a single one bare; a loss of them is the schedule's `loss_fn`.

    A stage is a graph like that of `rewrite` over the same tensors, with those of its layers alone: it is trained,
    compiled, checkpointed and sharded like one. `save` in all processes writes one file of all stages.

    Args:
        model: a result of `rewrite`, `load` or `capture` with adapters, which is not changed. `del model` afterwards
            frees what the other stages have.
        stages: their number, of about as many layers each; or the names of the layers that the second and each later
            stage begins with, as in `["model.layers.16"]`.
        without: the arguments that calls leave out, as `"labels"` if the loss is the schedule's.

    Returns:
        The stages, in order.

    Raises:
        AdapterError: the model is not an adapted graph, has too few layers or none of a name, or cannot be cut there:
            a stage would have no adapters, or two would train one tensor or write to one.
        CallError: the graph does not serve calls without these arguments.
    """
    adapter_tensors(model)
    refuse_sharded(model, "split cannot cut a model", "split it first, and shard each stage")
    gm = graph_of(model)
    if not isinstance(gm, AdaptedGraphModule) or gm is not model or gm.execution is None:
        hint = (
            " The way out: split(rewrite(model, cfg), stages), or load in place of rewrite. Schedules call stages,"
            " not generate or Trainer."
        )
        raise AdapterError(f"split takes a graph that rewrite or load returned, not {shown(model)}.{hint}")
    draft = _without(gm, (without,) if isinstance(without, str) else tuple(without))
    inputs = [node for node in draft.graph.find_nodes(op="placeholder") if node.users and value_is_tensor(node)]
    starts = _starts(draft, stages)
    parts = cut_at(draft, draft.graph, starts)
    _check(draft, parts)
    note_lost_rows(draft.graph, [node for part in parts for node in part.received])
    placed = tuple(placements(gm))
    execution = replace(gm.execution, signature=None, fuse_loss=False, made_from=None)
    execution = replace(execution, passes=replace(execution.passes, check=None))
    result: list[AdaptedGraphModule] = []
    for index, part in enumerate(parts):
        stage = Stage(gm, part.graph(inputs), execution)
        keep_registration(gm, stage)
        stage.switches = gm.switches
        stage.stage_of = StageOf(index, len(parts), placed)
        result.append(stage)
    return result


def _without(gm: AdaptedGraphModule, left_out: tuple[str, ...]) -> fx.GraphModule:
    """Return the graph of calls that leave arguments out, with inputs and results that are not nested."""
    assert gm.execution is not None
    signature = gm.execution.signature
    draft = fx.GraphModule(gm, copy_graph(gm.flat_graph))
    if signature is not None and signature.layouts:
        raise AdapterError(
            f"split cannot cut the graph of {signature.model}, because {', '.join(signature.layouts)} of its calls are"
            " a part of it, which stages would not check."
        )
    if left_out:
        if signature is None:
            raise CallError(f"This graph takes all its inputs in every call; without={left_out!r} leaves some out.")
        Pipeline((LeaveOutInputs(signature.omission(left_out)),)).run(draft)
    if count_arguments(draft.graph) != len(draft.graph.find_nodes(op="placeholder")):
        raise AdapterError(
            "split takes graphs whose arguments are tensors, because a stage takes them by name. An argument of this"
            " graph is a list, a tuple or a dict."
        )
    return_as(draft.graph, None)
    return draft


def _starts(gm: fx.GraphModule, stages: int | Sequence[str]) -> list[fx.Node]:
    """Return the first node of each stage but the first one."""
    first: dict[str, fx.Node] = {}
    for path, members in pieces_of(gm, gm.graph):
        first.setdefault(path, members[0])
    layers = list(first)
    if isinstance(stages, int):
        if not 2 <= stages <= len(layers):
            raise AdapterError(
                f"split cannot cut {len(layers)} layers into {stages} stages; give 2 to {len(layers)}. {A_LAYER}"
            )
        names = [layers[index * len(layers) // stages] for index in range(1, stages)]
    else:
        names = [stages] if isinstance(stages, str) else list(stages)
        if unknown := [name for name in names if name not in first]:
            raise AdapterError(f"split: there is no layer {unknown[0]!r}; the layers are {', '.join(layers)}.")
        if not names or names != sorted(set(names), key=layers.index) or names[0] == layers[0]:
            raise AdapterError(
                f"split: stages={names!r} are to name the first layers of the second and later stages, in the order of"
                f" the graph: {', '.join(layers)}."
            )
    return [first[name] for name in names]


def _check(gm: fx.GraphModule, parts: Sequence[Part]) -> None:
    """Raise AdapterError where parts could not run apart from each other, or would not train as one."""
    computed_in: dict[fx.Node, set[int]] = {}
    for index, part in enumerate(parts):
        for node in part.nodes:
            computed_in.setdefault(node, set()).add(index)
        if index and not part.received:
            raise AdapterError(f"split: stage {index} reads nothing that stage {index - 1} computes.")
        if others := [node.name for node in part.received if not value_is_tensor(node)]:
            raise AdapterError(
                f"split: stage {index} reads {others[0]}, which stage {index - 1} computes and which is not a tensor,"
                " so that it cannot be sent. The way out: cut before another layer."
            )
    for span in spans_of(gm.graph):
        _require_one(computed_in, span, "a region with a mode of its own", anew=True)
    for made_by, readers in overwritten_tensors(gm, gm.graph):
        nodes = [*readers, *([made_by] if made_by else [])]
        _require_one(computed_in, nodes, "a tensor that is written in place", anew=False)
    trained_in: dict[str, set[int]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if reads_tensor(gm, node) and tensor_of(gm, name).requires_grad:
            trained_in.setdefault(name, set()).update(computed_in.get(node, ()))
    for index in range(len(parts)):
        if all(index not in places for places in trained_in.values()):
            raise AdapterError(
                f"split: stage {index} would have no adapters to train. The way out: cut before other layers, or adapt"
                " more."
            )
    for name, places in trained_in.items():
        if len(places) > 1:
            raise AdapterError(
                f"split: {name} is read by the stages {sorted(places)}, each of which would train a tensor of its own."
                " The way out: a config that shares no trained tensors between sites."
            )


def _require_one(computed_in: dict[fx.Node, set[int]], nodes: Sequence[fx.Node], what: str, anew: bool) -> None:
    """Check that the same stages compute all nodes that any computes; one stage alone unless they compute `anew`."""
    places = [frozenset(computed_in[node]) for node in nodes if node in computed_in]
    if len(set(places)) > 1 or (places and len(places[0]) > 1 and not anew):
        raise AdapterError(f"split would cut {what}, around {nodes[0].name}. The way out: cut before another layer.")
