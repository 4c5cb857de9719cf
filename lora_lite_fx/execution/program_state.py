"""What a graph module has to run programs: how it runs them, what it derived of its graph, and its switches."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.changed_buffers import BaseBuffers
from ..adapters.placement import AdapterNames, Placement, placements
from ..adapters.switches import Switches
from ..capture.process_state.held_answers import other_default_dtype
from ..compat.torch import constant_when_compiled
from ..errors import AdapterError, CallError
from ..graph.layers import A_LAYER, pieces_of, require_layers
from ..graph.modes import FLAG, flag_name, is_flag, parts_with_modes
from ..graph.tensors import attribute_of
from ..graph.writes import written_buffers
from ..sites.batch.batch_dimension import inputs_with_rows
from ..sites.finding import find_sites
from ..sites.site import Site
from .bank_inputs import BankInputs
from .compile_layers import LayerCompiler
from .execution import Execution, Host
from .hooks_and_ties import HooksAndTies
from .layer_modules import GraphLayer
from .memory_plan import Memory, MemoryPlan, check_memory
from .run_program import Program, ProgramKey
from .tensor_reader import reader_of_modes

deriving = threading.RLock()
"""Held while a program is derived, because several threads may run one graph."""

_TRAINING = itemgetter(FLAG)


class Derived:
    """What follows from the flat graph of a module. It is made anew when that changes.

    Args:
        gm: the module.
        names: of its adapters.
    """

    def __init__(self, gm: RunsPrograms, names: tuple[str, ...]) -> None:
        graph, self.gm, self.names = gm.flat_graph, gm, names
        self.banks = BankInputs.of(gm, graph)
        self.parts = parts_with_modes(graph)  # those on whose mode it depends which operations run, see `one_mode`
        self.read_parts = reader_of_modes([flag_name(path) for part in self.parts for path in part])
        self.read_modes = reader_of_modes([str(node.target) for node in filter(is_flag, graph.nodes)])
        self.owners_of_modes: list[dict[str, Any]] | None = None  # their attributes, in a scope of `frozen`
        self.hooks_and_ties: HooksAndTies | None = None
        self.programs: dict[ProgramKey, Program] = {}
        self.exported: dict[ProgramKey, fx.Graph] = {}

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The sites of the graph by name."""
        return {site.name: site for site in find_sites(self.gm)}

    @cached_property
    def placements(self) -> Sequence[Placement]:
        """The adapters of the graph in their places."""
        return placements(self.gm)

    @cached_property
    def written_buffers(self) -> Sequence[str]:
        """The names of the buffers that the graph writes to."""
        return written_buffers(self.gm)

    def add(self, program: Program) -> None:
        """Add a program; also as an attribute, which torch.compile finds if it is added while it traces a call."""
        self.programs[program.key] = program
        setattr(self, program.name, program)


class RunsPrograms(fx.GraphModule):
    """A graph module that runs programs, and whose layers can be compiled and can keep less for the backward pass."""

    execution: Execution | None = None  # None while the module is being made
    recorded: AdapterNames | None = None  # the names that the graph has of adapters, as of the last recompile
    derived: Derived
    keeps_values: bool  # inside a scope of `frozen`
    own_switches: Switches
    _host = Host()

    def program(self, *fields: Any) -> Program:
        """Return the program with a `ProgramKey` of these fields; derive it if there is none."""
        raise NotImplementedError

    @property
    def host(self) -> nn.Module:
        """The module whose tensors the programs read, and whose layers they call."""
        return self._host.module or self

    @property
    def switches(self) -> Switches:
        """The switches of the adapters: those of the host, if it has any."""
        host: Any = self._host.module  # without switches as long as it is being adapted
        return self.own_switches if host is None else getattr(host, "switches", self.own_switches)

    @switches.setter
    def switches(self, switches: Switches) -> None:
        self.own_switches = switches

    @property
    def base_buffers(self) -> BaseBuffers:
        """The base's buffers of which the graph has copies, by name, as `changed_buffers.py` asks for them."""
        return {} if self.execution is None else self.execution.base_buffers

    @base_buffers.setter
    def base_buffers(self, buffers: BaseBuffers) -> None:
        assert self.execution is not None
        self.execution = replace(self.execution, base_buffers=buffers)

    def run_on(self, host: nn.Module) -> None:
        """Let the programs read the tensors of `host`, and call its layers, wherever it has those of the graph."""
        self._host = Host(host)
        self.drop_derived()

    @property
    def flat_graph(self) -> fx.Graph:
        """The flat graph with all adapters, from which programs are derived."""
        return super().graph

    def drop_derived(self) -> None:
        """Drop the programs, which are derived again at the next calls."""
        with deriving:
            self.recorded = AdapterNames.of(self)
            self.derived = Derived(self, self.recorded.names)
            for module in self.modules():
                if isinstance(module, GraphLayer):
                    module.own_part = None

    # Otherwise torch.compile would trace it. The hooks and ties of a compiled call are those that it was compiled with.
    @constant_when_compiled
    def called_for_hooks(self) -> tuple[str, ...]:
        """Return the names of the modules that are to be called because hooks stand on them; check the ties."""
        assert self.execution is not None
        known = self.derived.hooks_and_ties
        if known is None or not known.hold():
            with deriving:
                known = self.derived.hooks_and_ties = HooksAndTies.of(self, self.host, self.execution.absent)
        known.check_ties(self.host)
        if self.execution.default_dtype not in (None, torch.get_default_dtype()):
            change = other_default_dtype(self.execution.default_dtype)
            raise CallError(f"{change}. The way out: torch.set_default_dtype, or capture the model under this type.")
        return known.hooked()

    def any_part_in_training(self) -> bool:
        """Tell whether a part on whose mode a value of the graph depends is in training mode."""
        derived = self.derived
        if torch.compiler.is_compiling():
            return True in derived.read_modes(self.host)
        if derived.owners_of_modes is None:
            paths = (".".join(path[:-1]) for path in derived.read_modes.paths)
            derived.owners_of_modes = [vars(attribute_of(self.host, path) if path else self.host) for path in paths]
        return True in map(_TRAINING, derived.owners_of_modes)

    @constant_when_compiled
    def inputs_with_rows(self) -> tuple[tuple[int, str], ...]:
        """Return the places and the names of the inputs whose first dimension is the batch."""
        names = [str(node.target) for node in self.flat_graph.find_nodes(op="placeholder")]
        return tuple((index, names[index]) for index in inputs_with_rows(self.flat_graph))

    @property
    def adapter_ids(self) -> Tensor | None:
        """For banks, the slot of each row of the batch, as `by_row` says. Programs that keep values read this name."""
        return self.switches.ids

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the plans of the training programs that were called."""
        return [plan for program in self.derived.programs.values() for plan in program.memory_plans()]

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

    def run_with(self, **changes: Any) -> None:
        """Change fields of the execution."""
        assert self.execution is not None
        self.execution = replace(self.execution, **changes)
        self.drop_derived()
