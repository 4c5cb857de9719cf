"""What `import lora_lite_fx` and `python -m lora_lite_fx` import: modules are counted, because seconds vary."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lora_lite_fx as llfx
from tests.support.selection import broad_after

ROOT = Path(__file__).resolve().parents[2]

MOST_MODULES = 385
"""Of the package, whose modules all come with it. One takes half a millisecond: more than these and it feels slow."""

NEW = """
import json, sys, torch
before = set(sys.modules)
import lora_lite_fx
print(json.dumps(sorted(set(sys.modules) - before)))
"""

COLLISIONS = sorted(
    name for name in llfx.__all__ if any((Path(llfx.__path__[0]) / f"{name}{end}").exists() for end in ("", ".py"))
)
"""The public functions that have the name of a wing, which Python makes an attribute of the package too."""


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this one's path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def new_modules() -> list[str]:
    """The modules that `import lora_lite_fx` adds to those of `import torch`."""
    done = run("-c", NEW)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout)
    return names


def test_import_brings_nothing_of_torch_that_torch_does_not_bring_itself(new_modules: list[str]) -> None:
    # sympy, torch._dynamo, torch.distributed.tensor, Triton and transformers take from 0.1 to 1 s each.
    packages = {name.split(".")[0] for name in new_modules} - sys.stdlib_module_names
    of_torch = [name for name in new_modules if name.startswith("torch.")]
    assert of_torch == []
    assert {name for name in packages if not name.startswith("_")} == {"lora_lite_fx", "regex", "safetensors"}


def test_import_brings_few_modules_of_the_package(new_modules: list[str]) -> None:
    own = [name for name in new_modules if name.split(".")[0] == "lora_lite_fx"]
    assert 100 < len(own) <= MOST_MODULES
    assert not any(name.startswith("lora_lite_fx.testing") for name in own), "which few programs need"


@pytest.mark.parametrize(
    ("options", "status", "answer"),
    [
        (["--help"], 0, "inspect"),
        (["inspect", "--help"], 0, "MODEL"),
        ([], 2, "required: COMMAND"),
        (["inspect"], 2, "required: MODEL"),
        (["inspect", "model", "--nope"], 2, "unrecognized arguments: --nope"),
    ],
    ids=["help", "help-inspect", "no-command", "no-model", "unknown-option"],
)
def test_the_command_line_answers_without_torch(options: list[str], status: int, answer: str) -> None:
    done = run("-X", "importtime", "-m", "lora_lite_fx", *options)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == status
    assert answer in done.stdout + done.stderr
    assert {"lora_lite_fx", "argparse"} <= imported
    assert not {"torch", "lora_lite_fx.adapters", "lora_lite_fx.inspection"} & imported


@pytest.mark.broad
def test_the_command_line_has_all_public_names_when_it_imports_a_users_module(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(
        "import types, lora_lite_fx as llfx\n"
        "wrong = [n for n in llfx.__all__ if isinstance(getattr(llfx, n, llfx), types.ModuleType)]\n"
        "print('probed', wrong, 'LoRA' in llfx.registry())\n"
    )
    done = run("-m", "lora_lite_fx", "inspect", "nothing.pt2", "--import", "probe", cwd=tmp_path)
    assert done.stderr.splitlines() == ["probed [] True", "python -m lora_lite_fx: error: there is no nothing.pt2"]


@pytest.mark.broad
def test_another_program_has_all_public_names_though_it_is_started_by_m(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("from lora_lite_fx import LoRA\n")
    (tmp_path / "program" / "__main__.py").write_text("from program import LoRA\nprint(LoRA.__name__)\n")
    done = run("-m", "program", "lora_lite_fx", cwd=tmp_path)
    assert done.stdout == "LoRA\n", done.stderr


def test_public_names_are_complete() -> None:
    namespace: dict[str, object] = {}
    exec("from lora_lite_fx import *", namespace)
    assert set(llfx.__all__) <= namespace.keys()
    assert set(llfx.__all__) <= set(dir(llfx))
    assert len(set(llfx.__all__)) == len(llfx.__all__)


def test_no_public_name_is_a_module() -> None:
    assert COLLISIONS == ["adapters", "capture"]
    assert [name for name in llfx.__all__ if inspect.ismodule(getattr(llfx, name))] == []


@pytest.mark.parametrize("name", COLLISIONS)
def test_a_function_stays_in_front_of_the_wing_of_its_name(name: str) -> None:
    function = getattr(llfx, name)
    wing = importlib.import_module(f"lora_lite_fx.{name}")
    assert isinstance(wing, ModuleType)
    for file in sorted(Path(wing.__path__[0]).glob("*.py")):
        importlib.import_module(f"lora_lite_fx.{name}.{file.stem}")
    assert getattr(llfx, name) is function


@pytest.mark.broad
@pytest.mark.parametrize(
    "first",
    broad_after(
        1,
        [
            *(f"import lora_lite_fx.{name}" for name in COLLISIONS),
            "import lora_lite_fx.capture.export",
            "from lora_lite_fx.adapters.listing import AdapterTable",
        ],
    ),
)
def test_a_function_stands_in_front_of_a_wing_that_is_imported_first(first: str) -> None:
    script = f"{first}\nimport lora_lite_fx as llfx\nprint(llfx.adapters.__name__, llfx.capture.__name__)"
    done = run("-c", script)
    assert done.stdout == "adapters capture\n", done.stderr


@pytest.mark.broad
def test_an_exported_program_of_a_marked_model_loads_after_the_import_alone(tmp_path: Path) -> None:
    # It cannot run, but it can be looked at. The operator of the marks must be known for that.
    script = """
import sys, torch, lora_lite_fx as llfx
net, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4)
marked = llfx.backend(llfx.LoRA(r=2, target_names="0")).adapt(net, x)
torch.export.save(torch.export.export(marked, (x,)), "marked.pt2")
"""
    load = "import lora_lite_fx, torch\nprint(torch.export.load('marked.pt2').graph)"
    assert run("-c", script, cwd=tmp_path).returncode == 0
    done = run("-c", load, cwd=tmp_path)
    assert "lora_lite_fx.mark.default" in done.stdout, done.stderr


@pytest.mark.broad
def test_flops_of_the_first_call_are_counted() -> None:
    # The counter copies the formulas when it is made, and the first call derives the operations that need them.
    script = """
import torch, lora_lite_fx as llfx
net, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.ones(2, 3, 8)
gm = llfx.rewrite(net, llfx.LoRA(r=2, target_names="0"), (x,))
from torch.utils.flop_counter import FlopCounterMode
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        gm(x)
    print(counter.get_total_flops())
"""
    done = run("-c", script)
    assert done.stdout.split() == [str(2 * 6 * (8 * 8 + 8 * 2 + 2 * 8))] * 2, done.stderr
