"""Everything public has a docstring, which is what the API reference is made from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import lora_lite_fx
import lora_lite_fx.passes
import lora_lite_fx.testing
from lora_lite_fx.adapters.param_spec import ParamSpec

MODULES = (lora_lite_fx, lora_lite_fx.passes, lora_lite_fx.testing)
PUBLIC = [(module, name) for module in MODULES for name in module.__all__]


def members(public: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a public object shows in the API reference: itself and, of a class, its public methods."""
    yield public.__name__, public
    if not inspect.isclass(public):
        return
    for name, value in vars(public).items():
        method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
            # An overridden method may leave the docstring to the class that it comes from.
            inherited = next(vars(base)[name] for base in reversed(public.__mro__) if name in vars(base))
            yield f"{public.__name__}.{name}", method if method.__doc__ else inherited


def undocumented(public: Any) -> list[str]:
    """Return the names of what has no docstring of its own."""
    return [
        name
        for name, member in members(public)
        # A dataclass without a docstring gets its signature as one.
        if not member.__doc__ or member.__doc__.startswith(f"{name}(")
    ]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_every_public_name_has_a_docstring(module: ModuleType, name: str) -> None:
    public = getattr(module, name)
    if inspect.isclass(public) or inspect.isroutine(public):  # a constant has no docstring
        assert undocumented(public) == []


def test_a_missing_docstring_is_found() -> None:
    class Documented:
        """A class."""

        def bare(self) -> None: ...

    class Plain(ParamSpec):
        def empty(self, *args: Any) -> Any: ...

    assert undocumented(Documented) == ["Documented.bare"]
    assert undocumented(Plain) == ["Plain"]
