"""The module that `rewrite` returns: it holds a plain graph, and runs programs that are derived from it.

Passes, `remove`, `merge`, `inspect`, files and exports see the plain, flat graph. A program is an optimized copy of the
graph, in which parameter work is computed apart, and whose layers are checkpointed if the caller asks for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from ..adapters.bank import IDS, check_coefficients
from ..adapters.changed_buffers import BaseBuffers
from ..adapters.listing import describe_adapters
from ..adapters.placement import Recorded, adapter_tensor_names
from ..adapters.state import trainable_parameters
from ..adapters.switches import Switches
from ..capture.autograd_functions import warn_of_trace
from ..capture.capture_model import call_of
from ..capture.default_dtype import other_default_dtype
from ..capture.graph_calls import left_out_of_export, return_as, return_without, take_further_inputs_from
from ..compat.torch import (
    SeesMoves,
    constant_when_compiled,
    outside_symbolic_trace,
    pytree,
    trace_is_active,
    transform_is_active,
)
from ..errors import AdapterError, CallError
from ..graph.annotated import traceable_forward
from ..graph.copies import Draft, copy_graph, share_signatures
from ..graph.modes import (
    FLAG,
    Modes,
    add_flagged_modules,
    flag_name,
    is_flag,
    keep_mode,
    modes_of,
    one_mode,
    parts_with_modes,
    set_modes,
)
from ..graph.subgraph import forward_of
from ..graph.tensors import delete_tensor, has_attribute, keep_registration, module_at, register_tensor, tensor_of
from ..graph.writes import overwrites, written_attributes
from ..log import phase
from ..ops.low_rank_products import let_flops_be_counted
from ..passes import (
    LeaveOutInputs,
    PassReport,
    Pipeline,
    Program,
    input_name,
    read_ids,
)
from ..sites.batch.batch_dimension import inputs_with_rows
from .bank_inputs import BankInputs
from .casting import follow_cast, follow_data
from .cutting import cut
from .derived import Derived, part_of, piece_method, values_method
from .execution import ELSEWHERE, Execution, Host
from .forward import forward_of_programs
from .frozen import KeptValues, can_be_kept, changed_inside
from .layer import GraphLayer, Part, RunsParts, make_layers, running_parts, submodule
from .layer_settings import LayerSettings
from .program_graph import ProgramGraph
from .reading import reader_of_modes
from .switched import ALL, Switched, acting_of, switch_passes, switched_by
from .watch import Watch

_DERIVED = "_run_"
"""The names of the methods that run programs begin with this."""

_TRAINING = itemgetter(FLAG)

_deriving = threading.RLock()
"""Held while a program is derived, because several threads may run one graph."""


class AdaptedGraphModule(SeesMoves, LayerSettings):
    """A graph module that computes what its graph says, and runs it as its `execution` says.

    A program is derived at the first call that needs it after a recompile, so that passes can change the graph. Its
    layers are called as modules at their own paths: `graph.model.layers[0]`. They read their tensors when they are
    called, so whatever replaces a tensor or stands on a layer acts. `torch.fx.Interpreter`, and so `torch.export`, run
    the graph itself. It has all adapters; calls and exports leave out those that do not act, see `switches`.
    """

    kept: KeptValues | None  # inside a scope of `frozen`
    own_switches: Switches
    recorded: Recorded | None = None  # the names that the graph has of adapters, as of the last recompile
    _names: tuple[str, ...] = ()  # of the adapters
    _banks: BankInputs | None = None
    modes = False  # whether programs run other operations in each mode
    _parts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # those on whose mode that depends, see `one_mode`
    _read_parts = reader_of_modes(())
    _read_modes = reader_of_modes(())  # those on which a value of the graph depends
    _numbers: dict[Switched, int]  # of the switches that programs were derived for, as a part of names
    _exported: dict[tuple[Switched, tuple[str, ...]], fx.Graph]  # by switches and by the arguments that are left out
    _host = Host()
    _watch: Watch | None = None

    def __init__(self, root: nn.Module, graph: fx.Graph, execution: Execution) -> None:
        super().__init__(root, graph)
        set_modes(self, modes_of(root))
        let_flops_be_counted()  # now, because a counter may be on while the first call derives a program
        # torch.compile guards that an instance has no such attribute where it finds one of the class, so that a call
        # before the first scope that sets it would be compiled again after that.
        self.kept, self.own_switches = None, Switches()
        self.execution = execution
        make_layers(self)
        self._run_programs()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedGraphModule:
        share_signatures(self, memo)
        memo[id(self.kept)] = None
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, AdaptedGraphModule)
        keep_registration(self, twin)
        twin.kept, twin.execution, twin.own_switches = None, self.execution, self.switches
        twin._run_programs()
        return twin

    def __reduce__(self) -> Any:
        # torch.fx would pickle the source of `forward` and trace that again, so that nothing would know of adapters.
        raise AdapterError(
            "A graph module cannot be pickled, and so neither by torch.save: it would come back without its records of"
            " adapters. llfx.save(graph, path) writes the adapters, torch.export.save the exported graph, and"
            " copy.deepcopy copies it."
        )

    def train(self, mode: bool = True) -> Self:
        """Put all parts in a mode, but for those that the `train` of the model leaves in the other one."""
        super().train(mode)
        for name in () if self.execution is None else self.execution.held.get(mode, ()):
            if has_attribute(self, flag_name(name)):
                module_at(self, name).training = not mode
        return self

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

    def recompile(self) -> Any:
        code = super().recompile()
        if self.execution is not None:
            self._run_programs()
        return code

    def _run_programs(self) -> None:
        """Let `forward` run programs that are derived anew, in place of the graph that torch.fx has just compiled."""
        assert self.execution is not None
        self.drop_derived()
        take_further_inputs_from(self, self.flat_graph)
        cls: Any = type(self)
        cls.forward = forward_of_programs(cls.forward, self.execution, (IDS,) if self._banks else ())

    @property
    def flat_graph(self) -> fx.Graph:
        """The flat graph with all adapters, from which programs are derived."""
        return super().graph

    @property
    def graph(self) -> fx.Graph:
        """The flat graph with all adapters; while torch.export runs, the one for the switches and the call of now."""
        flat = self.flat_graph
        if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling() or self.execution is None:
            return flat
        if self.execution.finish is not None:
            raise AdapterError(
                "torch.export does not take DTensors, which the parameters of this graph are. The way out: export"
                " before parallelize; or save the adapters, and load them onto the whole model."
            )
        switched = self._switched_now("torch.export")
        signature = self.execution.signature
        left_out = left_out_of_export(signature)
        if switched == ALL and not left_out:
            return flat
        if (switched, left_out) not in self._exported:
            derived = Draft(self, copy_graph(flat))
            Pipeline(switch_passes(switched)).run(derived)
            if signature is not None and left_out:
                return_without(derived.graph, signature.omission(left_out))
            type(self)._exported[switched, left_out] = derived.graph
        return self._exported[switched, left_out]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        set_graph: Any = fx.GraphModule.graph
        set_graph.fset(self, graph)

    def take_over(self, draft: fx.GraphModule) -> None:
        """Take the graph and the adapters of a draft, which has other adapters over the same frozen tensors."""
        old, new = adapter_tensor_names(self), adapter_tensor_names(draft)
        for name in [name for name in old if name not in new]:
            delete_tensor(self, name)
        for name in [name for name in new if name not in old]:
            register_tensor(self, name, tensor_of(draft, name))
        self.graph = draft.graph
        add_flagged_modules(self, draft.graph)
        make_layers(self)
        self.recompile()

    def _switched_now(self, constants_for: str = "") -> Switched:
        """Return what a program depends on of the switches.

        Args:
            constants_for: says who needs the coefficients as numbers in the program; without it they are inputs.
        """
        if constants_for:
            return acting_of(self.switches, self._names), self._constants(constants_for)
        return switched_by(self.switches, self._names)

    @constant_when_compiled
    def _constants(self, purpose: str) -> tuple[tuple[str, float], ...]:
        given = self.switches.constants(purpose)
        return tuple((name, given[name]) for name in self._names if name in given)

    def program_graph(self, program: Program, left_out: tuple[str, ...] = ()) -> tuple[ProgramGraph, list[PassReport]]:
        """Return a program before it is cut into layers, as a graph of its own, and what each pass did.

        Args:
            program: which one.
            left_out: the arguments that its calls leave out, in the order of the signature.
        """
        assert self.execution is not None
        signature = self.execution.signature
        training = self.training if program in ("plain", "exported") else program != "inference"
        switched = self._switched_now("llfx.program")
        graph, reports = self._optimized(program, left_out, self._hooked(), (training, training), switched)
        if signature is not None and left_out:
            return_as(graph, signature.omission(left_out).out_spec)
        return ProgramGraph.over(self, self.host, graph, signature, left_out), reports

    def tensors_read_outside_layers(self) -> list[str]:
        """Return the names of the tensors that training reads outside of the layers that it calls as modules."""
        graph, _ = self._optimized("training", (), (), (True, True), ALL)
        called = {str(node.target) for node in graph.find_nodes(op="call_module")}
        _, values = cut(self, self.host, graph, "unused", ())
        outside = called & {str(node.target) for node in graph.find_nodes(op="call_module")}
        names = [name for name, _ in self.named_parameters() if name.rpartition(".")[0] in outside]
        read = () if values is None else set(values.read.paths).difference(self._read_modes.paths)
        return [*names, *map(".".join, sorted(read))]

    def keep_values(self) -> None:
        """Keep the values that depend on parameters alone, see `frozen`."""
        if not can_be_kept(self.host):
            return
        self.kept = KeptValues()
        if self._banks is not None:
            return  # the rows are known at the first call
        for method in self.derived:
            if method.startswith(f"{_DERIVED}inference"):
                self._keep(method)

    def drop_values(self) -> None:
        """Drop the kept values, and keep none from now on."""
        self.kept = None

    def drop_derived(self) -> None:
        """Drop the programs, which are derived again at the next calls."""
        with _deriving:
            # torch.fx makes a class for each module, so the methods of the programs can be attributes of the class.
            cls: Any = type(self)
            for method in [name for name in vars(cls) if name.startswith(_DERIVED)]:
                delattr(cls, method)
            cls.derived, cls._numbers, cls._exported = {}, {}, {}
            cls.recorded = Recorded.of(self)
            cls._names, cls._banks = cls.recorded.names, BankInputs.of(self, self.flat_graph)
            cls._parts = parts_with_modes(self.flat_graph)
            cls.modes = bool(cls._parts[0]) or (self.execution is not None and self.execution.fuse_loss)
            cls._read_modes = reader_of_modes([str(node.target) for node in filter(is_flag, self.flat_graph.nodes)])
            cls._read_parts = reader_of_modes([flag_name(path) for part in cls._parts for path in part])
            cls._watch = None
            if self.kept is not None:
                self.kept = KeptValues()
            for module in self.modules():
                if isinstance(module, GraphLayer):
                    module.own_part = None

    def _keeps_for(self, ids: object) -> bool:
        """Return whether a call may use kept values.

        With a bank they are those for the ids of the scope of `by_row`; other ids begin anew.

        Args:
            ids: those that the call itself has, for which nothing is kept.
        """
        if self.kept is None or self._banks is None or not self._banks.acting(self.switches):
            return self.kept is not None
        if ids is not None or self.switches.ids is None or torch.compiler.is_compiling():
            return False
        if self.kept.ids is not self.switches.ids:
            self.kept = KeptValues(ids=self.switches.ids)
        return True

    def _method_for(self, left_out: tuple[str, ...], ids: object = None) -> str:
        """Return the name of the method that runs the program for a call in the modes of now.

        Args:
            left_out: the arguments that the call leaves out.
            ids: for banks, those that the call itself has.
        """
        assert self.execution is not None
        training = self.training
        modes = (training, one_mode(*self._parts, *self._read_parts(self.host)) if self._parts[0] else training)
        if torch.compiler.is_exporting():
            return self._derive("exported", left_out, (), modes, self._switched_now("torch.export"))
        if not torch.compiler.is_compiling():
            if trace_is_active():
                with outside_symbolic_trace():
                    return self._derive("exported", left_out, (), modes, self._switched_now("A trace of torch.fx"))
            if transform_is_active():
                return self._derive("plain", left_out, self._hooked(), modes, self._switched_now())
        hooked, switched = self._hooked(), self._switched_now()
        if self._keeps_for(ids) and not torch.is_grad_enabled() and not self._any_in_training():
            assert self.kept is not None
            method = self._derive("inference", left_out, hooked, modes, switched)
            if self.kept.fit(method):
                return method
        checkpoints = self.execution.checkpoint_layers and training
        return self._derive("checkpointed" if checkpoints else "training", left_out, hooked, modes, switched)

    def _any_in_training(self) -> bool:
        """Tell whether the model is in training mode, or a part on whose mode a value depends."""
        if self.training or self.kept is None:
            return True
        if torch.compiler.is_compiling():
            return True in self._read_modes(self.host)
        if self.kept.parts is None:
            paths = (path[:-1] for path in self._read_modes.paths)
            self.kept.parts = [vars(submodule(self.host, ".".join(path)) if path else self.host) for path in paths]
        return True in map(_TRAINING, self.kept.parts)

    # Otherwise torch.compile would trace it.
    @constant_when_compiled
    def _derive(
        self,
        program: Program,
        left_out: tuple[str, ...],
        hooked: tuple[str, ...],
        modes: Modes,
        switched: Switched = ALL,
    ) -> str:
        """Make the method that runs this program, unless the class has it.

        Args:
            program: which one.
            left_out: the arguments that the call leaves out.
            hooked: qualified names of modules outside layers that are to be called, because hooks stand on them.
            modes: of the call. A graph with other operations in each mode has a program for each.
            switched: which adapters act and are scaled.

        Returns:
            The name of the method.
        """
        if program == "exported":
            warn_of_trace(self.flat_graph)
            set_modes(self, modes_of(self.host))  # the graph reads its own
        training, chosen = modes
        mode = "_evaluating" if self.modes and not training else ""
        if chosen is not training:
            mode += "_choosing_training" if chosen else "_choosing_evaluation"
        method = "_without_".join((f"{_DERIVED}{program}{mode}", *left_out))
        if hooked:
            method = "_calling_".join((method, *(name.replace(".", "_") for name in hooked)))
        if switched != ALL:
            cls: Any = type(self)
            method = f"{method}_switched_{cls._numbers.setdefault(switched, len(cls._numbers))}"
        if method not in self.derived:
            with _deriving:
                if method not in self.derived:
                    self._make(method, program, left_out, hooked, modes, switched)
        if program == "inference":
            with _deriving:
                self._keep(method)
        return method

    def _make(
        self,
        method: str,
        program: Program,
        left_out: tuple[str, ...],
        hooked: tuple[str, ...],
        modes: Modes,
        switched: Switched,
    ) -> None:
        cls: Any = type(self)
        without = f" for calls without {', '.join(left_out)}" if left_out else ""
        with phase(f"derived the {program} program{without}") as details:
            graph, _ = self._optimized(program, left_out, hooked, modes, switched)
            if program == "exported":
                setattr(cls, method, traceable_forward(self, graph))
                cls.derived[method] = Derived()
                return
            for name in hooked if self.host is not self else ():
                module = submodule(self.host, name)
                if not isinstance(module, RunsParts):
                    kind: Any = type(module)
                    module.__class__ = running_parts(kind)
            assert self.execution is not None
            compiler = None if program == "plain" else self.execution.compiler
            memory = self.execution.memory if program == "training" and compiler is None else "fast"
            unplanned = "the graph overwrites tensors" if memory != "fast" and overwrites(self, graph) else ""
            pieces, values = cut(self, self.host, graph, method, hooked)
            graph.lint()  # every value is there before it is read, wherever passes of others put their nodes
            is_kept, checkpoints = program == "inference", program == "checkpointed"
            written = written_attributes(self) if is_kept else ()
            derived = Derived(pieces, values, unplanned=unplanned, written=written)
            setattr(cls, f"{method}_values", values_method(method, derived, is_kept))
            for index, piece in enumerate(pieces):
                if memory != "fast" and not unplanned:
                    part: Part = derived.planned_part(piece, memory)
                else:
                    part = part_of(piece, is_kept, checkpoints, compiler)
                derived.parts.append(part)
                setattr(cls, piece.method, piece_method(method, index, piece, part, is_kept))
                layer = submodule(self.host, piece.path)
                if isinstance(layer, GraphLayer) and not is_kept and program != "plain":
                    layer.own_part = part if [each.path for each in pieces].count(piece.path) == 1 else None
            setattr(cls, method, forward_of(self, graph))
            cls.derived[method] = derived
            details.append(f"{len(graph.nodes)} nodes")

    def _keep(self, method: str) -> None:
        """Compute and keep what a program needs of the modules."""
        if self.kept is not None and method not in self.kept.by_program:
            # Not inference tensors, because a later call could not use those otherwise.
            with torch.inference_mode(False), torch.no_grad():
                self.derived[method].keep(self.host, self.kept, method)

    @property
    def adapter_ids(self) -> Tensor | None:
        """For banks, the slot of each row of the batch, as `by_row` says; programs read it that keep values."""
        return self.switches.ids

    def _coefficients(self, values: Any, named: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the coefficients of adapters that the program of a call takes as inputs.

        Args:
            values: the inputs of the call, in the order of the graph.
            named: those that come by name.

        Raises:
            CallError: there is one for each row of the batch, and the inputs have another number of rows.
        """
        if not self.switches.scales:
            return {}
        if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and trace_is_active()):
            return {}  # numbers in the program
        scales = self.switches.scales_of(self._names)
        by_row = [scale for scale in scales.values() if scale.dim()]
        if by_row:
            leaves = pytree.tree_leaves(values)
            for index, name in self._inputs_with_rows():
                value: Any = leaves[index] if index < len(leaves) else named.get(name)
                for scale in by_row if isinstance(value, Tensor) else ():
                    check_coefficients(scale, value.shape[0])
        return {input_name(name): scale for name, scale in scales.items()}

    @constant_when_compiled
    def _inputs_with_rows(self) -> tuple[tuple[int, str], ...]:
        """Return the places and the names of the inputs whose first dimension is the batch."""
        names = [str(node.target) for node in self.flat_graph.find_nodes(op="placeholder")]
        return tuple((index, names[index]) for index in inputs_with_rows(self.flat_graph))

    # As above. The hooks and ties of a compiled call are those that it was compiled with.
    @constant_when_compiled
    def _hooked(self) -> tuple[str, ...]:
        """Return the names of the modules that are to be called because hooks stand on them; check the ties."""
        assert self.execution is not None
        watch = self._watch
        if watch is None or not watch.holds():
            with _deriving:
                watch = type(self)._watch = Watch.of(self, self.host, self.execution.absent)
        watch.check_ties(self.host)
        if change := other_default_dtype(self.execution.default_dtype):
            raise CallError(f"{change}. The way out: torch.set_default_dtype, or capture the model under this type.")
        return watch.hooked()

    def _optimized(
        self, program: Program, left_out: tuple[str, ...], hooked: tuple[str, ...], modes: Modes, switched: Switched
    ) -> tuple[fx.Graph, list[PassReport]]:
        """Return an optimized copy of the graph, and the reports of the passes that optimized it."""
        assert self.execution is not None
        checked = self.execution.passes.check is not None  # a check calls it
        training, chosen = modes
        derived = (fx.GraphModule if checked else Draft)(self, copy_graph(self.flat_graph))
        derived.meta["called"] = hooked
        keep_mode(derived.graph, chosen)
        if left_out:
            assert self.execution.signature is not None
            Pipeline((LeaveOutInputs(self.execution.signature.omission(left_out)),)).run(derived, program)
        if switched != ALL:
            Pipeline(switch_passes(switched)).run(derived, program)
        ids = self.adapter_ids
        if program == "inference" and ids is not None and self._banks is not None and self._banks.acting(self.switches):
            read_ids(derived, ids)
        reports: list[PassReport] = []
        if self.execution.fuse_loss and training:
            fusing = replace(self.execution.passes.of(program, "fuse_loss"), check=None)  # it leaves out a result
            reports += fusing.run(derived, program)
        passes = self._passes_for(program, left_out)
        if switched[1]:  # the inputs of a check lack the coefficients
            passes = replace(passes, check=None)
        reports += passes.run(derived, program)
        if self.execution.finish is not None:
            self.execution.finish(self, derived.graph)
        derived.graph.owning_module = None  # torch.fx would ask it for modules, but the calls stand for methods
        return derived.graph, reports

    def _passes_for(self, program: Program, left_out: tuple[str, ...]) -> Pipeline:
        """Return the passes that optimize a program, with the inputs of a check as the program takes them.

        The program is not checked if a call with these inputs does not run it, because it leaves other arguments out.
        """
        assert self.execution is not None
        passes, signature = self.execution.passes.of(program), self.execution.signature
        if passes.check is None or signature is None:
            return passes
        values, without = signature.bind(*call_of(passes.check))
        if set(without) != set(left_out):
            return replace(passes, check=None)
        return replace(passes, check=tuple(values)) if left_out else passes

    def derive_checked(self) -> None:
        """Derive the programs that the inputs of a check are a call of, which checks their passes.

        Raises:
            PassError: a pass changes what the graph computes.
            CallError: the graph does not take the inputs.
        """
        assert self.execution is not None
        if self.execution.passes.check is None:
            return
        left_out: tuple[str, ...] = ()
        if self.execution.signature is not None:
            _, left_out = self.execution.signature.bind(*call_of(self.execution.passes.check))
        for program in self.execution.programs:
            training = program != "inference"
            self._derive(program, left_out, self._hooked(), (training, training), self._switched_now())

    def move(self, fn: Callable[..., Any], apply: Callable[[], object]) -> None:
        """Move or cast the module; programs depend on the device, and are derived again."""
        if self.kept is not None:
            raise changed_inside("The model was moved or cast")
        follow_cast(self, fn)
        follow_data(self, fn)
        self.drop_derived()
        apply()
        if self.own_switches.scales or self.own_switches.ids is not None:
            self.own_switches = self.own_switches.moved_to(tensor_of(self, adapter_tensor_names(self)[0]).device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in ELSEWHERE:
                raise AttributeError(f"A rewritten graph has no {name}. {ELSEWHERE[name]}") from error
            raise

    def extra_repr(self) -> str:
        """Return the lines on the adapters that `repr` shows."""
        return "\n".join(describe_adapters(self))

    def print_trainable_parameters(self) -> None:
        """Print one line: how many parameters train now, of how many, as PEFT prints it."""
        print(trainable_parameters(self))
