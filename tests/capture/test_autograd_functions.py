"""An autograd function keeps its own backward pass in a graph, also where that is not the derivative of its forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.selection import broad_after


class Round(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Scaled(torch.autograd.Function):
    """Two results, one of them scaled, and gradients that are scaled otherwise."""

    @staticmethod
    def forward(x: Tensor, factor: float, sizes: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        return x.view(-1, *sizes).clone(), 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor, ctx.shape = inputs[1], inputs[0].shape

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Any, ...]:
        return ctx.factor * (first.view(ctx.shape) + second), None, None


class Bounded(torch.autograd.Function):
    """The identity of its first argument, with a gradient that its second bounds. Calls another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(bound)
        result: Tensor = x + 0 * cast(Any, Round).apply(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bound,) = ctx.saved_tensors
        return grad.clamp(-bound, bound), None


# Looked up before any trace, as models do.
scaled, round_through, bounded = (cast(Any, function.apply) for function in (Scaled, Round, Bounded))


class Estimators(nn.Module):
    """Layers with functions between them, one for a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 8)
        self.codes = nn.Parameter(torch.randn(12, 12))
        self.bound = nn.Buffer(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = scaled(self.first(4 * x), 0.5, (12,))
        x = self.dropout(self.second(round_through(one) + two))
        x = nn.functional.linear(x, cast(Any, Round).apply(self.codes))
        y: Tensor = self.third(bounded(x, self.bound))
        return y


CONFIG = llfx.LoRA(r=2, target_names=("first", "second", "third"))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Estimators()


def gradients(adapted: nn.Module, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Return the gradients of the adapters for a batch other than the example's."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    adapted.zero_grad()
    torch.manual_seed(1)
    (adapted if run is None else run)(x).sin().sum().backward()
    parameters = dict(adapted.named_parameters())
    found = {name: parameters[name].grad for name in llfx.adapter_state_dict(adapted)}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def require_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("inputs", broad_after(1, [(torch.ones(3, 8),), None]), ids=["exported", "symbolic"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_rewritten_graph_are_those_of_the_wrapper(model: nn.Module, inputs: Any, training: bool) -> None:
    gm, wrapped = llfx.rewrite(model, CONFIG, inputs).train(training), llfx.wrap(model, CONFIG, inputs).train(training)
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    expected = gradients(wrapped)
    require_equal(gradients(gm), expected)
    if training:
        require_equal(gradients(gm, torch.compile(gm, fullgraph=True, backend="aot_eager")), expected)


def test_gradients_inside_torch_compile_are_those_of_the_wrapper(model: nn.Module) -> None:
    torch._dynamo.reset()
    backend = llfx.backend(CONFIG, inner="aot_eager")
    adapted = backend.adapt(model, torch.ones(3, 8))
    wrapped = llfx.wrap(model, CONFIG, (torch.ones(3, 8),))
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    adapted.eval(), wrapped.eval()
    require_equal(gradients(adapted, torch.compile(adapted, backend=backend)), gradients(wrapped))


def test_a_call_is_one_node_that_names_its_function(model: nn.Module) -> None:
    for inputs in ((torch.ones(3, 8),), None):
        gm = llfx.capture(model, inputs)
        names = [getattr(node.target, "__name__", "") for node in gm.graph.nodes]
        assert [name for name in names if name.endswith("_apply")] == [
            "Scaled_apply", "Round_apply", "Round_apply", "Bounded_apply"
        ]  # fmt: skip
        assert "Scaled_apply(" in gm.code


@pytest.mark.broad
@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_graph_warns_of_the_functions_whose_backward_it_drops(model: nn.Module, strict: bool) -> None:
    gm = llfx.rewrite(model, CONFIG, (torch.ones(3, 8),)).eval()
    x = torch.randn(3, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.export.export(gm, (x,), strict=strict)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "with a backward of its own, which torch.export" in messages
    assert all(name in messages for name in ("Scaled", "Round", "Bounded"))
    torch.testing.assert_close(program.module()(x), gm(x))


@dataclass(frozen=True)
class QuantizedLoRA(llfx.LoRA):
    """A low-rank branch whose inner values are rounded, with the gradient of the identity."""

    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + round_through(4 * x @ p.lora_A.T) @ p.lora_B.T


def test_a_variant_may_use_a_function(model: nn.Module) -> None:
    cfg, x = QuantizedLoRA(r=2, target_names=("first", "second")), (torch.ones(3, 8),)
    gm, wrapped = llfx.rewrite(model, cfg, x), llfx.wrap(model, cfg, x)
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    require_equal(gradients(gm), gradients(wrapped))


def test_a_graph_inside_another_model_is_captured_with_its_functions(model: nn.Module) -> None:
    inner = llfx.capture(model, (torch.ones(3, 8),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer = llfx.capture(nn.Sequential(inner), (torch.ones(3, 8),))
    assert sum(node.name.startswith("round_apply") for node in outer.graph.nodes) == 2


class TakesAModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        y: Tensor = module(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad, None


class WritesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Between(nn.Module):
    """A function between two linears."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second)


def test_a_function_that_takes_a_module_is_traced_through_with_a_warning() -> None:
    model = Between(cast(Any, TakesAModule).apply)
    with pytest.warns(UserWarning, match="TakesAModule.apply takes an argument of type Linear"):
        gm = llfx.capture(model, (torch.ones(2, 4),))
    assert [row.name for row in llfx.inspect(gm)] == ["first", "second"]


def test_a_function_that_writes_to_its_arguments_is_refused() -> None:
    model = Between(lambda x, module: module(cast(Any, WritesInPlace).apply(x)))
    with pytest.raises(llfx.CaptureError, match="WritesInPlace is an autograd function that writes to its arguments"):
        llfx.capture(model, (torch.ones(2, 4),))


def test_functions_are_left_as_they_were(model: nn.Module) -> None:
    before = {function: vars(function).get("forward") for function in (Round, Scaled, Inherits, WritesInPlace)}
    llfx.capture(model, (torch.ones(3, 8),))
    with pytest.raises(llfx.CaptureError):
        llfx.capture(Between(lambda x, module: module(cast(Any, WritesInPlace).apply(x))), (torch.ones(2, 4),))
    assert {function: vars(function).get("forward") for function in before} == before


class Inherits(Round):
    """Has the `forward` of another function, and a backward of its own."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def test_a_function_that_inherits_its_forward_keeps_its_backward() -> None:
    gm = llfx.capture(Between(lambda x, module: module(cast(Any, Inherits).apply(x))), (torch.ones(2, 4),))
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(gm(x).sum(), x)
    first, second = (gm.get_parameter(f"{name}.weight") for name in ("first", "second"))
    torch.testing.assert_close(grad, 3 * (second.sum(0) @ first).expand(3, 4))


def test_a_forward_that_the_model_calls_itself_is_traced() -> None:
    class Context:
        def save_for_backward(self, *tensors: Tensor) -> None: ...

    gm = llfx.capture(Between(lambda x, module: module(Bounded.forward(Context(), x, x))), (torch.ones(2, 4),))
    assert not any(str(node.name).startswith("bounded_apply") for node in gm.graph.nodes)


def test_a_function_that_is_defined_in_each_call_is_refused() -> None:
    def defines(x: Tensor, module: nn.Module) -> Tensor:
        class Local(Round):
            pass

        y: Tensor = module(cast(Any, Local).apply(x))
        return y

    with pytest.raises(llfx.CaptureError, match="Local is an autograd function that is defined while the model runs"):
        llfx.capture(Between(defines), (torch.ones(2, 4),))
