"""A graph and a file belong to the variant that they were made with: registration, redefinition, unknown classes."""

from __future__ import annotations

import copy
import dataclasses
import json
import linecache
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from lora_lite_fx.adapters import registry
from lora_lite_fx.adapters.fingerprint import TEXT, code_fingerprint
from lora_lite_fx.formats import checkpoint
from lora_lite_fx.graph.insertion import insertions
from tests.support.conformance import randomise, small
from tests.support.models import one_layer_llama
from tests.support.selection import broad_after

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
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KNOWN = ", ".join(sorted(llfx.registry()))
CHANGED = (
    "The source of Gate.forward, or of what it reads, is not what it was when the adapter was made (as"
    " notebook.Gate), so it may compute something else. Define Gate as it was. Or, if both compute the same, copy the"
    " tensors into a new adapter:"
    " llfx.load_adapter_state_dict(llfx.rewrite(model, Gate(...)), tensors). The tensors are"
    " llfx.adapter_state_dict(graph) or safetensors.torch.load_file(file)."
)
REDEFINED = (
    "Gate is defined anew, with other code in forward. Graphs that were made with the former Gate keep its code. Files"
    " of the former Gate are refused from now on."
)
UNTOLD = (
    "Whether the code of Gate.forward is what it was when the adapter was made (as notebook.Gate) cannot be told. Its"
    " source was not at hand then or is not now, or an earlier version of this library wrote the file. Save the adapter"
    " again, from a class that is defined in a file or a notebook, to have it checked from now on."
)
IN_PASS = r"(\nin pass \w+ \(.*\))?$"
UNKNOWN = (
    "Unknown variant 'Gate'. If the class is your own (as notebook.Gate), write @register above it, and import the"
    " module that defines it before this call; on the command line, --import MODULE. The registered variants are"
    f" {KNOWN}."
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
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


# What counts as the same code.


OTHER_PARTS = [
    ("class Gate", "class  Gate"),
    ("    def params", "    def unused(self):\n        return 1\n\n    def params"),
    ("        return {", "        size = site.d_out\n        return {"),
]


@pytest.mark.parametrize("at_hand", [True, False], ids=["source", "no source"])
@pytest.mark.parametrize(("old", "new"), [("", ""), *OTHER_PARTS])
def test_other_methods_do_not_count_and_running_the_cell_again_is_silent(old: str, new: str, at_hand: bool) -> None:
    notebook = Notebook()
    first = notebook.run(GATE, at_hand)
    gm = adapted(first)
    assert warned(lambda: notebook.run(GATE.replace(old, new) if old else GATE, at_hand)) == []
    second = notebook.namespace["Gate"]
    assert second is not first
    assert llfx.registry()["Gate"] is second
    assert (TEXT in (code_fingerprint(second) or {})) == at_hand
    torch.testing.assert_close(llfx.merge(gm)(X), gm(X))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        return base(x)", "        # a comment\n        return base(x)"),
        ("    def forward(self, x, base, p):", "    def forward(self, x: torch.Tensor, base, p) -> object:"),
    ],
)
def test_a_changed_comment_counts_because_the_text_is_compared(old: str, new: str) -> None:
    notebook = Notebook()
    gm = adapted(notebook.run(GATE))
    assert warned(lambda: notebook.run(GATE.replace(old, new))) == [REDEFINED]
    torch.testing.assert_close(llfx.merge(gm)(X), gm(X))


CHANGES = [
    ("(1 + helper", "(2 + helper"),
    ("base(x) * (1", "base(x) + (1"),
    ("(1 + helper(p.lora_g))", "(1 + torch.tanh(p.lora_g))"),
    ("        return base(x)", "        x = x * 2\n        return base(x)"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_redefinition_is_a_warning_and_the_graph_keeps_the_code_it_was_made_with(
    old: str, new: str, tmp_path: Path
) -> None:
    notebook = Notebook()
    gm = adapted(notebook.run(GATE))
    expected, file = gm(X).detach(), tmp_path / "adapter.safetensors"
    llfx.save(gm, file)
    assert warned(lambda: notebook.run(GATE.replace(old, new))) == [REDEFINED]
    for same in (gm, copy.deepcopy(gm)):
        torch.testing.assert_close(llfx.merge(same)(X), expected)
    changed = adapted(llfx.registry()["Gate"])
    assert not torch.allclose(changed(X), expected)
    torch.testing.assert_close(llfx.merge(changed)(X), changed(X))
    with pytest.raises(llfx.CheckpointError, match=f"^{re.escape(f'{file}: {CHANGED}')}$"):
        llfx.load(model(), file)
    assert warned(lambda: llfx.save(gm, file)) == [
        "Gate has been defined anew since these adapters were made. The file can be loaded only where the code of"
        " Gate.forward is what it was then."
    ]
    # The way out that the message names.
    copied = llfx.rewrite(model(), llfx.registry()["Gate"](), (X,))
    llfx.load_adapter_state_dict(copied, safetensors.torch.load_file(file))
    assert torch.equal(copied(X), changed(X))
    # The former code again: the file loads.
    notebook.run(GATE)
    assert torch.equal(llfx.load(model(), file)(X), expected)


@pytest.mark.parametrize(("old", "new"), CHANGES[:1])
def test_without_source_the_graph_keeps_its_code_and_a_file_is_loaded_with_a_warning(
    old: str, new: str, tmp_path: Path
) -> None:
    notebook = Notebook()
    gm = adapted(notebook.run(GATE, at_hand=False))
    expected, file = gm(X).detach(), tmp_path / "adapter.safetensors"
    llfx.save(gm, file)
    notebook.run(GATE.replace(old, new), at_hand=False)
    for same in (gm, copy.deepcopy(gm)):
        torch.testing.assert_close(llfx.merge(same)(X), expected)
    assert UNTOLD in warned(lambda: llfx.load(model(), file))
    assert UNTOLD in warned(lambda: llfx.save(gm, file))


@pytest.mark.parametrize(
    "edit",
    [
        "SCALE = 3.0",
        "def helper(x):\n    return x * SCALE + 1\n",
        "Gate.forward = lambda self, x, base, p: base(x) * (1 - p.lora_g)",
        "Gate.forward.__defaults__ = (None,)",
    ],
)
def test_what_forward_reads_from_its_module_counts(edit: str) -> None:
    notebook = Notebook()
    gm = adapted(notebook.run(GATE))
    notebook.run(edit)
    for refused in (llfx.merge, lambda gm: llfx.rewrite(gm, llfx.IA3(target_names="0"))):
        with pytest.raises(llfx.ConfigError, match=f"^{re.escape(CHANGED)}{IN_PASS}"):
            refused(gm)
    assert torch.equal(llfx.remove(gm)(X), model()(X)), "removing an adapter needs no code of it"


INHERITS = """
class Scaled(llfx.LoRA):
    FACTOR = 2.0
    def strength(self): return self.FACTOR

@llfx.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(Scaled):
    r: int = 2
    def forward(self, x, base, p):
        return super().forward(x, base, p) * self.strength()
"""


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("FACTOR = 2.0", "FACTOR = 3.0", True),
        ("return self.FACTOR", "return self.FACTOR + 1", True),
        ("r: int = 2", "r: int = 4", False),
    ],
)
def test_methods_and_constants_of_base_classes_count_and_fields_do_not(old: str, new: str, counts: bool) -> None:
    notebook = Notebook()
    notebook.run(INHERITS)
    assert warned(lambda: notebook.run(INHERITS.replace(old, new))) == ([REDEFINED] if counts else [])


def test_a_class_made_by_a_function_counts_with_what_it_encloses() -> None:
    factory = """
def make(factor):
    class Gate(llfx.Variant):
        target_names: object = "0"
        def params(self, site): return {"lora_g": llfx.ParamSpec((site.d_out,))}
        def forward(self, x, base, p): return base(x) * factor * (1 + p.lora_g)
    return dataclasses.dataclass(frozen=True, kw_only=True)(Gate)
"""
    notebook = Notebook()
    notebook.run(factory)
    graphs = [(adapted(notebook.namespace["make"](factor)), factor) for factor in (1.0, 2.0, torch.tensor(3.0).item())]
    for gm, _ in graphs:
        torch.testing.assert_close(llfx.merge(gm)(X), gm(X))
    assert len({str(insertions(gm.graph)[0].fields["forward"]) for gm, _ in graphs}) == 3


def test_an_edit_of_the_source_after_the_class_was_registered_is_not_taken_for_its_code() -> None:
    cls = Notebook().run(GATE)
    before = code_fingerprint(cls)
    file = cls.forward.__code__.co_filename
    text = "".join(linecache.getlines(file)).replace("(1 + helper", "(2 + helper")
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    assert code_fingerprint(cls) == before


def test_variants_of_the_package_have_no_fingerprint_so_that_their_code_may_be_written_in_another_way() -> None:
    for cls in llfx.registry().values():
        if cls.__module__.startswith("lora_lite_fx."):
            assert code_fingerprint(cls) is None
            assert {"class", "forward"}.isdisjoint(registry.to_config(small(cls)))


def test_of_a_fingerprint_of_an_earlier_version_nothing_can_be_told() -> None:
    config = registry.to_config(Notebook().run(GATE)())
    with pytest.raises(llfx.ConfigError, match="is not what it was"):
        registry.from_config({**config, "forward": {TEXT: "0"}})
    earlier = {**config, "forward": {"source": "0", "3.11": "0"}}
    assert warned(lambda: registry.from_config(earlier)) == [UNTOLD]
    assert isinstance(registry.from_config(earlier), llfx.Variant)


@pytest.mark.parametrize("damaged", ["text", 3, ["a"], {"source": 1}])
def test_a_damaged_fingerprint_is_refused(damaged: Any) -> None:
    config = registry.to_config(Notebook().run(GATE)())
    with pytest.raises(llfx.ConfigError, match="Gate: its fingerprint is damaged"):
        registry.from_config({**config, "forward": damaged})
    with pytest.raises(llfx.ConfigError, match=r"LoRA\.forward, or of what"):
        registry.from_config({"variant": "LoRA", "forward": {TEXT: "0"}})


def test_a_file_without_a_fingerprint_loads(tmp_path: Path) -> None:
    file, old = tmp_path / "adapter.safetensors", tmp_path / "old.safetensors"
    gm = adapted(Notebook().run(GATE))
    llfx.save(gm, file)
    with safetensors.safe_open(file, "pt") as opened:
        document = json.loads(opened.metadata()["lora_lite_fx"])
    config = document["adapters"][0]["config"]
    assert config.pop("class") == "notebook.Gate"
    assert config.pop("forward").keys() == {TEXT}
    del document["checksum"]
    state = safetensors.torch.load_file(file)
    document["checksum"] = checkpoint._checksum(document, state)
    safetensors.torch.save_file(state, old, {"lora_lite_fx": json.dumps(document)})
    assert torch.equal(llfx.load(model(), old)(X), gm(X))


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


@pytest.mark.broad
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
