"""What is counted as training is what trains, and what trains and is not saved is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.models import one_layer_llama


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc(x))
        return y


LORA = llfx.LoRA(r=2, target_names=("fc", "head"))


@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
def test_adapters_that_the_user_freezes_are_not_counted(how: Any) -> None:
    model = how(Net(), LORA)
    everything = llfx.adapter_parameters(model)
    assert sum(parameter.numel() for parameter in everything) == 2 * (8 + 8) + 2 * (8 + 4)
    model.get_parameter("fc.lora_A").requires_grad_(False)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    left = llfx.adapter_parameters(model)
    assert [id(model.get_parameter(name)) for name in names] == [id(parameter) for parameter in left]
    assert len(left) == len(everything) - 1
    assert len(llfx.adapter_state_dict(model)) == len(everything)  # they are saved all the same


def test_inspect_and_the_line_of_peft_count_what_trains(capsys: pytest.CaptureFixture[str]) -> None:
    gm: Any = llfx.rewrite(Net(), LORA)
    gm.get_parameter("fc.lora_A").requires_grad_(False)
    table = llfx.inspect(gm)
    assert [row.parameters for row in table] == [16, 24]
    assert (table.trainable, table.unfrozen) == (40, 0)
    gm.get_parameter("head.weight").requires_grad_(True)
    table = llfx.inspect(gm)
    assert (table.trainable, table.unfrozen) == (72, 32)
    assert table.to_dict()["trainable"] == 72
    assert str(table).endswith("72 of 160 parameters train (45.000%), 32 of them outside the adapters")
    gm.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 72 || all params: 160")


def test_an_adapted_model_counts_what_trains_and_names_what_its_checkpoints_lack(tmp_path: Path) -> None:
    model = llfx.adapt(one_layer_llama(), llfx.LoRA(r=2, target_names="q_proj"))
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    table = llfx.inspect(model)
    assert (table.trainable, table.unfrozen) == (32 + 32 * 16, 32 * 16)
    assert table.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("save", [llfx.save, llfx.save_peft, llfx.save_lora_lite])
@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
def test_a_tensor_that_trains_and_is_not_written_is_named(how: Any, save: Any, tmp_path: Path) -> None:
    model = how(Net(), llfx.LoRA(r=2, target_names="fc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path / "first")
    model.get_parameter("head.weight").requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"^{save.__name__} writes adapters only, and head\.weight train") as caught:
        save(model, tmp_path / "second")
    assert caught[0].filename == __file__
