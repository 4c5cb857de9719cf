"""Capture a deep model at the cost of a few layers: cut its stacks of layers, capture, stamp the rest.

What licenses that is a run of the whole model on tensors without data (`operators.py`). Its operators are compared with
those of the shortened model, one by one: it has to be the program that comes of stamping that one, for each layer. So
a layer that branches on its own number, or has another constant, is seen although it was not captured. The same is
checked of the graph of the captured layers (`repeats.py`), whose last ones are copied then (`stamp.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .operators import StandIn
from .other_sizes import Sizes, guessed_sizes, sizes_taken
from .repeats import Blocks, NotRepeated, Repetition, repetition_of, require_stamped
from .stamp import number_nodes, stamp

_FEWEST = 4
"""The number of layers from which on some can be left out: one before the repetition, and two that show it."""


class ByDepth:
    """Captures a model with stacks of layers, in one mode after the other.

    Args:
        model: is shortened while it is captured, and is as before afterwards.
        args, kwargs: the call.
        export: captures `model` as it is.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], export: Callable[[], fx.GraphModule]
    ) -> None:
        self._model = model
        self._call = args, dict(kwargs)
        self._export = export
        self._stacks = _stacks(model)

    def capture(self) -> tuple[fx.GraphModule, list[str]]:
        """Return the graph of the model in its mode, and what was done with its layers, for the log."""
        if not self._stacks:
            return self._in_full(), []
        try:
            gm, repetitions = self._in_part()
        except NotRepeated as reason:
            return self._in_full(), [f"all layers captured, because {reason}"]
        except Exception as error:  # whatever keeps a part of a model from running is no matter of the whole
            why = "a part could not be captured" if isinstance(error, CaptureError) else f"of a {type(error).__name__}"
            return self._in_full(), [f"all layers captured, because {why}"]
        return gm, [_said(repetition) for repetition in repetitions]

    def _in_full(self) -> fx.GraphModule:
        gm = self._export()
        number_nodes(gm)
        return gm

    def _in_part(self) -> tuple[fx.GraphModule, list[Repetition]]:
        stand_in = StandIn(self._model, self._stacks)
        leaves = pytree.tree_leaves(self._call)
        # Sizes of the example could be equal to a number of the model, so check others that the graph takes.
        sizes = guessed_sizes(leaves)
        try:
            repetitions = self._repetitions(stand_in, sizes)
        except Exception:  # the model may refuse them
            sizes = {}
            repetitions = self._repetitions(stand_in, sizes)
        with _shortened(self._model, repetitions):
            gm = self._export()
        taken = sizes_taken(gm, leaves, sizes)
        if taken != sizes and self._repetitions(stand_in, taken) != repetitions:
            raise NotRepeated("layers repeat otherwise at other sizes")
        stamp(gm, self._model, repetitions)
        return gm, repetitions

    def _repetitions(self, stand_in: StandIn, sizes: Sizes) -> list[Repetition]:
        """Return how stacks repeat, proved by a run of the whole and one of the shortened model.

        Raises:
            NotRepeated: none does.
        """
        whole = stand_in.run(*self._call, sizes)
        found: list[Repetition] = []
        reason = NotRepeated("no stack of layers runs")
        for name, size in self._stacks.items():
            if any(name.startswith(f"{outer.stack}.") for outer in found):
                continue
            try:
                found.append(repetition_of(Blocks(whole, {name: size}), name))
            except NotRepeated as other:
                reason = other
        if not found:
            raise reason
        with _shortened(stand_in.model, found):
            part = stand_in.run(*self._call, sizes)
        full = Blocks(whole, {each.stack: each.members for each in found})
        short = Blocks(part, {each.stack: each.captured for each in found})
        require_stamped(full, short, found)
        for each in found:
            _require_same_modules(self._model.get_submodule(each.stack), each)
        return found


def _require_same_modules(stack: nn.Module, repetition: Repetition) -> None:
    """Check that layers are built of modules of the same classes as their templates, which a graph tells."""
    layers = [[(name, type(module)) for name, module in layer.named_modules()] for layer in stack.children()]
    for member, layer in enumerate(layers):
        if layer != layers[repetition.template(member)]:
            raise NotRepeated(f"layer {member} of {repetition.stack} has modules of other classes")


def _said(repetition: Repetition) -> str:
    kinds = f"{repetition.kinds} kind{'s' if repetition.kinds > 1 else ''}"
    stamped = repetition.members - repetition.captured
    return (
        f"{repetition.members} layers of {repetition.stack}: {kinds}, captured {repetition.captured}, stamped {stamped}"
    )


def _stacks(model: nn.Module) -> dict[str, int]:
    """Return the containers of modules that may be layers, with their sizes; the outermost first."""
    found: dict[str, int] = {}
    owners: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners[id(module)] = owners.get(id(module), 0) + 1
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name and len(module) >= _FEWEST:
            found[name] = len(module)

    def is_once(name: str) -> bool:
        return all(owners[id(layer)] == 1 for layer in model.get_submodule(name).children())

    return {name: size for name, size in found.items() if is_once(name)}


@contextmanager
def _shortened(model: nn.Module, repetitions: list[Repetition]) -> Iterator[None]:
    """Leave the layers that are to be stamped out of `model`."""
    stacks = [(model.get_submodule(each.stack), each.captured) for each in repetitions]
    all_layers = [stack._modules for stack, _ in stacks]
    try:
        for stack, captured in stacks:
            stack._modules = dict(list(stack._modules.items())[:captured])
        yield
    finally:
        for (stack, _), layers in zip(stacks, all_layers, strict=True):
            stack._modules = layers
