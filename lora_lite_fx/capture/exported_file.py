"""Open exported programs (`.pt2` files) without running code from them.

`torch.export.load` runs code that a file brings along, in several ways: pickles, compiled libraries, guards, which are
Python, and expressions of sizes, which sympy evaluates. Names in the file become part of the source of a function. So
everything is looked at before it is loaded: records and payloads must be of the kinds that hold plain data, names must
be names, operators must be registered ones, and expressions must be arithmetic. Whatever is not known is refused.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from ..compat.torch import HigherOrderOperator, OpOverload
from ..errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch.export.pt2_archive import PT2ArchiveReader

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment|models/model\.json"
    r"|data/weights/(?:weight_\d+|model_weights_config\.json)"
    r"|data/constants/(?:tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/.*"
)
_NAME = re.compile(r"\w*(?:\.\w+)*", re.ASCII)
_NUMBER = re.compile(r"-?[\d.]+(?:e[-+]?\d+)?", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.[a-zA-Z]\w*\.\w+(?:\.\w+)?|math\.[a-z]\w*|torch\.(?:_?sym_)\w+"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|invert"
    r"|lshift|rshift|getitem|index)",
    re.ASCII,
)
_OUTPUTS = re.compile(r"transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+)", re.ASCII)
_TEXT = {"as_string", "as_strings", "torch_version", "class_fqn"}
"""The fields of a document whose text goes nowhere but into values."""

_HAS_METADATA = {"nodes", "graph_module"}
"""The fields whose members have a field `metadata`; elsewhere that is just a name."""

_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "floor", "ceiling",
    "And", "Or", "Not", "Xor", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan",
    "LessThan", "StrictGreaterThan", "GreaterThan", "Piecewise", "ExprCondPair", "Infinity", "NegativeInfinity",
    "BooleanTrue", "BooleanFalse", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt",
    "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat",
    "Identity",
}  # fmt: skip
"""What an expression or a guard may call: the constructors of sympy's arithmetic and torch's additions to it."""

_METHODS = {"size", "stride", "storage_offset", "dim", "numel"}
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.Tuple, ast.Load,
)  # fmt: skip


def open_exported(path: Path, *, trust: bool = False) -> ExportedProgram:
    """Return the exported program in a `.pt2` file.

    Args:
        path: of a file that `torch.export.save` wrote.
        trust: open files too that can only be opened by running code from them, as `torch.export.load` does. The code
            can do whatever the user can.

    Raises:
        CheckpointError: the file is unreadable, or it holds something that may run code and is not trusted.
    """
    try:
        if trust:
            _know_outputs("transformers.modeling_outputs")
            return torch.export.load(path)
        from torch.export.pt2_archive import PT2ArchiveReader

        from ..compat.dynamo import load_pt2

        _check_archive(PT2ArchiveReader(str(path)))
        # torch.export.load takes what it cannot read for a file of an older kind, with pickles.
        programs: dict[str, ExportedProgram] = load_pt2(str(path)).exported_programs
        return programs["model"]
    except _MayRunCode as error:
        raise CheckpointError(
            f"{path} is not opened, because that may run code from it: {error}. If you trust whoever made the file, say"
            " so: python -m lora_lite_fx inspect --trust."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable exported program: {error}") from error


class _MayRunCode(Exception):
    """The file holds something that is not known to be plain data; the message says what."""


def _check_archive(archive: PT2ArchiveReader) -> None:
    names = archive.get_file_names()
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise _MayRunCode(f"it holds {shown(name)}")
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        payloads = json.loads(archive.read_string(f"data/{kind}/model_{kind}_config.json"))
        for name, payload in payloads["config"].items():
            if payload["use_pickle"] is not False or not payload["path_name"].startswith(prefix):
                raise _MayRunCode(f"the tensor {shown(name)} is pickled")
        _check(payloads, "")
    inputs = archive.read_bytes("data/sample_inputs/model.pt")
    try:
        # Where this fails, torch.export.load unpickles whatever it is.
        torch.load(io.BytesIO(inputs), weights_only=True) if inputs else None
    except Exception as error:
        raise _MayRunCode("its example inputs are more than tensors and containers of them") from error
    _check(json.loads(archive.read_string("models/model.json")), "")


def _check(value: Any, field: str) -> None:
    """Check every name and text in a JSON document. `field` is the name of the field that `value` is in."""
    if isinstance(value, dict):
        for name, member in value.items():
            _check_name(name, field)
            if name == "metadata" and field in _HAS_METADATA:
                _check_metadata(member)
            else:
                _check(member, name)
    elif isinstance(value, list):
        for member in value:
            _check(member, field)
    elif isinstance(value, str) and field not in _TEXT:
        _CHECKS.get(field, _check_name)(value, field)


def _check_metadata(texts: Any) -> None:
    """The texts about a node, such as its stack trace, are read as data, whatever they are."""
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _MayRunCode("its metadata are not texts")


def _check_name(name: str, field: str) -> None:
    """Names become part of the source of functions."""
    if not _NAME.fullmatch(name):
        raise _MayRunCode(f"{shown(name)} in {field or 'its document'} is not a name")


def _check_operator(name: str, field: str) -> None:
    """An operator is found by its attributes of a module, as any other object would be."""
    if not _OPERATOR.fullmatch(name):
        raise _MayRunCode(f"it calls {shown(name)}, which is not an operator of torch")
    if name.startswith("torch.ops."):
        found: Any = torch.ops
        for part in name.split(".")[2:]:
            found = getattr(found, part, None)
        if found is not None and not isinstance(found, (OpOverload, HigherOrderOperator)):
            raise _MayRunCode(f"it calls {shown(name)}, which is not an operator of torch")


def _check_tree(text: str, field: str) -> None:
    """The structure of inputs or outputs names classes and, for enums and default factories, modules to import."""

    def check(spec: Mapping[str, Any]) -> None:
        _know_outputs(str(spec["type"]).rpartition(".")[0])
        if spec["type"] == "collections.defaultdict":
            raise _MayRunCode(f"{field} has a defaultdict, which brings a function along")
        context = spec["context"]
        parsed = json.loads(context) if isinstance(context, str) else context
        if "__enum__" in json.dumps(parsed):
            raise _MayRunCode(f"{field} has an enum, whose module would be imported")
        if field == "in_spec" and isinstance(parsed, list):
            for key in parsed:
                _check_name(key if isinstance(key, str) else "", field)  # a keyword argument
        for child in spec["children_spec"]:
            check(child)

    if text:
        _, tree = json.loads(text)
        check(tree)


def _know_outputs(module: str) -> None:
    """Import the module of transformers that has the class of a model's outputs, so that torch knows the class."""
    if _OUTPUTS.fullmatch(module):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def _check_expression(text: str, field: str) -> None:
    """Sympy evaluates an expression as Python."""
    try:
        parsed = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _MayRunCode(f"{shown(text)} in {field} is not an expression") from error
    for node in ast.walk(parsed):
        if not (isinstance(node, _ARITHMETIC) or _is_harmless(node)):
            raise _MayRunCode(f"{shown(text)} in {field} is not arithmetic")


def _is_harmless(node: ast.AST) -> bool:
    """Return whether a part of an expression computes nothing by itself, or calls something that is known."""
    match node:
        case ast.Name(id=name):
            return bool(_NAME.fullmatch(name))
        case ast.Constant(value=str(text)):
            return bool(_NAME.fullmatch(text) or _NUMBER.fullmatch(text))
        case ast.Constant(value=value):
            return isinstance(value, (int, float))
        case ast.Call(func=ast.Name(id=name)):
            return name in _FUNCTIONS
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in _METHODS
        case ast.Attribute(attr=name):
            return name in _METHODS
        case ast.Subscript(slice=ast.Constant()) | ast.keyword(arg=str()):
            return True
    return False


_CHECKS: Mapping[str, Callable[[str, str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "guards_code": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
}
"""How the fields are checked whose text is not just a name."""
