"""Some of the cases of `trainers.py`: an adapted model trains as the eager wrapper does under the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.hugging_face.trainers import CASES, CONFIG, compare, nf4
from tests.support.conformance import randomise
from tests.support.selection import slow_unless


@pytest.mark.broad
@pytest.mark.parametrize(
    "name",
    slow_unless(
        ("accelerate", "TRL SFT, fused loss", "TRL SFT, base of 4 bits").__contains__,
        [
            "Trainer, NEFTune",
            "Trainer, best model",
            "Trainer, fused loss, torch_compile",
            "accelerate",
            "TRL SFT, packed",
            "TRL SFT, fused loss",
            "TRL SFT, base of 4 bits",
            "TRL Reward",
        ],
    ),
)
def test_losses_and_adapters_equal_those_of_the_eager_wrapper(name: str) -> None:
    for library in ["trl"] * name.startswith("TRL") + ["bitsandbytes"] * name.endswith("4 bits"):
        pytest.importorskip(library)
    outcome = compare(CASES[name])
    assert outcome.loss <= CASES[name].tolerance
    assert outcome.adapters <= CASES[name].tolerance < outcome.moved / 100


@pytest.mark.broad
def test_a_base_of_4_bits_trains_under_trl_as_with_peft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    peft: Any = pytest.importorskip("peft")
    train = CASES["TRL SFT, base of 4 bits"].train

    def with_ours() -> Any:
        chat = llfx.adapt(nf4(), CONFIG)
        randomise(chat, 0)
        llfx.save_peft(chat, tmp_path / "start")
        return chat

    def with_peft() -> Any:
        base = nf4()
        base.is_loaded_in_4bit = False  # otherwise TRL rounds PEFT's adapters to bfloat16
        return peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)

    ours, chat = train(with_ours, tmp_path / "ours")
    theirs, model = train(with_peft, tmp_path / "theirs")
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)
    trained = peft.get_peft_model_state_dict(model)
    llfx.save_peft(chat, tmp_path / "trained")
    for name, tensor in load_file(tmp_path / "trained" / "adapter_model.safetensors").items():
        close(tensor, trained[name], 1e-5, name)
