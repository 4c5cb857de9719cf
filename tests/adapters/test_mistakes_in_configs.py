"""Check that a wrong config raises an error whose message says how to correct it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import shown
from tests.support.mistakes import A_VARIANT, CFG, PEFT_CFG, VARIANTS, Mistake, anything, check_mistake, model, plain

MISTAKES: list[Mistake] = [
    # The config.
    (lambda: anything.rewrite(plain(), "LoRA"), llfx.ConfigError, A_VARIANT + "'LoRA'. Pass a config: llfx.LoRA()."),
    (lambda: anything.rewrite(plain(), "lora"), llfx.ConfigError, A_VARIANT + "'lora'. Pass a config: llfx.LoRA()."),
    (
        lambda: anything.rewrite(plain(), "all-linear"),
        llfx.ConfigError,
        A_VARIANT + f"'all-linear'. The variants are {VARIANTS}.",
    ),
    (
        lambda: anything.rewrite(plain(), "adapter.safetensors"),
        llfx.ConfigError,
        A_VARIANT + "'adapter.safetensors'. It is a file: llfx.load(model, 'adapter.safetensors') loads the adapters"
        " that llfx.save wrote.",
    ),
    (
        lambda: anything.rewrite(plain(), Path("peft")),
        llfx.ConfigError,
        A_VARIANT + "'peft'. It is a folder: llfx.load_peft(model, 'peft') loads the adapter of a PEFT directory.",
    ),
    (
        lambda: anything.Bank(PEFT_CFG, 4),
        llfx.ConfigError,
        A_VARIANT + "a LoraConfig. It is a config of PEFT: pass llfx.from_peft_config(cfg).",
    ),
    (
        lambda: anything.adapt(model(), {"peft_type": "LORA", "r": 8}),
        llfx.ConfigError,
        A_VARIANT + "{'peft_type': 'LORA', 'r': 8}. It is a config of PEFT: pass llfx.from_peft_config(cfg).",
    ),
    (
        lambda: anything.rewrite(plain(), llfx.LoRA),
        llfx.ConfigError,
        A_VARIANT + "the class LoRA. Pass an instance: LoRA().",
    ),
    (
        lambda: anything.rewrite(plain(), {"r": 8}),
        llfx.ConfigError,
        A_VARIANT + "{'r': 8}. Make a config of these fields: LoRA(**cfg).",
    ),
    (
        lambda: anything.rewrite(plain(), {"chat.fr": CFG}),
        llfx.ConfigError,
        "The name of an adapter is of letters, digits and underscores and does not begin with a digit, because the"
        " names of its tensors end in it; not 'chat.fr'.",
    ),
    (
        lambda: anything.rewrite(plain(), {1: CFG}),
        llfx.ConfigError,
        "The name of an adapter is a string, as in rewrite(model, {'fr': LoRA(r=8)}), not 1.",
    ),
    (
        lambda: anything.rewrite(plain(), {"chat": []}),
        llfx.ConfigError,
        A_VARIANT + "an empty list.",
    ),
    (
        lambda: anything.rewrite(plain(), {CFG}),
        llfx.ConfigError,
        A_VARIANT + "{<LoRA>}. A set has no order; pass a list.",
    ),
    (
        lambda: anything.rewrite(plain(), (cfg for cfg in [CFG])),
        llfx.ConfigError,
        A_VARIANT + "a generator. Make a list of it: [*cfg].",
    ),
    (
        lambda: anything.rewrite(model(), model().config),
        llfx.ConfigError,
        A_VARIANT + "a LlamaConfig. It is the config of a model; cfg is the config of the adapters.",
    ),
    (lambda: anything.rewrite(plain(), 8), llfx.ConfigError, A_VARIANT + "8."),
    (lambda: anything.rewrite(plain(), None), llfx.ConfigError, A_VARIANT + "None."),
    (lambda: anything.rewrite(plain(), []), llfx.ConfigError, A_VARIANT + "an empty list."),
    (
        lambda: anything.adapt(model(), "LoRA"),
        llfx.CheckpointError,
        "There is no file 'LoRA' to load adapters from. For new ones pass a config: LoRA(r=8).",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_the_error_of_a_mistake_says_how_to_correct_it(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_mistake(mistake, tmp_path, monkeypatch)


# Mistakes in the fields of configs. More of them are in test_variant_arguments.py.

FIELDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: anything.LoRA(8), "LoRA takes its fields by name: write LoRA(r=8)."),
    (lambda: anything.LoRA(lora_alpha=16), "LoRA has no field 'lora_alpha': write alpha=16."),
    (
        lambda: anything.LoRA(target_modules=["q_proj"]),
        "LoRA has no field 'target_modules': write target_names=(r\"(^|\\.)q_proj$\",), regular expressions that are"
        " searched in the qualified name.",
    ),
    (
        lambda: anything.LoRA(target_modules="all-linear"),
        "LoRA has no field 'target_modules': the default roles are every linear of attention and of the feed-forward"
        ' layers, so leave it out, or write target_roles=("attention", "mlp").',
    ),
    (lambda: anything.LoRA(lora_dropout=0.1), "LoRA has no field 'lora_dropout': write dropout=0.1."),
    (
        lambda: anything.LoRA(modules_to_save=["lm_head"]),
        "LoRA has no field 'modules_to_save': a config of its own trains whole modules. Write"
        r""" [Full(target_names=(r"(^|\.)lm_head$",)), LoRA(...)].""",
    ),
]


@pytest.mark.parametrize(("build", "message"), FIELDS, ids=range(len(FIELDS)))
def test_the_error_of_a_field_of_peft_names_our_field(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        build()
    assert str(caught.value) == message


# Values in error messages.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 200, "'" + "x" * 27 + "..." + "x" * 28 + "'"),
        ([nn.Linear(2, 2)] * 9, "[" + "<Linear>, " * 6 + "...]"),
        (nn.Linear(2, 2), "a Linear"),
        (llfx.IA3(), "an IA3"),
        (Path("a/b"), "'a/b'"),
        (llfx.LoRA, "the class LoRA"),
        (None, "None"),
        (2.5, "2.5"),
        ({"a": (1, "b")}, "{'a': (1, 'b')}"),
    ],
)
def test_a_value_is_shortened_in_messages(value: object, text: str) -> None:
    assert shown(value) == text
