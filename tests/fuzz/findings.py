"""What the fuzzer has found, each as its smallest trial. What is mended stays as a test.

An entry is taken over from the script that the fuzzer prints. `is_open=True` is to go when the finding is mended: its
test fails from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lora_lite_fx as llfx
from tests.fuzz import operations as ops
from tests.fuzz.campaign import Finding
from tests.fuzz.modules import Net
from tests.fuzz.trial_calls import Call, Calls, Step
from tests.fuzz.trial_defaults import Defaults
from tests.fuzz.trial_models import Called, Models
from tests.fuzz.trial_peft import Folder
from tests.fuzz.trial_rows import Rows
from tests.fuzz.trial_stacks import Stack
from tests.fuzz.trial_starts import Starts
from tests.fuzz.trial_writes import Line, Writes
from tests.fuzz.verdict import Trial, Verdict


@dataclass(frozen=True)
class Found:
    """A finding.

    Args:
        name: says what is wrong.
        kind: of the trial.
        trial: the smallest that shows it.
        outcome: "WRONG" or "RAW".
        aspect: which result is wrong, or the class of the error.
        is_open: whether it is not mended yet.
    """

    name: str
    kind: str
    trial: Trial
    aspect: str = "output"
    outcome: str = "WRONG"
    is_open: bool = False


FROZEN_NORM, FROZEN_DROPOUT = ops.Mode("b0.norm", False), ops.Mode("b0.drop", False)
NORM, DROPOUT, ACTIVATION = Net(("BatchNorm",)), Net(("Dropout",)), Net(("MLP",))
WEIGHT = Net(("NormedWeight",))


def _folder(method: str, *targets: str, **fields: Any) -> Folder:
    return Folder(method, tuple(fields.items()), targets or ("fc1", "fc2"))


FINDINGS: tuple[Found, ...] = (
    # Modes of parts.
    Found("a norm's own eval() after rewrite", "calls", Calls(NORM, after=(FROZEN_NORM,), training=True)),
    Found(
        "a norm's own eval() before rewrite",
        "calls",
        Calls(NORM, before=(FROZEN_NORM,), training=True),
    ),
    Found(
        "a dropout's own eval() in an adapted model",
        "calls",
        Calls(DROPOUT, "adapt", after=(FROZEN_DROPOUT,), training=True),
    ),
    # Buffers that training changes.
    Found(
        "statistics of a norm are lost by save",
        "calls",
        Calls(NORM, after=(Step("reload"), ops.Mode("", False)), training=True),
    ),
    Found(
        "remove has other statistics than the base",
        "calls",
        Calls(NORM, after=(Step("remove"),), training=True),
        "removed",
    ),
    # What else a model is.
    Found(
        "a bias set where there was none",
        "calls",
        Calls(Net(("Biasless",)), "adapt", after=(ops.Bias("b0.fc"),)),
    ),
    Found(
        "a buffer set where there was none",
        "calls",
        Calls(Net(("Buffers",)), "adapt", after=(ops.Buffer("b0", "none"),)),
    ),
    Found(
        "another class of a module",
        "calls",
        Calls(ACTIVATION, "adapt", after=(ops.Exchange("b0.act", "class"),)),
    ),
    Found("forward replaced on a graph's module", "calls", Calls(Net(), after=(ops.Forward("b0"),))),
    Found(
        "a pre-hook in an adapted model has a gradient without it",
        "calls",
        Calls(ACTIVATION, "adapt", before=(ops.Hook("b0.act", "pre"),)),
        "gradient",
    ),
    Found(
        "a pre-hook on a block changes the coefficient of an adapter",
        "calls",
        Calls(Net(), "adapt", before=(ops.Hook("b0", "pre"),), after=(Step("scaled"),)),
    ),
    Found(
        "a pre-hook on a block changes the coefficient of an adapter, traced",
        "calls",
        Calls(Net(("Linear", "Linear")), "traced", after=(Step("scaled"), ops.Hook("b0", "pre"))),
    ),
    Found(
        "a hook inside a block with a hook",
        "calls",
        Calls(Net(("Conv",)), after=(ops.Hook("b0"), ops.Hook("b0.conv"))),
    ),
    Found(
        "a hook on a linear that reads what its siblings read",
        "calls",
        Calls(Net(("SelfAttention",)), "adapt", before=(ops.Hook("b0.attention.q"),)),
    ),
    *(
        Found(f"what computes a weight is {words}, {path}", "calls", Calls(WEIGHT, path, after=(change,)))
        for words, change, path in (
            ("replaced", ops.Forward("b0.fc.parametrizations.weight"), "rewrite"),
            ("replaced", ops.Forward("b0.fc.parametrizations.weight"), "adapt"),
            ("replaced in part", ops.Forward("b0.fc.parametrizations.weight.0"), "adapt"),
            ("hooked", ops.Hook("b0.fc.parametrizations.weight.0"), "adapt"),
        )
    ),
    Found(
        "a pre-hook on a block changes what frozen keeps",
        "calls",
        Calls(Net(), "adapt", before=(ops.Hook("b0", "pre"),), after=(ops.Mode("", False), Call("frozen"))),
    ),
    Found(
        "an adapter that is added after a bias was taken away, traced",
        "calls",
        Calls(Net(), "traced", after=(ops.Bias("b0.fc"), Step("add"))),
        "AssertionError",
        "RAW",
    ),
    Found(
        "a bias taken away beside Full",
        "calls",
        Calls(Net(), variant="Full", after=(ops.Bias("b0.fc"),)),
        "RuntimeError",
        "RAW",
    ),
    Found(
        "a bias taken away beside Full, in an adapted model",
        "calls",
        Calls(Net(), "adapt", "Full", after=(ops.Bias("b0.fc"),)),
    ),
    Found(
        "a bias set beside Full, which trains none, in wrap",
        "calls",
        Calls(Net(), "wrap", "Full", before=(ops.Bias("b0.fc"),), after=(ops.Bias("b0.fc"),)),
        "AttributeError",
        "RAW",
    ),
    Found("a bias taken away beside Full, in wrap", "calls", Calls(Net(), "wrap", "Full", after=(ops.Bias("b0.fc"),))),
    Found("forward replaced on the model, traced", "calls", Calls(Net(), "traced", before=(ops.Forward(),))),
    # What a process says, and symbolic capture.
    Found("autocast regions, traced", "calls", Calls(Net(("Autocast",), True), "traced")),
    Found("no_grad regions, traced", "calls", Calls(Net(("NoGrad",)), "traced"), "gradient"),
    Found(
        "is_grad_enabled asked, traced",
        "calls",
        Calls(Net(("AsksGrad",)), "traced", after=(Call("no_grad"),)),
    ),
    Found(
        "is_autocast_enabled asked",
        "calls",
        Calls(Net(("AsksAutocast",), True), after=(Call("autocast"),)),
    ),
    Found("Python state, traced", "calls", Calls(Net(("Counts",)), "traced", after=(Call("grad"),))),
    # Rows.
    *(Found(f"rows: {name}", "rows", Rows((name,)), "output of rows") for name in ("flip", "roll")),
    # Stacks and PEFT.
    Found(
        "HiRA and an unfrozen weight in wrap",
        "stacks",
        Stack((llfx.HiRA(r=2, target_names="."),), unfrozen=True),
        "gradient of wrap",
    ),
    Found(
        "DoRA around a trained bias",
        "stacks",
        Stack((llfx.Full(weight=False, target_names="."), llfx.DoRA(r=2, target_names="."))),
        "output of a stack",
    ),
    Found(
        "blocks that are left out at random around others",
        "stacks",
        Stack((llfx.BOFT(block_size=2, dropout=0.3, target_names="."),) * 2, bias=False, training=True),
        "output of wrap",
    ),
    Found(
        "DoRA around LoRA",
        "stacks",
        Stack((llfx.LoRA(r=2, target_names="."), llfx.DoRA(r=2, target_names="."))),
        "output of a stack",
    ),
    Found("PEFT's BOFT with a bias", "peft", _folder("BOFT", boft_block_size=4, bias="all")),
    Found("PEFT's GLoRA with a bias", "peft", _folder("GLoRA", r=4, bias="all")),
    Found("PEFT's DoRA with a bias", "peft", _folder("LoRA", r=4, use_dora=True, bias="all")),
    Found(
        "PEFT's LoHa with effective convolutions",
        "peft",
        _folder("LoHa", "conv", r=4, alpha=6, use_effective_conv2d=True),
        "file after a step",
    ),
    Found(
        "PEFT's LoRA in MultiheadAttention",
        "peft",
        _folder("LoRA", "attention", r=4, lora_alpha=6),
        "file after a step",
    ),
    # Writes in place, traced, and in one mode alone.
    Found("an augmented assignment", "writes", Writes((Line("view"), Line("+= a number")))),
    Found("training overwrites a value", "writes", Writes((Line("clone"), Line("mul_", (1, 1), mode=True)))),
    Found(
        "training has an activation in place", "writes", Writes((Line("activation in place", mode=True), Line("tanh")))
    ),
    Found("training averages into a buffer", "writes", Writes((Line("an average", mode=True), Line("times a buffer")))),
    Found(
        "evaluation counts", "writes", Writes((Line("a count", mode=False), Line("plus the count"), Line("a count")))
    ),
    Found(
        "training updates statistics, and nothing else reads the norm",
        "writes",
        Writes(
            (Line("batch norm"), Line("view", mode=False), Line("batch norm", mode=False), Line("tanh")), exported=True
        ),
    ),
    # What gates that start at zero and examples of one number hide.
    Found("a condition behind a gate of zeros is left out", "starts", Starts(("plus a gate of the condition",))),
    Found("a condition behind a small gate is left out", "starts", Starts(("plus a gate of the condition",), 1e-6)),
    Found("a size of one decides behind a gate", "starts", Starts(("a gate of twice for one row",))),
    Found(
        "a condition that scales zeros is left out",
        "starts",
        Starts(("times a linear of the condition",), 0.1, "zeros"),
    ),
    Found("a mask of tokens that are alike is left out", "starts", Starts(("attend",), 0.1, "ones")),
    Found("a trace changes what zeros hide", "starts", Starts(("twice while it is traced",), 0.1, "zeros")),
    Found(
        "a size of one decides on zeros", "starts", Starts(("twice for one row", "times the condition"), 0.1, "zeros")
    ),
    Found(
        "a region without gradients before a computed weight, in both modes",
        "calls",
        Calls(Net(("AsksMode", "NoGrad", "NormedWeight"))),
    ),
    # Models of transformers, and defaults.
    Found(
        "problem_type is not what the model would have made it",
        "models",
        Models("BertForSequenceClassification", (Called("labels"),)),
        "config",
    ),
    Found("experts are left out", "defaults", Defaults("Qwen3Moe"), "left out in silence"),
    Found(
        "a new classifier is left out",
        "defaults",
        Defaults("a new classifier of Llama"),
        "untrained weights left out in silence",
    ),
    # Open since the first campaign of the account.
    Found(
        "a pre-hook on a module that hands its input on in evaluation",
        "calls",
        Calls(Net(("Linear", "Linear", "AsksMode")), after=(Call("grad"), ops.Hook("b2", "pre"))),
    ),
)
"""The findings."""


def known_findings() -> list[Finding]:
    """Return those that are open, for a campaign, which attributes trials to them."""
    open_ones = [each for each in FINDINGS if each.is_open]
    return [Finding(each.kind, each.trial, Verdict(each.outcome, each.aspect)) for each in open_ones]
