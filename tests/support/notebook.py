"""Cells of a notebook that define a variant, and the registry as another process would have it."""

from __future__ import annotations

import linecache
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import registry
from tests.support.conformance import randomise

HEADER = """
import dataclasses
import torch
import lora_lite_fx as llfx

SCALE = 2.0

def helper(x):
    return x * SCALE

"""
GATE = """
@llfx.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(llfx.Variant):
    target_names: object = "0"

    def params(self, site):
        return {"lora_g": llfx.ParamSpec((site.d_out,))}

    def forward(self, x, base, p):
        return base(x) * (1 + helper(p.lora_g))
"""
CHANGED = (
    "The source of Gate.forward, or of what it reads, is not what it was when the adapter was made (as"
    " notebook.Gate), so it may compute something else. Define Gate as it was. Or, if both compute the same, copy the"
    " tensors into a new adapter:"
    " llfx.load_adapter_state_dict(llfx.rewrite(model, Gate(...)), tensors). The tensors are"
    " llfx.adapter_state_dict(graph) or safetensors.torch.load_file(file)."
)
IN_PASS = r"(\nin pass \w+ \(.*\))?$"
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def forget_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after a test the classes that it made known."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_MADE_WITH", dict(registry._MADE_WITH))


def another_process(*classes: type[llfx.Variant]) -> None:
    """Behave as a process that has imported these classes only."""
    registry._MADE_WITH.clear()
    registry._REGISTRY.pop("Gate", None)
    for cls in classes:
        llfx.register(cls)


class Notebook:
    """Cells that share a namespace; their source is at hand as in IPython, or not."""

    cells = 0

    def __init__(self, module: str = "notebook") -> None:
        self.namespace: dict[str, Any] = {"__name__": module}
        self.run(HEADER)

    def run(self, source: str, at_hand: bool = True) -> Any:
        Notebook.cells += 1
        source = "\n" * Notebook.cells + source  # no code is where that of another cell was
        file = f"<cell {Notebook.cells}>"
        if at_hand:
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec", dont_inherit=True), self.namespace)
        return self.namespace.get("Gate")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def adapted(cls: Any) -> Any:
    gm = llfx.rewrite(model(), cls())
    randomise(gm, 0)
    return gm


def warned(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]
