"""How a graph module is told to run its layers: compiled, or with less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..errors import AdapterError
from .compiling import LayerCompiler
from .derived import Derived
from .execution import Execution
from .memory import Memory, MemoryPlan, check_memory
from .pieces import A_LAYER, pieces_of, require_layers


class LayerSettings(fx.GraphModule):
    """A graph module whose layers can be compiled, and can keep less for the backward pass."""

    execution: Execution | None = None  # None while the module is being made
    derived: dict[str, Derived]  # by the method that runs the program

    def drop_derived(self) -> None:
        """Drop the programs, which are derived again at the next calls."""
        raise NotImplementedError

    def compile_layers_by(self, compiler: LayerCompiler | None) -> None:
        """Compile what the layers run from now on; or no longer, for None.

        Raises:
            AdapterError: the graph has no layers.
        """
        assert self.execution is not None
        if compiler is not None and not pieces_of(self, self.graph):
            raise AdapterError(
                f"compile_layers: the model has no layers. {A_LAYER} The way out: torch.compile(model), which compiles"
                " the whole model."
            )
        self.run_with(compiler=compiler)

    def plan_memory_by(self, memory: Memory) -> None:
        """Let the layers keep that much for the backward pass from now on, see `plan_memory`.

        Raises:
            ConfigError: `memory` is no such value, or the layers are checkpointed.
            AdapterError: the graph has no layers, or its parameters are DTensors.
        """
        assert self.execution is not None
        if memory != "fast" and self.execution.finish is not None:
            raise AdapterError(
                f"memory={memory!r}: the parameters of the graph are DTensors, and plans measure whole tensors. The way"
                " out: gradient_checkpointing_enable of an adapted model, or capture with checkpoint_layers."
            )
        check_memory(memory, self.execution.checkpoint_layers)
        if memory != "fast" and not pieces_of(self, self.graph):
            raise AdapterError(
                f"memory={memory!r}: the model has no layers, of which a plan says what they keep. {A_LAYER}"
            )
        self.run_with(memory=memory)

    def checkpoint_layers_if(self, checkpoints: bool) -> None:
        """Let the layers keep only their inputs for the backward pass from now on, or all activations again.

        Raises:
            CaptureError: the graph has no layers to checkpoint.
        """
        if checkpoints:
            require_layers(self)
        self.run_with(checkpoint_layers=checkpoints)

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the plans of the training programs that were called."""
        return [plan for derived in type(self).derived.values() for plan in derived.memory_plans()]

    def run_with(self, **changes: Any) -> None:
        """Change fields of the execution."""
        assert self.execution is not None
        self.execution = replace(self.execution, **changes)
        self.drop_derived()
