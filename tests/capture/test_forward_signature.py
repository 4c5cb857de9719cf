"""Check subclasses whose `forward` passes `*args, **kwargs` on: their arguments have names all the same."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.forward_signature import forward_signature, signature_of
from tests.support.conformance import randomise
from tests.support.models import ids, tiny_llama


class Sharper(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(x)
        return y if scale is None else y * scale


class Negated(Scaled):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().forward(*args, **kwargs)


class Passed(Negated):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class AnyInputs(nn.Module):
    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return sum(inputs, torch.zeros(()))


@pytest.fixture
def sharper() -> Sharper:
    torch.manual_seed(0)
    model: Any = Sharper(tiny_llama())
    return model.eval()  # type: ignore[no-any-return]


def test_names_are_those_of_the_class_that_has_some() -> None:
    assert forward_signature(Passed) == inspect.signature(Scaled.forward)
    assert forward_signature(AnyInputs) == inspect.signature(AnyInputs.forward)
    assert list(forward_signature(nn.Linear).parameters) == ["self", "input"]
    assert signature_of(Passed()) == inspect.signature(Scaled().forward)
    replaced = Passed()
    replaced.forward = lambda *args, **kwargs: args[0]  # type: ignore[method-assign]
    assert list(signature_of(replaced).parameters) == ["args", "kwargs"]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_graph_is_called_by_position_and_by_name(by_name: bool) -> None:
    model, x, scale = Passed(), torch.randn(3, 4), torch.rand(3, 4)
    example = {"x": x, "scale": scale} if by_name else (x, scale)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=("fc",)), example)
    wrapped = llfx.wrap(model, llfx.LoRA(r=2, target_names=("fc",)), example)
    randomise(gm, 0)
    randomise(wrapped, 0)
    expected = wrapped(x[:2], scale[:2])
    torch.testing.assert_close(gm(x[:2], scale[:2]), expected)
    torch.testing.assert_close(gm(scale=scale[:2], x=x[:2]), expected)


def test_the_class_of_the_model_is_left_as_it_is(sharper: Sharper) -> None:
    forward = Sharper.forward
    llfx.rewrite(sharper, llfx.LoRA(r=2))
    assert type(sharper) is Sharper
    assert Sharper.forward is forward
    assert not hasattr(forward, "__signature__")


def test_a_hugging_face_model_is_rewritten(sharper: Sharper) -> None:
    cfg = llfx.LoRA(r=2)
    gm, wrapped = llfx.rewrite(sharper, cfg), llfx.wrap(sharper, cfg)  # with inputs that are made from its config
    randomise(gm, 0)
    randomise(wrapped, 0)
    with torch.no_grad():
        torch.testing.assert_close(gm(ids(2, 5)).logits, wrapped(input_ids=ids(2, 5)).logits)
        torch.testing.assert_close(
            gm(input_ids=ids(3, 7), labels=ids(3, 7)).loss, wrapped(input_ids=ids(3, 7), labels=ids(3, 7)).loss
        )


def test_a_hugging_face_model_is_adapted(sharper: Sharper) -> None:
    cfg = llfx.LoRA(r=2)
    chat = llfx.adapt(sharper, cfg)
    wrapped: Any = llfx.wrap(sharper, cfg)
    randomise(chat, 0)
    randomise(wrapped, 0)
    chat.eval()
    x = ids(2, 5)
    with torch.no_grad():
        for args, kwargs in (((x,), {}), ((), {"input_ids": x}), ((), {"input_ids": x, "labels": x})):
            ours, theirs = chat(*args, **kwargs), wrapped(*args, **kwargs)
            torch.testing.assert_close(ours.logits, theirs.logits)
            torch.testing.assert_close(ours.loss, theirs.loss)
        settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(chat.generate(x, **settings), wrapped.generate(x, **settings))
