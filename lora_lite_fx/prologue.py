"""The prologue of an adapted model: its tensors, and what depends on parameters alone.

Tensors are read where they are registered: as attributes of attributes they cost several microseconds each. What is
computed of them is kept from call to call while they are the same. That they are is seen from their identity, their
version counters, which every operation in place counts up, their addresses, and the number of steps that optimizers
took (some write past the version counters); `train()`, `eval()` and moving the model start anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .passes.parameter_work import first_input, move_to_front, reads_tensor
from .provenance import is_inserted
from .subgraph import extract, forward_of, replace_by_call
from .tensors import registry_of, tensor_of

aten = torch.ops.aten

_steps = 0


def _count_step(optimizer: object, args: object, kwargs: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


Place = tuple[dict[str, Any], str]
"""The registry of a module that holds a tensor, and its name there."""


class Kept(NamedTuple):
    """Values, and what they hold for: the tensors, and everything else that would change them."""

    tensors: list[Tensor]
    state: tuple[Any, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Prologue:
    """Reads the tensors of a model, and computes the values of its prologue, or returns those that are kept.

    Without gradients all values are kept. With gradients those that need none, as the norm of DoRA; the others belong
    to the autograd graph of each call. Nothing is kept inside `torch.compile` and other tracing, inside `torch.func`,
    while a CUDA graph is captured, or for tensors that are not ordinary ones.

    Args:
        kind: the class of the module that it is of.
        places: of the tensors that values are computed from.
        read: `module -> tensors`, the same.
        passed_places: of the tensors that the model reads itself.
        read_passed: `module -> tensors`, the same.
        constants: `module, *tensors -> values` that need no gradients.
        undetached: indices of the tensors that `constants` reads with no `detach` after them; they are frozen.
        rest: `module, *tensors, *constants -> values`, all of them.
    """

    kind: type
    places: list[Place]
    read: Callable[[nn.Module], tuple[Tensor, ...]]
    passed_places: list[Place]
    read_passed: Callable[[nn.Module], tuple[Tensor, ...]]
    constants: Callable[..., tuple[Tensor, ...]] | None
    undetached: list[int]
    rest: Callable[..., tuple[Tensor, ...]]
    kept: dict[bool, Kept] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> tuple[Tensor, ...]:
        """All values, for the tensors that `module` has now, and the tensors that it reads itself."""
        try:
            passed = [registry[name] for registry, name in self.passed_places]
        except KeyError:  # parametrised
            return self.inline(module)
        return (*self._values(module), *passed)

    def inline(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The same, computed as part of the call."""
        return (*self._computed(module), *self.read_passed(module))

    def _values(self, module: nn.Module) -> tuple[Tensor, ...]:
        if not self.places:
            return ()
        with_gradients = torch.is_grad_enabled()
        try:
            tensors = [registry[name] for registry, name in self.places]
            state = (module.training, *_state(tensors)) if self.constants or not with_gradients else ()
        except (KeyError, RuntimeError):  # parametrised, or wrapped so that there is no version or address
            return self._computed(module)
        # A class changed by others, as by fully_shard, means tensors that are overwritten unseen.
        unusual = torch.jit.is_tracing() or type(module) is not self.kind or _is_capturing(tensors)
        if unusual or (with_gradients and any(tensors[i].requires_grad for i in self.undetached)):
            return self._computed(module)
        if with_gradients and self.constants is None:
            return self.rest(module, *tensors)
        kept = self.kept.get(with_gradients)
        if kept is None or kept.state != state or not all(map(operator.is_, kept.tensors, tensors)):
            kept = Kept(tensors, state, self._compute(module, tensors, with_gradients))
            if all(type(value) is Tensor for value in kept.values):
                self.kept[with_gradients] = kept
        return self.rest(module, *tensors, *kept.values) if with_gradients else kept.values

    def _computed(self, module: nn.Module) -> tuple[Tensor, ...]:
        tensors = self.read(module)
        return self.rest(module, *tensors, *(self.constants(module, *tensors) if self.constants else ()))

    def _compute(self, module: nn.Module, tensors: list[Tensor], constants_only: bool) -> tuple[Tensor, ...]:
        # Detached, and not under no_grad: there autocast would remember casts of parameters without their gradients.
        # And no inference tensors, which a later call could not use with gradients.
        with torch.inference_mode(False):
            plain = [tensor.detach() for tensor in tensors]
            constants = self.constants(module, *plain) if self.constants else ()
            return constants if constants_only else self.rest(module, *plain, *constants)

    def forget(self) -> None:
        """Compute everything anew in the next call."""
        self.kept.clear()


def _state(tensors: list[Tensor]) -> tuple[Any, ...]:
    device = tensors[0].device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    # The version counter has no public name; autograd's documentation calls it by this one.
    return autocast, stream, _steps, [tensor._version for tensor in tensors], [tensor.data_ptr() for tensor in tensors]


def _is_capturing(tensors: list[Tensor]) -> bool:
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


# Making one.


def cut_prologue(gm: fx.GraphModule, outer: fx.Graph, name: str) -> Prologue | None:
    """Replace the parameter work before the inputs of `outer`, and all tensors, by one call of the method `name`.

    Returns:
        What that method has to do; None if there is nothing.
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
    own = set(work)
    tensors = [node for node in by_name.values() if not own.isdisjoint(node.users)]
    passed = [node for node in by_name.values() if not own.issuperset(node.users)]
    results = [node for node in work if not own.issuperset(node.users)]

    reached = _reached_by_gradients([*tensors, *work])
    trained = {str(node.target) for node in tensors if tensor_of(gm, str(node.target)).requires_grad}
    needs_gradients = {node for node in reached if not trained.isdisjoint(reached[node])}
    computed = [node for node in work if node not in needs_gradients]
    constants = [node for node in computed if node in results or not needs_gradients.isdisjoint(node.users)]
    undetached = set().union(*(reached[node] for node in constants))
    prologue = Prologue(
        type(gm),
        [registry_of(gm, str(node.target)) for node in tensors],
        forward_of(gm, extract([], tensors)),
        [registry_of(gm, str(node.target)) for node in passed],
        forward_of(gm, extract([], passed)),
        forward_of(gm, extract(tensors, constants)) if constants else None,
        [index for index, node in enumerate(tensors) if str(node.target) in undetached],
        forward_of(gm, extract([*tensors, *constants], results)),
    )
    replace_by_call(outer, name, [], sorted([*read, *work]), [*results, *passed])
    return prologue


def _reached_by_gradients(nodes: list[fx.Node]) -> dict[fx.Node, set[str]]:
    """The names of the tensors that a gradient of each of `nodes` would reach; these are in order."""
    reached: dict[fx.Node, set[str]] = {}
    for node in nodes:
        if node.op == "get_attr":
            reached[node] = {str(node.target)}
        elif node.target is aten.detach.default:
            reached[node] = set()
        else:
            reached[node] = set().union(*(reached[operand] for operand in node.all_input_nodes))
    return reached
