"""A function that was put on a module runs the modules of the copy that is captured or wrapped, with its adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.selection import slow_after

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LORA = llfx.LoRA(r=2, target_names=".")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def by_a_bound_method(part: Any) -> None:
    before = part.forward
    part.forward = lambda x: 1 + before(x)


def by_the_module(part: Any) -> None:
    part.forward = lambda x: 1 + type(part).forward(part, x)


def by_a_default(part: Any) -> None:
    def forward(x: Tensor, before: Any = part.forward) -> Any:
        return 1 + before(x)

    part.forward = forward


def by_a_keyword_default(part: Any) -> None:
    def forward(x: Tensor, *, before: Any = part.forward) -> Any:
        return 1 + before(x)

    part.forward = forward


def by_a_method(part: Any) -> None:
    before = part.forward
    part.forward = MethodType(lambda self, x: 1 + before(x), part)


def by_a_function_in_a_function(part: Any) -> None:
    by_a_bound_method(part)
    before = part.forward
    part.forward = lambda x: (lambda: before(x))()


def by_a_partial(part: Any) -> None:
    before = part.forward
    part.forward = functools.partial(lambda one, x: one + before(x), 1)


def by_a_list(part: Any) -> None:
    steps = [part.forward, (lambda y: 1 + y,)]
    part.forward = lambda x: steps[1][0](steps[0](x))


def by_a_dict(part: Any) -> None:
    steps = {"before": part.forward}
    part.forward = lambda x: 1 + steps["before"](x)


def by_a_function_that_holds_itself(part: Any) -> None:
    before = part.forward

    def forward(x: Tensor, count: int = 1) -> Any:
        return 1 + forward(x, 0) if count else before(x)

    part.forward = forward


def by_a_hook(part: Any) -> None:
    before = part.forward
    part.register_forward_hook(lambda module, args, output: 1 + 2 * output - before(*args))


def by_a_global(part: Any) -> None:
    names: dict[str, Any] = {"before": part.forward}
    exec("def added(x):\n    return 1 + before(x)\nforward = lambda x: added(x)", names)
    part.forward = names["forward"]


WAYS: list[Callable[[Any], None]] = [each for name, each in sorted(globals().items()) if name.startswith("by_")]


def adapted(adapt: Any, change: Callable[[Any], None], part: str, inputs: Any) -> Any:
    torch.manual_seed(0)
    model = Outer().eval()
    change(model.get_submodule(part))
    with torch.no_grad():
        before = model(X)
    gm = adapt(model, LORA, inputs)
    randomise(gm, 0)
    with torch.no_grad():
        assert torch.equal(model(X), before), "the model is as it was"
    return gm


@pytest.mark.broad
@pytest.mark.parametrize("way", slow_after(4, WAYS))
@pytest.mark.parametrize(
    ("adapt", "part", "inputs"),
    [
        (llfx.rewrite, "", (X,)),
        (llfx.rewrite, "inner", (X,)),
        (llfx.rewrite, "inner", None),
        (llfx.wrap, "inner", (X,)),
    ],
    ids=["the model, exported", "a part, exported", "a part, traced", "a part, wrapped"],
)
def test_adapters_act_inside_a_function_that_was_put_on_a_module(way: Any, adapt: Any, part: str, inputs: Any) -> None:
    expected = 1 + adapted(adapt, lambda part: None, part, inputs)(X)
    assert torch.allclose(adapted(adapt, way, part, inputs)(X), expected, atol=1e-6)


@pytest.mark.parametrize("way", [by_a_bound_method, by_a_method])
def test_a_forward_that_was_put_on_the_model_is_not_traced(way: Any) -> None:
    with pytest.raises(llfx.CaptureError, match=r"forward of this Outer was replaced .* way out: pass example_inputs"):
        adapted(llfx.rewrite, way, "", None)


class Frozen(dict[str, int]):
    """A dict that refuses changes, as the configs of diffusers do."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("it is frozen")


def test_a_dict_that_refuses_changes_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.config = Frozen(sizes=4)  # type: ignore[assignment]
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="0"), (torch.ones(2, 4),))
    assert torch.equal(gm(torch.ones(2, 4)), model(torch.ones(2, 4)))
