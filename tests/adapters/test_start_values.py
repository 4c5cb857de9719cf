"""Check what a variant may do where it starts: write its own tensors in place, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.calibration_data import Statistic
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from tests.support.refusals import WAYS, Mine, Net, X, refusal
from tests.support.selection import broad_after
from tests.support.untouched import untouched

PLACE = "at 'fc' (d_in=4, d_out=8)"
LINE = "Line N of test_start_values.py:"
SHAPES = "Shapes: weight (8, 4), lora_A (2, 4), lora_B (8, 2)."
NEW = "The way out: an operation that returns a new tensor, such as t * 2 in place of t.mul_(2) or t *= 2."


class WritesWeight(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        weight.mul_(2)


class WritesWeightData(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        weight.t()[0].data.zero_()


class Assigns(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_A = weight[:2]


class PutsData(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_A.data = weight[:3]


class WrongShape(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_A.copy_(weight[:, :3])


class NaN(Mine):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_B[0] = weight[0, :2] / 0 * 0


class Shared(Mine):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_shared_g": llfx.ParamSpec((3,))}

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_shared_g.fill_(1)


MISTAKES = {
    WritesWeight: f"writes to weight in place (mul_), which it may only read. {NEW} {LINE} weight.mul_(2).",
    WritesWeightData: (
        f"writes to weight in place (zero_), which it may only read. {NEW} {LINE} weight.t()[0].data.zero_()."
    ),
    Assigns: (
        "failed, AttributeError: p.lora_A cannot be assigned, because that would not change the adapter's tensor. Write"
        f" to it in place: p.lora_A.copy_(...). {LINE} p.lora_A = weight[:2]. {SHAPES}"
    ),
    PutsData: (
        "put another tensor (3, 4) in the place of p.lora_A (2, 4) (.data = ...). Write to it in place:"
        " p.lora_A.copy_(...)."
    ),
    WrongShape: (
        "failed, RuntimeError: The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension"
        f" 1. {LINE} p.lora_A.copy_(weight[:, :3]). {SHAPES}"
    ),
    NaN: "left 2 of 16 values of 'lora_B' NaN or infinite. Nothing would train from there.",
    Shared: (
        f"writes to p.lora_shared_g in place (fill_), which it may only read. {NEW} {LINE} p.lora_shared_g.fill_(1)."
    ),
}


@pytest.mark.parametrize("way", broad_after(1, WAYS))
@pytest.mark.parametrize(("cls", "expected"), MISTAKES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_start_that_breaks_a_rule(way: Any, cls: type[Mine], expected: str) -> None:
    assert refusal(way, cls) == f"{cls.__name__}.init {PLACE} {expected}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_read_only_on_any_base(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    with untouched(model), pytest.raises(llfx.ConfigError, match=r"^WritesWeight\.init at 'fc' .* writes to weight"):
        llfx.wrap(model, WritesWeight(target_names="fc"), (X.to(dtype),))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (torch.rand_like, "left 8 of 8 values NaN, infinite or unwritten. It must fill its argument in place."),
        (lambda t: t[0].fill_(1), "left 4 of 8 values NaN, infinite or unwritten. It must fill its argument in place."),
    ],
)
def test_a_function_that_does_not_fill_its_tensor(way: Any, init: Any, expected: str) -> None:
    class Unfilled(Mine):
        def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
            return {**super().params(site), "lora_A": llfx.ParamSpec((2, site.d_in), init=init)}

    name = "Unfilled.params at 'fc' (d_in=4, d_out=8): the function init of 'lora_A'"
    assert refusal(way, Unfilled) == f"{name} {expected}"


@pytest.mark.parametrize("way", WAYS)
def test_a_start_in_place_arrives_in_both(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Right(Mine):
        def init(self, site: Site, weight: Tensor, p: Any) -> None:
            scaled = weight.clone().mul_(2)
            p.lora_A.copy_(scaled[:2])
            p.lora_B[:, 0] = scaled.sum(1)

    monkeypatch.setitem(_REGISTRY, "Right", Right)
    model = way(Net(), Right(target_names="fc"), (X,))
    weight = Net().fc.weight.detach()
    values = llfx.adapter_state_dict(model)
    torch.testing.assert_close(values["fc.lora_A"], 2 * weight[:2], rtol=0, atol=0)
    torch.testing.assert_close(values["fc.lora_B"], torch.stack([2 * weight.sum(1), torch.ones(8)], 1))


# Data.


@dataclass(frozen=True, kw_only=True)
class Observes(Mine):
    """A variant that starts from the mean of its inputs."""

    def observer(self, site: Site, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        return self.observe

    def observe(self, x: Tensor) -> Tensor:
        return x.sum(0)

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        p.lora_A[0] = statistic.total / statistic.tokens


class WritesInputs(Observes):
    def observe(self, x: Tensor) -> Tensor:
        return x.mul_(2).sum(0)


class ReturnsNone(Observes):
    def observe(self, x: Tensor) -> Any:
        x.sum(0)


class ReturnsTokens(Observes):
    def observe(self, x: Tensor) -> Tensor:
        return x


def refusal_of_torch() -> str:
    """Return what torch says of the product of `WrongProduct`, which each release words otherwise."""
    with pytest.raises(RuntimeError) as error:
        torch.ones(5, 4) @ torch.ones(5, 4)
    return str(error.value)


class WrongProduct(Observes):
    def observe(self, x: Tensor) -> Tensor:
        return x @ x


class WritesWeightLater(Observes):
    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        weight.zero_()


@pytest.mark.parametrize("way", broad_after(1, WAYS))
@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            WritesInputs,
            f"observer {PLACE} writes to its inputs in place (mul_), which it may only read. {NEW}"
            f" {LINE} return x.mul_(2).sum(0).",
        ),
        (ReturnsNone, f"observer {PLACE}: the function must return a tensor to be summed up, not None."),
        (
            ReturnsTokens,
            f"observer {PLACE}: the function returned tensors (3, 4) and (5, 4), which cannot be summed up over"
            " batches. Sum over the tokens, as in x.T @ x.",
        ),
        (
            WrongProduct,
            f"observer {PLACE} failed, RuntimeError: {refusal_of_torch()}. {LINE} return x @ x. Shapes: inputs (5, 4).",
        ),
        (
            WritesWeightLater,
            f"calibrate {PLACE} writes to weight in place (zero_), which it may only read. {NEW}"
            f" {LINE} weight.zero_().",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_observer_that_breaks_a_rule(way: Any, cls: type[Mine], expected: str) -> None:
    assert refusal(way, cls, calibration=[(X,), (X[:3],)]) == f"{cls.__name__}.{expected}"


def test_a_mean_of_the_inputs_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, "Observes", Observes)
    for way in WAYS:
        model: nn.Module = way(Net(), Observes(target_names="fc"), (X,), calibration=[(X,), (X[:3],)])
        row = llfx.adapter_state_dict(model)["fc.lora_A"][0]
        torch.testing.assert_close(row, torch.cat([X, X[:3]]).mean(0))


def test_finalize_must_return_a_config() -> None:
    class Forgets(Mine):
        def finalize(self, sites: Any, statistics: Any) -> Any:
            pass

    for way in WAYS:
        assert refusal(way, Forgets) == "Forgets.finalize must return a config, not None."
