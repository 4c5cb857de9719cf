"""Compare a compiled package with the graph that it was compiled from, also after an exchange of its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from .distance_from_torch import allowed, difference
from .served_graph import ServedGraph
from .swappable import Swappable

_SCALE = 0.5


@torch.no_grad()
def check_package(package: Path, graph: ServedGraph, tensors: Mapping[str, Tensor]) -> None:
    """Check that a package computes what its graph does, and that all that can be exchanged takes effect.

    A compiler may make a constant of a tensor, which no exchange reaches then, and torch does not say so.

    Args:
        package: the path of the package.
        graph: what was compiled.
        tensors: those of the adapters that act, by name.

    Raises:
        AdapterError: it does not.
    """
    program = Swappable(package)
    spec = program.spec
    _compare(program(**graph.inputs), graph.gm(**graph.inputs), "with the adapter that it was saved with")
    if not tensors:
        return
    generator = torch.Generator().manual_seed(0)
    other = {name: _other(value, generator) for name, value in tensors.items()}
    try:
        if "slots" in spec:
            shared = {name for name, entry in spec["tensors"].items() if entry["shared"]}
            other |= {name: tensors[name] for name in shared}
            for slot in range(spec["slots"]):
                program.put(slot, {name: value if name in shared else value[slot] for name, value in other.items()})
        else:
            program.load("other", other)
            program.use("other", _SCALE)
    except RuntimeError as error:  # of torch, which does not find a name
        raise AdapterError(
            f"AOTInductor made a constant of a tensor that is to be exchanged: {error}. Nothing was written. The way"
            " out: bake=True."
        ) from error
    read = {name: value.to(spec["device"]) for name, value in other.items() if spec["tensors"][name]["read"]}
    coefficients = {
        name: torch.tensor(_SCALE, dtype=getattr(torch, dtype), device=spec["device"])
        for name, dtype in spec["coefficients"].items()
    }
    expected = torch.func.functional_call(graph.gm, {**read, **coefficients}, (), graph.inputs)
    _compare(program(**graph.inputs), expected, "after its adapter was exchanged")


def _other(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor that differs from `value` in every element, of about its size; indices stay as they are."""
    if not value.is_floating_point():
        return value
    drawn = torch.rand(value.shape, generator=generator).to(value)
    return value * (0.9 + 0.2 * drawn) + 0.02 * drawn


def _compare(got: Any, expected: Any, when: str) -> None:
    """Raise AdapterError unless two results of a call are equal up to rounding."""
    if (apart := difference(got, expected)) > allowed(expected):
        raise AdapterError(
            f"What AOTInductor compiled differs from the model by {apart:.1e} of the largest output {when}. Nothing was"
            " written. The way out: bake=True, or llfx.export, whose program runs without compiling."
        )
