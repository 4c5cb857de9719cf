"""The everyday tests have each variant and pass, the smoke tests each front door; graphs of the store are apart."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import checks
import pytest
import torch

import lora_lite_fx as llfx
from lora_lite_fx import passes
from lora_lite_fx.passes import GraphPass
from tests.conftest import COMMANDS, pytest_collection_modifyitems, tier
from tests.support.captured import captured
from tests.support.models import GatedMLP, ids, net
from tests.support.selection import broad_after, broad_unless, slow_unless
from tests.variants import test_conformance

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
IN_SEVERAL_PROCESSES = {"materialize", "parallelize", "shard", "split"}
COMPILE_FOR_LONG = {"save_aoti"}
NEED_MORE_PACKAGES = {
    "load_diffusers", "loftq", "save_diffusers", "save_executorch", "save_gguf", "save_onnx", "save_onnx_adapter",
}  # fmt: skip


def marks(test: Any) -> set[str]:
    return {mark.name for mark in getattr(test, "pytestmark", ())}


def everyday_tests(module: ModuleType) -> list[str]:
    """Return the names of the tests in a module that are not left out as a whole."""
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    return [name for name, test in tests.items() if not marks(test) & {"broad", "slow"}]


def everyday_values(test: Any, name: str) -> set[Any]:
    """Return the values of one parameter of a test that are not marked."""
    (values,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == name)
    plain = [value for value in values if not getattr(value, "marks", ())]
    return {value.values[0] if hasattr(value, "marks") else value for value in plain}


def test_each_variant_conforms_every_day() -> None:
    test = test_conformance.test_every_variant_conforms_on_random_models
    assert everyday_values(test, "cls") == set(llfx.registry().values()) - {llfx.TrainableTokens}


GRAPH_PASSES = [
    name
    for name in passes.__all__
    if inspect.isclass(cls := getattr(passes, name)) and issubclass(cls, GraphPass) and cls is not GraphPass
]


@pytest.mark.parametrize("name", GRAPH_PASSES)
def test_each_pass_is_tested_every_day(name: str) -> None:
    file = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    assert everyday_tests(importlib.import_module(f"tests.passes.test_{file}"))


def test_each_front_door_is_in_the_smoke_tests() -> None:
    doors = {name for name in llfx.__all__ if inspect.isfunction(getattr(llfx, name))}
    source = (TESTS / "test_smoke.py").read_text(encoding="utf-8")
    called = set(re.findall(r"\bllfx\.(\w+)", source))
    assert doors - called == IN_SEVERAL_PROCESSES | COMPILE_FOR_LONG | NEED_MORE_PACKAGES


def test_the_commands_are_those_of_the_readmes_and_of_ci() -> None:
    assert f" && {COMMANDS['everyday']}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    readme = (TESTS / "README.md").read_text(encoding="utf-8")
    for name in ("broad", "slow"):
        assert f"\n{COMMANDS[name]}\n" in readme
    expression = shlex.split(COMMANDS["broad"])[-1]
    assert any(f"-m '{expression}'" in command for command in checks.BROAD.commands)
    assert f"run: {COMMANDS['slow'].replace('-n 2', '-n auto')}\n" in (
        ROOT / ".github" / "workflows" / "slow.yml"
    ).read_text(encoding="utf-8")


def is_marked(value: Any) -> str:
    return ",".join(mark.name for mark in getattr(value, "marks", ()))


def test_values_are_marked_once() -> None:
    values = broad_unless(lambda value: value < 2, slow_unless(lambda value: value < 4, range(6)))
    assert [is_marked(value) for value in values] == ["", "", "broad", "broad", "slow", "slow"]
    values = broad_after(1, slow_unless(lambda value: value > 0, range(3)))
    assert [is_marked(value) for value in values] == ["slow", "", "broad"]
    (first, second) = broad_after(1, [(1, 2), (3, 4)], several=True)
    assert first == (1, 2)
    assert second.values == (3, 4)


class Item:
    """What a tier is told by, of a test with its parameters."""

    def __init__(self, nodeid: str, mark: str) -> None:
        self.nodeid, self.path, self.callspec, self.marks = (
            nodeid,
            TESTS.parent / nodeid.partition("::")[0],
            None,
            [mark],
        )

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark.name)


@pytest.mark.parametrize(
    ("file", "tiers"),
    [("tests/ops/test_a.py", "broad slow slow broad slow"), ("tests/project/test_a.py", "broad " * 5)],
)
def test_a_third_of_the_broad_parameters_stays_broad(file: str, tiers: str) -> None:
    items: list[Any] = [Item(f"{file}::test_b[{number}]", "broad") for number in range(5)]
    everyday: Any = Item(f"{file}::test_b[every day]", "smoke")
    pytest_collection_modifyitems([everyday, *items])
    assert [tier(item) for item in items] == tiers.split()
    assert tier(everyday) == "everyday"


def test_a_test_without_a_value_for_every_day_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter is left"):
        broad_unless(lambda value: False, [1, 2])
    with pytest.raises(TypeError, match="True or False"):
        broad_unless((1).__eq__, ["one"])


def test_a_model_of_the_store_is_captured_once_and_each_test_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = captured(net, GatedMLP, inputs=(ids(2, 5),))
    monkeypatch.setattr(llfx, "capture", None)
    other, other_graph = captured(net, GatedMLP, inputs=(ids(2, 5),))
    before = other_graph(ids(3, 4))
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(graph(ids(3, 4)), model(ids(3, 4)))
    assert torch.equal(other_graph(ids(3, 4)), before)
    assert torch.equal(other(ids(3, 4)), before)
    assert not torch.equal(model(ids(3, 4)), before)
    assert type(llfx.wrap(other_graph, llfx.LoRA(r=2, target_names="."))) is type(other)


def test_models_that_differ_are_captured_apart() -> None:
    with_bias, without = (captured(net, GatedMLP, inputs=example)[1] for example in ((ids(2, 5),), None))
    assert with_bias.execution.signature != without.execution.signature
