"""A graph and a file belong to the variant that they were made with: registration, and classes that are unknown."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from tests.support.conformance import randomise
from tests.support.models import one_layer_llama
from tests.support.notebook import (
    CHANGED,
    GATE,
    HEADER,
    IN_PASS,
    Notebook,
    X,
    adapted,
    another_process,
    forget_afterwards,
    model,
)
from tests.support.selection import broad_after

KNOWN = ", ".join(sorted(llfx.registry()))
UNKNOWN = (
    "Unknown variant 'Gate'. If the class is your own (as notebook.Gate), write @register above it, and import the"
    " module that defines it before this call; on the command line, --import MODULE. The registered variants are"
    f" {KNOWN}."
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_afterwards(monkeypatch)


# In another process.


def exported(gm: Any, path: Path) -> Any:
    torch.export.save(torch.export.export(gm.eval(), (X,)), path)
    return torch.export.load(path).module()


def test_a_pt2_file_of_another_process_needs_the_class_with_the_same_code(tmp_path: Path) -> None:
    cls = Notebook().run(GATE)
    gm = adapted(cls)
    loaded = exported(gm, tmp_path / "model.pt2")
    changed = Notebook().run(GATE.replace("(1 + helper", "(2 + helper"))
    another_process()
    for refused in (llfx.merge, lambda gm: llfx.save(gm, tmp_path / "a.safetensors")):
        with pytest.raises(llfx.ConfigError, match=f"^{re.escape(UNKNOWN)}{IN_PASS}"):
            refused(loaded)
    assert llfx.inspect(loaded)[0].adapters == ("Gate",)
    assert torch.equal(llfx.remove(loaded)(X), model()(X))
    another_process(changed)
    for refused in (llfx.merge, lambda gm: llfx.save(gm, tmp_path / "a.safetensors")):
        with pytest.raises(llfx.ConfigError, match=f"^{re.escape(CHANGED)}{IN_PASS}"):
            refused(loaded)
    another_process(cls)
    torch.testing.assert_close(llfx.merge(loaded)(X), gm(X))
    llfx.save(loaded, tmp_path / "a.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.broad
def test_load_and_adapt_say_which_class_is_missing(tmp_path: Path) -> None:
    cls = Notebook().run(GATE.replace('"0"', '"q_proj"'))
    llama = one_layer_llama()
    file = tmp_path / "adapter.safetensors"
    llfx.save(llfx.rewrite(llama, cls()), file)
    another_process()
    for load in (llfx.load, llfx.adapt):
        with pytest.raises(llfx.CheckpointError, match=f"^{re.escape(f'{file}: {UNKNOWN}')}$"):
            load(llama, file)
    llfx.register(dataclasses.dataclass(frozen=True, kw_only=True)(type("Gatter", (llfx.Variant,), {})))
    with pytest.raises(llfx.CheckpointError, match="Unknown variant 'Gate', did you mean 'Gatter'\\? If the class"):
        llfx.load(llama, file)


@pytest.mark.slow
def test_the_command_line_imports_a_users_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_variants.py").write_text(f"print('imported'){HEADER}{GATE}".replace('"0"', '"q_proj"'))
    (tmp_path / "needs.py").write_text("import not_there_at_all\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    script = """
import sys, torch, lora_lite_fx as llfx, my_variants
from lora_lite_fx.__main__ import main
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
    def forward(self, x): return self.q_proj(x)
net, x = Net(), torch.ones(2, 4)
torch.export.save(torch.export.export(net, (x,)), "base.pt2")
llfx.save(llfx.rewrite(net, my_variants.Gate(), (x,)), "adapter.safetensors")
"""
    run = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
    command = [
        sys.executable,
        "-m",
        "lora_lite_fx",
        "inspect",
        "base.pt2",
        "--trust",
        "--adapter",
        "adapter.safetensors",
    ]
    done = subprocess.run([*command, "--json", "--import", "my_variants"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"][0]["adapters"] == ["Gate"], "what the module prints is not in the output"
    options = ["inspect", str(tmp_path / "base.pt2"), "--trust", "--adapter", str(tmp_path / "adapter.safetensors")]
    assert main(options) == 2
    unknown = UNKNOWN.replace("notebook", "my_variants")
    *_, last = capfd.readouterr().err.splitlines()  # after the phases
    assert last == f"python -m lora_lite_fx: error: {tmp_path / 'adapter.safetensors'}: {unknown}"


@pytest.mark.parametrize(
    ("module", "message"),
    broad_after(
        2,
        [
            ("nope", "--import nope: there is no module nope in {folder} or among the installed packages"),
            ("needs.more", "--import needs.more needs the module not_there_at_all, which is not there"),
            ("needs", "--import needs needs the module not_there_at_all, which is not there"),
            ("fails", "--import fails failed: ZeroDivisionError: division by zero"),
            ("fails.py", "--import takes the name of a module, not a file: --import fails, in {folder}"),
            ("./needs.py", "--import takes the name of a module, not a file: --import needs, in {folder}"),
        ],
        several=True,
    ),
)
def test_the_command_line_says_why_a_module_cannot_be_imported(
    module: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs.py").write_text("import not_there_at_all\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["inspect", "model", "--import", module]) == 2
    assert capsys.readouterr().err == f"python -m lora_lite_fx: error: {message.format(folder=tmp_path)}\n"


# Without registration.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unregistered(llfx.Variant):
    def params(self, site: Any) -> Any:
        return {"lora_g": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y = base(x)
        return y * (1 + p.lora_g)


@pytest.mark.broad
def test_a_variant_that_is_not_registered_works_in_one_process_and_is_refused_only_by_save(tmp_path: Path) -> None:
    gm = adapted(lambda: Unregistered(target_names="0"))
    gm(X).sum().backward()
    assert gm.get_parameter("0.lora_g").grad is not None
    twin = llfx.rewrite(copy.deepcopy(gm), llfx.LoRA(r=2, target_names="0"))
    assert llfx.inspect(twin)[0].adapters == ("Unregistered", "LoRA")
    wrapped = llfx.wrap(model(), Unregistered(target_names="0"))
    randomise(wrapped, 0)
    for same in (twin, wrapped, llfx.merge(gm)):
        torch.testing.assert_close(same(X), gm(X))
    assert torch.equal(llfx.remove(gm)(X), model()(X))
    adaptable = llfx.adapt(one_layer_llama(), Unregistered())
    randomise(adaptable, 0)
    ids = torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(llfx.merge(adaptable)(ids).logits, adaptable(ids).logits)
    message = (
        "Unregistered is not registered, so no process could load the file. Write @register above the class, or call"
        " llfx.register(Unregistered), and save again."
    )
    for refused in (gm, wrapped, adaptable):
        with pytest.raises(llfx.ConfigError, match=f"^{re.escape(message)}$"):
            llfx.save(refused, tmp_path / "adapter.safetensors")
    assert not any(tmp_path.iterdir())
    llfx.register(Unregistered)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    assert torch.equal(llfx.load(model(), tmp_path / "adapter.safetensors")(X), gm(X))


def test_two_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = (Notebook(name) for name in ("first", "second"))
    source = GATE.replace("@llfx.register", "")
    graphs = [adapted(first.run(source)), adapted(second.run(source.replace("(1 +", "(2 +")))]
    impostor = adapted(Notebook("third").run(source.replace("Gate", "LoRA") + "\nGate = LoRA"))
    for gm in (*graphs, impostor):
        torch.testing.assert_close(llfx.merge(gm)(X), gm(X))
    assert not torch.allclose(graphs[0](X), graphs[1](X))
    llfx.register(first.namespace["Gate"])
    with pytest.raises(
        llfx.ConfigError,
        match=r"^A variant named Gate is already registered, by first\. Files and graphs name variants by their class,"
        r" so give this one another name\.$",
    ):
        llfx.register(second.namespace["Gate"])
    with pytest.raises(
        llfx.ConfigError,
        match=r"^Gate is not registered, so no process could load the file\. That first registers another Gate is no"
        r" use here\. Write @register above the class, or call llfx\.register\(Gate\), and save again\.$",
    ):
        llfx.save(graphs[1], tmp_path / "adapter.safetensors")
    with pytest.raises(llfx.ConfigError, match=r"That lora_lite_fx\.variants\.lora registers another LoRA"):
        llfx.save(impostor, tmp_path / "adapter.safetensors")
    with pytest.raises(llfx.ConfigError, match="PEFT has no method that computes LoRA"):
        llfx.save_peft(impostor, tmp_path / "peft")


# What can be registered.


def test_a_class_that_is_not_a_dataclass_of_its_own_is_refused() -> None:
    class Plain(llfx.Variant):
        gain: float = 1.0
        steps: int = 2

    class Bare(llfx.LoRA):
        pass

    order = "Write both decorators above the class, in this order: @register, @dataclass(frozen=True, kw_only=True),"
    for cls, message in (
        (Plain, f"Plain is not a dataclass of its own, so its fields gain, steps would have no effect. {order} class"),
        (Bare, f"Bare is not a dataclass of its own. {order} class"),
    ):
        base = cls.__mro__[1].__name__
        with pytest.raises(llfx.ConfigError, match=f"^{re.escape(f'{message} {cls.__name__}({base}).')}$"):
            llfx.register(cls)
        assert cls.__name__ not in llfx.registry()


@pytest.mark.parametrize(("wrong", "named"), [(nn.Linear, "Linear"), (llfx.LoRA(), "a LoRA"), ("LoRA", "'LoRA'")])
def test_what_is_not_a_class_of_a_variant_is_refused(wrong: Any, named: str) -> None:
    with pytest.raises(llfx.ConfigError, match=f"^{named} must be a frozen dataclass derived from Variant\\.$"):
        llfx.register(wrong)
