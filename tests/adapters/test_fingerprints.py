"""A graph and a file belong to the code that they were made with: what counts as the same, and what is said."""

from __future__ import annotations

import copy
import json
import linecache
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import lora_lite_fx as llfx
from lora_lite_fx.adapters import registry
from lora_lite_fx.adapters.fingerprint import TEXT, code_fingerprint
from lora_lite_fx.formats import checkpoint
from lora_lite_fx.graph.insertion import insertions
from tests.support.conformance import small
from tests.support.notebook import CHANGED, GATE, IN_PASS, Notebook, X, adapted, forget_afterwards, model, warned
from tests.support.selection import broad_after

REDEFINED = (
    "Gate is defined anew, with other code in forward. Graphs that were made with the former Gate keep its code. Files"
    " of the former Gate are refused from now on."
)
UNTOLD = (
    "Whether the code of Gate.forward is what it was when the adapter was made (as notebook.Gate) cannot be told. Its"
    " source was not at hand then or is not now, or an earlier version of this library wrote the file. Save the adapter"
    " again, from a class that is defined in a file or a notebook, to have it checked from now on."
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_afterwards(monkeypatch)


# What counts as the same code.


OTHER_PARTS = [
    ("class Gate", "class  Gate"),
    ("    def params", "    def unused(self):\n        return 1\n\n    def params"),
    ("        return {", "        size = site.d_out\n        return {"),
]


@pytest.mark.parametrize("at_hand", broad_after(1, [True, False]), ids=["source", "no source"])
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


@pytest.mark.parametrize(("old", "new"), broad_after(2, CHANGES, several=True))
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
