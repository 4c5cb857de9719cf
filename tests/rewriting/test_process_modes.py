"""Modes of the process that differ between capture and call: a graph follows each of them, or refuses the call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.process import default_dtype, deterministic
from tests.support.selection import broad_after, slow_after

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LORA = llfx.LoRA(r=2, target_names=("fc",))


class Plain(nn.Module):
    """Makes no tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return torch.softmax(y * (x > 0).float(), -1)


class Zeros(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(4)


class Divides(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x > 0).sum(0).div(3)


class Constant(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([0.25, 0.5, 1.0, 2.0])


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "deterministic algorithms": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "another default dtype": lambda: default_dtype(torch.float64),
}


@pytest.mark.broad
@pytest.mark.parametrize("inputs", [(X,), None], ids=["exported", "traced"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_of_the_capture_is_not_one_of_calls(mode: Any, inputs: Any) -> None:
    base = Plain()
    expected = llfx.rewrite(base, LORA, inputs)
    with mode():
        gm = llfx.rewrite(base, LORA, inputs)
    for each in (gm, expected):
        randomise(each, 0)
    result = gm(X)
    assert torch.equal(result, expected(X))
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in llfx.adapter_parameters(gm))


@pytest.mark.parametrize("inputs", broad_after(1, [(X,), None]), ids=["exported", "traced"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_of_the_call_acts_as_in_the_wrapped_model(mode: Any, inputs: Any) -> None:
    base = Plain()
    gm, wrapped = llfx.rewrite(base, LORA, inputs), llfx.wrap(base, LORA, inputs)
    for each in (gm, wrapped):
        randomise(each, 0)
    with mode():
        actual, expected = gm(X), wrapped(X)
    assert (actual.dtype, actual.requires_grad) == (expected.dtype, expected.requires_grad)
    assert actual.is_inference() == expected.is_inference()
    assert torch.allclose(actual, expected, atol=0.02 if mode is MODES["autocast"] else 1e-6)


@pytest.mark.parametrize("kind", broad_after(1, [Zeros, Divides, Constant]))
def test_a_graph_that_depends_on_the_default_dtype_refuses_another(kind: type[Plain]) -> None:
    for capture_in, call_in in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        with default_dtype(capture_in):
            model = kind().float()
            gm = llfx.rewrite(model, LORA, (X,))
            again = llfx.rewrite(gm, {"more": LORA})
            assert gm(X).dtype == again(X).dtype == model(X).dtype
        for each in (gm, again, llfx.remove(gm)):
            with (
                default_dtype(call_in),
                pytest.raises(llfx.CallError, match=rf"is {call_in}, and was {capture_in} when"),
            ):
                each(X)


def test_a_constant_of_a_traced_graph_depends_on_the_default_dtype() -> None:
    gm = llfx.rewrite(Zeros(), LORA)
    with default_dtype(torch.float64), pytest.raises(llfx.CallError, match="which depends on it"):
        gm(X)


@pytest.mark.parametrize("device", ["meta"])
def test_tensors_of_a_graph_are_made_where_its_inputs_were(device: str) -> None:
    gm = llfx.rewrite(Zeros(), LORA, (X,))
    with torch.device(device):
        assert gm(X).device == X.device  # the default device is ignored


class Positions(hf.LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        result.logits = result.logits + torch.zeros(32)
        return result


@pytest.mark.broad
def test_an_adapted_model_follows_the_default_dtype() -> None:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base: Any = Positions(config)
    base.eval()
    model = llfx.adapt(base, llfx.LoRA(r=2))
    ids = torch.randint(3, 32, (2, 6))
    for dtype in (torch.float32, torch.float64, torch.float32):
        with default_dtype(dtype):
            actual, expected = model(ids).logits, base(ids).logits
            assert actual.dtype == expected.dtype == dtype
            assert torch.allclose(actual, expected, atol=1e-5)
    assert len(model.graphs) == 2


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(3, [*MODES, "nothing"]))
def test_an_adapted_model_captures_outside_of_the_modes_of_the_call(name: str) -> None:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base: Any = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32, (2, 6))
    model = llfx.adapt(base, llfx.LoRA(r=2))
    with MODES.get(name, nullcontext)():
        model(ids, output_hidden_states=True)  # captures a graph
    actual = model(ids, output_hidden_states=True)
    assert torch.allclose(actual.logits, base(ids).logits, atol=1e-5)
    assert actual.logits.requires_grad
