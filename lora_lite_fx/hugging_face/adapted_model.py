"""The methods that `adapt` adds to the class of a model."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ..adapters.changed_buffers import BaseBuffers
from ..adapters.listing import describe_adapters
from ..adapters.placement import Placement, copy_over_tensors, next_index
from ..adapters.state import CountsParameters
from ..adapters.switches import Switches, coefficients
from ..adapters.variant import Variant
from ..capture.capture_model import Inputs
from ..capture.origins.origin import is_hugging_face
from ..compat.torch_modules import SeesMoves, children_of
from ..errors import AdapterError, ConfigError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.compile_layers import LayerCompiler
from ..execution.frozen import changed_inside
from ..execution.layer_modules import WRAPPED, RunsParts, plain_class, running_parts
from ..execution.memory_plan import Memory, MemoryPlan, check_memory
from ..execution.optimize import checkpoints_layers
from ..formats.any_file import WEIGHTS
from ..formats.checkpoint import save
from ..formats.peft.directory import CONFIG, TENSORS, save_peft
from ..graph.layers import is_layer
from ..graph.sharded import is_sharded, refuse_sharded
from ..graph.tensors import register_tensor, tensor_of
from ..log import logger
from ..rewriting.capture import base_graph
from ..rewriting.choose_sites import Batches
from ..rewriting.merge_into_model import fold_into, tell_config
from ..rewriting.named import as_named
from ..storage.dequantized import restore_quantized
from .adapted_parts import AdaptedLayer, AdaptedPart, subclass
from .named_adapters import NamedAdapters
from .own_forward import forget_replaced_forward


class Adapted(SeesMoves, NamedAdapters, CountsParameters, AdaptedPart):
    """The adapted model itself."""

    is_whole = True

    @property
    def placements(self) -> list[Placement]:
        """The adapters by site, as `adapters.placement.placements` asks for them."""
        return self._graphs.adapters.placements

    @property
    def switches(self) -> Switches:
        """The adapters that act, and their coefficients."""
        return self._graphs.adapters.switches

    @switches.setter
    def switches(self, switches: Switches) -> None:
        self._graphs.adapters.switches = switches

    @property
    def base_buffers(self) -> BaseBuffers:
        """The buffers of the user's model that calls of this one change in copies, by name."""
        return self._graphs.adapters.base_buffers

    @property
    def adapter_ids(self) -> Tensor | None:
        """For banks, the slot of each row of the batch, as `by_row` says; the graphs read it that keep values."""
        return self.switches.ids

    @property
    def is_quantized(self) -> bool:
        """False, because a `Trainer` asks it to refuse quantized models without adapters; this one has adapters."""
        return False

    @property
    def is_loaded_in_4bit(self) -> bool:
        """False, because TRL would set the data of the adapters of such a model to bfloat16, behind the graphs."""
        return False

    @property
    def is_loaded_in_8bit(self) -> bool:
        """False, for the same reason. What holds the weights here are tensors like any others."""
        return False

    def keep_values(self) -> None:
        """Keep the values that depend on parameters alone, see `frozen`."""
        self._graphs.keep_values(True)

    def drop_values(self) -> None:
        """Drop the kept values, and keep none from now on."""
        self._graphs.keep_values(False)

    def let_parts_run(self) -> None:
        """Let the models in this one run graphs of their own, its layers parts of graphs, and its sites as below."""
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            cls: Any = type(module)
            wraps = any(
                isinstance(children_of(module).get(key), RunsParts) for key in WRAPPED
            )  # what runs parts already
            if not wraps and not issubclass(cls, (RunsParts, AdaptedPart)):
                if is_hugging_face(module):
                    module.__class__ = subclass(AdaptedPart, cls)
                    module._graphs, module._path = self._graphs, name
                elif is_layer(name):
                    module.__class__ = running_parts(cls)
        self.let_sites_run_alone()

    def let_sites_run_alone(self) -> None:
        """Let the modules of adapted sites run graphs of their own when they are called by themselves."""
        modules: dict[str, Any] = dict(self.named_modules())  # type: ignore[attr-defined]
        for name in {placement.site for placement in self.placements} & modules.keys():
            module = modules[name]
            if not isinstance(module, (AdaptedLayer, AdaptedPart)):
                module.__class__ = running_parts(plain_class(type(module)), AdaptedLayer)
                module._graphs, module._path = self._graphs, name

    def bind_graphs(self) -> None:
        """Let the graphs have the tensors that the model has now, and no others."""
        self._graphs.bind()

    def compile_layers_by(self, compiler: LayerCompiler | None) -> None:
        """Compile what the layers run from now on, see `compile_layers`; or no longer, for None."""
        self._graphs.apply(lambda gm: gm.compile_layers_by(compiler), "compiler")

    def plan_memory_by(self, memory: Memory) -> None:
        """Let the layers keep that much for the backward pass from now on, see `plan_memory`."""
        check_memory(memory, checkpoints_layers(self))  # type: ignore[arg-type]
        self._graphs.apply(lambda gm: gm.plan_memory_by(memory), "memory", lambda gm: gm.run_with(memory=memory))

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the plans of all graphs that were called in training."""
        return [plan for gm in self._graphs.modules() for plan in gm.memory_plans()]

    def graph_of_call(self, inputs: Inputs | None) -> AdaptedGraphModule:
        """Return a graph of the model's own call with these arguments, with the adapters, over the model's tensors.

        Unlike the graphs that calls run, it takes the arguments as they are. It is captured anew each time.

        Args:
            inputs: as for `capture`.
        """
        gm = base_graph(self.adapters_taken_off(), inputs)
        assert isinstance(gm, AdaptedGraphModule)
        self.give_adapters_to(gm)
        return gm

    def adapters_taken_off(self) -> Any:
        """Return a copy of the model without adapters, of its own class, over the same weights."""
        self._graphs.follow_model()
        return self._graphs.adapters.shadow()

    def give_adapters_to(self, gm: AdaptedGraphModule) -> None:
        """Insert the adapters into a graph of the copy without them, over the tensors of the model."""
        self._graphs.adapters.insert_into(gm)
        self._graphs.adapters.bind(gm)
        gm.own_switches = self.switches

    def add_to_graphs(self, adapters: Sequence[tuple[str, Variant]], calibration: Batches | None) -> None:
        """Add new adapters to all graphs, as `add` asks for."""
        self._graphs.add(adapters, calibration)
        self.let_sites_run_alone()

    def insert_from(self, loaded: fx.GraphModule, name: str) -> None:
        """Insert the one adapter of another graph of the model into all graphs, as `combine` asks for."""
        self._graphs.insert(*as_named(loaded, name, next_index(self)))  # type: ignore[arg-type]
        self.let_sites_run_alone()

    def delete_from_graphs(self, names: Sequence[str]) -> None:
        """Delete adapters from all graphs, as `delete` asks for."""
        self._graphs.delete(names)

    def adapted_graph(self) -> fx.GraphModule:
        """Return the graph that has all sites, over the tensors of the model."""
        return self._graphs.first_graph()

    def without_adapters(self, fold: bool, requantise: bool = False) -> Any:
        """Return the model in its own class, its adapters folded into copies of the adapted weights, or left out."""
        way_out = "do this before it is sharded; or save the adapters, and load them onto the whole model"
        refuse_sharded(self, f"{'merge' if fold else 'remove'} does not take a model", way_out)
        plain = self._graphs.adapters.plain_model()
        for name, base in self.base_buffers.items():
            now = tensor_of(plain, name)
            register_tensor(plain, name, (now if fold or base is None else base.to(now)).clone())
        if fold:
            acting = coefficients(self, "merge")  # type: ignore[arg-type]
            fold_into(plain, self.adapted_graph(), acting, requantise)
        else:
            tell_config(plain)
        restore_quantized(plain)
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle would refuse the class, which is made for the model, without saying what to do.
        raise AdapterError(
            f"An adapted {type(self).__name__} cannot be pickled, and so neither by torch.save: its graphs would come"
            " back without their records of adapters. llfx.save(model, path) writes the adapters, llfx.merge(model)"
            " returns a model of the plain class, and copy.deepcopy copies it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(vars(self), memo))  # type: ignore[attr-defined]
        for module in twin.modules():  # type: ignore[attr-defined]
            if "_graphs" in vars(module):  # a part that was copied before may have kept those of this model
                module._graphs = twin._graphs
        forget_replaced_forward(twin)  # type: ignore[arg-type]
        return twin

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__setstate__(dict(vars(self)))  # type: ignore[attr-defined]
        return twin

    def with_placements(self, placed: Sequence[Placement]) -> Any:
        """Return a copy of the model over the same tensors, with these configs at its places."""
        twin: Any = copy_over_tensors(self)  # type: ignore[arg-type]
        twin._graphs.adapters.placements = list(placed)
        return twin

    def extra_repr(self) -> str:
        """Return the lines that `repr` shows before the modules: those of the model, and one for each adapter."""
        return "\n".join(line for line in (super().extra_repr(), *describe_adapters(self)) if line)  # type: ignore

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters, and not the model: as a PEFT directory, and for a `Trainer` that resumes.

        `adapt`, `from_pretrained` of an adapted class and PEFT read the directory. Adapters that PEFT has no form for
        are in `model.safetensors` alone, as `save` writes them; the log says why.

        Args:
            save_directory: made if it is not there.
            is_main_process: whether to write at all.
            state_dict: of a sharded model, its whole tensors by name, as `accelerator.get_state_dict` gathers them; the
                process that has them calls this alone. Without it all processes call this.
        """
        if not is_main_process:
            return
        model: Any = self
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        whole_tensors = state_dict if is_sharded(model) else None
        save(model, folder / WEIGHTS, whole_tensors=whole_tensors)
        try:
            save_peft(model, folder, whole_tensors=whole_tensors)
        except ConfigError as error:
            for name in (CONFIG, TENSORS):  # those of adapters that were saved here before
                (folder / name).unlink(missing_ok=True)
            logger.info("%s is not a directory of PEFT: %s", folder, error)

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that are captured now, one for each kind of call, over the tensors of this model.

        They are for reading. Each takes the tensors of its calls by name; `adapt(rewrite(...))` has a graph that is
        called like the model.
        """
        return self._graphs.modules()

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Raise AdapterError, because continuous batching calls attention in a way of its own, with pages of a cache.

        `generate_batch` comes here too.
        """
        raise AdapterError(
            "Continuous batching runs attention over pages of a cache, which a graph does not. The way out:"
            " llfx.merge(model).generate_batch(...), or generate."
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Let the graphs checkpoint their layers, as `rewrite(..., checkpoint_layers=True)` does.

        Args:
            gradient_checkpointing_kwargs: as for the model; `use_reentrant` may not be true.

        Raises:
            ConfigError: the reentrant kind is asked for.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError("The layers of a graph are checkpointed with use_reentrant=False; the other kind is not.")
        self._graphs.apply(lambda gm: gm.checkpoint_layers_if(True))
        self._switch_checkpointing("enable", gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Let the graphs save all activations again."""
        self._graphs.apply(lambda gm: gm.checkpoint_layers_if(False))
        self._switch_checkpointing("disable")

    def _switch_checkpointing(self, how: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name calls the old one if that is overridden
            getattr(super(), f"gradient_checkpointing_{how}")(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings, as the model does. The next calls have graphs for them; files hold the adapters alone.

        Raises:
            AdapterError: the embeddings or the head have an adapter.
        """
        if self._graphs.keeps_values:
            raise changed_inside("The embeddings were resized")
        modules: dict[str, Any] = dict(self.named_modules(remove_duplicate=False))  # type: ignore[attr-defined]
        resized = self.get_input_embeddings(), self.get_output_embeddings()  # type: ignore[attr-defined]
        for site in (placement.site for placement in self.placements):
            if (module := modules.get(site)) is not None and module in resized:
                raise AdapterError(
                    f"{site!r} has an adapter, whose tensors are of the size that it has. The way out: resize the"
                    " embeddings before adapt."
                )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def move(self, fn: Any, apply: Callable[[], object]) -> None:
        """Move or cast the model; its graphs are captured again if that changes a tensor."""
        if self._graphs.keeps_values:
            raise changed_inside("The model was moved or cast")
        before = self._tensors()
        apply()
        # What goes to "meta" comes back by other ways, as accelerate loads a sharded model.
        if self._tensors() != before and not any(tensor.is_meta for tensor in self.parameters()):  # type: ignore
            self._graphs.drop()
            self.switches = self.switches.moved_to(self.device)  # type: ignore[attr-defined]

    def _tensors(self) -> list[Any]:
        tensors = [*self.parameters(), *self.buffers()]  # type: ignore[attr-defined]
        return [(id(tensor), tensor.dtype, tensor.device) for tensor in tensors]
