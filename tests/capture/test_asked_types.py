"""Check that symbolic tracing answers what a model asks of the types of its values as in a call of the model."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.support.untouched import untouched

CFG = llfx.LoRA(r=2, target_names=".")
_COMPILED_AFTER_A_TRACE = """
import torch
import lora_lite_fx as llfx

llfx.rewrite(torch.nn.Sequential(torch.nn.Linear(4, 4)), llfx.LoRA(r=2, target_names="0"))

def asking(x):
    return 2 * x if isinstance(x, torch.Tensor) and hasattr(x, "shape") and getattr(x, "ndim") else x

print(torch.compile(asking, backend="eager", fullgraph=True)(torch.ones(1)).item())
"""
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Between = Callable[[Any, Any], Any]


class Net(nn.Module):
    """Two linears with a function between them."""

    count: Tensor

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.ones(()))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self, self.first(x)))


ASKED: dict[str, Between] = {
    "a tensor": lambda m, x: 2 * x if isinstance(x, Tensor) else x,
    "is_tensor": lambda m, x: 2 * x if torch.is_tensor(x) else x,
    "no tuple": lambda m, x: x[0] if isinstance(x, (list, tuple)) else 2 * x,
    "in a tree": lambda m, x: torch.utils._pytree.tree_map_only(Tensor, lambda leaf: 2 * leaf, [x])[0],
    "an attribute": lambda m, x: x if hasattr(x, "lengths") else 2 * x,
    "an attribute or a default": lambda m, x: x if getattr(x, "lengths", None) is not None else 2 * x,
    "an attribute that is there": lambda m, x: x + 2 * getattr(x, "T", m.count).sum(),
    "callable": lambda m, x: x if callable(x) else 2 * x,
    "a parameter": lambda m, x: 2 * x if isinstance(m.first.weight, nn.Parameter) else x,
    "a buffer": lambda m, x: x if isinstance(m.count, nn.Parameter) or not isinstance(m.count, Tensor) else 2 * x,
    "sizes": lambda m, x: 2 * x if isinstance(x.shape, tuple) and isinstance(x.size(0) + 1, int) else x,
}


@pytest.mark.parametrize("between", broad_after(5, ASKED.values()), ids=ASKED)
def test_a_graph_goes_the_way_of_the_model(between: Between) -> None:
    model = Net(between)
    with untouched(model):
        gm, wrapped = llfx.rewrite(model, CFG), llfx.wrap(model, CFG)
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    close(gm(X), wrapped(X), 1e-6, "output")
    assert builtins.isinstance.__module__ == builtins.hasattr.__module__ == builtins.getattr.__module__ == "builtins"


class TensorOrTuple(nn.Module):
    """A model that takes a tensor, or a tuple with one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.linear(x[0] if isinstance(x, tuple) else x)


def test_what_was_taken_for_a_tensor_has_to_be_one() -> None:
    model = TensorOrTuple()
    gm = llfx.rewrite(model, CFG)
    assert torch.equal(gm(X), model(X))
    with pytest.raises(AssertionError, match="x is not a tensor, as it was taken for"):
        gm((X,))


def caught(m: Any, x: Any) -> Any:
    try:
        return x if x.sum() > 0 else 2 * x
    except ValueError:
        return 3 * x


def test_what_cannot_be_traced_is_refused_though_the_model_catches_the_error() -> None:
    with pytest.raises(llfx.CaptureError, match="control flow"):
        llfx.rewrite(Net(caught), CFG)


def test_the_compiler_knows_the_functions_of_python_after_a_trace() -> None:
    """Dynamo lists them when it is imported, which a trace does in a new process."""
    command = [sys.executable, "-c", _COMPILED_AFTER_A_TRACE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "2.0\n", done.stderr[-2000:]
