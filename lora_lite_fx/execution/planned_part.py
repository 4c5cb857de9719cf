"""Run what layers run as a memory plan says: some of what autograd saves is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from ..compat.torch import version_of
from ..graph.direct_calls import is_ordinary
from ..graph.subgraph import extract, function_of
from ..log import logger
from ..ops.saved_values import autocast_of
from .measured_layer import Recorder, address, obstacle, plan_of
from .memory_plan import Memory, MemoryPlan, choose
from .tensor_reader import Reader, Values


class PlannedPart:
    """What layers of one kind run in training: as it is, but for what it saves.

    The plan is made at the first call, because it needs the sizes, and holds for all later ones: it decides what is
    computed twice, and never what is computed. Layers of the same code have a plan for the shapes of their tensors and
    the operands that need gradients. Under torch.compile, which chooses itself what to save, the layer runs as it is.

    Args:
        values: what the layer needs of its module.
        modes: reads the modes of the module's parts.
        graph: computes the results of the layer from these modes and values and its inputs.
        memory: how much it may keep.
    """

    def __init__(self, values: Values, modes: Reader, graph: fx.Graph, memory: Memory) -> None:
        self.values, self.modes, self.graph, self.memory = values, modes, graph, memory
        self.rest = function_of(graph)
        self.runs: dict[Any, _Planned] = {}

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        """Return the results of the layer `module` for its inputs."""
        own = (*self.modes(module), *self.values.of(module))
        operands = (*own, *inputs)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.rest(None, *operands)
        shapes = tuple(value.shape for value in own if isinstance(value, Tensor))
        pattern = shapes, tuple(isinstance(value, Tensor) and value.requires_grad for value in operands)
        planned = self.runs.get(pattern)
        if planned is None:
            results, self.runs[pattern] = _first_call(self.graph, operands, len(own), self.memory)
            logger.info("planned the memory of %s", self.runs[pattern].plan)
            return results
        return planned(operands)


@dataclass
class _Planned:
    """A plan, and the functions that follow it; without them the layer runs as it is."""

    plan: MemoryPlan
    rest: Callable[..., Any]
    recipe: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self, operands: Sequence[Any]) -> Any:
        if self.recipe is None:
            return self.rest(None, *operands)
        cells: list[_Cell] = []
        with saved_tensors_hooks(_packing(cells), _unpacked):
            results, dropped, sources = self.rest(None, *operands)
        _drop(cells, dropped, sources, self.recipe)
        return results


class _Cell:
    """A tensor that autograd saves; or, after `drop`, how to compute it again.

    torch does not check whether a tensor was overwritten that a hook has packed, so this does.
    """

    __slots__ = ("again", "place", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Without its history: an operation that saves its own result would hold itself by it, which no collector sees.
        self.tensor: Tensor | None = tensor.detach()
        self.version = version_of(tensor)
        self.again: _Again | None = None
        self.place: Any = None

    def drop(self, again: _Again, index: int, base: Tensor) -> None:
        """Forget the tensor, which shares the memory of `base`, the value `index` that `again` computes."""
        tensor = self.tensor
        assert tensor is not None
        self.place = index, tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset()
        self.tensor, self.again = None, again
        again.readers += 1


def _packing(cells: list[_Cell]) -> Callable[[Tensor], Any]:
    def pack(tensor: Tensor) -> Any:
        if not is_ordinary(tensor):
            return tensor  # as of a quantized weight, whose memory is its own matter
        cells.append(_Cell(tensor))
        return cells[-1]

    return pack


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if packed.again is not None:
        index, shape, stride, offset = packed.place
        base: Tensor = packed.again.value(index)
        return base.as_strided(shape, stride, base.storage_offset() + offset)
    _require_unchanged(packed.tensor, packed.version)
    return packed.tensor  # type: ignore[no-any-return]


def _require_unchanged(tensor: Tensor, version: int) -> None:
    if version_of(tensor) != version:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was overwritten after the forward"
            " pass, as an optimizer's step between the two does. The way out: call backward before that."
        )


def _version(value: Any) -> int | None:
    """Return how often a tensor was overwritten; None for sizes, and for tensors of inference mode, which cannot be."""
    return version_of(value) if isinstance(value, Tensor) and not value.is_inference() else None


class _Again:
    """Computes the dropped values of one call of a layer again, once for all that read them."""

    def __init__(self, recipe: Callable[..., tuple[Tensor, ...]], sources: Sequence[Any], device: str) -> None:
        self.recipe = recipe
        self.sources = [value.detach() if isinstance(value, Tensor) else value for value in sources]
        self.versions = [_version(value) for value in sources]
        self.autocast = autocast_of(device)
        self.readers = self.waiting = 0
        self.values: tuple[Tensor, ...] | None = None

    def value(self, index: int) -> Tensor:
        """Return a dropped value. When all readers have asked, it is dropped again."""
        if self.values is None:
            for source, version in zip(self.sources, self.versions, strict=True):
                if version is not None:
                    _require_unchanged(source, version)
            with torch.no_grad(), torch.autocast(**self.autocast):
                self.values = self.recipe(None, *self.sources)
            self.waiting = self.readers
        value = self.values[index]
        self.waiting -= 1
        if self.waiting == 0:
            self.values = None
        return value


def _drop(
    cells: list[_Cell], dropped: Sequence[Tensor], sources: Sequence[Any], recipe: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Let the cells forget what is dropped. All values are still there, so memory tells which tensor is which."""
    by_address = {address(value): index for index, value in enumerate(dropped)}
    again = _Again(recipe, sources, dropped[0].device.type)
    for cell in cells:
        assert cell.tensor is not None
        index = by_address.get(address(cell.tensor))
        if index is not None and _is_plain_view(cell.tensor, dropped[index]):
            cell.drop(again, index, dropped[index])


def _is_plain_view(tensor: Tensor, base: Tensor) -> bool:
    """Return whether sizes and strides say all of a view. A view of another type, or a lazy conjugate, says more."""
    return tensor.dtype is base.dtype and tensor.is_conj() == base.is_conj() and tensor.is_neg() == base.is_neg()


def _first_call(graph: fx.Graph, operands: Sequence[Any], own: int, memory: Memory) -> tuple[Any, _Planned]:
    """Run a layer for the first time, measure it, and plan.

    Args:
        graph: of the layer.
        operands: of its placeholders.
        own: the number of those that are values of the module.
        memory: how much may be kept.
    """
    if reason := obstacle(graph):
        rest = function_of(graph)
        return rest(None, *operands), _Planned(MemoryPlan(reason=reason), rest)
    cells: list[_Cell] = []
    recorder = Recorder(graph, own)
    with saved_tensors_hooks(_packing(cells), _unpacked):
        results = recorder.run(*operands)
    measured = recorder.measured([cell.tensor for cell in cells if cell.tensor is not None])
    dropped = choose(measured, memory)
    plan = plan_of(measured, dropped)
    if not dropped:
        return results, _Planned(plan, function_of(graph))
    repeated = measured.repeated(dropped)
    assert repeated is not None
    sources, _ = repeated
    recipe = function_of(_without_unread(extract(sources, dropped)))
    _drop(cells, [recorder.values[node] for node in dropped], [recorder.values[node] for node in sources], recipe)
    return results, _Planned(plan, function_of(_returning(graph, dropped, sources)), recipe)


def _without_unread(graph: fx.Graph) -> fx.Graph:
    """Leave out the sites of gathered products whose results nothing reads."""
    for node in graph.nodes:
        if getattr(node.target, "results_are_apart", False):
            node.args = node.target.without_unread(node.args, {user.args[1] for user in node.users})
    return graph


def _returning(graph: fx.Graph, dropped: Sequence[fx.Node], sources: Sequence[fx.Node]) -> fx.Graph:
    """Return a copy of `graph` that returns these values too."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = copied.graph_copy(graph, copies)
    copied.output((results, tuple(copies[node] for node in dropped), tuple(copies[node] for node in sources)))
    return copied
