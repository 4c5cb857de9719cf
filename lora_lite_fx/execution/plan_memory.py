"""`plan_memory` and `memory_plan`: how much the layers of a model keep for the backward pass."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from ..errors import AdapterError, shown
from .memory_plan import Memory, MemoryPlan

Model = TypeVar("Model", bound=nn.Module)


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
