"""`plan_memory` and `memory_plan`: what layers keep for the backward pass, and what they compute again there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import fx, nn

from ..errors import AdapterError, ConfigError, shown
from ..graph.walk import ancestors

Model = TypeVar("Model", bound=nn.Module)

Memory: TypeAlias = Literal["fast", "balanced"] | float
"""What layers keep for the backward pass, see `rewrite`."""

BALANCED = 0.08
"""The most time that `"balanced"` spends on computing values again, as a part of the layer's own step."""


def check_memory(memory: object, checkpoint_layers: bool = False) -> None:
    """Raise `ConfigError` unless `memory` is one of the values that `rewrite` takes and layers are not checkpointed."""
    is_number = isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory > 0
    if memory not in ("fast", "balanced") and not (is_number and math.isfinite(memory)):  # type: ignore[arg-type]
        raise ConfigError(
            f"memory is 'fast', 'balanced', a part of what 'fast' keeps as 0.5, or a number of bytes that a layer may"
            f" keep for each token as 20_000, not {shown(memory)}."
        )
    if isinstance(memory, float) and memory > 1:
        raise ConfigError(f"memory={memory}: a part is at most 1.0, and a number of bytes is an int.")
    if memory != "fast" and checkpoint_layers:
        raise ConfigError(
            f"memory={memory!r} plans what layers keep, and checkpoint_layers=True lets them keep nothing but their"
            " inputs. The way out: one of the two."
        )


@runtime_checkable
class PlansMemory(Protocol):
    """A model whose calls run layers that can keep less for the backward pass."""

    def plan_memory_by(self, memory: Memory) -> None:
        """Let the layers keep that much for the backward pass from now on."""

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the plans of the layers that were called in training."""


def plan_memory(model: Model, memory: Memory = "balanced") -> Model:
    """Let the layers of a model keep less for the backward pass, and compute the rest again in it; in place.

    Between keeping all that autograd saves and keeping only the input of each layer (`checkpoint_layers`) there are
    cheaper choices: a gate takes a pass over memory to compute again, a product some of the step's time. The first
    training call measures what a layer of each kind saves, and what each value costs to compute again; then it drops
    the values that free most for their cost. Losses and gradients are the same to the bit, because the same operations
    run again on the same tensors. Random operations are not repeated. A layer that overwrites tensors, or calls
    functions that may have other effects, keeps all it has.

    It serves what `rewrite`, `capture`, `load` and `adapt` return. Calls under `torch.compile` and the layers of
    `compile_layers` are not planned, because the compiler decides itself, by the `activation_memory_budget` of
    torch.

    Args:
        model: the model.
        memory: `"fast"` keeps all. `"balanced"` keeps the least that costs at most 8 % of a layer's step, by a count
            of operations and bytes. A float such as 0.5 is a part of what `"fast"` keeps. An int is a number of bytes
            that a layer may keep for each token, a row of its output.

    Returns:
        The model. `memory_plan` returns the plan after the first training call, which also logs it.

    Raises:
        AdapterError: it is another model, or a graph without layers: elements of a ModuleList or Sequential.
        ConfigError: `memory` is another value, or the layers are checkpointed. The first training call raises it if a
            layer cannot keep so little, and says the least.
    """
    if not isinstance(model, PlansMemory):
        raise AdapterError(f"plan_memory takes what rewrite, capture, load or adapt returned, not {shown(model)}.")
    model.plan_memory_by(memory)
    return model


def memory_plan(model: Any) -> list[MemoryPlan]:
    """Return what the layers keep for the backward pass, a plan for each kind of layer; `print` shows a table of each.

    The first layer has a plan of its own as a rule, because its input needs no gradient.

    Args:
        model: a model of `plan_memory`, or of `rewrite` with `memory`, that was called in training.

    Raises:
        AdapterError: there is no plan yet, or none is asked for.
    """
    plans = model.memory_plans() if isinstance(model, PlansMemory) else []
    if not plans:
        raise AdapterError(
            "There is no memory plan. plan_memory(model) asks for one, and the first training call makes it, because it"
            " follows from the sizes of values."
        )
    return plans


@dataclass
class Measured:
    """What a layer did in a training call.

    Args:
        saved: the bytes that autograd keeps of each node's value, or of views of it.
        inside: the bytes that it keeps of values inside operations, such as masks of dropout.
        cost: of each node that has tensors, in the time of a floating-point operation.
        home: for the nodes that have tensors, the node that made the memory.
        given: the bytes of the layer's own inputs that are not kept, which a plan may have to keep.
        repeatable: the nodes that compute the same from the same operands.
        tokens: rows of the layer's output.
    """

    saved: dict[fx.Node, int]
    inside: int
    cost: dict[fx.Node, float]
    home: dict[fx.Node, fx.Node]
    given: dict[fx.Node, int]
    repeatable: set[fx.Node]
    tokens: int

    def repeated(self, dropped: Collection[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """Return what makes the dropped values again: the nodes to begin with, which are kept, and those that run.

        Returns:
            None if an operation cannot be repeated.
        """
        kept = self.saved.keys() - set(dropped)

        def is_source(node: fx.Node) -> bool:
            home = self.home.get(node)
            if home is None:  # sizes are at hand; a tuple of tensors is not
                return node not in self.cost
            return home.op == "placeholder" or home in kept

        reached = sorted(ancestors(dropped, stop=is_source))
        sources, runs = [n for n in reached if is_source(n)], [n for n in reached if not is_source(n)]
        return (sources, runs) if self.repeatable.issuperset(runs) else None

    def outcome(self, dropped: Collection[fx.Node]) -> tuple[int, float] | None:
        """Return the bytes that are kept without the dropped values, and the cost of making these again; or None."""
        if (repeated := self.repeated(dropped)) is None:
            return None
        sources, runs = repeated
        held = {self.home[node] for node in sources if node in self.home}
        size = sum(size for node, size in self.saved.items() if node not in dropped)
        size += sum(self.given.get(node, 0) for node in held)
        return self.inside + size, sum(self.cost[node] for node in runs)

    @property
    def step(self) -> float:
        """The cost of the layer's forward and backward pass, which computes the gradients of values alone."""
        return 2 * sum(self.cost.values())


_CANDIDATES = 10
"""The number of values that may be dropped, the largest of a layer: every set of them is compared."""


def choose(measured: Measured, memory: Memory) -> list[fx.Node]:
    """Return the values to drop, in graph order: the best of all sets of the layer's largest values.

    A layer that keeps nothing but its inputs, as a lone linear, has none to drop, whatever `memory` allows.

    Raises:
        ConfigError: so few bytes as `memory` allows cannot be reached.
    """
    if memory == "fast":
        return []
    made = [node for node in measured.saved if node.op != "placeholder"]
    if not made:
        return []
    candidates = sorted(made, key=lambda node: measured.saved[node], reverse=True)[:_CANDIDATES]
    sets = (subset for size in range(len(candidates) + 1) for subset in itertools.combinations(candidates, size))
    outcomes = [(subset, outcome) for subset in sets if (outcome := measured.outcome(subset)) is not None]
    if memory == "balanced":
        limit = BALANCED * measured.step
        best, _ = min((each for each in outcomes if each[1][1] <= limit), key=lambda each: each[1])
        return sorted(best)
    (_, (fast, _)), *_ = outcomes
    most = memory * fast if isinstance(memory, float) else memory * measured.tokens
    allowed = [(cost, size, subset) for subset, (size, cost) in outcomes if size <= most]
    if not allowed:
        least = min(size for _, (size, _) in outcomes)
        raise ConfigError(
            f"memory={memory!r}: a layer keeps at least {math.ceil(least / measured.tokens):_} bytes for each token"
            f" here, {least / fast:.2f} of what it keeps without a plan. The way out: at least that much, or"
            " checkpoint_layers=True."
        )
    return sorted(min(allowed)[2])


@dataclass(frozen=True)
class MemoryPlan:
    """What the layers of one kind keep for the backward pass.

    Args:
        layers: their qualified names.
        kept: the values that they keep, with the bytes for each token. `"inside operations"` are masks and the like;
            the input of a layer is kept by some plans alone.
        dropped: the values that they compute again, likewise.
        fast: the bytes for each token that they would keep without a plan.
        bytes_per_token: those that they keep.
        cost: the part of a layer's step that this takes, by a count of operations and of bytes moved.
        reason: why nothing is planned, if that is so.
    """

    kept: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    fast: float = 0.0
    bytes_per_token: float = 0.0
    cost: float = 0.0
    reason: str = ""
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.reason:
            return f"{_shortened(self.layers)}: keep what autograd keeps, because {self.reason}"
        lines = [
            f"{_shortened(self.layers)}: keep {self.bytes_per_token:,.0f} of {self.fast:,.0f} bytes for each token,"
            f" compute {100 * self.cost:.1f} % of a step again"
        ]
        rows = [(name, size, what) for what in ("kept", "dropped") for name, size in getattr(self, what).items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines += [f"  {name:{width}}  {size:>12,.0f}  {_SAYS[what]}" for name, size, what in rows]
        return "\n".join(lines)


_SAYS = {"kept": "kept", "dropped": "computed again"}


def _shortened(layers: Sequence[str]) -> str:
    if not layers:
        return "a kind of layer"
    first, *others = layers
    return f"{first} and {len(others)} more" if others else first
