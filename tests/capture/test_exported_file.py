"""Exported programs of strangers: opening them runs no code, unless they are trusted."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture import exported_file
from lora_lite_fx.capture.exported_file import open_exported
from tests.support.releases import has

Records = dict[str, bytes]


class Model(nn.Module):
    """It has parameters, a buffer, a constant, a condition, a dynamic size and outputs in a dict."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.constant = torch.ones(4)

    def forward(self, x: Tensor, flag: bool = True) -> dict[str, Any]:
        x = self.fc(x) + self.constant
        with torch.no_grad():
            y = x.sin()
        self.count.add_(1)
        sign = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return {"sign": sign, "more": [y, x.shape[0] // 2, x.new_ones(x.shape[0] * 2)]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Model(), (torch.randn(5, 4),), {"flag": True}, dynamic_shapes={"x": {0: batch}, "flag": None}
    )
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    torch.export.save(program, path)
    return path


def records_of(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, records: Records, prefix: str = "model/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(prefix + name, data)
    return path


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Records], Any]:
    """A change of a JSON record."""

    def edited(records: Records) -> None:
        document = json.loads(records[name])
        change(document)
        records[name] = json.dumps(document).encode()

    return edited


def edit_model(change: Callable[[Any], Any]) -> Callable[[Records], Any]:
    return edit("models/model.json", change)


ran: list[str] = []
"""What the code in a file adds to."""

CODE = f"__import__('sys').modules[{__name__!r}].ran.append('it ran')"


class Bomb:
    def __reduce__(self) -> Any:
        return exec, (CODE,)


def torch_pickle(value: Any = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb() if value is None else value, buffer)
    return buffer.getvalue()


def pickled(kind: str, prefix: str, data: bytes) -> Callable[[Records], None]:
    """Let the first tensor of a kind be pickled."""

    def change(records: Records) -> None:
        config = f"data/{kind}/model_{kind}_config.json"
        document = json.loads(records[config])
        payload = next(iter(document["config"].values()))
        payload |= {"use_pickle": True, "path_name": f"{prefix}0"}
        records[config] = json.dumps(document).encode()
        records[f"data/{kind}/{prefix}0"] = data

    return change


def graph(model: Any) -> Any:
    return model["graph_module"]["graph"]


def root(model: Any) -> Any:
    return model["graph_module"]["module_call_graph"][0]["signature"]


def expression(text: str) -> Callable[[Records], Any]:
    """Let the first size that is an expression be this one."""
    return lambda records: records.update(
        {
            "models/model.json": re.sub(
                rb'"expr_str": ?"[^"]*"', b'"expr_str": ' + json.dumps(text).encode().replace(b"\\", b"\\\\"),
                records["models/model.json"],
                count=1,
            )
        }
    )  # fmt: skip


def spec(context: Any, kind: str = "builtins.dict") -> str:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def factory() -> str:
    return spec({"default_factory_module": "evil", "default_factory_name": "x", "dict_context": ["a"]},
                "collections.defaultdict")  # fmt: skip


def enum(space: str = "") -> str:
    # torch remembers what it made of a text.
    return space + spec('[{"__enum__": true, "fqn": "evil:X", "name": "a"}]')


def legacy(records: Records) -> str:
    """An archive of the kind that torch 2.7 wrote."""
    model = records["models/model.json"]
    records.clear()
    records |= {"version": b"8.8", "serialized_exported_program.json": model}
    for part in ("state_dict", "constants", "example_inputs"):
        records[f"serialized_{part}.pt"] = torch_pickle()
    return ""


def with_name(name: str) -> Callable[[Any], Any]:
    return lambda model: graph(model)["inputs"][0].update(as_tensor={"name": name})


EVIL: dict[str, tuple[Callable[[Records], Any], bool]] = {
    # With whether loading it, or making its module, is known to run the code.
    "a pickled weight": (pickled("weights", "weight_", torch_pickle()), True),
    "a pickled constant": (pickled("constants", "tensor_", torch_pickle()), True),
    "an opaque object": (pickled("constants", "opaque_obj_", pickle.dumps(Bomb())), has("torch", "2.13")),
    "a torchbind object": (pickled("constants", "custom_obj_", torch_pickle()), False),
    "weights as a whole": (lambda r: r.update({"data/weights/model.pt": torch_pickle()}), True),
    "constants as a whole": (lambda r: r.update({"data/constants/model.pt": torch_pickle()}), True),
    "example inputs": (lambda r: r.update({"data/sample_inputs/model.pt": torch_pickle()}), True),
    "an example input": (lambda r: r.update({"data/sample_inputs/model.pt": torch_pickle(((Bomb(),), {}))}), True),
    "an older archive": (legacy, True),
    "a guard": (edit_model(lambda m: m.update(guards_code=[CODE])), True),
    "a guard that ends a string": (edit_model(lambda m: m.update(guards_code=[f"L['x\"); {CODE}; (\"'] == 1"])), False),
    "an expression": (expression(f"exec({CODE!r})"), True),
    "an expression with attributes": (expression("Symbol.__class__.__mro__"), False),
    "an expression with a string": (expression(f"Symbol({CODE!r})"), False),
    "a factory": (edit_model(lambda m: root(m).update(out_spec=factory())), True),
    "an enum": (edit_model(lambda m: root(m).update(out_spec=enum())), True),
    "an enum in the inputs": (edit_model(lambda m: root(m).update(in_spec=enum(" "))), True),
    "a keyword argument": (edit_model(lambda m: root(m).update(in_spec=spec(json.dumps([f"x={CODE}"])))), False),
    "an argument": (edit_model(lambda m: root(m).update(forward_arg_names=["x", f"flag={CODE}"])), False),
    "an input": (edit_model(with_name(f"x={CODE}")), False),
    "a node": (edit_model(lambda m: graph(m)["nodes"][0].update(name=f"x={CODE};y")), False),
    "a keyword": (edit_model(lambda m: graph(m)["nodes"][0]["inputs"][0].update(name=f"x={CODE},y")), False),
    "a tensor's name": (edit_model(lambda m: graph(m)["tensor_values"].update({f'a"+{CODE}+"': {}})), False),
    "a size under the name of metadata": (edit_model(
        lambda m: graph(m)["tensor_values"].update(metadata={"sizes": [{"as_expr": {"expr_str": f"exec({CODE!r})"}}]})
    ), False),
    "an operator under the name of metadata": (edit_model(
        lambda m: graph(m)["nodes"][0]["inputs"][0].update(
            arg={"as_string_to_argument": {"metadata": {"as_operator": "torch.os.system"}}}
        )
    ), False),
    "metadata that are not texts": (edit_model(lambda m: graph(m)["nodes"][0].update(metadata={"a": [1]})), False),
    "a function of torch": (edit_model(lambda m: graph(m)["nodes"][0].update(target="torch.os.system")), False),
    "a function beside torch": (edit_model(lambda m: graph(m)["nodes"][0].update(target="torchx.os.system")), False),
    "a method of the operators": (
        edit_model(lambda m: graph(m)["nodes"][0].update(target="torch.ops.load_library")), False
    ),
    "a function of an operator": (
        edit_model(lambda m: graph(m)["nodes"][0].update(target="torch.ops.aten.__class__.mro")), False
    ),
    "another function": (edit_model(lambda m: graph(m)["nodes"][0].update(target="_operator.methodcaller")), False),
    "an extension": (edit_model(lambda m: graph(m)["nodes"][0].update(target="#evil:x")), False),
    "a compiled library": (lambda r: r.update({"data/aotinductor/model/x.so": b"\x7fELF"}), False),
    "a record that is not known": (lambda r: r.update({"data/weights/other": b""}), False),
    "another model": (lambda r: r.update({"models/other.json": r["models/model.json"]}), False),
}  # fmt: skip


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that lies beside the file, as it may when an archive was unpacked in the current folder."""
    (tmp_path / "evil.py").write_text(f"import enum\nx = int\nclass X(enum.Enum):\n    a = 1\n{CODE}\n")
    monkeypatch.syspath_prepend(tmp_path)
    ran.clear()
    yield
    sys.modules.pop("evil", None)


@pytest.mark.usefixtures("evil_module")
@pytest.mark.parametrize("kind", EVIL)
def test_an_evil_file_is_refused_and_runs_nothing(kind: str, whole: Path, tmp_path: Path) -> None:
    records = records_of(whole)
    prefix = EVIL[kind][0](records)
    path = write(tmp_path / "evil.pt2", records, "model/" if prefix is None else prefix)
    with pytest.raises(llfx.CheckpointError) as caught:
        open_exported(path)
    assert not ran
    if kind != "an older archive":  # which is not read at all
        assert "is not opened, because that may run code from it" in str(caught.value)
        assert "--trust" in str(caught.value)


@pytest.mark.usefixtures("evil_module")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind, (_, known) in EVIL.items() if known])
def test_the_evil_files_are_evil(kind: str, whole: Path, tmp_path: Path) -> None:
    """Without this, the refusals above might be of files that do no harm."""
    records = records_of(whole)
    prefix = EVIL[kind][0](records)
    path = write(tmp_path / "evil.pt2", records, "model/" if prefix is None else prefix)
    try:
        open_exported(path, trust=True).module()(torch.randn(3, 4), flag=True)
    except Exception:
        assert ran, "it neither loads nor runs"
    assert ran


def test_a_good_file_is_opened(whole: Path, tmp_path: Path) -> None:
    program = open_exported(write(tmp_path / "again.pt2", records_of(whole)))
    x = torch.randn(3, 4)
    assert torch.equal(program.module()(x, flag=True)["sign"], torch.export.load(whole).module()(x, flag=True)["sign"])
    assert [row.name for row in llfx.inspect(program)] == ["fc"]


@pytest.mark.parametrize("name", ["aten.linear.default", "higher_order.cond"])
def test_the_operators_of_a_good_file_are_operators_of_torch(name: str, whole: Path) -> None:
    assert f"torch.ops.{name}".encode() in records_of(whole)["models/model.json"]


@pytest.mark.parametrize("text", ["", "hello", "PK"])
def test_a_file_that_is_not_an_archive_is_unreadable(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.pt2").write_text(text)
    with pytest.raises(llfx.CheckpointError, match="is not a readable exported program"):
        open_exported(tmp_path / "file.pt2")


def test_a_file_of_pickles_alone_is_unreadable(tmp_path: Path) -> None:
    ran.clear()
    torch.save(Bomb(), tmp_path / "file.pt2")
    with pytest.raises(llfx.CheckpointError, match="is not a readable exported program"):
        open_exported(tmp_path / "file.pt2")
    assert not ran


@pytest.mark.parametrize(
    "text",
    [
        "Mul(Integer(16), Symbol('s53', positive=True, integer=True))",
        "FloorDiv(Symbol('s77', positive=True, integer=True), Integer(2))",
        "Float('-0.5', precision=53)",
        "Float('1.0e-5', precision=53)",
        "2*s0 + s1 // 2",
        "L['attention_mask'].size()[1] == L['input_ids'].size()[1]",
        "L['args'][0].size()[0] % 8 == 0 and not 2 <= L['x'].stride()[1]",
        "Ne(Mod(s0, 8), 0)",
    ],
)
def test_what_torch_writes_is_arithmetic(text: str) -> None:
    exported_file._check_expression(text, "expr_str")


@pytest.mark.parametrize(
    "text",
    [
        "exec('x')",
        "s0.__class__",
        "[x for x in s0]",
        "(lambda: 0)()",
        "s0()()",
        "L['x'].size().__class__",
        "f'{s0}'",
        "sympify('x')",
        "Symbol('a b')",
        "Symbol('x\\n')",
        "L[s0]",
        "(s0 := 1)",
        "s0 if s1 else s2",
        "Symbol(*s0)",
        "Symbol(**s0)",
        "1 +",
        "(" * 1000,
    ],
)
def test_what_is_more_than_arithmetic_is_not(text: str) -> None:
    with pytest.raises(exported_file._MayRunCode):
        exported_file._check_expression(text, "expr_str")
