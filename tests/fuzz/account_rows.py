"""The rows of the account: what a call depends on. See `account.py` for what the words mean."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.fuzz import operations as ops
from tests.fuzz.account import (
    ANSWER,
    EVERYWHERE,
    FOLLOWED,
    NO_CLASS,
    NO_MODULE,
    NO_TRACE,
    WARNED,
    Row,
    backward_hook,
    cells,
    field_of_config,
    leave,
    mask,
    parametrized,
    untied,
)
from tests.fuzz.account_models import Ask, Llama, Scaled, Subject, TypesOfCaches

MODES = Subject(("BatchNorm", "Dropout", "MLP"))
MLP = Subject(("MLP",))
IN_SINGLE = Subject(("MLP",), single=True)
BUFFERS = Subject(("Buffers", "MLP"))


def tensors() -> list[Row]:
    """Return the rows of parameters and buffers."""
    rows = [
        Row("parameters", f"{where} parameter, {how}", EVERYWHERE, change=ops.Tensors(part, how).of)
        for where, part in (("an adapted module's", "b0.up"), ("another module's", "b1.norm"))
        for how in ("replaced", "in place", "data")
    ]
    no_place = "refused: the graph has no place for it"
    by_one_name = "refused: the graph reads it by one of its names"
    return [
        *rows,
        Row("parameters", "requires_grad of a frozen weight", EVERYWHERE, change=ops.Unfreeze("b0.up").of),
        Row(
            "parameters",
            "a bias set where there was none",
            cells(no_place),
            Subject(("Biasless",)),
            ops.Bias("b0.fc").of,
        ),
        Row("parameters", "a bias taken away", EVERYWHERE, change=ops.Bias("b0.up").of),
        Row("parameters", "a parametrization put on a weight", EVERYWHERE, change=parametrized),
        Row(
            "parameters",
            "a tied weight untied",
            cells(by_one_name, adapt=by_one_name, traced=NO_TRACE),
            Llama(tied=True),
            untied,
        ),
        Row("buffers", "another tensor", EVERYWHERE, BUFFERS, ops.Buffer("b0", "assigned").of),
        Row("buffers", "in place", EVERYWHERE, BUFFERS, ops.Buffer("b0", "in place").of),
        Row("buffers", "set where there was None", cells(no_place), BUFFERS, mask),
    ]


def modes() -> list[Row]:
    """Return the rows of training and evaluation mode."""
    norm, drop = "b0.norm", "b1.drop"
    frozen: Any = {"subject": MODES, "training": True}
    return [
        Row("mode", "train() of the model", EVERYWHERE, MODES, ops.Mode("", True).of),
        Row("mode", "eval() of the model", EVERYWHERE, change=ops.Mode("", False).of, **frozen),
        Row("mode", "eval() of a norm, before capture", EVERYWHERE, before=ops.Mode(norm, False).of, **frozen),
        Row("mode", "eval() of a dropout, before capture", EVERYWHERE, before=ops.Mode(drop, False).of, **frozen),
        Row("mode", "train() of a norm, before capture", EVERYWHERE, MODES, before=ops.Mode(norm, True).of),
        Row("mode", "eval() of a norm, after capture", EVERYWHERE, change=ops.Mode(norm, False).of, **frozen),
        Row("mode", "eval() of a dropout, after capture", EVERYWHERE, change=ops.Mode(drop, False).of, **frozen),
        Row("mode", "train() of a norm, after capture", EVERYWHERE, MODES, ops.Mode(norm, True).of),
    ]


def modules() -> list[Row]:
    """Return the rows of modules and of what stands on them."""
    on_instance = "refused: a warning names the module"
    without_tensors = cells(NO_MODULE, traced=FOLLOWED)
    hooked = cells(FOLLOWED, wrap="refused: `wrap` takes modules that only multiply")
    return [
        Row("modules", "another module in the place of one", without_tensors, change=ops.Exchange("b0.act").of),
        Row("modules", "another class, without tensors", without_tensors, change=ops.Exchange("b0.act", "class").of),
        Row(
            "modules", "another class, of an adapted module", cells(NO_CLASS), change=ops.Exchange("b0.up", "class").of
        ),
        Row("modules", "numbers and lists", cells(NO_MODULE), Subject(("Settings", "MLP")), ops.Setting("b0").of),
        Row("modules", "objects, lists in lists", cells(NO_MODULE), Subject(("Objects", "MLP")), ops.Setting("b0").of),
        Row("modules", "forward replaced", cells(on_instance, adapt=on_instance), change=ops.Forward("b0.up").of),
        Row("modules", "forward replaced, before capture", EVERYWHERE, before=ops.Forward("b0.act").of),
        Row("hooks", "a forward hook, before capture", hooked, before=ops.Hook("b0.up").of),
        Row("hooks", "a forward pre-hook, before capture", EVERYWHERE, before=ops.Hook("b0.act", "pre").of),
        Row("hooks", "a forward hook", EVERYWHERE, change=ops.Hook("b0.up").of),
        Row(
            "hooks",
            "a pre-hook on a norm",
            cells(WARNED, adapt=WARNED, traced=FOLLOWED),
            change=ops.Hook("b1.norm", "pre").of,
        ),
        Row("hooks", "a full backward hook", EVERYWHERE, change=backward_hook),
    ]


def calls() -> list[Row]:
    """Return the rows of arguments, configs and the model as a whole."""
    scale, as_tuple = (Ask(keywords=(pair,)) for pair in (("scale", torch.tensor(2.0)), ("return_dict", False)))
    other_call = "refused: the graph serves the calls that it was captured for"
    in_config = cells("n/a: a graph has no config", traced=NO_TRACE)
    checkpointing = cells(
        "n/a: `rewrite(..., checkpoint_layers=True)` decides it",
        backend="refused: `torch.compile` makes graphs of their own of checkpointed layers",
        traced=NO_TRACE,
    )
    return [
        Row("calls", "an argument that may be left out, given", cells(other_call), Scaled(), ask=scale),
        Row("calls", "return_dict=False", cells(other_call, traced=NO_TRACE), Llama(), ask=as_tuple),
        Row("calls", "a field of the config", in_config, Llama(), field_of_config("output_hidden_states", True)),
        Row("whole", "copy.deepcopy", EVERYWHERE, change=copy.deepcopy),
        Row("whole", "to(float64)", EVERYWHERE, IN_SINGLE, lambda model: model.double()),
        Row(
            "whole",
            "gradient checkpointing",
            checkpointing,
            Llama(),
            lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
            training=True,
        ),
    ]


def process() -> list[Row]:
    """Return the rows of what a process says."""
    asked = cells(f"refused: {ANSWER}", adapt=f"refused: {ANSWER}", wrap="refused: `wrap` captures the model")
    held = cells(f"refused: {ANSWER}")
    no_cache = "n/a: `rewrite` leaves caches out of its graph"
    one_type = "ignored: one graph serves training with and without autocast, and no later call reads this cache"
    line = "refused: the error names the line"
    counted = cells(line, adapt=line, wrap=line)
    return [
        Row("process", "no_grad at the call", EVERYWHERE, ask=Ask("no_grad")),
        Row("process", "inference_mode at the call", EVERYWHERE, ask=Ask("inference")),
        Row("process", "autocast at the call", EVERYWHERE, IN_SINGLE, ask=Ask("autocast")),
        Row(
            "process",
            "autocast at a training call, and the type of the cache that it returns",
            cells(no_cache, adapt=one_type, traced=NO_TRACE),
            TypesOfCaches(),
            ask=Ask("autocast"),
            training=True,
        ),
        Row("process", "autocast at the capture alone", EVERYWHERE, Subject(("MLP",), True, within="autocast")),
        Row("process", "no_grad at the capture alone", EVERYWHERE, Subject(("MLP",), within="no_grad")),
        Row("process", "inference_mode at the capture alone", EVERYWHERE, Subject(("MLP",), within="inference")),
        Row("process", "is_grad_enabled(), asked", asked, Subject(("AsksGrad", "MLP")), ask=Ask("no_grad")),
        Row(
            "process",
            "is_autocast_enabled(), asked",
            held,
            Subject(("AsksAutocast", "MLP"), True),
            ask=Ask("autocast"),
        ),
        Row("process", "a region without gradients", EVERYWHERE, Subject(("NoGrad", "MLP")), before=leave),
        Row("process", "a region of autocast", EVERYWHERE, Subject(("Autocast", "MLP"), True), before=leave),
        Row("process", "the default dtype of new tensors", held, Subject(("AsksDtype", "MLP")), ask=Ask("float64")),
        Row(
            "process",
            "deterministic algorithms, asked",
            held,
            Subject(("AsksDeterminism", "MLP")),
            ask=Ask("deterministic"),
        ),
        Row(
            "process",
            "Python state that a call changes",
            counted,
            Subject(("Counts", "MLP")),
            before=leave,
            ask=Ask(times=2),
        ),
    ]


ROWS: tuple[Row, ...] = (*tensors(), *modes(), *modules(), *calls(), *process())
"""The account."""
