"""A call of a model as a graph takes it, and a graph with the calls that it holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..capture.process_state.held_answers import HeldAnswer, other_default_dtype, other_than_held
from ..execution.adapted_graph_module import AdaptedGraphModule
from .cache_states import disassemble_cache, give_states, states_of
from .caches import cut_windows
from .call_structure import CACHES, Leaves, Structure, Tree, assemble, differences, disassemble
from .causal_lm import NormalizedCall, with_loss
from .config_reads import ConfigValues


@dataclass(frozen=True)
class CapturedCall:
    """A call as a graph takes it.

    Args:
        path: qualified name of the part of the model that is called; empty for the model.
        normalized: its arguments in normal form.
        structure: the arguments without their leaves.
        leaves: the tensors and integers of the arguments, by name.
    """

    path: str
    normalized: NormalizedCall
    structure: Structure
    leaves: Leaves

    @classmethod
    def of(cls, part: Any, normalized: NormalizedCall) -> CapturedCall:
        """Return a call of `part`, a model or one of its modules, that is in normal form."""
        leaves: Leaves = {}
        names = sorted(normalized.arguments)
        parts = tuple(
            (disassemble_cache if name in CACHES else disassemble)(normalized.arguments[name], name, leaves)
            for name in names
        )
        return cls(getattr(part, "_path", ""), normalized, Tree(dict, tuple(names), parts), leaves)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The part of the call that all calls of one graph have in common."""
        return self.path, self.structure

    def name_in(self, model: Any) -> str:
        """Return what the log calls the part of `model` that is called."""
        return f"{type(model).__name__}.{self.path}".rstrip(".")

    def difference_from_nearest(self, others: Iterable[CapturedCall]) -> str:
        """Return in what the signature of the call differs from that of the nearest of `others` of the same part."""
        same = ([*differences(other.structure, self.structure)] for other in others if other.path == self.path)
        return "; ".join(min(same, key=len, default=["the first call"])[:3])


@dataclass
class CapturedGraph:
    """A graph of the calls that are like one.

    Args:
        gm: takes the leaves of a call by name, and returns those of the result.
        call: the one that it was captured for.
        example: what of the leaves that it was captured with the capture depends on, see `captured_with`.
        layouts: those leaves of which the graph holds for these values alone.
        guards: raises for other leaves that the graph does not hold for.
        decisions: tells of a module with the tensors of the graph, and of leaves, where the model decides otherwise.
        result: the result without its leaves.
        given: the state of the caller's objects after the call, without its leaves.
        held: the answers of the process that it holds for.
        config: what it has of the configs of the model.
        last_use: when a call ran it last.
    """

    gm: AdaptedGraphModule
    call: CapturedCall
    example: Any
    layouts: dict[str, Tensor]
    guards: Callable[..., object]
    decisions: Callable[..., str]
    result: Structure
    given: dict[str, Structure]
    held: tuple[HeldAnswer, ...]
    config: ConfigValues = field(default_factory=ConfigValues)
    last_use: int = 0

    def __post_init__(self) -> None:
        self.states = {name: states_of(structure) for name, structure in self.given.items()}

    def change(self) -> str:
        """Return in words what has changed that the graph was captured under; empty if nothing has."""
        assert self.gm.execution is not None
        return (
            self.config.change() or other_default_dtype(self.gm.execution.default_dtype) or other_than_held(self.held)
        )

    def refuses(self, leaves: Leaves) -> str:
        """Return the reason why the graph does not hold for `leaves`; empty if it does."""
        reads_values = not torch.compiler.is_dynamo_compiling()  # the graph itself asserts what depends on them there
        if change := self.change():
            return change
        for name, layout in self.layouts.items() if reads_values else ():
            if not torch.equal(leaves[name], layout):
                return f"{name} is {leaves[name].tolist()}, and was {layout.tolist()}"
        inputs = [leaf for name, leaf in leaves.items() if name not in self.layouts]
        try:
            self.guards(*inputs)
        except AssertionError as error:
            return str(error)
        return self.decisions(self.gm, *inputs) if reads_values else ""

    def run(self, part: Any, call: CapturedCall, return_dict: bool) -> Any:
        """Run the graph for a call that it holds for, and return what `part` would.

        Args:
            return_dict: whether a `ModelOutput` stays one, and is not made a tuple.
        """
        self.config.decide()
        self.gm.training = part.training
        leaves = self.gm(**call.leaves)
        given: dict[str, Any] = {}
        for name, structure in self.given.items():
            if name in call.normalized.given:
                from ..compat.transformers import tell_batch

                given[name] = give_states(call.normalized.given[name], structure, self.states[name], leaves)
                tell_batch(given[name])
            else:
                given[name] = assemble(structure, leaves) if call.normalized.keeps_cache else None
        cut_windows(given)
        result = with_loss(part, call.normalized, assemble(self.result, leaves, given))
        return result if return_dict or not hasattr(result, "to_tuple") else result.to_tuple()
