"""Keep the graphs of an adapted model: one for each signature of its calls, captured on first use."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.changed_buffers import BaseBuffers
from ..adapters.placement import Placement, placements
from ..adapters.switches import Switches
from ..adapters.variant import Variant
from ..capture.asserted_decisions import is_other_decision
from ..capture.capture_model import Inputs, without_what_cannot_be
from ..capture.held_answers import other_than_held
from ..capture.inputs.example_inputs import example_inputs_of
from ..capture.inputs.labels import problem_type_of
from ..capture.origins.hooks import take_hooks_off
from ..capture.origins.origin import is_diffusers, is_hugging_face
from ..compat.torch import not_compiled
from ..errors import COMPILE_INSTEAD, AdapterError, CaptureError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.compile_layers import LayerCompiler
from ..execution.memory_plan import Memory, MemoryPlan, check_memory
from ..execution.optimize import checkpoints_layers, draft_of
from ..graph.calls_and_traces import calling, tracing
from ..graph.modes import add_flagged_modules
from ..graph.sharded import is_sharded, refuse_sharded
from ..graph.tensors import delete_tensor, register_tensor, tensor_of
from ..graph.writes import written_buffers
from ..log import logger
from ..passes import Pipeline, RemoveAdapters
from ..rewriting.calibration import Batches
from ..rewriting.plan import make_plans
from ..rewriting.rewrite import insert_new, insert_placed
from ..sites.finding import find_sites
from ..sites.site import Site
from .around_parts import has_parts, run_around_parts, try_around_parts
from .call_structure import Leaves
from .captured_call import CapturedCall, CapturedGraph, attempts, capture_call, captured_with
from .causal_lm import arguments_of, caches, normalize_call
from .config_reads import ConfigValues, recorded_reads
from .decoder import Decoder, probe
from .diffusers_models import prepare_arguments
from .forms import Forms, Kind, kind_of
from .kept_graphs import KeptGraphs
from .model_state import ModelState
from .own_forward import check_is_whole
from .plain_copy import plain_copy
from .positions import count_positions, forget_positions
from .written_by_calls import warn_of_writes

Insert = Callable[[fx.GraphModule, Batches | None], fx.GraphModule]
"""A function that inserts adapters into a base graph, with calibration data in the form that the graph takes."""


class GraphCache:
    """The graphs of an adapted model, over the tensors of that model.

    Args:
        model: a copy of the user's model, to be adapted.
        example_inputs: of the first call to capture, or None to make them from the config.
        limit: the most graphs to keep of the model, and of each part of it that is called by itself.
        verify, fuse_loss: as for `capture`.
    """

    def __init__(
        self,
        model: Any,
        example_inputs: Inputs | None,
        limit: int,
        verify: bool = True,
        fuse_loss: bool = False,
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.limit = limit
        self.verify = verify
        self.fuse_loss = fuse_loss
        self._without: tuple[str, ...] = ()  # images or sound, if example inputs of the config go without
        self.placements: list[Placement] = []
        self.switches = Switches()
        self.sites: dict[str, tuple[frozenset[str], str]] = {}  # roles and weight, as the first graph has them
        self.captures = 0
        self.keeps_values = False
        self.compiler: LayerCompiler | None = None
        self.memory: Memory = "fast"
        self.base_buffers: BaseBuffers = {}  # of the user's model; the graphs write to those of this one
        self._owned: set[str] = set()
        self._bound_for: type | None = None
        self.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        """Return the cache of a copy of the model: the same adapters, and no graph yet.

        A copy of a part alone, as one that is put in the place of that part, keeps the cache of its model.
        """
        if id(self.model) not in memo:
            return self
        twin = memo[id(self)] = object.__new__(GraphCache)
        twin.__dict__.update(self.__dict__, keeps_values=False)
        twin._owned = {*self._owned}
        twin.model = copy.deepcopy(self.model, memo)
        twin.drop()
        return twin

    def drop(self) -> None:
        """Forget all graphs, because devices, dtypes, and what `ModelState` sees are part of them."""
        self._kept = KeptGraphs(type(self.model).__name__, self.limit)
        self._forms = Forms(self.model, self._shadow)
        self._around_parts: list[Kind] = []  # kinds of calls with a loss that cannot be captured
        self._state: ModelState | None = None  # of the time of the first of them
        self._decoders: dict[torch.dtype | None, Decoder | None] = {}  # by what autocast computes in
        self.__dict__.pop("_first_call", None)

    def _decoder_for(self, part: Any, arguments: Mapping[str, Any]) -> Decoder | None:
        """Return the facts that a run of the model has shown, if it is a causal language model, and is called whole.

        Under autocast its cache has other types. The cache of a training call is read by no later one, and such calls
        have one graph with and without autocast. Of a model that is sharded no copy can be run.
        """
        if part is not self.model:
            return None
        device, dtype = self.model.device.type, None
        has_later_calls = not part.training or bool(caches(arguments))
        if torch.is_autocast_enabled(device) and has_later_calls and not is_sharded(self.model):
            dtype = torch.get_autocast_dtype(device)
        if dtype not in self._decoders:
            self._probe_now(dtype)
        return self._decoders[dtype]

    @not_compiled
    def _probe_now(self, dtype: torch.dtype | None) -> None:
        device = self.model.device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            self._decoders[dtype] = probe(self._shadow())

    def __len__(self) -> int:
        return len(self._kept)

    def modules(self) -> tuple[fx.GraphModule, ...]:
        """Return the graphs, the one that was used last at the end."""
        return self._kept.modules()

    # Calls.

    def run(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a part of the model, itself a model or a module with a site, as its own `forward` would be called."""
        if part is not self.model and is_hugging_face(part) and "forward" in vars(self.model):
            check_is_whole(self.model, part, self.placements)
        arguments, return_dict = arguments_of(part, args, kwargs)
        # Several threads may call one model. torch.compile knows no locks.
        with nullcontext() if torch.compiler.is_dynamo_compiling() else calling():
            return self._run(part, arguments, return_dict)

    def _run(self, part: Any, arguments: dict[str, Any], return_dict: bool) -> Any:
        if self._bound_for is not type(self.model):  # as fully_shard changes it
            self.bind()
        if not self.keeps_values and not torch.compiler.is_dynamo_compiling():
            self.follow_model()
        if "labels" in arguments and kind_of(part, arguments) in self._around_parts:
            return run_around_parts(part, arguments, return_dict)
        call = self._call(part, arguments)
        try:
            graph = self._graph_for(call)
        except CaptureError as error:
            if "labels" not in arguments or not has_parts(self.model, part, self.placements):
                raise
            return self._tried_around_parts(part, arguments, return_dict, error)
        return graph.run(part, call, return_dict)

    @not_compiled
    def _tried_around_parts(self, part: Any, arguments: dict[str, Any], return_dict: bool, reason: CaptureError) -> Any:
        result = try_around_parts(part, arguments, return_dict, reason)
        self._around_parts.append(kind_of(part, arguments))
        return result

    def _call(self, part: Any, arguments: dict[str, Any], is_first: bool = False) -> CapturedCall:
        if is_diffusers(part):
            arguments = prepare_arguments(part, arguments)
        # The first graph is for training if the loss is to be fused, in whichever mode the model is adapted.
        fuses_loss = self.fuse_loss and (self.model.training or is_first)
        counted = count_positions(part, arguments)
        decoder = self._decoder_for(part, arguments)
        form = self._forms.of(part, decoder, arguments, counted, fuses_loss)
        if counted.positions is not None:
            arguments = {**arguments, "position_ids": counted.positions}
        return CapturedCall.of(part, normalize_call(part, decoder, arguments, form, fuses_loss))

    def _graph_for(self, call: CapturedCall) -> CapturedGraph:
        """Return the graph for this call; capture it if there is none."""
        graph, _ = self._kept.find(call)
        return self._captured_now(call) if graph is None else graph

    @not_compiled
    def _captured_now(self, call: CapturedCall) -> CapturedGraph:
        with tracing():
            graph, reason = self._kept.find(call)  # another thread may have captured it
            if graph is not None:
                return graph
            start = time.perf_counter()
            graph = self._capture_for(call)
            self._kept.add(graph, reason, time.perf_counter() - start)
            if self.keeps_values:
                graph.gm.keep_values()
        return graph

    def follow_model(self) -> None:
        """Forget the graphs if the model has changed in what a graph has for good, as its modules and their numbers."""
        if self._state is not None and self._state.is_as_it_was():
            return
        with tracing():
            if self._state is not None:
                self.model.let_parts_run()  # those that are new
                if change := self._state.change():
                    logger.info("%s: graphs will be captured again, because %s", type(self.model).__name__, change)
                    self.drop()
            if self._state is None:
                self._state = ModelState(self.model)

    def keep_values(self, keeps: bool) -> None:
        """Let all graphs keep the values that depend on parameters alone, or drop them."""
        if keeps:
            self.follow_model()  # calls in the scope do not look
        with tracing():
            self.keeps_values = keeps
            for graph in self._kept:
                graph.gm.keep_values() if keeps else graph.gm.drop_values()

    def compile_layers_by(self, compiler: LayerCompiler | None) -> None:
        """Compile what the layers of all graphs run from now on; or no longer, for None."""
        with tracing():
            for graph in self._kept:
                graph.gm.compile_layers_by(compiler)
            self.compiler = compiler

    @not_compiled
    def bind(self) -> None:
        """Let all graphs have the tensors that the model has now; else those of a sharded model keep whole ones."""
        with tracing():
            self._bound_for = type(self.model)
            for graph in self._kept:
                self._bind(graph.gm)

    def checkpoint_layers(self, checkpoints: bool) -> None:
        """Let the layers of all graphs keep only their inputs for the backward pass, or all activations again."""
        with tracing():
            for graph in self._kept:
                graph.gm.checkpoint_layers_if(checkpoints)

    def plan_memory_by(self, memory: Memory) -> None:
        """Let the layers of all graphs keep that much for the backward pass from now on."""
        check_memory(memory, checkpoints_layers(self.model))
        with tracing():
            for graph in self._kept:
                graph.gm.plan_memory_by(memory)
            self.memory = memory

    def memory_plans(self) -> list[MemoryPlan]:
        """Return the plans of all graphs that were called in training."""
        return [plan for graph in self._kept for plan in graph.gm.memory_plans()]

    # Capture.

    def start(self, insert: Insert, calibration: Batches | None) -> None:
        """Capture the first graph, insert adapters into it, and register their tensors in the model."""
        batches = None if calibration is None else (self._batch(batch) for batch in calibration)
        graph = without_what_cannot_be(self.model, self.example_inputs, self._first_graph)
        adapted = insert(graph.gm, batches)
        assert isinstance(adapted, AdaptedGraphModule)
        graph.gm = adapted
        self._owned.clear()  # the buffers that calls change are those of this graph, which a file may have brought
        self._bind(graph.gm)
        graph.gm.run_on(self.model)
        self.placements = placements(graph.gm)
        self.sites = {site.name: (site.roles, site.weight) for site in find_sites(graph.gm)}
        self._kept.add(graph)

    def add(self, adapters: Sequence[tuple[str, Variant]], calibration: Batches | None) -> None:
        """Add new adapters to all graphs and to the model."""
        self.follow_model()
        with tracing():
            first = self._graph_for(self._first_call).gm
            draft = draft_of(first)
            batches = None if calibration is None else (self._batch(batch) for batch in calibration)
            insert_new(draft, make_plans(draft, adapters, batches))
            names = {name for name, _ in adapters}
            placed = [placement for placement in placements(draft) if placement.adapter_name in names]
            tensors = {path: tensor_of(draft, path) for each in placed for path in each.tensors.values()}
            self.insert(placed, tensors)

    def insert(self, placed: Sequence[Placement], tensors: Mapping[str, Tensor]) -> None:
        """Insert adapters that have tensors already into all graphs, and register the tensors in the model."""
        with tracing():
            drafts = [draft_of(graph.gm) for graph in self._kept]
            for draft in drafts:
                insert_placed(draft, placed, self._roles(), tensors)
            for name, tensor in tensors.items():
                register_tensor(self.model, name, tensor)
                self._owned.add(name)
            self.placements = [*self.placements, *placed]
            self._take_over(drafts)

    def delete(self, names: Sequence[str]) -> None:
        """Delete adapters from all graphs and from the model."""
        with tracing():
            drafts = [draft_of(graph.gm) for graph in self._kept]
            for draft in drafts:
                Pipeline((RemoveAdapters(tuple(names)),)).run(draft)
            gone = [path for each in self.placements if each.adapter_name in names for path in each.tensors.values()]
            for path in dict.fromkeys(gone):  # some are shared by several sites
                delete_tensor(self.model, path)
                self._owned.discard(path)
            self.placements = [each for each in self.placements if each.adapter_name not in names]
            self._take_over(drafts)

    def _take_over(self, drafts: Sequence[AdaptedGraphModule]) -> None:
        for graph, draft in zip(self._kept, drafts, strict=True):
            graph.gm.take_over(draft)
            self._bind(graph.gm)

    def first_graph(self) -> fx.GraphModule:
        """Return the graph that has all sites, captured again if it was dropped, over the tensors of the model."""
        self.follow_model()
        with tracing():
            gm = self._graph_for(self._first_call).gm
            self._bind(gm)
        return gm

    def _first_graph(self, without: Sequence[str]) -> CapturedGraph:
        """Capture the first graph, without images or sound in the example inputs if that is said."""
        self._without = tuple(without)
        self.__dict__.pop("_first_call", None)
        return self._capture_for(self._first_call)

    @functools.cached_property
    def _first_call(self) -> CapturedCall:
        """The call that the first graph is captured for. Kept, because that of a sharded model cannot be made anew."""
        model, inputs = self.model, self.example_inputs
        if inputs is None:
            inputs = example_inputs_of(self._shadow(), self._without)
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        args = tuple(_to(value, model.device) for value in args)
        kwargs = {name: _to(value, model.device) for name, value in kwargs.items()}
        return self._call(model, arguments_of(model, args, kwargs)[0], is_first=True)

    def _batch(self, batch: Any) -> Leaves:
        """Return a batch of calibration data as the first graph takes it."""
        args, kwargs = ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (batch,), {})
        return self._call(self.model, arguments_of(self.model, args, kwargs)[0], is_first=True).leaves

    def plain(self) -> Any:
        """Return a copy of the model without adapters, of its own class, over the same weights."""
        return plain_copy(self.model, self.placements)

    def _shadow(self) -> Any:
        """Return a copy of the model to be run for facts: without adapters, and without hooks, which act in calls."""
        copied = self.plain()
        take_hooks_off(copied)
        forget_positions(copied)
        return copied

    def _capture_for(self, call: CapturedCall) -> CapturedGraph:
        """Capture the call with one example after the other, and return the first graph that holds for it."""
        names = ", ".join(call.normalized.arguments)
        refuse_sharded(
            self.model,
            f"A call with {names} has no graph yet, and none can be captured of a model",
            "call the model once like this before it is sharded, which then has its graph",
        )
        same = [graph for graph in self._kept if graph.call.signature == call.signature and not graph.change()]
        decides = [is_other_decision(graph.refuses(call.leaves)) for graph in same]
        seen = [graph.example for graph, otherwise in zip(same, decides, strict=True) if not otherwise]
        errors = []
        for example, fixed in attempts(self.model, call, by_values=any(decides)):
            if (of_example := captured_with(example, fixed)) in seen:
                continue
            seen.append(of_example)
            try:
                graph = self._capture(call, example, fixed)
            except CaptureError as error:
                errors.append(error)
                continue
            refusal = graph.refuses(call.leaves)
            if not refusal:
                return graph
            errors.append(
                CaptureError(
                    f"A graph was captured that does not take its own call: {refusal}\nThe way out: {COMPILE_INSTEAD}."
                )
            )
        raise CaptureError(f"In a call with {names}: {errors[-1]}") from errors[-1]

    def _capture(self, call: CapturedCall, example: Leaves, fixed: tuple[str, ...]) -> CapturedGraph:
        labels = call.leaves.get("labels")
        for with_autocast in (False, True):
            shadow, decided = self._shadow(), None
            if labels is not None and (problem := problem_type_of(shadow.config, labels)):
                shadow.config.problem_type = shadow.config.problem_type or problem
                decided = self.model.config, problem
            with recorded_reads(shadow) as reads:
                graph = capture_call(shadow, call, example, fixed, self.verify, self.fuse_loss, with_autocast)
            if not other_than_held(graph.held):
                break
        if self.verify:
            warn_of_writes(shadow, example, self.model.training)
        graph.config = ConfigValues.of(self.model, reads, decided)
        self._insert_again(graph.gm)
        if self.compiler is not None:
            graph.gm.compile_layers_by(self.compiler)
        if self.memory != "fast":
            graph.gm.run_with(memory=self.memory)
        self.captures += 1
        self._bind(graph.gm)
        graph.gm.run_on(self.model)
        return graph

    def _insert_again(self, base: fx.GraphModule) -> None:
        """Insert the adapters that the model has into a graph of it; the first graph is made before there are any."""
        if not self.placements:
            return
        sites = {site.name: site for site in find_sites(base)}
        self._check(base, sites.keys())
        for placement in self.placements:
            if placement.site in sites:
                _check_tensors(placement, sites[placement.site])
        insert_placed(base, self.placements, self._roles(), self._adapter_tensors())

    def _roles(self) -> dict[str, frozenset[str]]:
        """Return the roles of all sites by name, as the first graph has them."""
        return {name: roles for name, (roles, _) in self.sites.items()}

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the adapters by name; raise AdapterError if a module was taken away with some."""
        tensors: dict[str, Tensor] = {}
        for placement in self.placements:
            for path in placement.tensors.values():
                if (tensor := _find(self.model, path)) is None:
                    raise AdapterError(
                        f"The adapter of {placement.site!r} is gone: {type(self.model).__name__} has no {path} any"
                        " more. The way out: replace modules before adapt; or put back the one that has the adapter."
                    )
                tensors[path] = tensor
        return tensors

    def _check(self, base: fx.GraphModule, found: Collection[str]) -> None:
        """Raise CaptureError unless all adapted sites that the graph runs were found in it."""
        read = {
            str(node.target)
            for node in base.graph.find_nodes(op="get_attr")
            if any(user.target is not torch.ops.aten.embedding.default for user in node.users)
        }
        for name in {placement.site for placement in self.placements}.difference(found):
            if self.sites[name][1] in read:
                raise CaptureError(f"{name} runs in a form that is not known as a linear, so its adapter has no place.")

    def _bind(self, gm: AdaptedGraphModule) -> None:
        """Let the graph have the tensors of the model, and the model the adapters and what the graph writes to.

        What runs reads the tensors of the model. Passes, `merge` and files read those of the graph.
        """
        adapters = {name for placement in placements(gm) for name in placement.tensors.values()}
        written = [
            name for name in {**dict.fromkeys(written_buffers(gm)), **gm.base_buffers} if name not in self._owned
        ]
        self.base_buffers = {**{name: gm.base_buffers.get(name) for name in written}, **self.base_buffers}
        gm.base_buffers = self.base_buffers
        for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
            of_model = _find(self.model, name)
            if name in written or (of_model is None and name in adapters):
                register_tensor(self.model, name, tensor)
                self._owned.add(name)
            elif isinstance(tensor, nn.Parameter) and not isinstance(of_model, nn.Parameter) and of_model is not None:
                register_tensor(gm, name, nn.Parameter(of_model.detach(), requires_grad=False))  # parametrized since
            elif of_model is not None:
                register_tensor(gm, name, of_model)
        add_flagged_modules(self.model, gm.graph)  # of adapters at what the model has no module for


def _check_tensors(placement: Placement, site: Site) -> None:
    """Raise AdapterError if the adapter would have other tensors at the site as it is now: Full trains its bias."""
    needed = placement.local.tensor_specs(site).keys()
    for name in sorted(needed ^ set(placement.names)):
        what, instead = ("has no place for", "zeros in its place") if name in placement.names else ("needs", "None")
        raise AdapterError(
            f"{site.name!r} {what} {name} of {type(placement.variant).__name__} since its bias is another than at"
            f" adapt. The way out: {instead}, which leaves the adapter as it was; or change the bias before adapt."
        )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _find(model: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of that qualified name; None for a constant that only the graph has."""
    try:
        return tensor_of(model, name)
    except AttributeError:
        return None
