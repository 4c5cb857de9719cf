"""Check the constructor of a variant: its fields, and its errors for arguments that are not fields."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import lora_lite_fx as llfx

RANKS = {"r", "rank_pattern"}
SCALES = {"alpha", "alpha_pattern"}
WITH_RANK = {"LoRA", "PiSSA", "OLoRA", "DoRA", "EVA", "GraLoRA", "LoHa", "LoKr", "RandLoRA", "AdaLoRA", "LoRAXS"}
WITH_RANK_ONLY = {"DeLoRA", "HRA", "HiRA", "VeRA", "MiSS", "AntiPaSTO", "AntiPaSTOGain", "SHiRA", "VBLoRA"} | {
    "GLoRA",
    "PSOFT",
    "AntiPaSTOAblate",
    "AntiPaSTOArrow",
    "AntiPaSTODPLR",
    "TinyLoRA",
}
WITH_NEITHER = {"IA3", "RoAd", "OFT", "BOFT", "C3A", "FourierFT", "WaveFT", "Full", "TrainableTokens"}

v: Any = llfx
"""The variants without their types, because these tests pass arguments that a type checker refuses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(llfx.Variant):
    """A variant of a user, which is not registered."""

    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class ByPosition(llfx.WithRank):
    """A variant of a user, whose field may be passed by position."""

    size: int = 1


def test_a_variant_has_a_rank_and_an_alpha_only_if_it_uses_them() -> None:
    for names, fields in ((WITH_RANK, RANKS | SCALES), (WITH_RANK_ONLY, RANKS), (WITH_NEITHER, set())):
        for name in names:
            fields_of_variant = {field.name for field in dataclasses.fields(llfx.registry()[name])}
            assert fields_of_variant & (RANKS | SCALES) == fields, name
    built_in = {name for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")}
    assert built_in == WITH_RANK | WITH_RANK_ONLY | WITH_NEITHER


@pytest.mark.parametrize("name", sorted(WITH_NEITHER | WITH_RANK_ONLY))
def test_a_variant_without_an_alpha_refuses_one(name: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        v.registry()[name](alpha=16)
    assert str(caught.value) == f"{name} has no alpha: remove alpha=16."


@pytest.mark.parametrize("name", sorted(WITH_NEITHER))
def test_a_variant_without_a_rank_refuses_one(name: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        v.registry()[name](r=64)
    assert str(caught.value) == f"{name} has no rank: remove r=64."


MINE: Any = Mine
BY_POSITION: Any = ByPosition
SEARCHED = "regular expressions that are searched in the qualified name."
STARTS = "or use PiSSA(...) or OLoRA(...) to start from the weight, or EVA(...) to start from data."


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: v.LoRA(8), "LoRA takes its fields by name: write LoRA(r=8)."),
        (lambda: v.LoRA(8, 16), "LoRA takes its fields by name: write LoRA(r=8, alpha=16)."),
        (lambda: v.HRA(8), "HRA takes its fields by name: write HRA(r=8)."),
        (
            lambda: v.LoRA("q_proj"),
            "LoRA takes its fields by name: write LoRA(target_names='q_proj') to adapt the sites whose name matches.",
        ),
        (
            lambda: MINE(2.0),
            "Mine takes its fields by name: it has dtype, target_roles, target_names, exclude_names, layers,"
            " target_kinds, slots, strength, and got 1 without a name (float).",
        ),
        (lambda: v.LoRA(lora_alpha=32), "LoRA has no field 'lora_alpha': write alpha=32."),
        (lambda: v.LoRA(rank=4), "LoRA has no field 'rank': write r=4."),
        (lambda: v.LoRA(lora_rank=4), "LoRA has no field 'lora_rank': write r=4."),
        (lambda: v.LoRA(use_rslora=True), "LoRA has no field 'use_rslora': write rank_stabilized=True."),
        (lambda: v.LoRA(layers_to_transform=[1]), "LoRA has no field 'layers_to_transform': write layers=[1]."),
        (lambda: v.VeRA(vera_dropout=0.1), "VeRA has no field 'vera_dropout': write dropout=0.1."),
        (lambda: v.OFT(oft_block_size=8), "OFT has no field 'oft_block_size': write block_size=8."),
        (lambda: v.HRA(apply_GS=True), "HRA has no field 'apply_GS': write orthogonal=True."),
        (lambda: v.IA3(lora_alpha=32), "IA3 has no alpha: remove lora_alpha=32."),
        (lambda: v.IA3(rank=4), "IA3 has no rank: remove rank=4."),
        (lambda: v.IA3(lora_dropout=0.1), "IA3 has no dropout: remove lora_dropout=0.1."),
        (lambda: v.IA3(rank_pattern={"q": 4}), "IA3 has no rank: remove rank_pattern={'q': 4}."),
        (
            lambda: v.LoRA(target_modules=["q_proj", "a.b"]),
            "LoRA has no field 'target_modules': write"
            rf' target_names=(r"(^|\.)q_proj$", r"(^|\.)a\.b$"), {SEARCHED}',
        ),
        (
            lambda: v.LoRA(target_modules={"v", "q"}),
            rf"""LoRA has no field 'target_modules': write target_names=(r"(^|\.)q$", r"(^|\.)v$"), {SEARCHED}""",
        ),
        (
            lambda: v.LoRA(target_modules=r".*\.(q|v)_proj"),
            rf"""LoRA has no field 'target_modules': write target_names=(r"^(.*\.(q|v)_proj)$",), {SEARCHED}""",
        ),
        (
            lambda: v.LoRA(target_modules=None),
            rf"""LoRA has no field 'target_modules': write target_names=(r"(^|\.)q_proj$",), {SEARCHED}""",
        ),
        (
            lambda: v.LoRA(target_modules="all-linear"),
            "LoRA has no field 'target_modules': the default roles are every linear of attention and of the"
            ' feed-forward layers, so leave it out, or write target_roles=("attention", "mlp").',
        ),
        (
            lambda: v.IA3(feedforward_modules=["down"]),
            rf"""IA3 has no field 'feedforward_modules': write feedforward_names=(r"(^|\.)down$",), {SEARCHED}""",
        ),
        (
            lambda: v.LoRA(feedforward_modules=["down"]),
            "LoRA has no field 'feedforward_modules': remove it.",
        ),
        (
            lambda: v.LoRA(modules_to_save=["head"]),
            "LoRA has no field 'modules_to_save': a config of its own trains whole modules. Write"
            r""" [Full(target_names=(r"(^|\.)head$",)), LoRA(...)].""",
        ),
        (lambda: v.LoRA(use_dora=True), "LoRA has no field 'use_dora': write DoRA(...) in place of LoRA(...)."),
        (lambda: v.LoRA(use_dora=False), "LoRA has no field 'use_dora': remove it."),
        (
            lambda: v.LoRA(init_lora_weights="pissa_niter_4"),
            "LoRA has no field 'init_lora_weights': write PiSSA(...) in place of LoRA(...).",
        ),
        (
            lambda: v.LoRA(init_lora_weights=True),
            f"LoRA has no field 'init_lora_weights': a variant has one way to start. Remove it, {STARTS}",
        ),
        (
            lambda: v.LoRA(bias="none"),
            "LoRA: bias='none' is PEFT's way to choose the model's biases to train, which Full(weight=False, ...) does"
            " here; leave it out, or write bias=True for a trained bias of B.",
        ),
        (
            lambda: v.DoRA(bias="none"),
            "DoRA has no field 'bias': Full(weight=False, ...) trains biases of the model. Remove bias='none'.",
        ),
        (
            lambda: v.LoRA(fan_in_fan_out=True),
            "LoRA has no field 'fan_in_fan_out': it is not needed, because the layout of each weight is read from the"
            " model. Remove it.",
        ),
        (
            lambda: v.LoRA(task_type="CAUSAL_LM"),
            "LoRA has no field 'task_type': it is not needed, because the class of the model says it. Remove it.",
        ),
        (
            lambda: MINE(strenght=2.0),
            "Mine has no field 'strenght', did you mean 'strength'? Its fields are dtype, target_roles, target_names,"
            " exclude_names, layers, target_kinds, slots, strength.",
        ),
        (
            lambda: MINE(zzz=2.0),
            "Mine has no field 'zzz'. Its fields are dtype, target_roles, target_names, exclude_names, layers,"
            " target_kinds, slots, strength.",
        ),
        (
            lambda: v.LoRA(lora_alpha=32, lora_dropout=0.1),
            "LoRA has no field 'lora_alpha': write alpha=32.\nLoRA has no field 'lora_dropout': write dropout=0.1.",
        ),
        (
            lambda: dataclasses.replace(v.LoRA(), lora_alpha=32),
            "LoRA has no field 'lora_alpha': write alpha=32.",
        ),
    ],
)
def test_the_error_of_an_unknown_argument_says_what_to_write(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_a_field_of_a_users_own_variant_may_be_positional() -> None:
    assert ByPosition(3, r=4).size == 3
    with pytest.raises(llfx.ConfigError, match=r"ByPosition takes its fields by name: .* got 2 without a name"):
        BY_POSITION(4, 5)


@pytest.mark.parametrize("cls", [*llfx.registry().values(), Mine], ids=lambda cls: cls.__name__)
def test_the_signature_names_the_fields(cls: type[llfx.Variant]) -> None:
    assert list(inspect.signature(cls).parameters) == [field.name for field in dataclasses.fields(cls)]


def test_a_config_can_be_copied_and_pickled() -> None:
    cfg = llfx.LoRA(r=4, target_names="q", rank_pattern={"q": 2})
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == copy.copy(cfg) == cfg


def test_one_value_a_list_and_a_tuple_mean_the_same() -> None:
    single = llfx.LoRA(target_names="q", exclude_names="x", target_roles="mlp", layers=0, target_kinds="linear")
    several = llfx.LoRA(
        target_names=["q"], exclude_names=["x"], target_roles=["mlp"], layers=[0], target_kinds=["linear"]
    )
    assert single == several
    assert (single.target_names, single.layers) == (("q",), (0,))
