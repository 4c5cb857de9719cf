"""Run a graph before and after each pass, to find the first one that changes what the graph computes."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from ..capture.capture_model import Inputs, call_of
from ..capture.comparable import comparable
from ..capture.differences import distance, largest, tolerance_for
from ..capture.graph_calls import values_of_call
from ..capture.outputs import as_before, buffers_of, copied, has_data, results_of
from ..capture.refusal import in_one_line
from ..compat.torch import is_wrapped
from ..errors import CallError, CaptureError

Modes = tuple[tuple[bool, bool], ...]
"""The modes to run in: whether in training mode, and whether with gradients."""

_SMALL = 100.0
"""A gradient is compared on the scale of the largest one divided by this, if it is smaller itself: it may be zero but
for rounding."""


class Check:
    """The runs of one graph around each pass, on the same inputs and with the same random numbers.

    Args:
        gm: the graph before the first pass.
        inputs: as the graph is called with, a tuple of positional or a dict of keyword arguments.
        modes: to run in.

    Raises:
        CallError: the graph does not take the inputs, or raises on them.
        CaptureError: there is no data to compare (on the meta device).
    """

    def __init__(self, gm: fx.GraphModule, inputs: Inputs, modes: Modes) -> None:
        call = call_of(inputs)
        if not has_data(gm, call):
            raise CaptureError("check: the graph or the inputs have no data, so there is nothing to compare.")
        self.modes = modes
        args, kwargs = call
        self.values = tuple(values_of_call(gm.graph, inspect.signature(gm.forward), args, kwargs))
        try:
            self.before, self.wrong = self._run(gm)
        except Exception as error:
            raise CallError(f"check: the graph raises on these inputs before any pass: {in_one_line(error)}") from error
        self.tolerance = tolerance_for(gm, call)

    def complaint(self, gm: fx.GraphModule) -> str:
        """Return what the last pass did wrong, as a clause; empty if it left all results as they were."""
        try:
            after, wrong = self._run(gm)
        except Exception as error:
            return f"leaves a graph that raises: {in_one_line(error)}"
        before, self.before = self.before, after
        if different := self._differences(before, after):
            return f"changes what the graph computes: {different[0]}"
        known, self.wrong = self.wrong, wrong
        for name, what in wrong.items():
            if name not in known:
                return f'leaves a wrong meta["val"] on {name}: {what}'
        return ""

    def _run(self, gm: fx.GraphModule) -> tuple[dict[_Value, Any], dict[str, str]]:
        """Return what all modes compute, and what is wrong with the recorded values, by the name of the node."""
        found: dict[_Value, Any] = {}
        wrong: dict[str, str] = {}
        for training, with_gradients in self.modes:
            mode = "training" if training else "evaluation"
            with torch.inference_mode(False), as_before(gm), comparable(gm, with_gradients):
                gm.train(training)
                interpreter = _Interpreter(gm)
                values = copied(self.values)
                results = results_of(interpreter.run(*values))
                found |= {_Value("result", name, mode): value for name, value in results.items()}
                found |= {_Value("buffer", name, mode): value for name, value in buffers_of(gm).items()}
                if with_gradients:
                    leaves = dict(gm.named_parameters()) | {f"input {i}": value for i, value in enumerate(values)}
                    gradients = _gradients(results, leaves)
                    found |= {_Value("gradient", name, mode): value for name, value in gradients.items()}
                wrong |= interpreter.wrong
        return found, wrong

    def _differences(self, before: dict[_Value, Any], after: dict[_Value, Any]) -> list[str]:
        """Return in words what differs beyond rounding: results first, and those that are further off."""
        of_gradients = max((largest(value) for name, value in before.items() if name.kind == "gradient"), default=0.0)
        different = []
        for name in {**before, **after}:
            theirs, ours = before.get(name), after.get(name)
            scale = largest(theirs)
            floor = of_gradients / _SMALL if name.kind == "gradient" else 0.0
            is_exact = isinstance(theirs, Tensor) and not (theirs.is_floating_point() or theirs.is_complex())
            allowed = 0.0 if is_exact else self.tolerance * max(scale, floor, 1e-30)
            off = distance(ours, theirs)
            if off <= allowed:
                continue
            if _kind(ours) != _kind(theirs):
                text = f"{name} was {_kind(theirs)}, and is {_kind(ours)} now."
            else:
                share = f", {off / scale:.2g} of its largest value" if scale else ""
                text = f"{name} differs by {off:.2g}{share}. Rounding explains {allowed:.2g}."
            different.append((("result", "buffer", "gradient").index(name.kind), -off, text))
        return [text for *_, text in sorted(different)]


class _Value(NamedTuple):
    """A result, a buffer after the run, or the gradient of a parameter or an input; in which mode."""

    kind: str
    name: str
    mode: str

    def __str__(self) -> str:
        name = {"gradient": f" of {self.name}", self.name: ""}.get(self.kind, f" {self.name}")
        return f"the {self.kind}{name} in {self.mode} mode"


class _Interpreter(fx.Interpreter):
    """Runs a graph, and compares the shape and dtype of each value with the recorded one."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.wrong: dict[str, str] = {}
        self.sizes: dict[Any, Any] = {}  # of the symbols in the shapes of the inputs

    def run_node(self, n: fx.Node) -> Any:
        import sympy

        value = super().run_node(n)
        recorded = n.meta.get("val")
        if n.op == "placeholder" and isinstance(recorded, Tensor) and isinstance(value, Tensor):
            for size, actual in zip(recorded.shape, value.shape, strict=False):
                if isinstance(symbolic := cast(Any, size), torch.SymInt):
                    self.sizes[symbolic.node.expr] = sympy.Integer(actual)
        if not self._fits(recorded, value):
            self.wrong[n.name] = f"{_kind(recorded)}, where a run has {_kind(value)}."
        return value

    def _fits(self, recorded: Any, value: Any) -> bool:
        """Check whether a value may be the recorded one; without a record any may."""
        if isinstance(recorded, (tuple, list)):
            same = isinstance(value, (tuple, list)) and len(value) == len(recorded)
            return same and all(map(self._fits, recorded, value))
        # A mask that hides nothing may be None. A value inside `vmap` has another shape than outside.
        if not isinstance(recorded, Tensor) or value is None or (isinstance(value, Tensor) and is_wrapped(value)):
            return True
        if not isinstance(value, Tensor) or (recorded.dtype, recorded.dim()) != (value.dtype, value.dim()):
            return False
        return all(map(self._fits_size, recorded.shape, value.shape))

    def _fits_size(self, recorded: Any, actual: int) -> bool:
        if not isinstance(recorded, torch.SymInt):
            return bool(recorded == actual)
        size = recorded.node.expr.xreplace(self.sizes)
        return not size.is_number or int(size) == actual  # a symbol need not be the size of an input


def _gradients(results: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients of a fixed functional of the results for the `leaves` that require one."""
    trained = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    floats = [value for value in results.values() if isinstance(value, Tensor) and value.requires_grad]
    if not trained or not floats:
        return {}
    loss = torch.stack([(value * _direction(value)).sum().double() for value in floats]).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(trained.items(), gradients, strict=True)
    }


def _direction(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), device=value.device).cos().to(value.dtype).view(value.shape)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"({', '.join(map(str, value.shape))}) {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_kind, value))}]"
    return "missing" if value is None else type(value).__name__
