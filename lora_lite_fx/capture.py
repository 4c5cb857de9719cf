"""Capture: a model becomes a `torch.fx.GraphModule` that shares its weights.

This is the one home of every quirk of torch that capture has to know (`hf.py` has those of transformers). Two
front doors: `torch.export` where there are example inputs, symbolic tracing where there are none. Both capture
the model twice, in training and in evaluation mode; the pass `FollowMode` makes one graph of the two.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from .adapters import adapter_tensor_names
from .errors import COMPILE_INSTEAD, CaptureError
from .hf import example_inputs_of, is_hugging_face, prepare_for_capture
from .tensors import keep_aliases, tensor_of

aten = torch.ops.aten
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Capture:
    """A model as captured, over frozen tensors of its own that share the model's storage.

    Args:
        gm: the graph module; of the training mode, where there are two.
        eval_gm: the same model captured in evaluation mode, or None where the mode was fixed before.
        training: the mode the model was in.
    """

    gm: fx.GraphModule
    eval_gm: fx.GraphModule | None
    training: bool


def capture(model: nn.Module | ExportedProgram, example_inputs: Inputs | None, dynamic_shapes: Any) -> Capture:
    """Capture `model`, which is left as it is. Arguments and errors as for `rewrite.base_graph`."""
    if isinstance(model, ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"A torch.nn.Module or an ExportedProgram is needed, not {type(model).__name__}.")
    if isinstance(model, fx.GraphModule):
        return Capture(share(model, adapter_tensor_names(model)), None, model.training)

    if adapter_tensor_names(model):
        raise CaptureError(
            f"{type(model).__name__} is wrapped eagerly already, or adapted. The way out: start from the model that"
            " it was made of, and pass several configs at once."
        )
    shadow = share(model)
    if is_hugging_face(shadow):
        prepare_for_capture(shadow)
        if example_inputs is None:
            example_inputs = example_inputs_of(shadow)
    if example_inputs is None:
        shadow.train()
        gm = _symbolic_trace(shadow)
        eval_gm = _symbolic_trace(shadow.eval())
    else:
        args, kwargs = _split_inputs(shadow, example_inputs)
        shadow.train()
        gm = _export(shadow, args, kwargs, dynamic_shapes)
        eval_gm = _export(shadow.eval(), args, kwargs, dynamic_shapes)
    keep_aliases(shadow, gm)
    _name_modules_once(shadow, gm.graph)
    return Capture(gm, eval_gm, model.training)


def share(model: nn.Module, own: Sequence[str] = ()) -> Any:
    """A copy of `model` whose frozen parameters and buffers are new objects over the same storage.

    Args:
        model: left as it is; ties between its tensors are kept in the copy.
        own: qualified names of tensors that the copy gets as copies of its own, trainable as they are.
    """
    owned = {id(tensor_of(model, name)) for name in own}
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            if id(tensor) in owned:
                memo[id(tensor)] = copy.deepcopy(tensor)
            elif isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
            else:
                memo[id(tensor)] = tensor.detach()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied with its weights shared, {error}."
            " Remove attributes that cannot be copied (locks, open files, generators) before rewriting."
        ) from error


def _split_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(inputs, (tuple, dict)):
        raise CaptureError(
            "example_inputs must be a tuple of positional or a dict of keyword arguments,"
            f" not {type(inputs).__name__}; for one tensor write example_inputs=(x,)."
        )
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    # Export takes one tensor passed twice for one input, and reads either placeholder for both.
    clone = lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf  # noqa: E731
    return pytree.tree_map(clone, (args, kwargs))


# The two front doors.


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any) -> fx.GraphModule:
    if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
        return _export_as(model, args, kwargs, dynamic_shapes)

    def dynamic(leaf: Any) -> list[Any] | None:
        return [Dim.AUTO] * leaf.dim() if isinstance(leaf, Tensor) else None

    def shapes(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        return pytree.tree_map(dynamic, dict(bound.arguments))

    # A dimension of size one would be specialised silently: a batch of one is shown twice, where the model lets us.
    doubled = double_batch_of_one((args, kwargs))
    if doubled is not None:
        twice_args, twice_kwargs = doubled
        try:
            return _export_as(model, twice_args, twice_kwargs, shapes(twice_args, twice_kwargs))
        except CaptureError:
            pass
    return _export_as(model, args, kwargs, shapes(args, kwargs))


def _export_as(model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any) -> fx.GraphModule:
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _uncapturable(model, error, "torch.export") from error
    return program.module()


def double_batch_of_one(inputs: Any) -> Any:
    """A tree of inputs with a batch of one shown twice; None if the batch is of another size, or there is none."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return None
    twice = lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf  # noqa: E731
    return pytree.tree_map(twice, inputs)


class _Tracer(fx.Tracer):
    """Traces into modules with weights to adapt or to tie, which so are in the graph; dropout and norms are leaves."""

    _INLINED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    # What a model writes to a buffer is a part of the graph too, and nothing to be done while it is traced.
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) and not isinstance(module, self._INLINED)


# What symbolic tracing records for the operators that sites are made of, and the operators.
_ATEN_FUNCTIONS: dict[Any, Any] = {
    nn.functional.linear: aten.linear.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
    torch.addmm: aten.addmm.default,
    torch.bmm: aten.bmm.default,
}
_ATEN_METHODS = {
    "matmul": aten.matmul.default,
    "t": aten.t.default,
    "bmm": aten.bmm.default,
    "transpose": aten.transpose.int,
}
_CONVOLUTIONS = {nn.functional.conv1d: aten.conv1d, nn.functional.conv2d: aten.conv2d}


def _symbolic_trace(model: nn.Module) -> fx.GraphModule:
    attributes = set(vars(model))
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise _uncapturable(model, error, "symbolic tracing (no example_inputs were given)") from error
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _ATEN_FUNCTIONS:
            node.target = _ATEN_FUNCTIONS[node.target]
        elif node.op == "call_method" and node.target in _ATEN_METHODS:
            node.op, node.target = "call_function", _ATEN_METHODS[node.target]
        elif node.op == "call_function" and node.target is getattr and node.args[1:] in (("T",), ("mT",)):
            node.target, node.args = (aten.numpy_T if node.args[1] == "T" else aten.mT).default, node.args[:1]
        elif node.op == "call_function" and node.target in _CONVOLUTIONS:
            packet = _CONVOLUTIONS[node.target]
            by_name = any(value in ("same", "valid") for value in (*node.args, *node.kwargs.values()))
            node.target = packet.padding if by_name else packet.default
        elif node.target is nn.functional.embedding and node.kwargs.get("max_norm") is None and len(node.args) == 2:
            ids, weight = node.args
            padding = node.kwargs.get("padding_idx")
            node.target, node.args, node.kwargs = (
                aten.embedding.default,
                (weight, ids, -1 if padding is None else padding),
                {},
            )
        if node.target in (aten.linear.default, aten.matmul.default, aten.addmm.default, aten.bmm.default):
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
    gm = fx.GraphModule(model, graph)
    # The tracer stores constant tensors on the model, under a new name each time it traces.
    for name in set(vars(model)) - attributes:
        delattr(model, name)
    return gm


def _uncapturable(model: nn.Module, error: Exception, how: str) -> CaptureError:
    """An error that names the construct in the user's code which could not be captured, and the ways out."""
    here = Path(__file__).parent
    torch_folder = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {here, torch_folder} & set(Path(frame.filename).parents) and Path(frame.filename).exists()
    ]
    where = f" at `{frames[-1].line}` ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    ways_out = "check the inputs, replace the construct by tensor operations (torch.where, torch.cond),"
    ways_out += f" adapt the submodules around it, or {COMPILE_INSTEAD}"
    if how.startswith("symbolic"):
        ways_out = "pass example_inputs, so that torch.export captures the model on real shapes, or " + ways_out
    return CaptureError(
        f"{type(model).__name__} could not be captured by {how}{where}: {reason.strip()}\nThe way out: {ways_out}."
    )


def _name_modules_once(model: nn.Module, graph: fx.Graph) -> None:
    """Let the nodes of a module that is registered under several names all go by the first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (names.get(path, path), *rest) for key, (path, *rest) in stack.items()}


# Regions that run in a mode of their own.

GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
# What torch.export traces at the borders of a region before it makes one, and so again when it captures an opened one.
# The public forms are context managers, which a graph cannot hold.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp._enter_autocast, torch.amp._exit_autocast


# Tracing a variant's function.


def fake_input(node: fx.Node, example: Tensor | None = None, fixed: Sequence[int] = ()) -> Tensor:
    """A stand-in without data for the value of `node`.

    A symbolically traced graph knows no shapes; there it is one of `example`, whose dimensions may be of any size but
    for the `fixed` ones.
    """
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value
    assert example is not None
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        [DimDynamic.STATIC if dim in fixed else DimDynamic.DYNAMIC for dim in range(example.dim())]
    )
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(example.detach(), symbolic_context=dynamic)


def fake_like(tensor: Tensor, beside: Tensor) -> Tensor:
    """A stand-in for `tensor` that can be used with the stand-in `beside`."""
    return _mode_of(beside).from_tensor(tensor.detach(), static_shapes=True)


def _mode_of(stand_in: Tensor) -> FakeTensorMode:
    assert isinstance(stand_in, FakeTensor)
    return stand_in.fake_mode


def trace(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> fx.Graph:
    """The aten graph of `function` on stand-ins, before autograd decomposes anything; one placeholder per tensor."""
    # make_fx is what torch.export itself traces with; nothing public records `aten.linear` and keeps `detach`.
    with _mode_of(tensors[0]):
        return make_fx(function, pre_dispatch=True)(*tensors).graph


def take_guards(gm: fx.GraphModule) -> Callable[..., object]:
    """Take out of `gm` what checks its inputs; returned as a function of them that raises AssertionError."""
    # torch.export puts its guards into a module of this name; there is no other way to ask whether a graph holds.
    calls = [node for node in gm.graph.find_nodes(op="call_module") if node.target == "_guards_fn"]
    if not calls:
        return lambda *inputs: None
    guards = gm.get_submodule("_guards_fn")
    for node in calls:
        gm.graph.erase_node(node)
    gm.delete_submodule("_guards_fn")
    gm.recompile()
    return guards
