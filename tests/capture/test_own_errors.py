"""Example inputs that the model itself does not take, and arguments of another kind than a graph takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.rewriting.capture import base_graph
from tests.support.captured import captured
from tests.support.models import tiny_llama


class InOneMode(nn.Module):
    """Raises in some modes, each time with another message."""

    def __init__(self, *modes: bool) -> None:
        super().__init__()
        self.a, self.modes = nn.Linear(4, 4), modes

    def forward(self, x: Tensor) -> Tensor:
        if self.training in self.modes and not torch.compiler.is_exporting():
            raise ValueError(f"training={self.training}\nis nothing for me")
        result: Tensor = self.a(x)
        return result


INPUTS: dict[str, tuple[Any, str]] = {
    "a width": (torch.randn(2, 5), r"RuntimeError: (addmm: )?mat1 and mat2 shapes cannot be multiplied \(2x5"),
    "a type": (torch.ones(2, 4, dtype=torch.long), "RuntimeError: (addmm: )?mat1 and mat2 must have the same dtype"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_the_model_is_asked_before_its_export_is_blamed(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    x, message = INPUTS[what]
    with pytest.raises(
        llfx.CaptureError, match=f"^Sequential itself raises for the example inputs: {message}"
    ) as caught:
        llfx.capture(nn.Sequential(nn.Linear(4, 4)), (x,))
    assert str(caught.value).endswith("\nThe way out: pass example_inputs that the model takes.")
    assert len(str(caught.value).splitlines()) == 2
    assert capfd.readouterr().err == "", "torch prints the traceback of the trace"


def test_a_model_that_raises_in_both_modes_is_refused_with_its_line_and_message() -> None:
    line = r"at `raise ValueError\(f\"training={self\.training}\\nis nothing for me\"\)` \(.*:\d+\)"
    with pytest.raises(llfx.CaptureError, match=rf"InOneMode itself raises.* {line}: ValueError: training=False\n"):
        llfx.capture(InOneMode(True, False), (torch.randn(2, 4),))


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_raises_in_one_mode_is_captured(mode: bool) -> None:
    model, x = InOneMode(mode), torch.randn(5, 4)
    gm = llfx.capture(model, (torch.randn(2, 4),))
    assert torch.equal(gm.train(not mode)(x), model.train(not mode)(x))


def test_inputs_that_are_not_of_the_user_may_be_none_that_the_model_takes() -> None:
    x = torch.randn(5, 4)
    gm = base_graph(InOneMode(True, False), (torch.randn(2, 4),), made=True)
    assert gm(x).shape == (5, 4)


def llama() -> Any:
    return hf.LlamaForCausalLM(tiny_llama(pad_token_id=0, eos_token_id=1)).eval()


IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "all at once": (
        {"input_ids": {"input_ids": IDS}},
        "input_ids must be a tensor, not {'input_ids': <Tensor>}. The way out: pass what is in it by name, as in"
        " model(**inputs).",
    ),
    "a list": (
        {"input_ids": [[1, 2], [3, 4]]},
        "input_ids must be a tensor, not [[1, 2], [3, 4]]. The way out: pass a tensor; a tokenizer makes some with"
        ' return_tensors="pt".',
    ),
    "a text": (
        {"input_ids": "Hello"},
        "input_ids must be a tensor, not 'Hello'. The way out: pass a tensor; a tokenizer makes some with"
        ' return_tensors="pt".',
    ),
    "hidden states": (
        {"input_ids": IDS, "output_hidden_states": True},
        "output_hidden_states differs from output_hidden_states=False, which this graph was captured with and which is"
        " part of it. The way out: set model.config.output_hidden_states before the capture; or adapt(model, cfg),"
        " which captures a graph for each kind of call.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_that_a_graph_does_not_take_is_named_with_a_way_out(what: str) -> None:
    _, gm = captured(llama, inputs={"input_ids": IDS})
    arguments, message = WRONG[what]
    with pytest.raises(llfx.errors.CallError) as caught:
        gm(**arguments)
    assert str(caught.value) == message


@pytest.mark.broad
def test_the_way_out_to_hidden_states_works() -> None:
    model = llama()
    model.config.output_hidden_states = True
    gm = llfx.capture(model, {"input_ids": IDS})
    assert len(gm(input_ids=IDS, output_hidden_states=True).hidden_states) == len(model(IDS).hidden_states)


def test_one_site_is_counted_in_the_singular() -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(4, 4)), llfx.IA3(target_names="0"))
    assert "\n1 site; " in str(llfx.inspect(gm))
    assert "\n2 sites; " in str(llfx.inspect(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    with pytest.raises(llfx.SelectionError, match=r"has 1 site \("):
        llfx.rewrite(gm, llfx.LoRA(target_names="nowhere"))
