"""Judge a trial: run it, and say whether the library computed what an oracle computes, refused, or was wrong."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import lora_lite_fx as llfx

OUTCOMES = ("equal", "refused", "warned", "WRONG", "RAW", "void")
"""What becomes of a trial.

- equal: all results are those of the oracle.
- refused: an error of this library.
- warned: a result is not the oracle's, and a warning of this library said so before.
- WRONG: a result is not the oracle's, in silence.
- RAW: an error that is not this library's.
- void: the oracle itself cannot run this, so there is nothing to compare with.
"""

_PACKAGE = str(Path(llfx.__file__).resolve().parent)


class Trial(Protocol):
    """A trial: a frozen dataclass, whose `repr` is code that makes it again."""

    def check(self) -> None:
        """Compare what the library computes with the oracle.

        Raises:
            Wrong: they differ.
            Void: the oracle cannot run this.
        """

    def features(self) -> frozenset[str]:
        """Return what the trial consists of, in words: a finding is named by the words of its smallest trial."""


class Wrong(Exception):
    """What the library computes is not what the oracle computes.

    Args:
        what: which result, such as "output", "gradient", "file".
        detail: how far it is off, and after which operation.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(f"{what}: {detail}")
        self.what, self.detail = what, detail


class Void(Exception):
    """The oracle cannot run the trial."""


@dataclass(frozen=True)
class Verdict:
    """What became of a trial.

    Args:
        outcome: one of `OUTCOMES`.
        aspect: of what is WRONG, which result; of what is RAW, the class of the error.
        detail: the message.
    """

    outcome: str
    aspect: str = ""
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether this is a finding."""
        return self.outcome in ("WRONG", "RAW")


def judge(trial: Trial) -> Verdict:
    """Run a trial and return the verdict."""
    with warnings.catch_warnings(record=True) as heard, torch.random.fork_rng():
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            trial.check()
        except Wrong as error:
            ours = [str(each.message) for each in heard if is_ours(each)]
            return Verdict("warned", error.what, ours[0]) if ours else Verdict("WRONG", error.what, str(error))
        except Void as error:
            return Verdict("void", "", str(error))
        except llfx.AdapterError as error:
            return Verdict("refused", type(error).__name__, str(error))
        except Exception as error:
            if _is_ours_inside(error):
                return Verdict("refused", type(error).__name__, str(error))
            return Verdict("RAW", type(error).__name__, f"{error}\n{_place(error)}")
    return Verdict("equal")


def is_ours(heard: Any) -> bool:
    """Return whether a warning is this library's and says that something does not act, or acts otherwise."""
    says = any(words in str(heard.message) for words in ("The way out", "does not act", "trains otherwise"))
    return issubclass(heard.category, UserWarning) and says


def _is_ours_inside(error: BaseException) -> bool:
    """Return whether torch.compile has wrapped an error of this library."""
    causes = (error.__cause__, error.__context__)
    return any(isinstance(cause, llfx.AdapterError) for cause in causes)


def _place(error: BaseException) -> str:
    """Return the last line of this library or of the tests that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"


@contextmanager
def the_oracle() -> Iterator[None]:
    """Let an error in the oracle make the trial void."""
    try:
        yield
    except Exception as error:
        raise Void(f"{type(error).__name__}: {error}") from error


def require_close(actual: Any, expected: Any, tolerance: float, what: str, where: str = "") -> None:
    """Compare two results: tensors, or tuples, lists, dicts and outputs of transformers that hold tensors.

    Raises:
        Wrong: their structure, shapes, dtypes or values differ.
    """
    if isinstance(expected, Tensor):
        if not isinstance(actual, Tensor):
            raise Wrong(what, f"{where}: {type(actual).__name__} in place of a tensor")
        if actual.shape != expected.shape:
            raise Wrong(what, f"{where}: shape {tuple(actual.shape)} in place of {tuple(expected.shape)}")
        if actual.dtype != expected.dtype:
            raise Wrong(f"{what} dtype", f"{where}: {actual.dtype} in place of {expected.dtype}")
        one, other = actual.detach().double(), expected.detach().double()
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        off = float((one - other).abs().max()) / size if other.numel() else 0.0
        if not off <= tolerance:
            raise Wrong(what, f"{where}: off by {off:.2g} of the largest value")
        return
    if isinstance(expected, dict):
        missing = expected.keys() ^ actual.keys()
        if missing:
            raise Wrong(what, f"{where}: {sorted(map(str, missing))[0]} is there once")
        for key, value in expected.items():
            require_close(actual[key], value, tolerance, what, f"{where}{key}")
    elif isinstance(expected, (tuple, list)):
        if len(actual) != len(expected):
            raise Wrong(what, f"{where}: {len(actual)} results in place of {len(expected)}")
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            require_close(one, other, tolerance, what, f"{where}[{index}]")
