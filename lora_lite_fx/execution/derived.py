"""Derived programs: what they need of modules, and the methods by which a graph module runs them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import AdapterError
from ..graph.tensors import has_attribute, tensor_of
from .compiling import LayerCompiler
from .cutting import Piece, Values
from .frozen import KeptValues
from .layer import Part, submodule
from .memory import Memory, MemoryPlan
from .planned import PlannedPart
from .reading import Reader


class RunsPrograms(Protocol):
    """A graph module that runs derived programs."""

    kept: KeptValues | None

    @property
    def host(self) -> nn.Module:
        """The module whose tensors the programs read, and whose layers they call."""
        ...


@dataclass
class Derived:
    """A program as it was derived.

    Args:
        pieces: what modules run of it.
        values: what the rest needs of the model, or None.
        parts: what the module of each piece runs.
        unplanned: why their memory is not planned though that was asked for.
        written: qualified names of the tensors that the program itself writes to.
    """

    pieces: list[Piece] = field(default_factory=list)
    values: Values | None = None
    parts: list[Part] = field(default_factory=list)
    unplanned: str = ""
    written: Sequence[str] = ()
    _planned: dict[Any, PlannedPart] = field(default_factory=dict)

    def planned_part(self, piece: Piece, memory: Memory) -> PlannedPart:
        """Return what the module of a piece runs where memory is planned. Pieces of equal code share it, and a plan."""
        key = (piece.values, piece.modes, piece.rest)
        if key not in self._planned:
            self._planned[key] = PlannedPart(piece.values, piece.modes, piece.graph, memory)
        return self._planned[key]

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the memory plans of its layers, one for each kind of layer that was called."""
        if self.unplanned:
            return [MemoryPlan(reason=self.unplanned, layers=tuple(dict.fromkeys(piece.path for piece in self.pieces)))]
        layers: dict[PlannedPart, list[str]] = {}
        for piece, part in zip(self.pieces, self.parts, strict=True):
            if isinstance(part, PlannedPart):
                layers.setdefault(part, []).append(piece.path)
        return [replace(run.plan, layers=tuple(paths)) for part, paths in layers.items() for run in part.runs.values()]

    def keep(self, host: nn.Module, kept: KeptValues, method: str) -> None:
        """Compute what the program needs of the modules of `host`, and let `kept` keep it.

        Nothing is computed of what the program writes to (see `parameter_work`), so its writes are not watched.
        """
        needed = [] if self.values is None else [(self.values, host)]
        needed += [(piece.values, submodule(host, piece.path)) for piece in self.pieces]
        written = {id(tensor_of(host, name)) for name in self.written if has_attribute(host, name)}
        tensors = [read for values, module in needed for read in values.read(module) if id(read) not in written]
        found = [values.of(module) for values, module in needed]
        kept.keep(method, found if self.values is not None else [(), *found], tensors)


def part_of(piece: Piece, is_kept: bool, checkpoints: bool, compiler: LayerCompiler | None) -> Part:
    """Return what the module of a piece runs. Pieces of equal code have one function, as long as it is in use.

    Args:
        piece: the piece.
        is_kept: whether what it needs of its module is kept in a scope of `frozen`, and given with its inputs.
        checkpoints: whether it keeps only its inputs for the backward pass.
        compiler: compiles the function; None for a function that runs as it is.
    """
    key = (piece.values, piece.modes, piece.rest, is_kept, checkpoints, compiler)
    part = _parts.get(key)
    if part is None:
        part = _parts[key] = _make_part(*key)
    return part


_parts: weakref.WeakValueDictionary[Any, Part] = weakref.WeakValueDictionary()


def _make_part(
    values: Values,
    modes: Reader,
    rest: Callable[..., Any],
    is_kept: bool,
    checkpoints: bool,
    compiler: LayerCompiler | None,
) -> Part:
    def run(flags: tuple[bool, ...], tensors: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
        return rest(None, *flags, *values.work(None, *tensors), *inputs)

    def run_kept(flags: tuple[bool, ...], inputs: tuple[Any, ...]) -> Any:
        return rest(None, *flags, *inputs)

    if compiler is not None:  # tensors are arguments, so that the code of one layer is that of all
        run, run_kept = compiler(run), compiler(run_kept)

    def in_modes(flags: tuple[bool, ...], module: nn.Module, *inputs: Any) -> Any:
        return run_kept(flags, inputs) if is_kept else run(flags, (*values.read(module), *values.constants), inputs)

    def part(module: nn.Module, *inputs: Any) -> Any:
        return in_modes(modes(module), module, *inputs)

    def checkpointed(module: nn.Module, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return part(module, *inputs)
        # The modes are those of now, also when the layer runs again in the backward pass.
        return checkpoint(in_modes, modes(module), module, *inputs, use_reentrant=False)

    return checkpointed if checkpoints else part


def piece_method(method: str, index: int, piece: Piece, part: Part, is_kept: bool) -> Callable[..., Any]:
    """Return the method that calls the module of a piece, the one at `index` of its program.

    Args:
        method: the name of the method that runs the program.
        index: the number of the piece among those of the program.
        piece: the piece.
        part: what its module runs, see `part_of`.
        is_kept: whether what it needs of its module is kept in a scope of `frozen`.
    """
    path = piece.path

    def run(self: RunsPrograms, *inputs: Any) -> Any:
        layer = submodule(self.host, path)
        if not getattr(layer, "runs_parts", False):
            raise AdapterError(
                f"{path!r} was replaced by a {type(layer).__name__} after the graph was captured. The graph runs the"
                " layer that it was captured from, with the tensors that stand at its names. The way out: capture the"
                " changed model."
            )
        if is_kept:
            inputs = (*_kept(self).by_program[method][index + 1], *inputs)
        if not piece.has_more_results or torch.is_grad_enabled():
            return layer(*inputs, part=part)
        # Without gradients a layer has caches among its results. Hooks expect its output alone.
        more: list[Any] = []
        return layer(*inputs, part=part, more=more), *more

    return run


def values_method(method: str, derived: Derived, is_kept: bool) -> Callable[..., Any]:
    """Return the method that gives a program what it needs of the model outside its pieces."""

    def values(self: RunsPrograms) -> Any:
        assert derived.values is not None
        found = _kept(self).by_program[method][0] if is_kept else derived.values.of(self.host)
        return found if len(found) != 1 else found[0]

    return values


def _kept(gm: RunsPrograms) -> KeptValues:
    assert gm.kept is not None
    return gm.kept
