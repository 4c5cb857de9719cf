"""Capture a model as a `torch.fx.GraphModule` that shares its weights.

There are three ways. A graph is copied. A model with example inputs is exported (`export.py`), any other is traced
symbolically (`symbolic_tracing/`). Both of these capture a copy over the same weights (`shared_copy.py`), in training
and in evaluation mode, unless runs show that the two differ in nothing but dropouts; the pass `FollowMode` makes one
graph of the two. `origins/` has what is special about the models of a library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from ..compat.torch import pytree
from ..errors import CaptureError
from ..graph.modes import held_modes, modes_of, put_in_mode, set_modes
from ..graph.tensors import keep_registration
from ..log import phase
from .compare import own_error
from .depth.by_depth import ByDepth
from .export import export
from .forward_signature import name_arguments, signature_of
from .inputs.example_inputs import warn_of
from .omissions import call_signature
from .origins.origin import DiffusersModel, PlainModule, TimmModel, is_diffusers, is_hugging_face
from .origins.transformers_model import TransformersModel
from .origins.wrong_arguments import check_inputs
from .outputs import Call
from .quirks.layouts import KnownWhileTraced, pass_layouts
from .quirks.python_random import without_python_random
from .recurrent_layers import warn_of_fixed_length
from .shared_copy import shared_copy
from .signature import CallSignature
from .symbolic_tracing.branches import Values, refuse_in_graph, refused_calls
from .symbolic_tracing.constant_answers import require_same_constants, trace_without_constants
from .symbolic_tracing.foreign_graph import normalize

Inputs = tuple[Any, ...] | dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Capture:
    """A captured model, over frozen tensors of its own that share the model's storage.

    Args:
        gm: the graph module; of the training mode, where there are two.
        eval_gm: the same model in evaluation mode; None if it is that graph, or the mode was fixed before.
        modes: of the modules of the model, by qualified name.
        held: the modules that the `train` of the model keeps in a mode, see `held_modes`.
        signature: how the graph is called; None for one that takes its inputs and nothing else.
        source: what was captured, a copy of the user's model over the same weights; None if that is a graph already.
        calls: calls to compare the two on, the first that of the capture; empty without example inputs.
        hint: a sentence on how to avoid a difference between the two, after a space.
    """

    gm: fx.GraphModule
    eval_gm: fx.GraphModule | None
    modes: Mapping[str, bool]
    signature: CallSignature | None = None
    source: nn.Module | None = None
    calls: tuple[Call, ...] = ()
    hint: str = ""
    held: Mapping[bool, Sequence[str]] = field(default_factory=dict)


def origin_of(model: nn.Module) -> PlainModule:
    """Return what capture has to know of where a model comes from."""
    if is_hugging_face(model):
        return TransformersModel(model)
    if is_diffusers(model):
        return DiffusersModel(model)
    return TimmModel(model) if isinstance(getattr(model, "pretrained_cfg", None), Mapping) else PlainModule(model)


def without_what_cannot_be(
    model: nn.Module, example_inputs: Inputs | None, attempt: Callable[[Sequence[str]], Result]
) -> Result:
    """Capture a model with all that it takes, and without its images and sound if it cannot be captured with these.

    Args:
        model: to capture.
        example_inputs: of the user. None for those of the config, which alone may be other ones.
        attempt: captures it without images or sound, or raises CaptureError.

    Warns:
        UserWarning: a model of text and images or sound is captured without these.
    """
    try:
        return attempt(())
    except CaptureError as error:
        for without in origin_of(model).left_out_in_turn() if example_inputs is None else ():
            try:
                result = attempt(without)
            except CaptureError:
                continue
            reason = str(error).partition("\n")[0].rstrip(".")
            warn_of(" and ".join(without), model, f"{' and '.join(without)} cannot be captured: {reason}")
            return result
        raise


def capture_model(
    model: nn.Module,
    example_inputs: Inputs | None,
    dynamic_shapes: Any,
    own: Sequence[str] = (),
    without: Sequence[str] = (),
    made: bool = False,
) -> Capture:
    """Capture `model` and leave it as it is. Arguments and errors are those of `rewriting.capture.capture`.

    Args:
        model: of which `check_model` has nothing to say.
        example_inputs, dynamic_shapes: as for `capture`.
        own: qualified names of tensors that the graph gets as copies of its own, trainable as they are.
        without: `"images"` or `"sound"` to leave them out of the inputs that are made from a config.
        made: whether the example inputs are not the user's.
    """
    if isinstance(model, fx.GraphModule):
        graph = shared_copy(model, own)
        normalize(graph)
        _name_modules_once(model, graph.graph)
        return Capture(graph, None, modes_of(model))
    origin = origin_of(model)
    copied = shared_copy(model)
    origin.prepare(copied)
    if example_inputs is None:
        example_inputs, made = origin.example_inputs(copied, without), True
    if example_inputs is None:
        captured = _traced(origin, copied)
    else:
        captured = _exported(origin, copied, example_inputs, dynamic_shapes, made)
    set_modes(copied, captured.modes)
    return captured


def _exported(
    origin: PlainModule, copied: nn.Module, example_inputs: Inputs, dynamic_shapes: Any, made: bool
) -> Capture:
    """Export the prepared copy of a model on example inputs; the arguments are those of `capture_model`."""
    name_arguments(copied, example_inputs)
    call = args, kwargs = split_inputs(copied, example_inputs)
    origin.check_call(copied, call)
    other = origin.with_other_mask(kwargs)
    calls = (call,) if other is None else (call, (args, other))
    hint, layouts = origin.hint(kwargs), origin.layouts(kwargs)
    if layouts:
        pass_layouts(copied, layouts)
        call = args, {name: value for name, value in kwargs.items() if name not in layouts}
    held = held_modes(copied)
    export_copy = functools.partial(export, copied, call, dynamic_shapes, origin.batch_only(made))
    by_depth = ByDepth(copied, call, export_copy)
    done: dict[str, None] = {}

    def capture_mode(in_training: fx.GraphModule | None) -> fx.GraphModule:
        if in_training is not None and (other := by_depth.in_other_mode(in_training)) is not None:
            return other
        graph, said = by_depth.capture()
        done.update(dict.fromkeys(said))
        return graph

    name = type(copied).__name__
    with phase(f"captured {name}", f"capturing {name}") as details:
        try:
            with without_python_random(origin.model), KnownWhileTraced() if layouts else nullcontext():
                gm, eval_gm = _in_both_modes(copied, capture_mode)
        except CaptureError as error:
            itself = None if made else own_error(copied, calls[0])
            raise (itself or error) from error.__cause__
        has_constants = dynamic_shapes is None or isinstance(dynamic_shapes, str)  # else a number may be an input
        signature = call_signature(origin, copied, call, gm.graph, has_constants, by_depth.few_layers, made)
        if signature is not None and layouts:
            signature = replace(signature, layouts=layouts)
        details += [f"{len(gm.graph.nodes)} nodes", *done]
    if dynamic_shapes is not None:
        warn_of_fixed_length(gm.graph)
    return Capture(gm, eval_gm, modes_of(origin.model), signature, copied, calls, hint, held)


def _traced(origin: PlainModule, copied: nn.Module) -> Capture:
    """Trace the prepared copy of a model symbolically."""
    held = held_modes(copied)
    refused: dict[Values, str] = {}

    def capture_mode(in_training: fx.GraphModule | None) -> fx.GraphModule:
        with without_python_random(copied):
            graph = trace_without_constants(copied)
        require_same_constants(copied, graph)
        refused.update(refused_calls(copied, graph))
        return graph

    name = type(copied).__name__
    with phase(f"captured {name}", f"capturing {name}") as details:
        gm, eval_gm = _in_both_modes(copied, capture_mode)
        for graph in (gm, eval_gm):
            if graph is not None:
                refuse_in_graph(copied, graph, refused)
        details.append(f"{len(gm.graph.nodes)} nodes")
    return Capture(gm, eval_gm, modes_of(origin.model), source=copied, held=held)


def _in_both_modes(
    copied: nn.Module, capture_mode: Callable[[fx.GraphModule | None], fx.GraphModule]
) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """Capture a model in training and then in evaluation; return None for the second graph if it is the first.

    Args:
        copied: the copy of the model; it is left in evaluation mode.
        capture_mode: captures it in the mode that it is in. Gets the graph of training in evaluation.
    """
    graphs: list[fx.GraphModule] = []
    for training in (True, False):
        put_in_mode(copied, training)
        graphs.append(capture_mode(None if training else graphs[0]))
    in_training, in_evaluation = graphs
    keep_registration(copied, in_training)
    for graph in graphs:
        _name_modules_once(copied, graph.graph)
    return in_training, None if in_evaluation is in_training else in_evaluation


def call_of(inputs: Inputs) -> Call:
    """Return the positional and the keyword arguments of a call with these inputs."""
    return (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)


def split_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of inputs that fit `model`, as copies."""
    check_inputs(inputs)
    args, kwargs = call_of(inputs)
    signature = signature_of(model)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    # Clone the inputs, because torch.export takes a tensor that is passed twice for one input.
    clone = lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf  # noqa: E731
    cloned: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(clone, (args, dict(kwargs)))
    return cloned


def _name_modules_once(model: nn.Module, graph: fx.Graph) -> None:
    """Give the nodes of a module that is registered under several names the first of these."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (names.get(path, path), *rest) for key, (path, *rest) in stack.items()}
