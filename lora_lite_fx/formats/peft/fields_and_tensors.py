"""What the form of a method consists of, PEFT's fields and tensors, and those that several methods have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PeftField:
    """One field of a config.

    Args:
        name: PEFT's name.
        default: PEFT's value where a file leaves it out.
        to_ours, to_peft: converters of its value.
    """

    name: str
    default: Any
    to_ours: Callable[[Any], Any] = lambda value: value
    to_peft: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a site.

    Args:
        key: the part after the module's path in PEFT's files; of a tensor that sites share, the whole key.
        to_ours, to_peft: converters of its layout.
        embedding: the key at an embedding, if it is another.
        conv: its layout at a convolution, from ours and the size of the kernel.
    """

    key: str
    to_ours: Callable[[Tensor], Tensor] = lambda tensor: tensor
    to_peft: Callable[[Tensor], Tensor] = lambda tensor: tensor
    embedding: str = ""
    conv: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None


# What several forms have.

BOTH_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
R = {"r": PeftField("r", 8)}
R_ALPHA = {**R, "alpha": PeftField("alpha", 8)}
GAUSSIAN = {"gaussian": {"init_weights": "gaussian"}}


def as_patches(a: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `A (r, d_in)` as the weight of a convolution."""
    weight: Tensor = a.unflatten(1, (-1, *kernel))
    return weight


def as_points(b: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `B (d_out, r)` as the weight of a convolution whose kernel is a point."""
    return b[(..., *[None] * len(kernel))]


as_rows = partial(Tensor.flatten, start_dim=1)
