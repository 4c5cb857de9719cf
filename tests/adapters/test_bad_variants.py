"""Check that variants and passes that break the rules are refused by name, and that the model is unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.passes import DropMetadataAsserts, GraphPass, PassError, Pipeline
from lora_lite_fx.sites.site import Site
from tests.adapters.test_bad_input import CFG, Net, X, anything, fails
from tests.support.selection import broad_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rogue(llfx.Variant):
    """A variant with one gate. Its subclasses break a rule in `forward`."""

    default_roles = ("up",)

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,), init="ones")}


class NeverCallsBase(Rogue):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return p.lora_g.expand(*x.shape[:-1], -1)


class CallsBaseTwice(Rogue):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return base(x) + p.lora_g * base(x)


class DoesNothing(Rogue):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x)


class Unregistered(Rogue):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return p.lora_g * base(x)


class Raises(Rogue):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        raise ZeroDivisionError("no luck")


@pytest.mark.parametrize("inputs", broad_after(1, [None, (X,)]), ids=["traced", "exported"])
@pytest.mark.parametrize(
    ("cls", "error", "parts"),
    [
        (NeverCallsBase, llfx.ConfigError, ["must call base(...) exactly once", "called it 0 times"]),
        (CallsBaseTwice, llfx.ConfigError, ["must call base(...) exactly once", "called it 2 times"]),
        (DoesNothing, llfx.ConfigError, ["returns base(x) unchanged"]),
        (Raises, llfx.ConfigError, ["ZeroDivisionError: no luck"]),
    ],
)
def test_a_variant_that_breaks_the_rules_is_named(
    cls: type[Rogue], error: type[Exception], parts: list[str], inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, cls.__name__, cls)
    for model in (Net(), llfx.rewrite(Net(), CFG, inputs)):
        with fails(model, error, f"{cls.__name__}.forward at 'fc1' (d_in=8, d_out=12)", *parts):
            llfx.rewrite(model, [CFG, cls()], inputs)


@pytest.mark.parametrize("adapt", [llfx.rewrite, llfx.wrap])
def test_a_variant_that_is_not_registered_is_refused_before_it_is_saved(
    adapt: Callable[..., Any], tmp_path: Path
) -> None:
    model = Net()
    with fails(model, llfx.ConfigError, "Unregistered", "registered"):
        llfx.save(adapt(model, Unregistered()), tmp_path / "adapter.safetensors")


def test_two_classes_of_one_name_cannot_be_registered() -> None:
    known = llfx.registry()
    impostor: Any = dataclasses.dataclass(frozen=True, kw_only=True)(type("LoRA", (llfx.Variant,), {}))
    with fails(nn.Identity(), llfx.ConfigError, "LoRA is already registered", "lora_lite_fx.variants.lora"):
        llfx.register(impostor)
    assert llfx.registry() == known


def test_a_class_that_is_not_a_variant_cannot_be_registered() -> None:
    with fails(nn.Identity(), llfx.ConfigError, "Site must be a frozen dataclass derived from Variant"):
        anything.register(Site)


class FailingPass(GraphPass):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, gm: fx.GraphModule) -> int:
        raise self.error


class InvalidatingPass(GraphPass):
    """A pass whose result fails the lint of torch.fx."""

    def run(self, gm: fx.GraphModule) -> int:
        first, *_, last = (node for node in gm.graph.nodes if node.op == "call_function")
        first.prepend(last)
        return 1


def test_leaving_an_unknown_pass_out_of_a_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No pass is named nope; the pipeline has drop_metadata_asserts\."):
        Pipeline((DropMetadataAsserts(),)).without("nope", "drop_metadata_asserts")


@pytest.mark.parametrize(
    ("failing", "error", "parts"),
    [
        (FailingPass(KeyError("lost")), PassError, ["KeyError", "lost", "in pass failing_pass"]),
        (FailingPass(llfx.ConfigError("my own")), llfx.ConfigError, ["my own", "in pass failing_pass"]),
        (InvalidatingPass(), PassError, ["in pass invalidating_pass"]),
    ],
    ids=["unexpected", "own", "invalid"],
)
def test_the_error_of_a_pass_names_it_and_the_passes_that_ran_before(
    failing: GraphPass, error: type[Exception], parts: list[str]
) -> None:
    model = Net()
    gm = llfx.remove(llfx.rewrite(model, CFG))
    with fails(model, error, "(passes that ran before: drop_metadata_asserts)", *parts):
        Pipeline((DropMetadataAsserts(), failing, DropMetadataAsserts())).run(gm)
