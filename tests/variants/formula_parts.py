"""What the formulas of variants in NumPy are made of: their operands, and a little linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = Any  # of NumPy, in float64


@dataclass(frozen=True)
class Given:
    """What a formula is computed of.

    Args:
        x: rows `(n, d_in)`.
        W, b: of the linear.
        p: the adapter's tensors, by their names without `lora_` and `lora_shared_`.
        cfg: the config.
        kept: what dropout multiplies with: the input, or what the variant drops; None without dropout.
        constants: the values of what autograd does not follow; None for the same values.
    """

    x: Array
    W: Array
    b: Array
    p: Any
    cfg: Any
    kept: Any = None
    constants: Given | None = None

    @property
    def y(self) -> Array:
        """The output of the linear."""
        return self.x @ self.W.T + self.b

    @property
    def dropped(self) -> Array:
        """The input after dropout."""
        return self.x if self.kept is None else self.x * self.kept

    @property
    def fixed(self) -> Given:
        """The values that are constants for autograd."""
        return self.constants or self


def names_of(tensors: dict[str, Array]) -> Any:
    """Return tensors as attributes with the names of the formulas."""
    return SimpleNamespace(
        **{name.removeprefix("lora_").removeprefix("shared_"): value for name, value in tensors.items()}
    )


def affine(formula: Callable[[Given], Array], given: Given) -> tuple[Array, Array]:
    """Return the weight and the bias of the linear with the adapter."""
    d_in = given.W.shape[1]
    b = formula(replace(given, x=np.zeros((1, d_in))))[0]
    return (formula(replace(given, x=np.eye(d_in))) - b).T, b


def scale_of(cfg: Any) -> float:
    """Return `alpha / r`, or `alpha / sqrt(r)` if the scale is rank-stabilized."""
    return float(cfg.alpha / (cfg.r**0.5 if cfg.rank_stabilized else cfg.r))


def columns(matrix: Array) -> Array:
    """Return the norms of the columns."""
    return np.sqrt((matrix**2).sum(0))


def rows(matrix: Array) -> Array:
    """Return the norms of the rows."""
    return np.sqrt((matrix**2).sum(1))


def skew(upper: Array, size: int) -> Array:
    """Return the skew-symmetric matrix that has `upper` above its diagonal, row by row."""
    q = np.zeros((size, size))
    entries = iter(upper)
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j] = next(entries)
            q[j, i] = -q[i, j]
    return q


def block_diagonal(blocks: list[Array]) -> Array:
    """Return the matrix with these blocks on its diagonal."""
    size = sum(len(block) for block in blocks)
    matrix, start = np.zeros((size, size)), 0
    for block in blocks:
        end = start + len(block)
        matrix[start:end, start:end] = block
        start = end
    return matrix


def elu(z: Array) -> Array:
    return np.where(z > 0, z, np.exp(np.minimum(z, 0)) - 1)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()
