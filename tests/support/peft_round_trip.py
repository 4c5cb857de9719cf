"""An adapter through files: from PEFT to us and back, with the outputs compared on the way."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import AdapterError

TOLERANCE = 2e-5  # of the largest output


@dataclass(frozen=True)
class Outcome:
    """What became of an adapter: of reading PEFT's file, and of writing what was read. Each is "equal" if right."""

    read: str
    written: str = ""
    why: str = ""


def round_trip(model: nn.Module, config: peft.PeftConfig, x: Tensor) -> Outcome:
    """Return the outcome for an adapter that PEFT makes of `config`, with random values.

    Args:
        model: the base, in evaluation mode.
        config: what PEFT adds to it.
        x: the input for which outputs are compared.
    """
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
        try:
            gm = llfx.load_peft(model, folder, (x,)).eval()
        except AdapterError as error:
            return Outcome("refused", "", str(error).replace(folder, "DIR"))
    read = compared(gm(x), expected, changed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            llfx.save_peft(gm, folder)
        except AdapterError as error:
            return Outcome(read, "refused", str(error).replace(folder, "DIR"))
        try:
            again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        except Exception as error:
            return Outcome(read, "wrong", f"PEFT: {type(error).__name__}: {error}")
        with torch.no_grad():
            return Outcome(read, compared(again(x), expected, changed))


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
