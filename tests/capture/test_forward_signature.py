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
from tests.support.selection import broad_after, slow_after


def _sharper(output: Any) -> Any:
    output.logits = 2 * output.logits
    return output


class NamesNothing(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _sharper(super().forward(*args, **kwargs))


class NamesOne(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return _sharper(super().forward(input_ids=input_ids, **kwargs))


class NamesAnother(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, sharpness: float = 2.0, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = sharpness * output.logits
        return output


class NamesRequired(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        return _sharper(super().forward(input_ids, labels=labels, **kwargs))


SUBCLASSES: list[Any] = [NamesNothing, NamesOne, NamesAnother, NamesRequired]


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


class Chooses(Scaled):
    def forward(self, x: Tensor, *, negate: bool = False, **kwargs: Any) -> Tensor:  # type: ignore[override]
        y = super().forward(x, **kwargs)
        return -y if negate else y


def build(subclass: Any) -> Any:
    torch.manual_seed(0)
    return subclass(tiny_llama()).eval()


def names(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments that `forward` takes, with their kinds."""
    parameters = list(forward_signature(cls).parameters.values())[1:]
    return {parameter.name: parameter.kind.name for parameter in parameters}


def test_names_are_those_of_all_classes() -> None:
    positional = "POSITIONAL_OR_KEYWORD"
    assert names(Passed) == {"x": positional, "scale": positional, "kwargs": "VAR_KEYWORD"}
    assert names(Chooses) == {
        "x": positional, "negate": "KEYWORD_ONLY", "scale": "KEYWORD_ONLY", "kwargs": "VAR_KEYWORD",
    }  # fmt: skip
    assert names(nn.Linear) == {"input": positional}
    assert forward_signature(AnyInputs) == inspect.signature(AnyInputs.forward)
    assert next(iter(names(NamesOne))) == "input_ids"
    assert names(NamesNothing) == names(transformers.LlamaForCausalLM)
    assert forward_signature(NamesNothing).parameters["logits_to_keep"].default == 0
    # Its own forward names images, and passes labels on.
    assert "labels" in names(transformers.Qwen3_5ForSequenceClassification)


def test_a_forward_on_the_instance_is_asked_itself() -> None:
    replaced = Passed()
    assert list(signature_of(replaced).parameters) == ["x", "scale", "kwargs"]
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


@pytest.mark.broad
def test_the_class_of_the_model_is_left_as_it_is() -> None:
    model, forward = build(NamesNothing), NamesNothing.forward
    llfx.rewrite(model, llfx.LoRA(r=2))
    assert type(model) is NamesNothing
    assert NamesNothing.forward is forward
    assert not hasattr(forward, "__signature__")


@pytest.mark.broad
@pytest.mark.parametrize("subclass", broad_after(1, slow_after(1, SUBCLASSES)))
@pytest.mark.parametrize("given", broad_after(1, [False, True]))
def test_a_subclass_is_rewritten(subclass: Any, given: bool) -> None:
    model, cfg = build(subclass), llfx.LoRA(r=2)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    call = {"input_ids": ids(2, 5), "attention_mask": mask, "labels": ids(2, 5)}
    example = call if given else None  # else inputs are made from the config
    gm, wrapped = llfx.rewrite(model, cfg, example), llfx.wrap(model, cfg, example)
    randomise(gm, 0)
    randomise(wrapped, 0)
    with torch.no_grad():
        ours, theirs = gm(**call), wrapped(**call)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.broad
@pytest.mark.parametrize("subclass", slow_after(1, SUBCLASSES))
def test_a_subclass_is_adapted(subclass: Any) -> None:
    model, cfg = build(subclass), llfx.LoRA(r=2)
    chat = llfx.adapt(model, cfg)
    wrapped: Any = llfx.wrap(model, cfg)
    randomise(chat, 0)
    randomise(wrapped, 0)
    chat.eval()
    x, mask = ids(2, 5), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    calls: list[Any] = [((x,), {}), ((), {"input_ids": x, "attention_mask": mask, "labels": x})]
    with torch.no_grad():
        for args, kwargs in calls:
            ours, theirs = chat(*args, **kwargs), wrapped(*args, **kwargs)
            torch.testing.assert_close(ours.logits, theirs.logits)
            torch.testing.assert_close(ours.loss, theirs.loss)
        settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(chat.generate(x, **settings), wrapped.generate(x, **settings))


class Bundle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y: Tensor = self.linear(x) * kwargs["scale"]
        return y.relu() if kwargs.get("positive") else y


def test_arguments_without_a_name_are_inputs_and_constants_like_others() -> None:
    model, scale = Bundle(), torch.tensor(2.0)
    gm = llfx.capture(model, {"x": torch.randn(2, 3), "scale": scale, "positive": True})
    x = torch.randn(5, 3)
    assert torch.equal(gm(x=x, scale=3 * scale, positive=True), model(x, scale=3 * scale, positive=True))
    with pytest.raises(llfx.CallError, match="positive=None differs from positive=True"):
        gm(x=x, scale=scale)
