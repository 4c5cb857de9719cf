"""Run programs: a program calls modules, each with its part of the program, and computes the rest itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ..errors import AdapterError
from ..graph.copies import specs_of
from ..graph.direct_calls import call_directly
from ..graph.tensors import attribute_of, has_attribute, tensor_of
from ..passes import Program as Kind
from .compile_layers import LayerCompiler
from .cut_program import Piece
from .frozen import KeptValues
from .layer_modules import Part, call_of
from .memory_plan import Memory, MemoryPlan
from .planned_part import PlannedPart
from .tensor_reader import Reader, Values

NUMBER, ROWS = "number", "rows"


@dataclass(frozen=True)
class ProgramKey:
    """What a program depends on. Calls with equal keys run one program.

    Args:
        kind: says which passes optimize the program, and how it is run.
        left_out: the arguments that the calls leave out, in the order of the signature.
        called: the names of modules outside layers that are called as modules, because hooks stand on them.
        fuses_loss: whether head and loss are one operation.
        mode: the mode of the parts that run other operations in each mode; None if the graph has no such parts.
        acting: the adapters that act; None for all.
        scales: the adapters that are scaled, each with `NUMBER` or `ROWS`, for a coefficient that is an input of the
            program, or with the coefficient itself, a float that is a constant of the program.
    """

    kind: Kind
    left_out: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    fuses_loss: bool = False
    mode: bool | None = None
    acting: tuple[str, ...] | None = None
    scales: tuple[tuple[str, str | float], ...] = ()


@dataclass(eq=False, repr=False)
class Program:
    """A program, cut into what modules run and the rest.

    Its code is a function that torch.fx made of the rest. That calls `run_piece` for each module, and `read_values`.

    Args:
        key: of the calls that it runs.
        name: its own among the programs of the graph.
        host: the module whose tensors it reads, and whose modules it calls.
        pieces: what modules run of it.
        values: what the rest needs of the host; None if it needs nothing.
        unplanned: why the memory of its layers is not planned though that was asked for.
        written: qualified names of the tensors that the program itself writes to.
        code: the function.
        owner: the `self` of the function: the program; or the graph, for an exported program, which is not cut.
        kept: what it needs of modules, kept in a scope of `frozen`.
    """

    key: ProgramKey
    name: str
    host: nn.Module
    pieces: list[Piece] = field(default_factory=list)
    values: Values | None = None
    unplanned: str = ""
    written: Sequence[str] = ()
    code: Callable[..., Any] = field(init=False)
    owner: Any = field(init=False)
    kept: KeptValues | None = None
    _planned: dict[Any, PlannedPart] = field(default_factory=dict)

    def compile(self, graph: fx.Graph) -> None:
        """Let `graph` be the rest of the program, without the pieces."""
        call_directly(graph)
        methods = nn.Module()
        vars(methods).update(run_piece=None, read_values=None)  # torch.fx asks whether there are any
        made = fx.GraphModule(methods, graph)
        self.code, self.owner = type(made).forward, self
        vars(self).update(specs_of(made))

    def read_values(self) -> Any:
        """Return what the rest of the program needs of the host; a single value bare."""
        if self.key.kind == "inference":
            assert self.kept is not None
            values = self.kept.values[0]
        else:
            assert self.values is not None
            values = self.values.of(self.host)
        return values if len(values) != 1 else values[0]

    def run_piece(self, number: int, *inputs: Any) -> Any:
        """Call the module that runs a piece of the program."""
        piece = self.pieces[number]
        layer = attribute_of(self.host, piece.path)
        if not getattr(layer, "runs_parts", False):
            raise AdapterError(
                f"{piece.path!r} was replaced by a {type(layer).__name__} after the graph was captured. The graph runs"
                " the layer that it was captured from, with the tensors that stand at its names. The way out: capture"
                " the changed model."
            )
        unseen, activations = inputs[: piece.unseen], inputs[piece.unseen :]
        if self.key.kind == "inference":
            assert self.kept is not None
            unseen = (*self.kept.values[number + 1], *unseen)
        call = call_of(layer, piece.path)
        if not piece.has_more_results or torch.is_grad_enabled():
            return call(*activations, part=piece.part, unseen=unseen)
        # Without gradients a layer has caches among its results. Hooks expect its output alone.
        more: list[Any] = []
        return call(*activations, part=piece.part, unseen=unseen, more=more), *more

    def keep_values(self, ids: Any) -> None:
        """Compute what the program needs of modules, and keep it.

        Nothing is computed of what the program writes to (see `parameter_work`), so its writes are not watched.

        Args:
            ids: of banks, the slots of the rows that the values are for.
        """
        needed = [] if self.values is None else [(self.values, self.host)]
        needed += [(piece.values, attribute_of(self.host, piece.path)) for piece in self.pieces]
        written = {id(tensor_of(self.host, name)) for name in self.written if has_attribute(self.host, name)}
        # Not inference tensors, because a later call could not use those otherwise.
        with torch.inference_mode(False), torch.no_grad():
            tensors = [each for values, module in needed for each in values.read(module) if id(each) not in written]
            kept = [values.of(module) for values, module in needed]
        self.kept = KeptValues(kept if self.values is not None else [(), *kept], tensors, ids)

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
        for piece in self.pieces:
            if isinstance(piece.part, PlannedPart):
                layers.setdefault(piece.part, []).append(piece.path)
        return [replace(run.plan, layers=tuple(paths)) for part, paths in layers.items() for run in part.runs.values()]


def part_of(piece: Piece, kind: Kind, compiler: LayerCompiler | None) -> Part:
    """Return what the module of a piece runs. Pieces of equal code have one function, as long as it is in use.

    Args:
        piece: the piece.
        kind: of the program. With `inference` it gets what it needs of its module with its inputs, because that is kept
            in a scope of `frozen`; with `checkpointed` it keeps only its inputs for the backward pass.
        compiler: compiles the function; None for a function that runs as it is.
    """
    key = (piece.values, piece.modes, piece.rest, kind == "inference", kind == "checkpointed", compiler)
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
