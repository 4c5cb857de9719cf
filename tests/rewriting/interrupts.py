"""Check that an interrupt leaves the model and torch as they were, and that the next call is right.

    python -m tests.rewriting.interrupts

This is not part of the suite: an exception that passes through torch's own C++ can end the process. So interrupts come
at calls of this library's functions alone, which is where a handler of signals mostly runs.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.execution import frozen
from tests.support.conformance import randomise
from tests.support.models import tiny_llama
from tests.support.untouched import untouched

POINTS = 100
"""Interrupts of each function."""

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(16, (2, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(torch.relu(layer(x)))
        return x


CFG = llfx.DoRA(r=2, target_names=("layers",))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=1, vocab_size=16)).eval()


Case = tuple[Any, Callable[[], Any], Callable[[Any], Tensor]]


def rewriting(folder: Path) -> Case:
    model = net()
    return model, lambda: llfx.rewrite(model, CFG, (X,)), lambda gm: gm(X)


def adapting(folder: Path) -> Case:
    model = llama()
    return model, lambda: llfx.adapt(model, llfx.DoRA(r=2)), lambda adapted: adapted(TOKENS).logits


def loading(folder: Path) -> Case:
    model, path = net(), folder / "adapter.safetensors"
    gm = llfx.rewrite(model, CFG, (X,))
    randomise(gm, 1)
    llfx.save(gm, path)
    return model, lambda: llfx.load(model, path, (X,)), lambda gm: gm(X)


def merging(folder: Path) -> Case:
    gm = llfx.rewrite(net(), CFG, (X,))
    randomise(gm, 1)
    return gm, lambda: llfx.merge(gm), lambda merged: merged(X)


CASES = [rewriting, adapting, loading, merging]


def torch_state() -> tuple[Any, ...]:
    """Return the state of torch but its random numbers, of which start values take some."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
        dict(frozen._scopes),
    )


def calls_in(function: Callable[[], Any], stop: int = -1) -> int:
    """Run `function`, raise KeyboardInterrupt at the call of that number, and return how many calls there were."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        own = "/lora_lite_fx/" in frame.f_code.co_filename and not frame.f_code.co_name.startswith("__torch")
        if event == "call" and own:
            count += 1
            if count == stop:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def check(case: Callable[[Path], Case], folder: Path, points: int) -> None:
    model, function, run = case(folder)
    expected = run(function())
    calls = calls_in(function)
    draw = random.Random(0)
    before = torch_state()
    for _ in range(points):
        with untouched(model), suppress(KeyboardInterrupt):
            calls_in(function, draw.randrange(1, calls))
        assert torch_state() == before
    torch.testing.assert_close(run(function()), expected)


if __name__ == "__main__":
    for each in CASES:
        with tempfile.TemporaryDirectory() as made:
            check(each, Path(made), POINTS)
        print(each.__name__, POINTS, "interrupts", flush=True)
