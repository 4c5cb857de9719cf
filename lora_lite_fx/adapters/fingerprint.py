"""Fingerprint the code of a variant, so that a graph or a file is not run with another `forward` than it was made with.

The fingerprint holds what decides on the maths: `forward`, the methods and constants of the class that it reads, and
the functions and constants of the same package that those read. Comments, docstrings, annotations and formatting do not
count. Values that are not constants count by their type alone.

There are two hashes. That of the source holds for all versions of Python. It is left out where the source is not at
hand, or is not the code that runs because the file was edited since. That of the bytecode is always there, and holds
for one version of Python.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import linecache
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

SOURCE = "source"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_OURS = __name__.partition(".")[0]
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def code_fingerprint(cls: type) -> dict[str, str] | None:
    """Return the hashes of the code that computes `forward`, by what they are of: `source`, or a version of Python.

    Variants of this package have none. Their maths is fixed by tests and by other libraries' files, and a version that
    writes it in another way must not make old files unreadable.

    Args:
        cls: a variant.
    """
    if _top(cls.__module__) == _OURS:
        return None
    code = _Code(cls)
    hashes = {_PYTHON: _hash(bytecode for _, bytecode in code.parts)}
    if all(source is not None for source, _ in code.parts):
        hashes[SOURCE] = _hash(str(source) for source, _ in code.parts)
    return hashes


def is_same_code(first: Mapping[str, str], second: Mapping[str, str]) -> bool | None:
    """Return whether two fingerprints are of the same code; None if they have no kind of hash in common."""
    common = first.keys() & second.keys()
    return any(first[kind] == second[kind] for kind in common) if common else None


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


class _Code:
    """The code that `forward` of a variant runs and the constants that it reads.

    Args:
        cls: the variant.

    Attributes:
        parts: source and bytecode of each function, and each constant in the place of both. The source is None where it
            is not at hand.
    """

    def __init__(self, cls: type) -> None:
        self.parts: list[tuple[str | None, str]] = []
        self._package = _top(cls.__module__)
        self._classes = [base for base in cls.__mro__[:-1] if _top(base.__module__) != _OURS]
        self._fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        self._seen: set[FunctionType] = set()
        self._read_attributes(["forward"])

    def _read_attributes(self, names: Iterable[str]) -> None:
        """Read what the variant's classes outside this package have under these names. Fields are config, not code."""
        for name in names:
            for base in self._classes:
                if name in vars(base) and name not in self._fields:
                    value = _function_of(vars(base)[name])
                    if isinstance(value, FunctionType):
                        self._read_function(value)
                    else:
                        self._add(name, value)

    def _read_global(self, name: str, value: Any, attributes: Sequence[str]) -> None:
        """Read a value from outside the class, of which code reads some of the `attributes`."""
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if _top(module) != self._package:
            self._add(name, value)
        elif isinstance(value, FunctionType):
            self._read_function(value)
        elif isinstance(value, (ModuleType, type)):
            for attribute in attributes:
                if attribute in vars(value):
                    self._read_global(attribute, _function_of(vars(value)[attribute]), attributes)
        else:
            self._add(name, value)

    def _read_function(self, function: FunctionType) -> None:
        if function in self._seen:
            return
        self._seen.add(function)
        code = function.__code__
        self.parts.append((_source(code), _bytecode(code, function.__doc__)))
        self._add("defaults", (function.__defaults__, function.__kwdefaults__))
        global_names, attributes = _names(code)
        outside = {name: function.__globals__[name] for name in global_names if name in function.__globals__}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        # `super()` puts the class itself into a cell.
        outside |= {name: _content(cell) for name, cell in cells if name != "__class__"}
        for name, value in outside.items():
            self._read_global(name, value, attributes)
        self._read_attributes(attributes)

    def _add(self, name: str, value: object) -> None:
        text = f"{name} = {_constant(value)}"
        self.parts.append((text, text))


def _function_of(value: Any) -> Any:
    """Return the function of a method or property as a class holds it; any other value as it is."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, functools.cached_property) else value


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _constant(value: object) -> str:
    """Return a constant as text that is the same in each process; for another value its type."""
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_constant, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_constant(key)}: {_constant(item)}' for key, item in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"partial of {_constant(value.func)}: {_constant(value.args)}, {_constant(value.keywords)}"
    if type(value) is Tensor and value.device.type != "meta":
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, ModuleType):
        return value.__name__
    named = value if isinstance(value, (FunctionType, type)) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


# Functions are looked into once: the code of a function does not change, and the file that it is from may.


@functools.cache
def _names(code: CodeType) -> tuple[list[str], list[str]]:
    """Return the names of globals and of attributes that `code` reads, with the functions inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    loads = dis.get_instructions(code)
    own = {str(load.argval) for load in loads if load.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = set(code.co_names) - own
    return (
        sorted(own.union(*(names for names, _ in inner))),
        sorted(attributes.union(*(names for _, names in inner))),
    )


def _bytecode(code: CodeType, docstring: str | None = None) -> str:
    """Return the instructions of `code` with what they refer to, without names of local variables and line numbers."""
    constants = [
        _bytecode(constant)
        if isinstance(constant, CodeType)
        else _constant(None if constant == docstring else constant)
        for constant in code.co_consts
    ]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags))


@functools.cache
def _source(code: CodeType) -> str | None:
    """Return the source of `code`, normalized; None if it is not at hand or has been edited since."""
    text = "".join(linecache.getlines(code.co_filename))
    try:
        tree = ast.parse(text)
        compiled = compile(text, code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    if not any(code == other for other in _all_code(compiled)):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and _is_at(node, code)]
    return ast.unparse(_WithoutNotes().visit(found[0])) if len(found) == 1 else None


def _all_code(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_code(constant)


def _is_at(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, code: CodeType) -> bool:
    """Return whether `node` is what `code` was compiled from. Python counts a function from its first decorator."""
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    return code.co_name == node.name and code.co_firstlineno in (node.lineno, *(d.lineno for d in node.decorator_list))


class _WithoutNotes(ast.NodeTransformer):
    """Take docstrings, annotations and decorators out of functions. Decorators count by what they make of these."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(ast.copy_location(ast.Assign([node.target], node.value), node))
