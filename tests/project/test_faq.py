"""Each message that docs/faq.md quotes is one that the library raises."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_lite_fx as llfx

FAQ = (Path(__file__).resolve().parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^```text\n(.*?)\n```$", FAQ, re.MULTILINE | re.DOTALL)


class Net(nn.Module):
    """A plain network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x)))


class Choosing(Net):
    """A network that decides by values."""

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            return self.first(x)
        return self.second(self.first(x))


def llama(kind: str = "AutoModelForCausalLM", **fields: Any) -> Any:
    """Return a tiny Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**{**sizes, "num_hidden_layers": 1, **fields})
    return getattr(transformers, kind).from_config(config)


def raised(call: Callable[[], object]) -> str:
    """Return the error and the warnings of a call as one text."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            call()
            said = []
        except Exception as error:
            said = [str(error)]
    return "\n".join([*said, *(str(warning.message) for warning in seen)])


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a newcomer's mistakes raise."""
    folder = tmp_path_factory.mktemp("files")
    model, x, ids = llama(), torch.randn(4, 16), torch.randint(64, (2, 8))
    gm, chat = llfx.rewrite(model, llfx.LoRA(r=4)), llfx.adapt(model, llfx.LoRA(r=4))
    llfx.save(gm, folder / "adapter.safetensors")
    llfx.save_peft(gm, folder / "peft")
    everywhere = llfx.LoRA(r=4, target_names=".")
    chosen = llfx.rewrite(Choosing(), everywhere, (x.abs(),))
    fixed = llfx.rewrite(nn.Sequential(nn.Linear(8, 8)), everywhere, (torch.ones(2, 8),))

    def change_inside_frozen() -> None:
        with llfx.frozen(gm), torch.no_grad():
            gm(input_ids=ids)
            next(iter(llfx.adapter_parameters(gm))).add_(1)
            gm(input_ids=ids)

    def name_one_row() -> None:
        with llfx.by_row(gm, ["default"]):
            gm(input_ids=ids)

    calls: list[Callable[[], object]] = [
        lambda: llfx.rewrite(Net(), llfx.LoRA(), (x,)),
        lambda: llfx.LoRA(target_roles="q_proj"),
        lambda: llfx.LoRA(target_names="all-linear"),
        lambda: llfx.LoRA(target_modules=["q_proj"]),  # type: ignore[call-arg]
        lambda: llfx.adapt(llama("AutoModelForSequenceClassification", pad_token_id=0), llfx.LoRA()),
        lambda: llfx.rewrite(model, llfx.C3A()),
        lambda: llfx.rewrite(model, llfx.EVA()),
        lambda: llfx.rewrite(Net(), everywhere, x),  # type: ignore[arg-type]
        lambda: llfx.rewrite(Net(), everywhere, (torch.ones(4, 8),)),
        lambda: chosen(-x.abs()),
        lambda: llfx.rewrite(Choosing(), everywhere),
        lambda: llfx.adapt(llama("AutoModelForSequenceClassification"), llfx.LoRA()),
        lambda: gm(input_ids=ids, use_cache=True),
        lambda: gm(input_ids=ids, output_hidden_states=True),
        lambda: gm({"input_ids": ids}),
        lambda: gm.generate(ids),  # type: ignore[operator]
        lambda: fixed(torch.ones(2, 3, 8)),
        name_one_row,
        lambda: llfx.save(model, folder / "none.safetensors"),
        lambda: llfx.adapt(chat, llfx.LoRA()),
        lambda: torch.save(gm, folder / "gm.pt"),
        lambda: gm.half(),
        lambda: llfx.load(model, folder / "peft"),
        lambda: llfx.load(Net(), folder / "adapter.safetensors"),
        lambda: llfx.load(llama(), folder / "adapter.safetensors"),
        change_inside_frozen,
        lambda: llfx.active(gm, "fr").__enter__(),
    ]
    return [raised(call) for call in calls]


def pattern(message: str) -> re.Pattern[str]:
    """Return what fits a quoted message, with anything in place of each ellipsis."""
    return re.compile(r".*".join(map(re.escape, message.split("\u2026"))), re.DOTALL)


@pytest.mark.broad
@pytest.mark.parametrize("message", MESSAGES, ids=[message[:40] for message in MESSAGES])
def test_a_quoted_message_is_raised(message: str, said: list[str]) -> None:
    assert any(pattern(message).search(text) for text in said), "\n".join(said)


def test_the_page_quotes_twenty_messages() -> None:
    assert len(MESSAGES) >= 20
    assert pattern("No \u2026 here").search("Error: No way here.")
    assert not pattern("No \u2026 here").search("nobody")
