"""The command `export` of the command line: it writes a model or an adapter for a runtime, and runs it there."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..adapters.placement import adapter_names
from ..errors import AdapterError
from ..formats.atomic_writing import write_atomically
from ..formats.peft.directory import save_peft
from ..inspection.given_model import (
    Refused,
    exported_program,
    import_module,
    model_with_weights,
    one_line,
    phases_on,
    with_adapter,
)
from ..log import logger, phase
from ..rewriting.capture import capture
from ..rewriting.rewrite import merge
from .compared import Written, compared
from .exported_program import export
from .served_graph import inputs_to_serve
from .targets import adapter_beside, name_of


def run(options: argparse.Namespace, program: str) -> int:
    """Run `export`.

    Args:
        options: of the command line, which `targets.complaint` has nothing against.
        program: its name, for messages.

    Returns:
        The exit status.
    """
    try:
        for module in options.modules:
            import_module(module)
        with phases_on(sys.stderr):
            written = _loaded(options)
            with phase(f"wrote {written.out}", f"writing {written.out}"):
                paths = _write(written, options)
            with phase("compared", "comparing it with torch"):
                said = compared(written)
    except (Refused, AdapterError, ImportError, OSError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(f'{path} ({_size(path)})' for path in paths)}; {said}")
    return 0


def _loaded(options: argparse.Namespace) -> Written:
    """Return the graph of the model with its adapter, and where it goes."""
    source: Any = None
    inputs: Any = None
    given: Any
    if options.model.endswith(".pt2"):
        given = exported_program(options.model, options.trust)
    else:
        given = source = model_with_weights(options.model).eval()
        inputs = inputs_to_serve(given)
    gm: Any = capture(given, inputs) if options.adapter is None else with_adapter(given, options.adapter, inputs)
    outputs = tuple(filter(None, options.outputs.split(","))) if options.outputs else None
    out = Path(options.out)
    return Written(options.to, out, gm.eval(), source, outputs, options.cache, name_of(options))


def _write(written: Written, options: argparse.Namespace) -> list[Path]:
    """Write the files of the target, and return those that are new."""
    gm, out = written.gm, written.out
    arguments: dict[str, Any] = {"outputs": written.outputs, "cache": written.cache}
    if options.bake:
        arguments["bake"] = True
    if written.to == "pt2":
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / out.name
            torch.export.save(export(gm, None, **arguments), made)
            write_atomically(out, made)
    elif written.to == "aoti":
        _function("aoti", "save_aoti")(gm, out, None, **arguments)
    elif written.to == "onnx":
        _function("onnx_file", "save_onnx")(gm, out, None, **arguments)
        return [out, *(_adapter_for_onnx(written) if adapter_names(gm) else [])]
    elif written.to == "executorch":
        is_new = not (out / "base.ptd").exists()
        _function("executorch_files", "save_executorch")(gm, out, written.name, None, **arguments)
        return [out / f"{written.name}.pte", *([out / "base.ptd"] if is_new else [])]
    elif written.to == "gguf":
        _function("gguf_file", "save_gguf")(gm, out)
    elif written.to == "merged":
        merge(gm).save_pretrained(out)
        _write_tokenizer(options.model, out)
    else:
        save_peft(gm, out, target=written.to)
    return [out]


def _write_tokenizer(model: str, out: Path) -> None:
    """Write the tokenizer or processor of a folder or hub id, if it has one, beside the merged weights."""
    transformers: Any = importlib.import_module("transformers")
    for kind in ("AutoProcessor", "AutoTokenizer"):
        with contextlib.suppress(Exception):  # of whatever kind, where there is none
            processor = getattr(transformers, kind).from_pretrained(model)
            tokenizer = getattr(processor, "tokenizer", processor)
            special = getattr(tokenizer, "all_special_tokens", None)
            if special is None or len(tokenizer) > len(special):  # else transformers made one without a vocabulary
                processor.save_pretrained(out)
                return
    logger.info("no tokenizer or processor beside %s", model)


def _function(file: str, name: str) -> Any:
    return getattr(importlib.import_module(f".{file}", __package__), name)


def _adapter_for_onnx(written: Written) -> list[Path]:
    """Write the adapter for the ONNX model, unless it is constants of that; and return its file."""
    path = adapter_beside(written.out)
    path.unlink(missing_ok=True)
    try:
        _function("onnx_file", "save_onnx_adapter")(written.gm, path)
    except AdapterError as error:
        logger.info("no file of the adapter alone: %s", one_line(error))
        return []
    return [path]


def _size(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, for people."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
