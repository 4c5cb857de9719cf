"""The prologue of an adapted model: it reads the model's tensors, and computes what depends on parameters alone.

It reads tensors from the registries of their modules, because attributes of attributes cost several microseconds each.

It caches the values that it computes from them while the tensors are the same. It recognizes a change by their
identity; their version counters, which every operation in place counts up; their addresses; the number of steps that
optimizers took, because some write past the version counters; and by gradients that were taken away after a backward
pass. `train()`, `eval()` and moving the model drop the values. A write to `.data` that does none of these goes
unnoticed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..graph.parameter_work import first_input, move_to_front
from ..graph.provenance import is_inserted
from ..graph.queries import reads_tensor
from ..graph.subgraph import extract, forward_of, replace_by_call
from ..graph.tensors import registry_of

_steps = 0


def _count_step(optimizer: object, args: object, kwargs: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


Place = tuple[dict[str, Any], str]
"""The registry of a module that holds a tensor, and the name of the tensor there."""


@dataclass
class CachedValues:
    """Cached values, and the state they are valid for.

    Args:
        tensors: the tensors that the values were computed from.
        state: everything else that would change the values.
        leaves: the tensors that the computation read: the same data as `tensors`, without their hooks and gradients.
        values: the results.
        used: whether a backward pass went through the values.
    """

    tensors: list[Tensor]
    state: tuple[Any, ...]
    leaves: list[Tensor]
    values: tuple[Tensor, ...]
    used: bool = False

    def holds(self, tensors: list[Tensor], state: tuple[Any, ...]) -> bool:
        """Check whether the values are valid for these tensors and this state."""
        # If a backward pass left no gradients, the caller took them: perhaps for a step that writes to `.data`.
        stepped = self.used and not any(tensor.is_leaf and tensor.grad is not None for tensor in tensors)
        return not stepped and self.state == state and all(map(operator.is_, self.tensors, tensors))


@dataclass(frozen=True)
class Prologue:
    """A function that reads the tensors of a model, and computes the values of its prologue or returns cached ones.

    With gradients it caches autograd's graph of the computation too, and the backward pass of each call goes through
    that graph again. It caches nothing inside `torch.compile` and other tracing, inside `torch.func`, while a CUDA
    graph is captured, or for subclasses of Tensor.

    Args:
        kind: the class of the module that it belongs to.
        places: of the tensors that values are computed from.
        read: `module -> tensors` reads the same tensors.
        compute: `module, *tensors -> values`.
        passed_places: of the tensors that the model reads itself.
        read_passed: `module -> tensors` reads these tensors.
        kept: the cached values, with gradients and without.
    """

    kind: type
    places: list[Place]
    read: Callable[[nn.Module], tuple[Tensor, ...]]
    compute: Callable[..., tuple[Tensor, ...]]
    passed_places: list[Place]
    read_passed: Callable[[nn.Module], tuple[Tensor, ...]]
    kept: dict[bool, CachedValues] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Return all values, for the tensors that `module` has now, and the tensors that it reads itself."""
        try:
            tensors = [registry[name] for registry, name in self.places]
            passed = [registry[name] for registry, name in self.passed_places]
        except KeyError:  # a parametrization has taken a tensor out of its registry
            return self.inline(module)
        return (*(self._values(module, tensors) if tensors else ()), *passed)

    def inline(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Compute the same as part of the call, without the cache."""
        return (*self.compute(module, *self.read(module)), *self.read_passed(module))

    def _values(self, module: nn.Module, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        try:
            state = (module.training, *_state(tensors))
        except RuntimeError:  # a wrapper, as of torch.func, has no version or address
            return self.compute(module, *tensors)
        # fully_shard, which changes the class of a module, overwrites tensors without a trace.
        is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        if is_tracing or type(module) is not self.kind or _is_capturing(tensors):
            return self.compute(module, *tensors)
        with_gradients = torch.is_grad_enabled()
        kept = self.kept.get(with_gradients)
        if kept is None or not kept.holds(tensors, state):
            kept = self._compute_apart(module, tensors, state)
            if not all(type(value) is Tensor for value in kept.values):
                return self.compute(module, *tensors)
            self.kept[with_gradients] = kept
        if any(value.requires_grad for value in kept.values):
            apply: Callable[..., tuple[Tensor, ...]] = _CachedResults.apply
            return apply(self, module, kept, *tensors)
        return kept.values

    def _compute_apart(self, module: nn.Module, tensors: list[Tensor], state: tuple[Any, ...]) -> CachedValues:
        # Leaves replace the tensors under no_grad too, because autocast would remember casts of parameters that have no
        # gradients there. The results are not inference tensors, because a later call could not use those with
        # gradients. Hooks on saved tensors are off, because a later call would not run them again.
        with_gradients = torch.is_grad_enabled()
        with (
            torch.inference_mode(False),  # it also switches gradients on
            torch.set_grad_enabled(with_gradients),
            torch.autograd.graph.saved_tensors_hooks(_same, _same),
        ):
            leaves = [tensor.detach().requires_grad_(with_gradients and tensor.requires_grad) for tensor in tensors]
            return CachedValues(tensors, state, leaves, self.compute(module, *leaves))

    def forget(self) -> None:
        """Drop the cached values."""
        self.kept.clear()


class _CachedResults(torch.autograd.Function):
    """The cached values as results of the tensors that they were computed from, so that these get gradients."""

    @staticmethod
    def forward(
        ctx: Any, prologue: Prologue, module: nn.Module, kept: CachedValues, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.prologue, ctx.module, ctx.kept = prologue, module, kept
        ctx.save_for_backward(*tensors)
        values = tuple(value.detach() for value in kept.values)
        pairs = zip(values, kept.values, strict=True)
        ctx.mark_non_differentiable(*(value for value, known in pairs if not known.requires_grad))
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.kept.used = True
        tensors, values = ctx.kept.leaves, ctx.kept.values
        if torch.is_grad_enabled():  # gradients of gradients need a graph that leads to the tensors themselves
            tensors = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]  # a view has none of the tensor's hooks
            values = ctx.prologue.compute(ctx.module, *tensors)
        reached = [(value, grad) for value, grad in zip(values, grads, strict=True) if grad is not None]
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [value for value, _ in reached],
                trained,
                [grad for _, grad in reached],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            if reached
            else [None] * len(trained)
        )
        return None, None, None, *(next(gradients) if tensor.requires_grad else None for tensor in tensors)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _state(tensors: list[Tensor]) -> tuple[Any, ...]:
    device = tensors[0].device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    # The version counter has no public name; autograd's documentation calls it by this one.
    versions = [(tensor._version, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
    return autocast, stream, _steps, versions


def _is_capturing(tensors: list[Tensor]) -> bool:
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def cut_prologue(gm: fx.GraphModule, outer: fx.Graph, name: str) -> Prologue | None:
    """Replace the parameter work before the inputs of `outer`, and all reads of tensors, by one call of a method.

    Args:
        gm: the module that has the tensors and gets the method.
        outer: the graph, changed in place.
        name: the name of the method.

    Returns:
        The work of that method; None if the graph reads no tensor.
    """
    first = first_input(outer)
    work = [node for node in outer.nodes if node < first and is_inserted(node) and node.op != "get_attr"]
    read = [node for node in outer.nodes if reads_tensor(gm, node)]
    if not read:
        return None
    move_to_front(outer, [*read, *work])
    by_name: dict[str, fx.Node] = {}
    same = {node: by_name.setdefault(str(node.target), node) for node in read}
    for node, other in same.items():
        node.replace_all_uses_with(other)
    members = set(work)
    tensors = [node for node in by_name.values() if not members.isdisjoint(node.users)]
    passed = [node for node in by_name.values() if not members.issuperset(node.users)]
    results = [node for node in work if not members.issuperset(node.users)]

    prologue = Prologue(
        type(gm),
        [registry_of(gm, str(node.target)) for node in tensors],
        forward_of(gm, extract([], tensors)),
        forward_of(gm, extract(tensors, results)),
        [registry_of(gm, str(node.target)) for node in passed],
        forward_of(gm, extract([], passed)),
    )
    replace_by_call(outer, name, [], sorted([*read, *work]), [*results, *passed])
    return prologue
