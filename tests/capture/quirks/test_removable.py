"""Delete the file of a quirk and its lines in the list: the models that need it are refused, and no others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.gumbel import Gumbel

import lora_lite_fx as llfx
from lora_lite_fx.compat.versions import release
from tests.project.test_layers import NAME, ROOT
from tests.support.models import tiny_llama


class Converts(nn.Linear):
    """Converts itself in each call, as the routers of Switch do."""

    def forward(self, input: Tensor) -> Tensor:
        self.to(torch.float32)
        return super().forward(input)


class Draws(nn.Linear):
    """Draws in training by a distribution that checks its parameters, as GroupViT does."""

    def forward(self, input: Tensor) -> Tensor:
        noise = Gumbel(torch.full((), 0.0), torch.full((), 1.0)).sample(input.shape) if self.training else 0
        return super().forward(input + noise)


class Decides(nn.Linear):
    """Looks whether its input has a number below zero."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(-input if (input < 0).any() else input)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "module_to": (lambda: Converts(4, 4), torch.ones(3, 4)),
    "checks_of_distributions": (lambda: Draws(4, 4), torch.ones(3, 4)),
    "decisions": (lambda: Decides(4, 4), torch.ones(3, 4)),
}
LINES = {
    "module_to": "self.to(",
    "checks_of_distributions": "noise = ",
    "decisions": "(input < 0).any()",
}


def main() -> None:
    """Print which of the models are captured, and why the others are not."""
    import transformers

    Distribution.set_default_validate_args(True)
    llfx.capture(transformers.LlamaForCausalLM(tiny_llama()))
    for name, (build, x) in MODELS.items():
        try:
            llfx.capture(build(), (x,))
            print(name, "captured")
        except llfx.CaptureError as error:
            print(name, str(error).partition("\n")[0])


@pytest.mark.broad
@pytest.mark.parametrize("name", LINES)
def test_a_quirk_is_deleted_with_its_lines_and_loses_its_models_alone(name: str, tmp_path: Path) -> None:
    if name == "checks_of_distributions" and release(torch.__version__) >= (2, 15):
        pytest.skip("torch 2.15 traces these checks")
    shutil.copytree(ROOT / NAME, tmp_path / NAME)
    shutil.copytree(ROOT / "passes", tmp_path / "passes")
    quirks = tmp_path / NAME / "capture" / "quirks"
    (quirks / f"{name}.py").unlink()
    listed = quirks / "all_quirks.py"
    lines, count = re.subn(rf"    {name}(\.QUIRK)?,\n", "", listed.read_text(encoding="utf-8"))
    assert count == 2
    listed.write_text(lines, encoding="utf-8")
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from {__name__} import main; main()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert [other for other, result in printed.items() if result != "captured"] == [name]
    assert "could not be captured by torch.export at `" in printed[name]
    assert LINES[name] in printed[name]
