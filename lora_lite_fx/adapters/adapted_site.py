"""One site of an adapter, as `adapters(model)` lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptedSite:
    """One site of an adapter.

    Args:
        name: qualified name.
        tensors: the qualified name of each of the adapter's tensors at it, by the variant's own name.
        trainable: number of parameters at it that train now.
        parameters: number of elements of all its tensors, frozen ones included. A tensor that sites share counts at
            each of them.
    """

    name: str
    tensors: Mapping[str, str]
    trainable: int
    parameters: int
