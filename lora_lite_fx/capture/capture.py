"""Capture a model as a `torch.fx.GraphModule` that shares its weights.

A model with example inputs is exported (`export.py`), any other is traced symbolically (`symbolic.py`). Both ways
capture it twice, in training and in evaluation mode, unless runs show that the two differ in nothing but dropouts; the
pass `FollowMode` makes one graph of the two.
`hugging_face.py` makes inputs from the config of a transformers model. `optional.py` finds the arguments that a call
may leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..compat.torch import pytree
from ..errors import CaptureError
from ..graph.modes import held_modes, modes_of, put_in_mode, set_modes
from ..graph.tensors import keep_registration
from ..log import phase, progress
from .compare import own_error
from .constant_answers import trace_without_constants
from .depth.by_depth import ByDepth
from .export import export
from .forward_signature import name_arguments, signature_of
from .inputs.example_inputs import example_inputs_of, warn_of, what_may_be_left_out
from .omissions import call_signature
from .origins.mistakes import check_inputs, check_model
from .origins.timm_model import example_images_of, images_of_one_size
from .origins.transformers_model import (
    accepted_arguments,
    batch_only_arguments,
    forget_checkpointing,
    input_hint,
    is_diffusers,
    is_hugging_face,
    prepare_for_capture,
    require_same_without_caches,
    with_other_mask,
)
from .outputs import Call
from .quirks.layouts import KnownWhileTraced, layouts_in, pass_layouts
from .quirks.python_random import without_python_random
from .shared_copy import shared_copy
from .signature import CallSignature
from .symbolic_tracing.branches import Values, refuse_in_graph, refused_calls
from .symbolic_tracing.foreign_graph import normalize

Inputs = tuple[Any, ...] | dict[str, Any]
Result = TypeVar("Result")


def call_of(inputs: Inputs) -> Call:
    """Return the positional and the keyword arguments of a call with these inputs."""
    return (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)


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


def without_what_cannot_be(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | None, attempt: Callable[[Sequence[str]], Result]
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
        if example_inputs is not None or not isinstance(model, nn.Module) or not is_hugging_face(model):
            raise
        for without in what_may_be_left_out(model):
            try:
                result = attempt(without)
            except CaptureError:
                continue
            reason = str(error).partition("\n")[0].rstrip(".")
            warn_of(" and ".join(without), model, f"{' and '.join(without)} cannot be captured: {reason}")
            return result
        raise error from error.__cause__


def capture_model(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None,
    dynamic_shapes: Any,
    own: Sequence[str] = (),
    without: Sequence[str] = (),
    made: bool = False,
) -> Capture:
    """Capture `model` and leave it as it is. Arguments and errors are those of `rewriting.capture.capture`.

    Args:
        own: qualified names of tensors that the graph gets as copies of its own, trainable as they are.
        without: `"images"` or `"sound"` to leave them out of the inputs that are made from a config.
        made: whether the example inputs are not the user's.
    """
    check_model(model)
    assert isinstance(model, nn.Module)
    if isinstance(model, fx.GraphModule):
        graph = shared_copy(model, own)
        normalize(graph)
        _name_modules_once(model, graph.graph)
        return Capture(graph, None, modes_of(model))

    shadow, modes = shared_copy(model), modes_of(model)
    made = made or example_inputs is None
    accepted: dict[str, Any] = {}
    signature = None
    one_size = images_of_one_size(shadow)
    if is_hugging_face(shadow):
        prepare_for_capture(shadow)
        accepted = accepted_arguments(shadow)
        if example_inputs is None:
            example_inputs = example_inputs_of(shadow, without)
    elif is_diffusers(shadow):
        forget_checkpointing(shadow)
    elif example_inputs is None and (images := example_images_of(shadow)) is not None:
        example_inputs, one_size = images, tuple(images)
    inputs = None
    if example_inputs is not None:  # else its forward is traced as it is written
        name_arguments(shadow, example_inputs)
        inputs = split_inputs(shadow, example_inputs)
    if inputs is not None and is_hugging_face(shadow):
        require_same_without_caches(model, shadow, inputs)
    calls = () if inputs is None else _calls(shadow, *inputs)
    layouts = layouts_in(inputs[1]) if inputs is not None and is_hugging_face(shadow) else {}
    if inputs is not None and layouts:
        pass_layouts(shadow, layouts)
        inputs = inputs[0], {name: value for name, value in inputs[1].items() if name not in layouts}
    batch_only = (*batch_only_arguments(shadow), *one_size)
    held = held_modes(shadow)
    with phase(f"captured {type(model).__name__}") as details:
        graphs = []
        refused: dict[Values, str] = {}
        done: dict[str, None] = {}
        if inputs is not None:
            exported = functools.partial(export, shadow, *inputs, dynamic_shapes, batch_only)
            by_depth = ByDepth(shadow, *inputs, exported)
        for mode in progress((True, False), f"capturing {type(model).__name__}"):
            put_in_mode(shadow, mode)
            try:
                with without_python_random(model), KnownWhileTraced() if layouts else nullcontext():
                    if inputs is None:
                        graphs.append(trace_without_constants(shadow))
                    elif not graphs or (other := by_depth.in_other_mode(graphs[0])) is None:
                        graph, said = by_depth.capture()
                        graphs.append(graph)
                        done.update(dict.fromkeys(said))
                    elif other is not graphs[0]:
                        graphs.append(other)
            except CaptureError as error:
                itself = None if made or inputs is None else own_error(shadow, calls[0])
                raise (itself or error) from error.__cause__
            if inputs is None:
                refused |= refused_calls(shadow, graphs[-1])
        for graph in graphs:
            refuse_in_graph(shadow, graph, refused)
        gm, eval_gm = graphs[0], graphs[1] if len(graphs) > 1 else None
        if inputs is not None:
            args, kwargs = inputs
            is_static = dynamic_shapes is None or isinstance(dynamic_shapes, str)  # else a number may be an input
            few = by_depth.few_layers
            signature = call_signature(shadow, args, kwargs, gm.graph, accepted, is_static, few)
            if signature is not None and layouts:
                signature = replace(signature, layouts=layouts)
        details += [f"{len(gm.graph.nodes)} nodes", *done]
    keep_registration(shadow, gm)
    for graph in graphs:
        _name_modules_once(shadow, graph.graph)
    hint = input_hint(shadow, inputs[1]) if inputs is not None else ""
    set_modes(shadow, modes)
    return Capture(gm, eval_gm, modes, signature, shadow, calls, hint, held)


def _calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, ...]:
    """Return the call of the capture, and the same with a mask of another kind if it has one."""
    call, other = (args, kwargs), with_other_mask(model, kwargs)
    return (call,) if other is None else (call, (args, other))


def split_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    check_inputs(inputs)
    args, kwargs = call_of(inputs)
    signature = signature_of(model)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    # Clone the inputs, because torch.export takes a tensor that is passed twice for one input.
    clone = lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf  # noqa: E731
    cloned: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(clone, (args, kwargs))
    return cloned


def _name_modules_once(model: nn.Module, graph: fx.Graph) -> None:
    """Give the nodes of a module that is registered under several names the first of these."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (names.get(path, path), *rest) for key, (path, *rest) in stack.items()}
