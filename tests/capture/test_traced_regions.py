"""Regions of autograd and autocast in models that are captured without example inputs, and with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.regions import closes_region, opens_region
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after, slow_after, slow_unless

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
CFG = llfx.LoRA(r=2, target_names=(".",))


class Layers(nn.Module):
    """Three linears, with regions around some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class NoGrad(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.no_grad():
            y = self.b(x)
        result: Tensor = self.c(x + y)
        return result


class Nested(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
            with torch.enable_grad():
                y = self.b(x)
                with torch.no_grad():
                    z = self.c(y)
                y = y * z
            x = x * y
        result: Tensor = x + y
        return result


class Within(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
            with torch.no_grad():
                y = self.b(x)
            x = self.c(x * y)
        result: Tensor = self.c(x)
        return result


class Flagged(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            x = self.a(x)
        result: Tensor = self.b(x)
        return result


class FlaggedInEvaluation(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            x = self.a(x)
        result: Tensor = self.b(x)
        return result


class Functions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        x = self.a(x)
        torch.set_grad_enabled(True)
        result: Tensor = self.b(x)
        return result


class Decorated(Layers):
    class Part(nn.Sequential):
        @torch.no_grad()
        def forward(self, input: Tensor) -> Tensor:
            result: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return result

    def __init__(self) -> None:
        super().__init__()
        self.b = Decorated.Part(nn.Linear(4, 4), nn.ReLU())  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result: Tensor = self.c(x + self.b(x))
        return result


class Enabled(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self.a(x)
        result: Tensor = x * self.b(x)
        return result


class Detached(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result: Tensor = self.c(self.b(x).detach() + x)
        return result


class Autocast(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
            with torch.autocast("cpu", enabled=False):
                z = self.c(y.float())
            y = self.c(y) * z
        result: Tensor = y.float() + x
        return result


class Both(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
        with torch.autocast("cpu", enabled=False):
            result: Tensor = self.c(x + y.float())
        return result


MODELS = [NoGrad, Nested, Within, Flagged, Functions, Decorated, Enabled, Detached, Autocast, Both, FlaggedInEvaluation]
OF_ONE_MODE = (Flagged, FlaggedInEvaluation)
EXPORTED = [kind for kind in MODELS if kind not in OF_ONE_MODE]
CALLERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.enable_grad(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": lambda: torch.no_grad(),
}


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Return the output, and the gradients of the adapters, which are None where none arrives."""
    for parameter in llfx.adapter_parameters(model):
        parameter.grad = None
    y: Tensor = model(X)
    if y.requires_grad:
        y.float().square().sum().backward()
    return y, {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}


def require_same(model: nn.Module, inputs: Any, callers: Any = tuple(CALLERS)) -> None:
    gm, wrapped = llfx.rewrite(model, CFG, inputs), llfx.wrap(model, CFG, inputs)
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    for training in (True, False):
        for caller in callers:
            with CALLERS[caller]():
                y, ours = gradients(gm.train(training))
                assert torch.is_grad_enabled() is (caller != "no_grad"), "the caller's mode"
            with CALLERS[caller]():
                expected, theirs = gradients(wrapped.train(training))
            assert (y.dtype, y.requires_grad) == (expected.dtype, expected.requires_grad)
            close(y, expected, 0.0, f"output, {caller}")
            assert {name for name, grad in ours.items() if grad is not None} == {
                name for name, grad in theirs.items() if grad is not None
            }, caller
            for name, grad in ours.items():
                if grad is not None:
                    close(grad, theirs[name], 1e-2 if caller == "autocast" else 1e-6, f"{name}, {caller}")


@pytest.mark.filterwarnings("ignore:The model runs")
@pytest.mark.parametrize("kind", broad_after(3, MODELS))
def test_regions_that_are_traced_equal_the_model(kind: Any) -> None:
    callers = [caller for caller in CALLERS if not (kind is Functions and caller == "no_grad")]
    require_same(kind(), None, callers)


def test_a_region_ends_where_it_ends_in_the_model() -> None:
    graph = llfx.capture(Nested()).graph
    assert len([node for node in graph.nodes if opens_region(node)]) == 3
    assert len([node for node in graph.nodes if closes_region(node)]) == 3


@pytest.mark.broad
@pytest.mark.filterwarnings("ignore:The model runs")
@pytest.mark.parametrize("kind", slow_unless({NoGrad, Nested, Decorated}.__contains__, EXPORTED))
def test_regions_that_are_exported_equal_the_model(kind: Any) -> None:
    callers = [caller for caller in CALLERS if not (kind in (Functions, Enabled) and caller == "no_grad")]
    require_same(kind(), (X[:2],), callers)


@pytest.mark.broad
@pytest.mark.parametrize("kind", slow_after(1, OF_ONE_MODE))
def test_a_region_of_one_mode_alone_that_is_exported_equals_the_model(kind: Any) -> None:
    require_same(kind(), (X[:2],))


@pytest.mark.filterwarnings("ignore:The model runs")
def test_functions_that_switch_autograd_on_leave_the_mode_of_the_caller_alone() -> None:
    """The model itself leaves autograd on, in a call without gradients. Its graph computes the same, and goes back."""
    gm = llfx.rewrite(Functions(), CFG)
    randomise(gm, 0)
    with torch.no_grad():
        assert gm(X).requires_grad
        assert not torch.is_grad_enabled()


class LeftOff(Layers):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        result: Tensor = self.a(x)
        return result


class Opposite(Layers):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(not before)
        result: Tensor = self.a(x)
        torch.set_grad_enabled(before)
        return result


class OnlyWithGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                x = self.b(x)
        result: Tensor = self.a(x)
        return result


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (OnlyWithGradients, r"with torch\.no_grad\(\):"),
        (LeftOff, r"torch\.set_grad_enabled\(False\)"),
        (Opposite, r"torch\.set_grad_enabled\(not before\)"),
    ],
)
def test_a_mode_that_does_not_end_is_refused_with_the_line(kind: Any, line: str) -> None:
    try:
        with pytest.raises(llfx.CaptureError, match=rf"`{line}`.*The way out: "):
            llfx.capture(kind())
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


class Inference(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.inference_mode():
            y = self.b(x)
        result: Tensor = x + y
        return result


class DecoratedInference(Layers):
    @torch.inference_mode()
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


@pytest.mark.parametrize("inputs", [None, (X[:2],)], ids=["traced", "exported"])
@pytest.mark.parametrize(
    ("kind", "line"), [(Inference, r"with torch\.inference_mode\(\):"), (DecoratedInference, r"return self\.part\(x\)")]
)
def test_a_region_of_inference_mode_is_refused_with_the_line(kind: Any, line: str, inputs: Any) -> None:
    with pytest.raises(llfx.CaptureError, match=rf"torch\.inference_mode\(\) at `{line}`.*torch\.no_grad\(\)"):
        llfx.capture(kind(), inputs)
