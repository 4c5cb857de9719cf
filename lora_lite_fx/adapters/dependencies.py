"""Record what a variant's `forward` reads, apart from tensors: fields of its site, and the mode.

A trace of `forward` holds wherever these have the same values. Nothing has to be declared for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Generic, TypeVar

from ..sites.site import Site
from .frozen_linear import FrozenLinear

T = TypeVar("T")
_REMEMBERED = 512
_FIELDS = frozenset(each.name for each in fields(Site))
_VALUES = _FIELDS | {
    name for name in dir(Site) if isinstance(inspect.getattr_static(Site, name), (property, cached_property))
}


@dataclass
class Dependencies:
    """What a `forward` has read so far.

    Args:
        site: the values that it has read of its site, by field or property.
        training: whether it has read the mode.
        tensors: whether it has read the weight or the bias.
        replaces: whether it calls the frozen linear with another weight or bias.
    """

    site: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    tensors: bool = False
    replaces: bool = False

    def hold_at(self, site: Site) -> bool:
        """Return whether `site` has the values that were read, so that `forward` computes the same there."""
        return all(getattr(site, name) == value for name, value in self.site.items())

    def watch(self, base: FrozenLinear) -> FrozenLinear:
        """Return `base` in a form that notes here what is read of it."""
        return _WatchedLinear(**{**vars(base), "site": _WatchedSite(base.site, self)}, dependencies=self)


class Remembered(Generic[T]):
    """What runs of `forward` have returned. Sites that `forward` cannot tell apart share a run."""

    def __init__(self) -> None:
        self._results: dict[Hashable, list[tuple[Dependencies, T]]] = {}

    def at(self, operands: Hashable, site: Site, run: Callable[[], tuple[Dependencies, T]]) -> T:
        """Return what an earlier run has returned if it holds at `site`, or run.

        Args:
            operands: what the result depends on besides the site.
            site: the site.
            run: returns what `forward` depended on, and the result.
        """
        for dependencies, result in self._results.get(operands, ()):
            if dependencies.hold_at(site):
                return result
        dependencies, result = run()
        if len(self._results) >= _REMEMBERED:
            self._results.clear()
        self._results.setdefault(operands, []).append((dependencies, result))
        return result


@dataclass(frozen=True, eq=False)
class _WatchedLinear(FrozenLinear):
    """A frozen linear that notes whether its mode is read, and whether its tensors are."""

    dependencies: Dependencies = field(default_factory=Dependencies)

    def __getattribute__(self, name: str) -> Any:
        if name == "training":
            object.__getattribute__(self, "dependencies").training = True
        elif name in ("weight", "bias"):
            object.__getattribute__(self, "dependencies").tensors = True
        return object.__getattribute__(self, name)


class _WatchedSite(Site):
    """A site that notes which of its values are read. What reads it as a whole, such as a method, reads all fields."""

    def __init__(self, site: Site, dependencies: Dependencies) -> None:
        object.__setattr__(self, "_watched", (site, dependencies))

    def __getattribute__(self, name: str) -> Any:
        site, dependencies = object.__getattribute__(self, "_watched")
        for read in [name] if name in _VALUES else _FIELDS:
            dependencies.site[read] = getattr(site, read)
        return getattr(site, name)
