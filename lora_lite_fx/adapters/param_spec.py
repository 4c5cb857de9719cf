"""The tensors that a variant adds: how `params` describes them, and how its other functions get them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..graph.insertion import SHARED

_STARTS = ("zeros", "ones", "kaiming")


@dataclass(frozen=True)
class ParamSpec:
    """One tensor that a variant adds to a site.

    A name that begins with `lora_shared_` is one tensor for all the sites of the adapter, registered at the root of
    the model; its spec must be the same at each of them.

    Args:
        shape: its shape.
        init: how it starts: `"zeros"`, `"ones"`, `"kaiming"` (uniform, a = sqrt(5)), a number to fill with, or a
            function that fills a tensor in place.
        trainable: a parameter if true, else a frozen buffer. Both are saved with the adapter.
        dtype: of the tensor, for indices; None means the adapter's own.

    Raises:
        ConfigError: one of these has an impossible value.
    """

    shape: tuple[int, ...]
    init: str | float | Callable[[Tensor], object] = "zeros"
    trainable: bool = True
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        shape: object = self.shape
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            one = f" Write ({shape},) for one dimension." if type(shape) is int else ""
            raise ConfigError(f"ParamSpec: shape must be a tuple of integers from 0, got {shown(shape)}.{one}")
        if isinstance(self.init, str) and self.init not in _STARTS:
            near = difflib.get_close_matches(self.init, _STARTS, n=1)
            raise ConfigError(
                f"ParamSpec: unknown init {self.init!r}{f', did you mean {near[0]!r}?' if near else '.'}"
                f" It is one of {', '.join(map(repr, _STARTS))}, a number, or a function that fills a tensor in place."
            )
        if not isinstance(self.init, str) and not callable(self.init) and not is_finite(self.init):
            raise ConfigError(
                f"ParamSpec: init must be one of {', '.join(map(repr, _STARTS))}, a finite number, or a function that"
                f" fills a tensor in place, got {shown(self.init)}."
            )
        if not isinstance(self.trainable, bool):
            raise ConfigError(f"ParamSpec: trainable must be True or False, got {shown(self.trainable)}.")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ConfigError(f"ParamSpec: dtype must be None or a torch.dtype, got {shown(self.dtype)}.")
        if self.trainable and self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(f"ParamSpec: a tensor of {self.dtype} cannot be trained: write trainable=False.")

    def repeated(self, count: int) -> ParamSpec:
        """Return the spec of `count` such tensors as one, `(count, *shape)`, each started by itself."""

        def fill_each(tensor: Tensor) -> None:
            for part in tensor:
                self.fill(part)

        return dataclasses.replace(self, shape=(count, *self.shape), init=fill_each)

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor, allocated and not yet filled: a Parameter if trainable."""
        tensor = torch.empty(self.shape, dtype=self.dtype or dtype, device=device)
        return torch.nn.Parameter(tensor) if self.trainable else tensor

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Write the start values into `tensor`, in place."""
        if callable(self.init):
            if tensor.is_floating_point():
                tensor.fill_(math.nan)  # so that a function that does not fill the tensor is noticed
            self.init(tensor)
        elif self.init == "kaiming":
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        elif isinstance(self.init, str):
            tensor.fill_({"zeros": 0.0, "ones": 1.0}[self.init])
        else:
            tensor.fill_(self.init)


def is_finite(value: object) -> bool:
    """Return whether `value` is a number that float32 can hold."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max
    )


class AdapterTensors:
    """The tensors of an adapter as attributes, by the variant's own names. They are written to in place only.

    Args:
        tensors: the tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Tensor:
        """Raise the error for a name that no tensor has."""
        if name.startswith("__"):  # asked for by copies and the like
            raise AttributeError(name)
        names = {known.lower(): known for known in vars(self)}
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f", did you mean {names[near[0]]!r}?" if near else "."
        raise AttributeError(f"p has no tensor {name!r}{hint} params gives it {', '.join(names.values()) or 'none'}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"p.{name} cannot be assigned, because that would not change the adapter's tensor."
            f" Write to it in place: p.{name}.copy_(...)"
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in vars(self).items())
        return f"AdapterTensors({shapes})"


def one_of(p: Any, index: int) -> AdapterTensors:
    """Return the tensors of one expert, or of one slot of a bank, from those of all; shared ones as they are."""
    tensors: dict[str, Tensor] = vars(p)
    return AdapterTensors({name: t if name.startswith(SHARED) else t[index] for name, t in tensors.items()})
