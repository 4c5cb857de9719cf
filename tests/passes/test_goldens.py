"""The graph of one layer adapted by each variant, as text that a reviewer reads.

One file per registered variant, `golden/<variant>.txt`. All sizes in the configs are 2 and alpha is 4. A file lists:

- the tensors of the adapter, with their shapes, and which of them are trained;
- the operations of the layer. In front of each: `+` for an inserted one, `~` for an operation of the layer that reads
  another value than before, nothing for one that is as it was. Then its name, its shape, and what it computes.

After a change that is meant, or for a new variant, write the files again and read the difference:

    python -m tests.passes.test_goldens            # all variants
    python -m tests.passes.test_goldens LoRA DoRA  # these
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.provenance import insertions, is_inserted
from lora_lite_fx.graph.tensors import tensor_of
from lora_lite_fx.rewriting.base_graph import base_graph
from tests.support.conformance import calibration, small

GOLDEN = Path(__file__).parent / "golden"
COMMAND = "python -m tests.passes.test_goldens"
EXAMPLE = (torch.ones(2, 4),)
# What a variant's config has besides the sizes and alpha.
FURTHER: dict[str, dict[str, Any]] = {"LoRA": {"dropout": 0.5}}


class Layer(nn.Module):
    """A residual layer, of which `proj` is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.proj(torch.relu(self.fc(x)))
        return y


BASE = """
  fc      (n, 6)  linear(x, fc.weight, fc.bias)
  relu    (n, 6)  relu(fc)
  proj    (n, 4)  linear(relu, proj.weight, proj.bias)
  result  (n, 4)  add(x, proj)
"""
BASE_NAMES = ("fc", "relu", "proj", "result")


def adapted(name: str) -> fx.GraphModule:
    """The layer adapted by the registered variant of that name."""
    cfg = small(llfx.registry()[name], 2, alpha=4, target_names=("proj",), **FURTHER.get(name, {}))
    return llfx.rewrite(Layer(), cfg, EXAMPLE, calibration=calibration(cfg, None, EXAMPLE))


def text(gm: fx.GraphModule) -> str:
    """The adapter's tensors and the operations of `gm`, as the module's docstring describes it."""
    sections = [_tensors(gm), _operations(gm)]
    return "\n\n".join(_aligned(rows) for rows in sections if rows)


def _tensors(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    paths = dict.fromkeys(path for insertion in insertions(gm.graph) for path in insertion.tensors.values())
    tensors = {path: tensor_of(gm, path) for path in paths}
    return [
        (f"  {path}", str(tuple(tensor.shape)), "trained" if tensor.requires_grad else "frozen")
        for path, tensor in tensors.items()
    ]


def _operations(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    before = {node.name: str(node.args) for node in base_graph(Layer(), EXAMPLE).graph.nodes}
    base_names = iter(BASE_NAMES)
    names: dict[fx.Node, str] = {}
    rows = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            names[node] = str(node.target)
            continue
        names[node] = _numbered(_operator(node), names) if is_inserted(node) else next(base_names)
        mark = "+" if is_inserted(node) else " " if str(node.args) == before[node.name] else "~"
        arguments = [_argument(value, names) for value in node.args]
        arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if key != "pin_memory"]
        call = f"{_operator(node)}({', '.join(arguments)})"
        rows.append((f"{mark} {names[node]}", _shape(node), call))
    return rows


def _operator(node: fx.Node) -> str:
    return str(node.target.__name__).split(".")[0].strip("_")  # type: ignore[union-attr]


def _numbered(name: str, names: dict[fx.Node, str]) -> str:
    """`name`, with a number if it is taken."""
    taken = {*names.values(), *BASE_NAMES}
    numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return names[value] if isinstance(value, fx.Node) else str(value)


def _shape(node: fx.Node) -> str:
    """The shape of the node's value; the number of rows is `n`."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "-"
    sizes = ["n" if isinstance(size, torch.SymInt) else str(size) for size in value.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _aligned(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {last}" for name, shape, last in rows)


def own_variants() -> list[str]:
    """The names of the variants that this package registers."""
    return [name for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")]


def test_the_graph_of_the_layer_before() -> None:
    assert text(base_graph(Layer(), EXAMPLE)) == BASE.strip("\n")


@pytest.mark.parametrize("name", own_variants())
def test_the_graph_of_the_adapted_layer_is_that_of_its_file(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    assert path.exists(), f"{name} has no golden graph. Run `{COMMAND} {name}`, read {path.name}, and commit it."
    assert text(adapted(name)) == path.read_text(encoding="utf-8").strip("\n"), (
        f"The graph of {name} changed. If that is meant, run `{COMMAND} {name}` and read the difference."
    )


def test_every_golden_graph_is_that_of_a_registered_variant() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(own_variants())


if __name__ == "__main__":
    for variant in sys.argv[1:] or own_variants():
        (GOLDEN / f"{variant}.txt").write_text(text(adapted(variant)) + "\n", encoding="utf-8")
