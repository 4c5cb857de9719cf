"""Check how a variant must be declared, and what its fields may hold."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config
from lora_lite_fx.adapters.registry import _REGISTRY
from tests.support.refusals import WAYS, Mine, Net, X
from tests.support.selection import broad_after
from tests.support.untouched import untouched

WRITE = (
    "Write @dataclass(frozen=True, kw_only=True) directly above class {}, and @register, if it is there, above that."
)


class Undecorated(Mine):
    strength: float = 1.0


class Derived(Undecorated):
    pass


class OtherDefault(llfx.LoRA):
    r = 4


@dataclass(frozen=True, kw_only=True)
class OtherDefaultDecorated(llfx.LoRA):
    alpha = 32.0


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            Undecorated,
            "Undecorated has the field 'strength' and is not a dataclass. " + WRITE.format("Undecorated"),
        ),
        (Derived, "Undecorated has the field 'strength' and is not a dataclass. " + WRITE.format("Undecorated")),
        (
            OtherDefault,
            "OtherDefault sets r = 4 without an annotation, which Python ignores: the default stays 8. Write"
            " r: int = 4.",
        ),
        (
            OtherDefaultDecorated,
            "OtherDefaultDecorated sets alpha = 32.0 without an annotation, which Python ignores: the default stays"
            " 16.0. Write alpha: float = 32.0.",
        ),
    ],
)
def test_a_class_whose_fields_python_ignores_makes_no_config(cls: Any, expected: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        cls()
    assert str(caught.value) == expected


def test_a_class_that_adds_no_field_needs_no_decorator() -> None:
    class Plain(llfx.LoRA):
        default_roles = ("query",)
        note: ClassVar[str] = "no field"

    assert Plain(r=3).r == 3

    @dataclass(frozen=True, kw_only=True)
    class Annotated(llfx.LoRA):
        r: int = 4

    assert (Annotated().r, Annotated(r=2).r) == (4, 2)


@dataclass(frozen=True, kw_only=True)
class Holds(Mine):
    """A variant with a field that can hold anything."""

    value: Any = None


class Color(enum.Enum):
    RED = 1


ALLOWED = (
    "which no file can hold. A field is None, a bool, an int, a float, a str, or a tuple of these: keep a name or a"
    " number, and make the rest of it in params or forward."
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (F.relu, f"holds the function relu, {ALLOWED}"),
        (torch.ones(2), f"holds a Tensor, {ALLOWED}"),
        (torch.nn.GELU, f"holds the class GELU, {ALLOWED}"),
        (Color.RED, f"holds a Color, {ALLOWED}"),
        (torch.float32, f"holds a dtype, {ALLOWED}"),
        ((1, F.relu), f"holds (1, <function>), {ALLOWED}"),
        ({"q_proj": 2}, "holds {'q_proj': 2}, which can be changed, and a config cannot. Write a tuple of pairs."),
        ({"q_proj"}, "holds {'q_proj'}, which can be changed, and a config cannot. Write a tuple."),
    ],
)
def test_a_field_that_no_file_can_hold_is_named(way: Any, value: object, expected: str) -> None:
    cfg = Holds(target_names="fc", value=value)
    model = Net()
    with untouched(model), pytest.raises(llfx.ConfigError) as caught:
        way(model, cfg, (X,))
    assert str(caught.value) == f"Holds: the field 'value' {expected}"


def test_a_field_that_is_not_an_argument_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cached(Mine):
        cache: int = field(default=0, init=False)

    with pytest.raises(llfx.ConfigError) as caught:
        llfx.rewrite(Net(), Cached(target_names="fc"), (X,))
    assert str(caught.value) == (
        "Cached: the field 'cache' has init=False, so that no file could bring it back. Make it a property that follows"
        " from the other fields."
    )


@pytest.mark.parametrize(
    "value", broad_after(4, [None, True, 3, 0.5, "gelu", (1, 2), ((1, "a"), (2, "b")), [1, [2, 3]]])
)
def test_what_fields_hold_comes_back_from_a_file(
    value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, "Holds", Holds)
    cfg = Holds(target_names="fc", value=value)
    assert hash(cfg) == hash(dataclasses.replace(cfg))  # a list has become a tuple
    llfx.save(llfx.rewrite(Net(), cfg, (X,)), tmp_path / "file")
    ((loaded, _),) = by_config(llfx.load(Net(), tmp_path / "file", (X,)))
    assert loaded == cfg
