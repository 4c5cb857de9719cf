"""The arguments of a captured graph, as those of its model, of which some may be left out.

A graph has an input for every argument that it was captured with. A model's optional arguments stay optional all the
same: `omissions.py` finds the sets of arguments that may be left out, and a constant for each of them. Such calls are
served by a program that has the constants built in and computes only the results that the model returns then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compat.torch import assert_async, pytree
from ..errors import CallError, shown
from ..graph.direct_calls import can_read_values


@dataclass(frozen=True)
class Fill:
    """A constant tensor in the place of an input.

    Args:
        value: of all its elements.
        sizes: of its dimensions: a number, or the input and the dimension of it that has the same size.
        dtype, device: its own.
    """

    value: int
    sizes: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self, inputs: Sequence[Any]) -> Tensor:
        """Return the constant for a call with these inputs."""
        sizes = [size if isinstance(size, int) else inputs[size[0]].shape[size[1]] for size in self.sizes]
        return torch.full(sizes, self.value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Omission:
    """A call that leaves arguments out.

    Args:
        fills: the constant in the place of each of them, by the index of the graph's input.
        outputs: indices of the graph's results that the model returns all the same.
        out_spec: the structure in which the model returns them.
    """

    fills: Mapping[int, Fill]
    outputs: tuple[int, ...]
    out_spec: pytree.TreeSpec

    def returned(self, results: Sequence[Any]) -> Any:
        """Return the results as the model does, for instance as its output class."""
        return pytree.tree_unflatten(list(results), self.out_spec)


_OF_DECODER = "decoder_input_ids"
_NO_TENSORS = (Mapping, list, tuple, str, bytes, bool, int, float)
"""What is passed by mistake where a graph takes a tensor."""


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a captured graph, as those of its model.

    Args:
        model: the class of the model, for messages.
        parameters: of the model's `forward`, in order, without `self` and `**kwargs`.
        positional: names of those that may be passed by position.
        captured: names of the arguments that the graph has, in the order in which it takes them.
        constants: of these, the ones that are not tensors; their values are part of the graph.
        accepted: values of arguments that the graph does not have which say what it does anyway.
        omissions: for each set of arguments that a call may leave out, what it computes.
        refusals: for each argument that it may not leave out although the model has a default, why.
        layouts: further arguments of a call, whose values are part of the graph; `layouts.py` says which.
        tensors: of the captured arguments, those that are tensors.
    """

    model: str
    parameters: Mapping[str, inspect.Parameter]
    positional: tuple[str, ...]
    captured: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    accepted: Mapping[str, Any] = field(default_factory=dict)
    omissions: Mapping[frozenset[str], Omission] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> CallSignature:
        return self  # nothing in it changes

    @property
    def of_method(self) -> inspect.Signature:
        """The signature of a `forward` method: that of the model's, less `**kwargs`."""
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return inspect.Signature([itself, *self.parameters.values()])

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
        """Return the graph's arguments in its order, and the names of those that the call leaves out.

        Args:
            args, kwargs: as the model takes them.

        Raises:
            CallError: the graph cannot serve the call.
        """
        passed = dict(zip(self.positional, args, strict=False))
        if len(args) > len(passed) or any(name in passed for name in kwargs):
            raise self._unfit(args, kwargs)
        passed.update(kwargs)
        for name, layout in self.layouts.items():
            self._check_layout(name, layout, passed.pop(name, None))
        for name, value in passed.items():
            if name not in self.captured and not self._says_nothing_new(name, value):
                raise self._not_captured(name)
        values: list[Any] = []
        left_out: tuple[str, ...] = ()
        for name in self.captured:
            value = passed[name] if name in passed else self._default(name)
            if name in self.constants:
                self._check_constant(name, value)
                value = self.constants[name]
            elif value is None:
                left_out = (*left_out, name)
            elif name in self.tensors and isinstance(value, _NO_TENSORS):
                raise self._no_tensor(name, value)
            values.append(value)
        return values, left_out

    def moved(self, moved_device: Callable[[torch.device], torch.device]) -> CallSignature:
        """Return the signature with the constants of its omissions on other devices."""
        omissions = {
            names: replace(
                omission,
                fills={at: replace(fill, device=moved_device(fill.device)) for at, fill in omission.fills.items()},
            )
            for names, omission in self.omissions.items()
        }
        return replace(self, omissions=omissions)

    @property
    def has_defaults(self) -> bool:
        """Tell whether there are arguments that a call may leave out, if only because they are not captured."""
        return any(parameter.default is not inspect.Parameter.empty for parameter in self.parameters.values())

    def by_position(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments by name, from their values in the order in which the graph takes them."""
        if len(values) > len(self.captured):
            raise CallError(f"{len(values)} arguments are too many. {self._captured_with}")
        return dict(zip(self.captured, values, strict=False)) | dict(self.layouts)

    def omission(self, left_out: Sequence[str]) -> Omission:
        """Return what a call without these arguments computes.

        Raises:
            CallError: the graph does not serve such calls.
        """
        for name in left_out:
            if name not in self.captured:
                raise CallError(f"{name} is not an argument that this graph has. {self._captured_with}")
        omission = self.omissions.get(frozenset(left_out))
        if omission is None:
            name = next((name for name in left_out if name in self.refusals), left_out[0])
            reason = self.refusals.get(name, "the graph was not compared with the model for such calls")
            message = f"{name} cannot be left out, because {reason}. {self._captured_with}"
            if "raises" not in reason:
                message += f" To leave it out, {self._capture_another(without=left_out)}"
            elif _OF_DECODER in self.parameters and _OF_DECODER not in self.captured:
                message += f" For calls with {_OF_DECODER} instead, {self._capture_another([_OF_DECODER], left_out)}"
            raise CallError(message)
        return omission

    def _default(self, name: str) -> Any:
        default = self.parameters[name].default
        if default is inspect.Parameter.empty:
            raise CallError(f"{name} is missing. {self._captured_with} {self.model}.forward has no default for it.")
        return default

    def _says_nothing_new(self, name: str, value: Any) -> bool:
        if name in self.parameters and value is self.parameters[name].default:
            return True
        return name in self.accepted and not isinstance(value, Tensor) and bool(value == self.accepted[name])

    def _no_tensor(self, name: str, value: Any) -> CallError:
        if isinstance(value, Mapping) and any(key in self.parameters for key in value):
            way_out = "pass what is in it by name, as in model(**inputs)"
        else:
            way_out = 'pass a tensor; a tokenizer makes some with return_tensors="pt"'
        return CallError(f"{name} must be a tensor, not {shown(value)}. The way out: {way_out}.")

    def _check_constant(self, name: str, value: Any) -> None:
        constant = self.constants[name]
        if isinstance(value, Tensor) or type(value) is not type(constant) or value != constant:
            raise CallError(
                f"{name}={value!r} differs from {name}={constant!r}, which this graph was captured with and which is"
                f" part of it. For another value, {self._capture_another()}"
            )

    def _check_layout(self, name: str, layout: Tensor, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise CallError(f"{name} is missing. {self._captured_with}")
        way_out = f"For images of other sizes, {self._capture_another()}"
        if value.shape == layout.shape:
            same = (value == layout.to(value.device)).all()
            if not can_read_values(value):
                # What traces or compiles this call has no values yet; nothing public asserts them when it runs.
                assert_async(same, f"{name} differs from that of the graph, which is part of it. {way_out}")
                return
            if same:
                return
        raise CallError(
            f"{name}={value.tolist()} differs from {layout.tolist()}, which this graph was captured with and which is"
            f" part of it. {way_out}"
        )

    def _unfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallError:
        try:
            self.of_method.bind(None, *args, **kwargs)
        except TypeError as error:
            return CallError(f"The call does not fit {self.model}.forward: {error}. {self._captured_with}")
        raise AssertionError("a call that fits was refused")

    def _not_captured(self, name: str) -> CallError:
        if name in self.accepted and name not in self.parameters:
            return CallError(
                f"{name} differs from {name}={self.accepted[name]!r}, which this graph was captured with and which is"
                f" part of it. The way out: set model.config.{name} before the capture; or adapt(model, cfg), which"
                " captures a graph for each kind of call."
            )
        if name not in self.parameters:
            return CallError(f"{name} is not an argument that this graph has. {self._captured_with}")
        way_out = self._capture_another(more=[name])
        return CallError(f"{name} was not captured. {self._captured_with} For calls with it, {way_out}")

    @property
    def _captured_with(self) -> str:
        return f"The graph of {self.model} was captured for calls with {', '.join((*self.captured, *self.layouts))}."

    def _capture_another(self, more: Sequence[str] = (), without: Sequence[str] = ()) -> str:
        example = ", ".join(f"{name!r}: ..." for name in (*self.captured, *self.layouts, *more) if name not in without)
        return (
            f"capture such a call: rewrite(model, cfg, example_inputs={{{example}}}), or load(model, file,"
            " example_inputs) for an adapter that is saved; or, of a Hugging Face model, adapt(model, cfg), which"
            " captures a graph for each kind of call."
        )
