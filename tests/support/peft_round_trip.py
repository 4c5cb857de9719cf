"""An adapter through files, from PEFT to us and back: outputs compared on the way, and one step of training."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import AdapterError

TOLERANCE = 2e-5  # of the largest output
STEP = 1e-4  # of the largest change that a step makes to a tensor
RATE = 0.1
TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What became of an adapter: of reading PEFT's file, of writing what was read, of training it by one step.

    Each is "equal" if right. A step is right if it changes the tensors in our file as it changes those in PEFT's. It is
    one of plain gradient descent in training mode, so that these changes are the gradients by the names of the files.
    It is "said" if it changes them otherwise and reading the file warns of that.
    """

    read: str
    written: str = ""
    why: str = ""
    trained: str = ""


EQUAL = Outcome("equal", "equal", trained="equal")


def round_trip(model: nn.Module, config: peft.PeftConfig, x: Tensor) -> Outcome:
    """Return the outcome for an adapter that PEFT makes of `config`, with random values.

    Args:
        model: the base, in evaluation mode.
        config: what PEFT adds to it.
        x: the input for which outputs are compared.
    """
    model, config = without_dropout(model, config)
    generator = torch.Generator().manual_seed(0)
    try:
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    except Exception as error:
        return Outcome("PEFT fails", "", f"{type(error).__name__}: {error}")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        expected = theirs(x)
        changed = float((expected - model(x)).abs().max())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        files = [safetensors.torch.load_file(Path(folder) / TENSORS)]
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                gm = llfx.load_peft(model, folder, (x,)).eval()
        except AdapterError as error:
            return Outcome("refused", "", str(error).replace(folder, "DIR"))
    read = compared(gm(x), expected, changed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            llfx.save_peft(gm, folder)
        except AdapterError as error:
            return Outcome(read, "refused", str(error).replace(folder, "DIR"))
        files.append(safetensors.torch.load_file(Path(folder) / TENSORS))
        try:
            again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        except Exception as error:
            return Outcome(read, "wrong", f"PEFT: {type(error).__name__}: {error}")
        with torch.no_grad():
            written = compared(again(x), expected, changed)
    trained, why = trained_equally(theirs, gm, x, files)
    if trained == "otherwise" and any("trains otherwise" in str(warning.message) for warning in said):
        trained = "said"
    return Outcome(read, written, why, trained)


def trained_equally(theirs: Any, ours: nn.Module, x: Tensor, before: list[dict[str, Tensor]]) -> tuple[str, str]:
    """Train PEFT's model and ours by one step, and compare how the tensors of the files change.

    Args:
        theirs, ours: the models, with equal adapters.
        x: the input.
        before: the tensors of their files and of ours.

    Returns:
        "equal", "otherwise" or "not written"; and the tensors that change otherwise.
    """
    results = []
    for model in (theirs, ours):
        model.train()
        step(model, [parameter for parameter in model.parameters() if parameter.requires_grad], x)
        with torch.no_grad():
            results.append(model.eval()(x))
    after = []
    for save in (theirs.save_pretrained, lambda folder: llfx.save_peft(ours, folder)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                save(folder)
            except AdapterError as error:
                return "not written", str(error).replace(folder, "DIR")
            after.append(safetensors.torch.load_file(Path(folder) / TENSORS))
    # What our file has in another form, such as PiSSA as an ordinary LoRA, changes the results.
    files = (*before, *after)
    common = sorted(set.intersection(*(set(file) for file in files)))
    same = [
        key
        for key in common
        if len({file[key].shape for file in files}) == 1 and torch.allclose(before[0][key], before[1][key], atol=1e-6)
    ]
    expected, actual = ({key: file[key] - old[key] for key in same} for file, old in zip(after, before, strict=True))
    largest = max((float(change.abs().max()) for change in expected.values()), default=0.0)
    wrong = []
    for key in same:
        own, difference = (float(change.abs().max()) for change in (expected[key], actual[key] - expected[key]))
        value = max(float(file[key].abs().max()) for file in files)
        if not difference <= STEP * own + 1e-6 * max(value, largest):
            wrong.append(f"{key} by {difference:.2g} of {own:.2g}")
    apart = float((results[1] - results[0]).abs().max())
    if not apart <= STEP * max(1.0, float(results[0].abs().max())):
        wrong.append(f"the result after the step by {apart:.2g} of {float(results[0].abs().max()):.2g}")
    return ("otherwise", "; ".join(wrong)) if wrong else ("equal", "")


def without_dropout(model: nn.Module, config: peft.PeftConfig) -> tuple[nn.Module, peft.PeftConfig]:
    """Return copies that drop nothing in training, because PEFT and we draw what to drop in other orders."""
    model, config = copy.deepcopy(model), copy.deepcopy(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return model, config


def step(model: nn.Module, parameters: Iterable[nn.Parameter], x: Tensor) -> None:
    """Subtract from each parameter the gradient of a fixed random sum of the outputs."""
    optimizer = torch.optim.SGD([*parameters], lr=RATE)
    y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * direction).sum().backward()
    optimizer.step()


def compared(actual: Tensor, expected: Tensor, changed: float) -> str:
    """Return "equal", or by how much the outputs differ.

    Args:
        actual, expected: the outputs.
        changed: by how much the adapter changes the output, without which the comparison would say nothing.
    """
    difference = float((actual.detach() - expected).abs().max())
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= bound:
        return f"wrong by {difference:.2g}"
    return "equal" if changed > 10 * bound or changed > 20 * difference else "equal to the base too"
