"""Run a graph, or its model, and keep what its modules return.

The two are run so that they can be compared: without gradients, on copies of the inputs, and with the same random
numbers, whatever the order in which they draw them. What a run writes to is as before when it has ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import is_wrapped, pytree
from ..errors import COMPILE_INSTEAD
from ..graph.modes import set_modes
from ..graph.tensors import has_values, tensor_of
from ..graph.writes import written_tensors
from .comparable import comparable
from .graph_calls import values_of_call
from .process_state.python_state import Change, PythonState, new_parameter, state_put_back
from .process_state.questions import Questions
from .shared_copy import shared_copy

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The positional and the keyword arguments of a call."""

Mode = bool | Mapping[str, bool]
"""Whether a model is in training mode; or for each of its modules, by qualified name, whether that is."""


@dataclass
class Outputs:
    """The values of one run.

    Args:
        results: what was returned, by its path.
        buffers: their values afterwards, by qualified name.
        modules: for each call of a module, by its name, the tensors that it returned; of a graph, all that it could
            have returned. The second call of a module has `@1` after its name.
        kept: what to say of what the run has left for later calls, if a graph cannot; empty if there is nothing.
        counted: what the run left in Python, and the same call changes again, if it has the same results.
    """

    results: dict[str, Any]
    buffers: dict[str, Tensor]
    modules: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: str = ""
    counted: Change | None = None


def has_data(model: nn.Module, call: Call = ((), {})) -> bool:
    """Tell whether a model can run: no tensor, also none made now, is a meta or a fake tensor."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(call), torch.empty(0)]
    return all(has_values(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def outputs_of_model(
    model: nn.Module,
    call: Call,
    mode: Mode,
    writes: Sequence[str] = (),
    by_module: bool = False,
    nudge: int = 0,
    watch: AbstractContextManager[Any] | None = None,
    in_any_order: bool = True,
    questions: Questions | None = None,
    seed: int | None = None,
) -> Outputs:
    """Run a copy of a model.

    Args:
        model: shares its tensors with the copy, except for buffers and other tensors that a run may write to.
        call: its arguments, which are copied.
        mode: to run in.
        writes: qualified names of the parameters that a run writes to.
        by_module: whether to keep what modules return.
        nudge: 1 or -1 to change the last bit of what each module returns, some up and some down, which shows what
            rounding does; 0 to leave it.
        watch: is entered around the call alone.
        in_any_order: whether random numbers are the same in whatever order they are drawn, which takes time for each
            operator; else they are for those who draw the same ones in the same order.
        questions: get what the model asks of the process. With them, a call that leaves something in Python is run
            again, unless `by_module`.
        seed: of the random numbers; None for those that the generators would draw now.
    """
    loose = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_leaf
    ]
    twin = shared_copy(model, [*(name for name, _ in model.named_buffers()), *loose, *writes])
    put(twin, mode)
    parameters = [*twin.parameters()]
    if nudge:
        _nudge_outputs(twin, nudge)
    modules = _kept_outputs(twin) if by_module else {}
    watching = watch or (nullcontext() if questions is None else questions.watched())
    with state_put_back(twin) as before:
        args, kwargs = copied(call)
        with comparable(model, in_any_order=in_any_order, seed=seed), watching:
            returned = twin(*args, **kwargs)
        outputs = Outputs(results_of(returned), buffers_of(twin), modules)
        if questions is not None and not by_module:
            _look_at_the_same_call_again(outputs, twin, before, model, call, mode, writes)
            outputs.kept = new_parameter(twin, parameters) or outputs.kept
    return outputs


def _kept_outputs(twin: nn.Module) -> dict[str, list[Tensor]]:
    """Let the modules of `twin` put what they return into the result, which is empty until it runs."""
    modules: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}

    def keep(name: str, output: Any) -> None:
        index = calls[name] = calls.get(name, -1) + 1
        tensors = [leaf for leaf in pytree.tree_leaves(output) if _can_be_kept(leaf)]
        modules[_call_name(name, index)] = [tensor.clone() for tensor in tensors]

    for name, module in twin.named_modules():
        if name:
            module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
    return modules


def _look_at_the_same_call_again(
    outputs: Outputs,
    twin: nn.Module,
    before: PythonState,
    model: nn.Module,
    call: Call,
    mode: Mode,
    writes: Sequence[str],
) -> None:
    """Note in `outputs` what a run left in Python, if the same call has other results then, or changes it again.

    Other results than it would have as the first call, with the same random numbers. These are others than those of the
    run, which may have kept some.
    """
    names = dict(model.named_buffers(remove_duplicate=False)).keys()
    left = [change for change in before.changes() if change.name not in names]
    if not left:
        return

    later = PythonState(twin)

    def is_as_the_first(in_any_order: bool) -> bool:
        before.restore()  # of classes and files too, which all copies share
        first = outputs_of_model(model, call, mode, writes, in_any_order=in_any_order, seed=1).results
        later.restore()
        args, kwargs = copied(call)
        buffers = {name: buffer for name, buffer in buffers_of(model).items() if name in dict(twin.named_buffers())}
        with comparable(model, in_any_order=in_any_order, seed=1):
            again = results_of(torch.func.functional_call(twin, buffers, args, kwargs))
        return all(_is_same(value, again.get(path)) for path, value in first.items())

    is_same = is_as_the_first(in_any_order=False)
    changed = (change for change in later.changes() if change.is_count and change.name not in names)
    outputs.counted = next(changed, None)
    # A first call may draw more numbers than later ones: BigBird makes modules in that of a short text.
    if not is_same and not is_as_the_first(in_any_order=True):
        outputs.kept = (
            f"keeps {left[0].name} from one call for the next{left[0].line}, outside of the cache that it returns,"
            " which a graph does not. The way out: call the model once before, if only the first call sets it;"
            f" use_cache=False; or {COMPILE_INSTEAD}."
        )


def put(model: nn.Module, mode: Mode) -> None:
    """Put a model in a mode, in place."""
    model.train(mode) if isinstance(mode, bool) else set_modes(model, mode)


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, equal_nan=True)


def outputs_of_graph(
    gm: fx.GraphModule, model: nn.Module, call: Call, mode: Mode, by_module: bool, in_any_order: bool = True
) -> Outputs:
    """Run the flat graph `gm` of `model`; the other arguments are those of `outputs_of_model`."""
    args, kwargs = copied(call)
    values = values_of_call(gm.graph, inspect.signature(model.forward), args, kwargs)
    interpreter = _Interpreter(gm, by_module)
    return _outputs_of(gm, mode, lambda: interpreter.run(*values), interpreter.modules, in_any_order)


def outputs_of_program(gm: fx.GraphModule, call: Call, mode: Mode) -> Outputs:
    """Run what a call of `gm` runs, which may be an optimized form of the graph; modules are not to be seen there."""
    args, kwargs = copied(call)
    return _outputs_of(gm, mode, lambda: gm(*args, **kwargs), {})


def _outputs_of(
    gm: fx.GraphModule,
    mode: Mode,
    run: Callable[[], Any],
    modules: dict[str, list[Tensor]],
    in_any_order: bool = True,
) -> Outputs:
    with as_before(gm), comparable(gm, in_any_order=in_any_order):
        put(gm, mode)
        return Outputs(results_of(run()), buffers_of(gm), modules)


class _Interpreter(fx.Interpreter):
    """Runs a graph, and keeps the values that leave a module: one of them is what the module returns."""

    def __init__(self, gm: fx.GraphModule, by_module: bool) -> None:
        super().__init__(gm)
        self.modules: dict[str, list[Tensor]] = {}
        self.stacks = {
            node: {str(key): str(entry[0]) for key, entry in (node.meta.get("nn_module_stack") or {}).items()}
            for node in (gm.graph.nodes if by_module else ())
        }
        # The keys of a stack tell the calls of a module apart. Capture counts them as they come, from 0.
        self.calls: dict[str, dict[str, int]] = {}
        for stack in self.stacks.values():
            for key, name in stack.items():
                calls = self.calls.setdefault(name, {})
                calls.setdefault(key, len(calls))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _can_be_kept(value):
            for key, name in self.stacks.get(n, {}).items():
                if any(key not in self.stacks[user] for user in n.users):
                    self.modules.setdefault(_call_name(name, self.calls[name][key]), []).append(value.clone())
        return value


def _can_be_kept(value: Any) -> bool:
    """Tell whether `value` is a tensor that is not of a level of vmap, outside of which it has no meaning."""
    return isinstance(value, Tensor) and not is_wrapped(value)


def _call_name(module: str, index: int) -> str:
    return f"{module}@{index}" if index else module


def results_of(returned: Any) -> dict[str, Any]:
    """Return the leaves of what a model returns, by their path in it."""
    return {name_of(path): leaf for path, leaf in leaves_by_path(returned)[0].items()}


def name_of(path: Any) -> str:
    """Return how messages call a leaf of what a model returns, by its path in it."""
    return pytree.keystr(path).strip("[].'") or "result"


def leaves_by_path(returned: Any) -> tuple[dict[Any, Any], pytree.TreeSpec]:
    """Return the leaves of a result by their path in it, and its structure.

    A class of results may be registered without names for its parts: transformers' before 5.20, those of diffusers.
    Such a result is a mapping, which has the names.
    """
    try:
        leaves, spec = pytree.tree_flatten_with_path(returned)
        return dict(leaves), spec
    except ValueError:
        numbered, spec = pytree.tree_flatten(returned)
    paths: list[tuple[Any, ...]] = []
    if isinstance(returned, Mapping):
        parts = ((name, path) for name, value in returned.items() for path in leaves_by_path(value)[0])
        paths = [(pytree.MappingKey(name), *path) for name, path in parts]
    if len(paths) != len(numbered):
        paths = [(pytree.SequenceKey(index),) for index in range(len(numbered))]
    return dict(zip(paths, numbered, strict=True)), spec


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers of a module, by name."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers(remove_duplicate=False)}


def copied(values: Any) -> Any:
    """Return copies of the tensors in `values`, which require gradients where those do."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(copy, values)


def _nudge_outputs(twin: nn.Module, sign: int) -> None:
    """Let the modules of `twin` without parts change the last bit of what they return."""

    def nudge(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        # The directions follow from the values, because vmap refuses to draw random numbers.
        up = torch.where((99 * leaf).sin() > 0, sign, -sign)
        return leaf * (1 + torch.finfo(leaf.dtype).eps * up.to(leaf.dtype))

    for module in twin.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, output: pytree.tree_map(nudge, output))


def written_parameters(gm: fx.GraphModule, model: nn.Module) -> list[str]:
    """Return the qualified names of the parameters of `model` that running its graph `gm` changes."""
    parameters = dict(model.named_parameters())
    return [name for name in written_tensors(gm) if name in parameters]


@contextmanager
def as_before(gm: fx.GraphModule) -> Iterator[None]:
    """Restore the modes of the modules of `gm`, and the tensors that it writes to."""
    modes = [(module, module.training) for module in gm.modules()]
    tensors = {name: tensor_of(gm, name) for name in written_tensors(gm)}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
