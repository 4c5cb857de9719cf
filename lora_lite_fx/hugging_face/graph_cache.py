"""Run the calls of an adapted model by graphs: one for each signature of its calls, captured on first use.

A call is brought into the form of its kind (`forms.py`), and a graph is found that holds for it, or captured
(`capture_call.py`) and given the adapters (`model_adapters.py`). The graph runs, and the objects of the caller get the
state in which the model would leave them.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..adapters.placement import Placement, placements
from ..adapters.variant import Variant
from ..capture.asserted_decisions import is_other_decision
from ..capture.capture_model import Inputs, call_of, without_what_cannot_be
from ..capture.inputs.example_inputs import example_inputs_of
from ..capture.origins.origin import is_diffusers, is_hugging_face
from ..compat.torch import not_compiled, pytree
from ..errors import COMPILE_INSTEAD, CaptureError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.optimize import draft_of
from ..graph.calls_and_traces import calling, collection_put_off, tracing
from ..graph.sharded import refuse_sharded
from ..graph.tensors import tensor_of
from ..log import logger
from ..passes import Pipeline, RemoveAdapters
from ..rewriting.choose_sites import Batches, choose_sites
from ..rewriting.rewrite import insert_new, insert_placed
from ..sites.finding import find_sites
from .around_parts import has_parts, run_around_parts, try_around_parts
from .caches import refuse_exports_with_static_cache
from .call_structure import Leaves
from .capture_call import attempts, capture_call
from .captured_call import CapturedCall, CapturedGraph
from .causal_lm import arguments_of
from .diffusers_models import prepare_arguments
from .forms import Forms, Kind, kind_of
from .model_adapters import ModelAdapters
from .model_state import ModelState
from .own_forward import check_is_whole

Setting = Callable[[AdaptedGraphModule], object]
"""A function that changes how a graph runs."""


class GraphCache:
    """The graphs of an adapted model, a copy of the user's, over its tensors. It takes what `adapt` does."""

    def __init__(
        self, model: Any, example_inputs: Inputs | None, limit: int, verify: bool = True, fuse_loss: bool = False
    ) -> None:
        self.model = model
        self.adapters = ModelAdapters(model)
        self.example_inputs = example_inputs
        self.limit = limit
        self.verify = verify
        self.fuse_loss = fuse_loss
        self.captures = 0
        self.keeps_values = False
        self._without: tuple[str, ...] = ()  # images or sound, if example inputs of the config go without
        self._settings: dict[str, Setting] = {}  # of graphs that are captured later, by name
        self._bound_for: type | None = None
        self.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        """Return the cache of a copy of the model: the same adapters, and no graph yet."""
        if id(self.model) not in memo:  # a copy of a part alone, as one that is put in the place of that part
            return self
        twin = memo[id(self)] = copy.copy(self)
        twin.model = copy.deepcopy(self.model, memo)
        twin.adapters = self.adapters.of_copy(twin.model)
        twin.keeps_values, twin._settings = False, dict(self._settings)
        twin.drop()
        return twin

    def drop(self) -> None:
        """Forget all graphs, because devices, dtypes, and what `ModelState` sees are part of them."""
        self._graphs: list[CapturedGraph] = []  # a new list for each change, because other threads may look through it
        self._forms = Forms(self.model, self.adapters.shadow)
        self._around_parts: list[Kind] = []  # kinds of calls with a loss that cannot be captured
        self._state: ModelState | None = None  # of the time of the first of them
        self.__dict__.pop("_first_call", None)

    def modules(self) -> tuple[AdaptedGraphModule, ...]:
        """Return the graphs, the one that was used last at the end."""
        return tuple(graph.gm for graph in sorted(self._graphs, key=lambda graph: graph.last_use))

    # Calls.

    def run(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a part of the model, itself a model or a module with a site, as its own `forward` would be called."""
        if part is not self.model and is_hugging_face(part) and "forward" in vars(self.model):
            check_is_whole(self.model, part, self.adapters.placements)
        arguments, return_dict = arguments_of(part, args, kwargs)
        refuse_exports_with_static_cache(arguments)
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
            if "labels" not in arguments or not has_parts(self.model, part, self.adapters.placements):
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
        return CapturedCall.of(part, self._forms.normalized(part, arguments, fuses_loss))

    def _graph_for(self, call: CapturedCall) -> CapturedGraph:
        """Return the graph for this call; capture it if there is none."""
        return self._find(call)[0] or self._captured_now(call)

    def _find(self, call: CapturedCall) -> tuple[CapturedGraph | None, str]:
        """Return the graph that holds for this call; or None, and why one of its signature does not."""
        reason, is_compiling = "", torch.compiler.is_dynamo_compiling()
        same = [graph for graph in self._graphs if graph.call.signature == call.signature]
        if not is_compiling:  # torch.compile would compile anew for each order
            same.sort(key=lambda graph: graph.last_use, reverse=True)
        for graph in same:
            if not (reason := graph.refuses(call.leaves)):
                if not is_compiling:
                    graph.last_use = time.monotonic_ns()
                return graph, ""
        return None, reason

    @not_compiled
    @collection_put_off()
    def _captured_now(self, call: CapturedCall) -> CapturedGraph:
        with tracing():
            graph, reason = self._find(call)  # another thread may have captured it
            if graph is not None:
                return graph
            start = time.perf_counter()
            graph = self._capture_for(call)
            seconds = time.perf_counter() - start
            why = reason or call.difference_from_nearest(other.call for other in self._graphs)
            logger.info("%s: captured a graph in %.1f s (%s)", call.name_in(self.model), seconds, why)
            self._keep(graph)
            if self.keeps_values:
                graph.gm.keep_values()
        return graph

    def _keep(self, graph: CapturedGraph) -> None:
        """Keep a graph; at the limit, drop the one of the same part that was not used for longest, with a warning."""
        call, kept = graph.call, self._graphs
        graph.last_use = time.monotonic_ns()
        same = [other for other in kept if other.call.path == call.path]
        if len(same) == self.limit:
            oldest = min(same, key=lambda other: other.last_use)
            kept = [other for other in kept if other is not oldest]
            logger.warning(
                "%s: dropped the graph that was not used for longest, of %d (max_graphs); a call like its own"
                " (%s) will capture it again",
                call.name_in(self.model),
                self.limit,
                ", ".join(oldest.call.normalized.arguments),
            )
        self._graphs = [*kept, graph]

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
        self.keeps_values = keeps
        self.apply(AdaptedGraphModule.keep_values if keeps else AdaptedGraphModule.drop_values)

    def apply(self, setting: Setting, name: str = "", later: Setting | None = None) -> None:
        """Apply a setting to all graphs; and if it has a name, it or `later` to those that are captured later."""
        with tracing():
            for graph in self._graphs:
                setting(graph.gm)
            if name:
                self._settings[name] = later or setting

    @not_compiled
    def bind(self) -> None:
        """Let all graphs have the tensors that the model has now; else those of a sharded model keep whole ones."""
        with tracing():
            self._bound_for = type(self.model)
            for graph in self._graphs:
                self.adapters.bind(graph.gm)

    # Adapters.

    def start(
        self, insert: Callable[[fx.GraphModule, Batches | None], fx.GraphModule], calibration: Batches | None
    ) -> None:
        """Capture the first graph, insert adapters into it, and register their tensors in the model."""
        graph = without_what_cannot_be(self.model, self.example_inputs, self._first_graph)
        self.adapters.sites = {site.name: replace(site, calls=()) for site in find_sites(graph.gm)}
        adapted = insert(graph.gm, self._batches(calibration))
        assert isinstance(adapted, AdaptedGraphModule)
        graph.gm = adapted
        self.adapters.start(graph.gm)
        graph.gm.run_on(self.model)
        self._keep(graph)

    def add(self, adapters: Sequence[tuple[str, Variant]], calibration: Batches | None) -> None:
        """Add new adapters to all graphs and to the model."""
        self.follow_model()
        with tracing():
            draft = draft_of(self._graph_for(self._first_call).gm)
            insert_new(draft, choose_sites(draft, adapters, self._batches(calibration)))
            names = {name for name, _ in adapters}
            placed = [placement for placement in placements(draft) if placement.adapter_name in names]
            tensors = {path: tensor_of(draft, path) for each in placed for path in each.tensors.values()}
            self.insert(placed, tensors)

    def insert(self, placed: Sequence[Placement], tensors: Mapping[str, Tensor]) -> None:
        """Insert adapters that have tensors already into all graphs, and register the tensors in the model."""
        self._change_all(
            lambda draft: insert_placed(draft, placed, self.adapters.roles, tensors),
            lambda: self.adapters.add(placed, tensors),
        )

    def delete(self, names: Sequence[str]) -> None:
        """Delete adapters from all graphs and from the model."""
        self._change_all(Pipeline((RemoveAdapters(tuple(names)),)).run, lambda: self.adapters.delete(names))

    def _change_all(self, change: Callable[[AdaptedGraphModule], object], change_model: Callable[[], object]) -> None:
        """Change the adapters in all graphs and in the model: in none if one raises."""
        with tracing():
            drafts = [draft_of(graph.gm) for graph in self._graphs]
            for draft in drafts:
                change(draft)
            change_model()
            for graph, draft in zip(self._graphs, drafts, strict=True):
                graph.gm.take_over(draft)
                self.adapters.bind(graph.gm)

    # Captures.

    def first_graph(self) -> AdaptedGraphModule:
        """Return the graph that has all sites, captured again if it was dropped, over the tensors of the model."""
        self.follow_model()
        with tracing():
            gm = self._graph_for(self._first_call).gm
            self.adapters.bind(gm)
        return gm

    def _first_graph(self, without: Sequence[str]) -> CapturedGraph:
        """Capture the first graph, without images or sound in the example inputs if that is said."""
        self._without = tuple(without)
        self.__dict__.pop("_first_call", None)
        return self._capture_for(self._first_call)

    @functools.cached_property
    def _first_call(self) -> CapturedCall:
        """The call that the first graph is captured for. Kept, because that of a sharded model cannot be made anew."""
        inputs = self.example_inputs
        if inputs is None:
            inputs = example_inputs_of(self.adapters.shadow(), self._without)
        return self._call_with(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.model.device), inputs))

    def _batches(self, calibration: Batches | None) -> Iterator[Leaves] | None:
        """Return calibration data as the first graph takes it."""
        if calibration is None:
            return None
        batches = (batch if isinstance(batch, (dict, tuple)) else (batch,) for batch in calibration)
        return (self._call_with(batch).leaves for batch in batches)

    def _call_with(self, inputs: Inputs) -> CapturedCall:
        args, kwargs = call_of(inputs)
        return self._call(self.model, arguments_of(self.model, args, dict(kwargs))[0], is_first=True)

    def _capture_for(self, call: CapturedCall) -> CapturedGraph:
        """Capture the call with one example after the other, and return the first graph that holds for it."""
        names = ", ".join(call.normalized.arguments)
        refuse_sharded(
            self.model,
            f"A call with {names} has no graph yet, and none can be captured of a model",
            "call the model once like this before it is sharded, which then has its graph",
        )
        same = [graph for graph in self._graphs if graph.call.signature == call.signature and not graph.change()]
        decides = [is_other_decision(graph.refuses(call.leaves)) for graph in same]
        seen = [graph.example for graph, otherwise in zip(same, decides, strict=True) if not otherwise]
        errors = []
        for example, fixed in attempts(self.model, call, any(decides), seen):
            try:
                graph = self._capture(call, example, fixed)
            except CaptureError as error:
                errors.append(error)
                continue
            if not (refusal := graph.refuses(call.leaves)):
                return graph
            errors.append(
                CaptureError(
                    f"A graph was captured that does not take its own call: {refusal}\nThe way out: {COMPILE_INSTEAD}."
                )
            )
        raise CaptureError(f"In a call with {names}: {errors[-1]}") from errors[-1]

    def _capture(self, call: CapturedCall, example: Leaves, fixed: Sequence[str]) -> CapturedGraph:
        """Capture the call with an example of its leaves, and give the graph the adapters and the model's tensors."""
        graph = capture_call(self.model, self.adapters.shadow, call, example, fixed, self.verify, self.fuse_loss)
        self.adapters.insert_into(graph.gm)
        for setting in self._settings.values():
            setting(graph.gm)
        self.captures += 1
        self.adapters.bind(graph.gm)
        graph.gm.run_on(self.model)
        return graph
