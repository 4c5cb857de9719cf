"""The graph of one layer adapted by each variant, as text that a reviewer reads.

There is one file per registered variant, `golden/<variant>.txt`, and some for LoRA at other kinds of sites. All sizes
in the configs are 2 and alpha is 4. A file lists:

- the tensors of the adapter, with their shapes, and which of them are trained;
- the operations of the layer. In front of each: `+` for an inserted one, `~` for an operation of the layer that reads
  another value than before, nothing for one that is as it was. Then its name, its shape, and what it computes.

After a change that is meant, or for a new variant, write the files again and read the difference:

    python -m tests.passes.test_goldens            # all
    python -m tests.passes.test_goldens LoRA DoRA  # these
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.insertion import inner_name, insertions, is_inserted
from lora_lite_fx.graph.tensors import tensor_of
from tests.support.captured import captured
from tests.support.conformance import calibration, for_any_linear, small

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


class LookUp(nn.Module):
    """A layer that looks up embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.embed(ids))


class Convolution(nn.Module):
    """A layer that convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


BASE = """
  fc      (n, 6)  linear(x, fc.weight, fc.bias)
  relu    (n, 6)  relu(fc)
  proj    (n, 4)  linear(relu, proj.weight, proj.bias)
  result  (n, 4)  add(x, proj)
"""

# LoRA at other kinds of sites: the layer, its inputs, and the kind.
KINDS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], str]] = {
    "LoRA at an embedding": (LookUp, (torch.ones(2, 3, dtype=torch.int64),), "embedding"),
    "LoRA at a convolution": (Convolution, (torch.ones(2, 2, 6, 6),), "conv"),
}


def adapted(name: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the graph of a layer, before and after the case of that name is inserted."""
    layer, inputs, kind = KINDS.get(name, (Layer, EXAMPLE, "linear"))
    variant = llfx.registry()[name.split()[0]]
    targets = {"target_names": ("^(proj|embed|conv)$",), "target_kinds": (kind,)}
    cfg = small(variant, 2, alpha=4, **targets, **FURTHER.get(name, {}))
    _, base = captured(layer, inputs=inputs)
    return base, llfx.rewrite(base, cfg, calibration=calibration(cfg, None, inputs))


def text(base: fx.GraphModule, gm: fx.GraphModule) -> str:
    """Return the adapter's tensors and the operations of `gm`, compared to `base`, as this module's docstring says."""
    sections = [_tensors(gm), _operations(base, gm)]
    return "\n\n".join(_aligned(rows) for rows in sections if rows)


def _tensors(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    paths = dict.fromkeys(path for insertion in insertions(gm.graph) for path in insertion.tensors.values())
    tensors = {path: tensor_of(gm, path) for path in paths}
    return [
        (f"  {path}", str(tuple(tensor.shape)), "trained" if tensor.requires_grad else "frozen")
        for path, tensor in tensors.items()
    ]


def _operations(base: fx.GraphModule, gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    before = {node.name: str(node.args) for node in base.graph.nodes}
    names = {node: str(node.target) for node in gm.graph.nodes if node.op != "call_function"}
    operations = [node for node in gm.graph.nodes if node not in names]
    names |= {node: _base_name(node) for node in operations if not is_inserted(node)}
    rows = []
    for node in operations:
        if is_inserted(node):
            names[node] = _numbered(_operator(node), set(names.values()))
        mark = "+" if is_inserted(node) else " " if str(node.args) == before[node.name] else "~"
        arguments = [_argument(value, names) for value in node.args]
        arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if key != "pin_memory"]
        call = f"{_operator(node)}({', '.join(arguments)})"
        rows.append((f"{mark} {names[node]}", _shape(node), call))
    return rows


def _base_name(node: fx.Node) -> str:
    """Return `result` for the layer's result, the module's name for a module's last operation, else the node's name."""
    if any(user.op == "output" for user in node.users):
        return "result"
    module = inner_name(node)
    if module and all(inner_name(user) != module or is_inserted(user) for user in node.users):
        return module
    return node.name


def _operator(node: fx.Node) -> str:
    return str(node.target.__name__).split(".")[0].strip("_")  # type: ignore[union-attr]


def _numbered(name: str, taken: set[str]) -> str:
    """Return `name`, with a number if it is taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return names[value] if isinstance(value, fx.Node) else str(value)


def _shape(node: fx.Node) -> str:
    """Return the shape of the node's value, with `n` for sizes that are left open."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "-"
    sizes = ["n" if isinstance(size, torch.SymInt) else str(size) for size in value.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _aligned(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {last}" for name, shape, last in rows)


def own_variants() -> list[str]:
    """Return the names of the variants that this package registers."""
    return [name for name, cls in for_any_linear().items() if cls.__module__.startswith("lora_lite_fx.")]


CASES = [*own_variants(), *KINDS]


def path_of(case: str) -> Path:
    """Return the file of a case."""
    return GOLDEN / f"{case.replace(' ', '_')}.txt"


def test_the_graph_of_the_layer_before() -> None:
    base = llfx.capture(Layer(), EXAMPLE)
    assert text(base, base) == BASE.strip("\n")


@pytest.mark.parametrize("case", CASES)
def test_the_graph_of_the_adapted_layer_is_that_of_its_file(case: str) -> None:
    path = path_of(case)
    assert path.exists(), f"{case} has no golden graph. Run `{COMMAND} {case!r}`, read {path.name}, and commit it."
    assert text(*adapted(case)) == path.read_text(encoding="utf-8").strip("\n"), (
        f"The graph of {case} changed. If that is meant, run `{COMMAND} {case!r}` and read the difference."
    )


def test_every_golden_graph_belongs_to_a_case() -> None:
    assert sorted(GOLDEN.glob("*.txt")) == sorted(path_of(case) for case in CASES)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        path_of(case).write_text(text(*adapted(case)) + "\n", encoding="utf-8")
