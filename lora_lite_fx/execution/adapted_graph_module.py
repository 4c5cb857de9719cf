"""The module that `rewrite` returns: it holds a flat graph, and runs programs that are derived from it.

Passes, `remove`, `merge`, `inspect`, files and exports see the flat graph. For each call `choose_program.py` chooses a
program, `derive_program.py` derives it at the first call of its kind, and `run_program.py` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import fx, nn

from ..adapters.listing import describe_adapters
from ..adapters.placement import adapter_tensor_names
from ..adapters.state import CountsParameters
from ..adapters.switches import Switches
from ..capture.autograd_functions import warn_of_trace
from ..capture.capture_model import call_of
from ..capture.graph_calls import call_like_the_model, return_as, take_further_inputs_from
from ..compat.torch import CODE, constant_when_compiled, disable_current_modes
from ..compat.torch_modules import SeesMoves
from ..errors import AdapterError
from ..graph.copies import head_of, prepare_copy, specs_of
from ..graph.modes import add_flagged_modules, flag_name, modes_of, set_modes
from ..graph.queries import model_name
from ..graph.sharded import is_sharded
from ..graph.tensors import delete_tensor, has_attribute, keep_registration, module_at, register_tensor, tensor_of
from ..ops.low_rank_products import let_flops_be_counted
from ..passes import PassReport
from ..passes import Program as Kind
from .casting import Moves, follow_cast, follow_move, moved_device, moves_of
from .choose_program import Switched, constant_switches, forward_of_programs, input_switches
from .cut_program import cut
from .derive_program import derive_program, graph_while_exporting, optimized_graph
from .execution import Execution, elsewhere
from .frozen import changed_inside
from .layer_modules import make_layers
from .program_graph import ProgramGraph
from .program_state import RunsPrograms, deriving
from .run_program import Program, ProgramKey


class AdaptedGraphModule(SeesMoves, CountsParameters, RunsPrograms):
    """A graph module that computes what its graph says, and runs it as its `execution` says.

    A program is derived at the first call that needs it after a recompile, so that passes can change the graph. Its
    layers are called as modules at their own paths: `graph.model.layers[0]`. They read their tensors when they are
    called, so whatever replaces a tensor or stands on a layer acts. `torch.fx.Interpreter`, and so `torch.export`, run
    the graph itself. It has all adapters; calls and exports leave out those that do not act, see `switches`.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, execution: Execution) -> None:
        super().__init__(root, graph)
        set_modes(self, modes_of(root))
        let_flops_be_counted()  # now, because a counter may be on while the first call derives a program
        # torch.compile guards that an instance has no such attribute where it finds one of the class, so that a call
        # before the first scope that sets it would be compiled again after that.
        self.keeps_values, self.own_switches = False, Switches()
        self.execution = execution
        make_layers(self)
        self._run_programs()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedGraphModule:
        prepare_copy(self, memo)
        memo[id(self.derived)] = None
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, AdaptedGraphModule)
        keep_registration(self, twin)
        twin.keeps_values, twin.execution, twin.own_switches = False, self.execution, self.switches
        if (errors := vars(self).get("requantised")) is not None:  # as `merge` notes them
            vars(twin)["requantised"] = dict(errors)
        twin._run_programs()
        return twin

    def __reduce__(self) -> Any:
        # torch.fx would pickle the source of `forward` and trace that again, so that nothing would know of adapters.
        raise AdapterError(
            "A graph module cannot be pickled, and so neither by torch.save: it would come back without its records of"
            " adapters. llfx.save(graph, path) writes the adapters, torch.export.save the exported graph, and"
            " copy.deepcopy copies it."
        )

    def __reduce_package__(self, exporter: object) -> Any:
        return self.__reduce__()

    def train(self, mode: bool = True) -> Self:
        """Put all parts in a mode, but for those that the `train` of the model leaves in the other one."""
        super().train(mode)
        for name in () if self.execution is None else self.execution.held.get(mode, ()):
            if has_attribute(self, flag_name(name)):
                module_at(self, name).training = not mode
        return self

    def recompile(self) -> Any:
        """Derive programs anew at the next calls, and compile the flat graph anew when its code is read."""
        if self.execution is not None:
            self._run_programs()

    def _run_programs(self) -> None:
        """Let `forward` run programs that are derived anew, and drop the code of the flat graph, which no call runs."""
        self.drop_derived()
        take_further_inputs_from(self, self.flat_graph)
        for name in CODE:
            vars(self).pop(name, None)
        head = fx.GraphModule(nn.Module(), head_of(self.flat_graph))
        vars(self).update(specs_of(head))
        cls: Any = type(self)  # torch.fx makes a class for each module
        cls.forward = forward_of_programs(type(head).forward, self)

    def _compile_flat_graph(self) -> None:
        """Compile the flat graph, as torch.fx does at each change. Calls run programs all the same."""
        cls: Any = type(self)
        forward = cls.forward
        super().recompile()
        cls.forward = forward
        if "__call__" in vars(cls):  # that of torch.fx, which tells which line of this code has failed
            del cls.__call__

    @property
    def graph(self) -> fx.Graph:
        """The flat graph with all adapters; while torch.export runs, the one for the switches and the call of now.

        torch.export does not call a graph module: it interprets `graph`.
        """
        if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling() or self.execution is None:
            return self.flat_graph
        return graph_while_exporting(self)

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

    def program(self, *fields: Any) -> Program:
        """Return the program with a `ProgramKey` of these fields; derive it if there is none."""
        if torch.compiler.is_dynamo_compiling():
            program: Program = getattr(self.derived, self._name_of(*fields))
            return program
        key = ProgramKey(*fields)
        known = self.derived.programs.get(key)
        return self._derive(key) if known is None or key.kind in ("inference", "exported") else known

    # Otherwise torch.compile would trace it.
    @constant_when_compiled
    def _name_of(self, *fields: Any) -> str:
        return self._derive(ProgramKey(*fields)).name

    def _derive(self, key: ProgramKey) -> Program:
        """Return the program with this key, derived if there is none, with its values inside a scope of `frozen`."""
        with deriving:
            if key.kind == "exported":
                warn_of_trace(self.flat_graph)
                set_modes(self, modes_of(self.host))  # because the graph reads its own
            derived = self.derived
            program = derived.programs.get(key)
            if program is None:
                with disable_current_modes():  # as that of fake tensors: a pass computes on those of the graph alone
                    program = derive_program(self, key)
                derived.add(program)
            if key.kind == "inference" and self.keeps_values:
                ids = self.adapter_ids
                if program.kept is None or program.kept.ids is not ids:
                    program.keep_values(ids)
            return program

    def keep_values(self) -> None:
        """Keep the values that depend on parameters alone, see `frozen`."""
        if is_sharded(self.host):
            return  # sharded parameters are freed
        self.keeps_values, self.derived.owners_of_modes = True, None
        if self.derived.banks is None:  # the rows of banks are known at the first call
            for key in [key for key in self.derived.programs if key.kind == "inference"]:
                self._derive(key)

    def drop_values(self) -> None:
        """Drop the kept values, and keep none from now on."""
        self.keeps_values = False
        for program in self.derived.programs.values():
            program.kept = None

    def _key_of(self, kind: Kind, left_out: tuple[str, ...], switches: Switched) -> ProgramKey:
        """Return the key of a program of a kind, by the hooks of now."""
        assert self.execution is not None
        training = self.training if kind in ("plain", "exported") else kind != "inference"
        mode = training if self.derived.parts[0] else None
        fuses_loss = self.execution.fuse_loss and training
        return ProgramKey(kind, left_out, self.called_for_hooks(), fuses_loss, mode, *switches)

    def program_graph(self, kind: Kind, left_out: tuple[str, ...] = ()) -> tuple[ProgramGraph, list[PassReport]]:
        """Return a program before it is cut into layers, as a graph of its own, and what each pass did.

        Args:
            kind: which one.
            left_out: the arguments that its calls leave out, in the order of the signature.
        """
        assert self.execution is not None
        signature = self.execution.signature
        graph, reports = optimized_graph(self, self._key_of(kind, left_out, constant_switches(self, "llfx.program")))
        if signature is not None and left_out:
            return_as(graph, signature.omission(left_out).out_spec)
        return ProgramGraph.over(self, self.host, graph, signature, left_out), reports

    def tensors_read_outside_layers(self) -> list[str]:
        """Return the names of the tensors that training reads outside of the layers that it calls as modules."""
        mode = True if self.derived.parts[0] else None
        graph, _ = optimized_graph(self, ProgramKey("training", mode=mode))
        _, values = cut(self, self.host, graph, ())
        read = set() if values is None else set(map(".".join, values.read.paths))  # tensors, modes, and modules
        names = (name for name, _ in self.named_parameters(remove_duplicate=False))
        return [name for name in names if name in read or name.rpartition(".")[0] in read]

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
        for kind in self.execution.programs:
            self._derive(self._key_of(kind, left_out, input_switches(self)))

    def move(self, fn: Callable[..., Any], apply: Callable[[], object]) -> None:
        """Move or cast the module; programs depend on the device, and are derived again."""
        if self.keeps_values:
            raise changed_inside("The model was moved or cast")
        follow_cast(self, fn)
        if moves := moves_of(self, fn):
            self._follow_move(moves)
        self.drop_derived()
        apply()
        if self.own_switches.scales or self.own_switches.ids is not None:
            self.own_switches = self.own_switches.moved_to(tensor_of(self, adapter_tensor_names(self)[0]).device)

    def _follow_move(self, moves: Moves) -> None:
        with disable_current_modes():  # as in `_derive`
            follow_move(self, moves)
        if self.execution is not None and self.execution.signature is not None:
            signature = self.execution.signature.moved(lambda device: moved_device(device, moves))
            self.execution = replace(self.execution, signature=signature)
            call_like_the_model(self.flat_graph, signature)
        self.recompile()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in CODE and self.execution is not None:
                self._compile_flat_graph()
                return vars(self)[name]
            if name == "save_pretrained" and (save := self._saver()) is not None:
                return save
            raise elsewhere(name, "A rewritten graph", "graph") or error from None

    def _saver(self) -> Callable[..., None] | None:
        """Return what saves the model with the weights of this graph; None if it has adapters or cannot be saved."""
        save = None if self.execution is None else self.execution.save_as_model
        return None if save is None or adapter_tensor_names(self) else partial(save, self)

    def __repr__(self) -> str:
        """Return the model's class, the sizes, the adapters and their sites; `code` has the graph."""
        if vars(self).get("execution") is None:  # it is still being made, as a debugger shows it
            return super().__repr__()
        trained, total = self.get_nb_trainable_parameters()
        of = "" if (name := model_name(self)) == "GraphModule" else f" of {name}"  # where it is not known
        lines = [
            f"GraphModule{of}, {total:,} parameters, of which {trained:,} train",
            *(f"  {line}" for line in describe_adapters(self, with_sites=True)),
            "  Its graph: code, print_readable(); its sites: lora_lite_fx.inspect",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return repr(self)
