"""Private names of other libraries are read in `compat/` alone, however they are written."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import pytest

import lora_lite_fx.compat.dynamo
import lora_lite_fx.compat.torch
import lora_lite_fx.compat.transformers  # noqa: F401  # each file registers its names
from lora_lite_fx.compat.names import NAMES

ROOT = Path(__file__).resolve().parents[2]

KNOWN = {path.rpartition(".")[2] for path in NAMES}
"""The last parts of the names that are looked up."""
OF_PYTHON = {"_replace", "_fields", "_asdict", "_getframe"}
"""Documented names of Python that look private."""
STANDING_ALONE = {"lora_lite_fx/hand_over/swappable.py": {"_inductor"}}
"""Files that are copied to where this library is not, and so cannot ask `compat/`, with the names that they read."""
LIBRARIES = {"torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "optimum", "diffusers", "peft"}
"""The libraries whose names a text may spell out, from the first part to the last."""
READERS = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "itemgetter"}
"""Functions that read an attribute by a text."""


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")


def private_parts(text: object) -> list[str]:
    """The private names in a dotted path of another library, such as the name of a logger; none in any other text."""
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) < 2 or parts[0] not in LIBRARIES or not all(part.isidentifier() for part in parts):
        return []
    return [part for part in parts if is_private(part)]


def sources(root: Path) -> list[Path]:
    files = [*(root / "lora_lite_fx").rglob("*.py"), *(root / "passes").rglob("*.py")]
    links = [path for path in (root / "lora_lite_fx").iterdir() if path.is_symlink()]
    return sorted(
        file for file in files if not any(link in file.parents for link in links) and "compat" not in file.parts
    )


def own_names(trees: Iterable[ast.Module]) -> set[str]:
    """The private names that the package gives: of functions and classes, and of attributes in their bodies."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)} | OF_PYTHON


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def ends_of_names(tree: ast.Module) -> Iterator[ast.expr]:
    """The texts that are the end of a longer one, as in f"{name}_apply"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield from node.values
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "removesuffix":
            yield from node.args


def private_names(tree: ast.Module, own: Set[str]) -> Iterator[tuple[int, str]]:
    """The lines that read private names of others: by import, as an attribute of whatever, or by a text."""
    ends = set(map(id, ends_of_names(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or (node.attr in KNOWN and not _is_self(node.value)):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and (parts := private_parts(node.value)):
            yield from ((node.lineno, part) for part in parts)
        elif isinstance(node, ast.Constant) and is_private(node.value) and node.value in KNOWN:
            if id(node) not in ends:
                yield node.lineno, str(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in READERS:
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(text)) for text in texts if is_private(text) and text not in own)


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sources(ROOT)}


@functools.cache
def all_own_names() -> frozenset[str]:
    return frozenset(own_names(trees().values()))


def test_private_names_are_read_in_compat_alone() -> None:
    assert len(trees()) > 250, "the sources were not found"
    assert [
        f"{file.relative_to(ROOT)}:{line} reads {name}"
        for file, tree in trees().items()
        for line, name in sorted(set(private_names(tree, all_own_names())))
        if name not in STANDING_ALONE.get(str(file.relative_to(ROOT)), ())
    ] == []


@pytest.mark.parametrize(
    "lines",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch import _assert",
        "import torch._dynamo as d",
        "from torch import fx as f\n\nf._symbolic_trace",
        "import torch\n\ntake = torch.fx\ntake.graph._PyTreeCodeGen",
        "def f(module):\n    return module._buffers",
        "def f(model):\n    return model._modules",
        'def f(module):\n    return getattr(module, "_never_heard_of")',
        'HOOKS = "_forward_pre_hooks"',
        'REPLACED = "_ignore_bidirectional_mask_sdpa"',
        'def f(module):\n    return vars(module)["_parameters"]',
        'LOG = logging.getLogger("torch._subclasses.fake_tensor")',
        'MOD_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"',
        'NAMED = {"transformers.masking_utils._any_name": 1}',
        "from operator import attrgetter\n\nread = attrgetter('_is_full_backward_hook')",
    ],
)
def test_a_planted_private_name_is_found(lines: str) -> None:
    file = ROOT / "lora_lite_fx" / "graph" / "tensors.py"
    text = file.read_text(encoding="utf-8")
    planted = ast.parse(f"{text}\n\n{lines}\n")
    found = list(private_names(planted, all_own_names() | own_names([planted])))
    assert found
    assert all(line > len(text.splitlines()) for line, _ in found)
