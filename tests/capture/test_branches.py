"""Check that a symbolically traced graph refuses the calls for which its model takes another branch, and no others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import lora_lite_fx as llfx
from tests.support.selection import broad_after

CFG = llfx.LoRA(r=2, target_names="fc")
X, MASK = torch.randn(2, 3, 4), torch.rand(2, 3, 1)
ATTENDED = torch.rand(3, 3)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class Masked(Layer):
    """Multiplies by a mask if there is one."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.fc(x if mask is None else x * mask)


class InEvaluation(Layer):
    """Branches in evaluation only."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.fc(x)
        return scaled_dot_product_attention(y, y, y, mask, is_causal=mask is None and not self.training)


class Causal(Layer):
    """Runs the same functions without a mask, but not with the same flags: without the check nothing would raise."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.fc(x)
        return scaled_dot_product_attention(y, y, y, attn_mask=mask, is_causal=mask is None)


class Required(Layer):
    """Has no default for the mask, but a branch without one."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        return self.fc(x) if mask is None else self.fc(x * mask)


class Flag(Layer):
    """Compares a flag by identity, so that tracing notices no branch."""

    def forward(self, x: Tensor, *, double: bool = False) -> Any:
        return self.fc(2 * x if double is True else x)


class Constant(Layer):
    """Runs the same operations on other constants."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.fc(x) * torch.tensor(1.0 if mask is None else 2.0)


class Either(Layer):
    """Serves a call without one of two arguments, but not without both."""

    def forward(self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> Any:
        y = self.fc(x)
        y = scaled_dot_product_attention(y, y, y, q)
        y = scaled_dot_product_attention(y, y, y, k)
        return y if q is None and k is None else 2 * y


class NeedsMask(Layer):
    """Raises without a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            raise ValueError("a mask, please")
        return self.fc(x) * mask


class Forwarded(Layer):
    """Only passes its arguments on, to functions that take None."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float = 1.0) -> Any:
        y = self.fc(x)
        return scaled_dot_product_attention(y, y, y, attn_mask=mask, is_causal=is_causal) * scale


class Many(Layer):
    """Passes on several arguments, of which any may be left out."""

    def forward(
        self,
        x: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
        e: Tensor | None = None,
    ) -> Any:
        y = self.fc(x)
        for mask in (a, b, c, d, e):
            y = scaled_dot_product_attention(y, y, y, mask)
        return y


Adapt = Callable[[nn.Module], Any]


def eager(model: nn.Module) -> Any:
    return llfx.rewrite(model, CFG)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(llfx.rewrite(model, CFG), backend="eager")


SO = "was captured by symbolic tracing, for calls with a tensor as"
REFUSED: dict[str, tuple[type[Layer], tuple[Any, ...], dict[str, Any], str]] = {
    "left out": (Masked, (X,), {}, rf"^mask=None: the graph of Masked {SO} mask, and with mask=None .*=\{{'x': \.\.\."),
    "None": (Masked, (X, None), {}, "^mask=None: the graph of Masked"),
    "None by name": (Masked, (X,), {"mask": None}, "^mask=None: the graph of Masked"),
    "other flags": (Causal, (X,), {}, "^mask=None: .* runs other operations"),
    "in evaluation": (InEvaluation, (X,), {}, "^mask=None: .* runs other operations"),
    "other constants": (Constant, (X,), {}, "^mask=None: .* runs other operations"),
    "required": (Required, (X, None), {}, "^mask=None: .* runs other operations"),
    "a flag": (Flag, (X,), {"double": True}, r"^double=True: .*example_inputs=\{'x': \.\.\., 'double': True\}"),
    "both": (Either, (X,), {}, "^q=None and k=None: the graph of Either"),
    "raises": (NeedsMask, (X,), {}, "^mask=None: .* raises an error when it is traced so: a mask, please"),
}


@pytest.mark.parametrize("adapt", broad_after(1, [eager, compiled]))
@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_takes_another_branch_is_an_error(adapt: Adapt, case: str) -> None:
    cls, args, kwargs, message = REFUSED[case]
    gm = adapt(cls())
    for training in (True, False):
        with pytest.raises(llfx.CallError, match=message):
            gm.train(training)(*args, **kwargs)


@pytest.mark.parametrize("adapt", broad_after(1, [eager, compiled]))
@pytest.mark.parametrize(
    ("cls", "args", "kwargs"),
    broad_after(
        6,
        [
            (Masked, (X, MASK), {}),
            (Causal, (X, ATTENDED), {}),
            (Required, (X, MASK), {}),
            (Flag, (X,), {}),
            (Either, (X, ATTENDED), {}),
            (Either, (X,), {"k": ATTENDED}),
            (NeedsMask, (X, MASK), {}),
            (Forwarded, (X,), {}),
            (Forwarded, (X, None), {"scale": 2.0}),
            (Forwarded, (X,), {"is_causal": True}),
            (Forwarded, (X, ATTENDED), {}),
            (Many, (X,), {}),
            (Many, (X,), {"d": ATTENDED}),
            (Many, (X, ATTENDED), {"e": ATTENDED}),
        ],
        several=True,
    ),
)
def test_a_call_that_takes_the_same_branch_runs(
    adapt: Adapt, cls: type[Layer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    model = cls()
    torch.testing.assert_close(adapt(model)(*args, **kwargs), model(*args, **kwargs))


def test_the_way_out_of_the_message_works() -> None:
    model = Masked()
    torch.testing.assert_close(llfx.rewrite(model, CFG, example_inputs={"x": X})(X), model(X))


def test_export_refuses_the_call_too_and_the_file_of_another_has_no_check() -> None:
    gm = llfx.rewrite(Causal(), CFG)
    with pytest.raises(llfx.CallError, match="mask=None: the graph of Causal"):
        torch.export.export(gm, (X,))
    program = torch.export.export(gm, (X, ATTENDED))
    assert not [node for node in program.graph.nodes if "refuse" in node.name]
    torch.testing.assert_close(program.module()(X, ATTENDED), gm(X, ATTENDED))


@pytest.mark.parametrize("change", [copy.deepcopy, llfx.merge, llfx.remove, lambda gm: llfx.rewrite(gm, CFG)])
def test_what_is_made_of_the_graph_refuses_the_call_too(change: Callable[[Any], Any]) -> None:
    gm = change(llfx.rewrite(Causal(), CFG))
    gm(X, ATTENDED)
    with pytest.raises(llfx.CallError, match="mask=None: the graph of Causal"):
        gm(X)


def test_a_graph_without_such_a_branch_has_no_check() -> None:
    for model in (Forwarded(), Many(), nn.Sequential(nn.Linear(4, 4))):
        assert not [node for node in llfx.capture(model).graph.nodes if "refuse" in node.name]


def test_tracing_again_leaves_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            self.calls.add_(1)  # type: ignore[operator]
            return self.fc(x) * torch.ones(4)

    model = Counting()
    names = set(vars(model))
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        gm = llfx.rewrite(model, CFG)
    gm(X)
    assert model.calls == 0
    assert gm.calls == 1
    assert set(vars(model)) == names
    assert [line.partition(" in ")[0] for line in caplog.messages].count("captured Counting") == 1
