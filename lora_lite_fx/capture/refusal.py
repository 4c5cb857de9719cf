"""Name the line that could not be captured, and the ways out."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ..errors import COMPILE_INSTEAD, CaptureError

OF_OTHERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""What the files of torch and of this library begin with."""


def line_of(frame: FrameType) -> str:
    """Return the line that a frame is at, for messages."""
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"`{linecache.getline(file, number).strip()}` ({file}:{number})"


def is_of_others(frame: FrameType) -> bool:
    """Return whether the code of a frame is torch's or this library's, and not the model's."""
    return frame.f_code.co_filename.startswith(OF_OTHERS)


def own_line(stack_trace: str) -> str:
    """Return the last line of the model's own code in the stack trace of a node, after a space; empty without one."""
    frames = re.findall(r'File "([^"]*)", line (\d+), in .*\n +(.*)', stack_trace)
    own = [frame for frame in frames if not frame[0].startswith(OF_OTHERS)]
    return f" at `{own[-1][2].strip()}` ({own[-1][0]}:{own[-1][1]})" if own else ""


def line_of_error(error: BaseException) -> str:
    """Return the last line of the model's own code that an error passed, after a space; empty without one."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(OF_OTHERS) and Path(frame.filename).exists()
    ]
    return f" at `{frames[-1].line}` ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def in_one_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, without the full stop at the end."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()}".rstrip(": .")


def refusal(model: nn.Module, error: Exception, how: str) -> CaptureError:
    """Return an error that names the line of the user's code which could not be captured, and the ways out."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    ways_out = "check the inputs, replace the construct by tensor operations (torch.where, torch.cond),"
    ways_out += f" adapt the submodules around it, or {COMPILE_INSTEAD}"
    if how.startswith("symbolic"):
        ways_out = "pass example_inputs, so that torch.export captures the model on real shapes, or " + ways_out
    return CaptureError(
        f"{type(model).__name__} could not be captured by {how}{line_of_error(error)}: {reason.strip()}"
        f"\nThe way out: {ways_out}."
    )
