"""The tensors of one adapter at one site, as the functions of a variant get them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from ..graph.insertion import SHARED


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
