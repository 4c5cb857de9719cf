"""The targets of the command `export`, their packages, and the check of options. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def import_package(name: str, extra: str) -> Any:
    """Return a package that writes for a runtime.

    Raises:
        ImportError: it cannot be imported; the message names the extra of this library that has it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): pip install 'lora_lite_fx[{extra}]'") from error


@dataclass(frozen=True)
class Target:
    """Where a model or an adapter is to be run.

    Args:
        suffix: of the file that is written; empty for a folder.
        is_program: whether the file has the computation of the model, and not an adapter or weights alone.
        package: what writes it, beside torch.
        extra: the extra of this library that has the package.
    """

    suffix: str = ""
    is_program: bool = False
    package: str = "torch"
    extra: str = ""


TARGETS = {
    "aoti": Target(".pt2", True),
    "executorch": Target("", True, "executorch", "executorch"),
    "gguf": Target(".gguf", False, "gguf", "gguf"),
    "merged": Target("", False, "transformers", "hf"),
    "onnx": Target(".onnx", True, "onnxscript", "onnx"),
    "openvino": Target(),
    "pt2": Target(".pt2", True),
    "sglang": Target(),
    "vllm": Target(),
}
"""By the value of `--to`."""


def complaint(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options of `export`; None if nothing is."""
    target, to = TARGETS[options.to], f"--to {options.to}"
    if not target.is_program:
        for given, option in ((options.outputs, "--outputs"), (options.cache, "--cache"), (options.bake, "--bake")):
            if given:
                programs = ", ".join(name for name, other in TARGETS.items() if other.is_program)
                return f"{option} is for programs ({programs}), and {to} writes none"
        if options.adapter is None:
            return f"{to} writes an adapter or what it changed: name it by --adapter"
        if options.model.endswith(".pt2"):
            return f"{to} takes a model folder or hub id, because a .pt2 file does not have the config of the model"
    if options.cache and options.model.endswith(".pt2"):
        return "--cache takes a model folder or hub id, because a .pt2 file does not have the cache of the model"
    if options.adapter is not None and not Path(options.adapter).exists():
        return f"there is no {options.adapter}"
    if Path(options.model).is_file() and not options.model.endswith(".pt2"):
        return f"the weights of the model are needed: give its folder, not {options.model}"
    return _about_name(options) or _about_out(options, target) or _about_package(options, target)


def name_of(options: argparse.Namespace) -> str:
    """Return the name of the program for ExecuTorch: the one given, or that of the adapter's file."""
    return str(options.name or (Path(options.adapter).stem if options.adapter else "model"))


def _about_name(options: argparse.Namespace) -> str | None:
    if options.name is not None and options.to != "executorch":
        return "--name is for --to executorch, whose folder has a program for each adapter"
    if options.to == "executorch" and name_of(options) != Path(name_of(options)).name:
        return f"--name is the name of a file without its ending, not {options.name}"
    return None


def _about_out(options: argparse.Namespace, target: Target) -> str | None:
    out = Path(options.out)
    if target.suffix and out.suffix != target.suffix:
        return f"--to {options.to} writes a {target.suffix} file, not {out}"
    if not out.absolute().parent.is_dir():
        return f"there is no folder {out.absolute().parent}"
    if not target.suffix and out.exists() and not out.is_dir():
        return f"{out} is not a folder"
    if target.suffix and out.is_dir():
        return f"{out} is a folder, and --to {options.to} writes a file"
    taken = next((path for path in _written(options, target) if path.exists()), None)
    if taken is None or options.overwrite:
        return None
    return f"{taken} exists: pass --overwrite to replace it, or write elsewhere"


def _written(options: argparse.Namespace, target: Target) -> list[Path]:
    """Return what `export` would replace."""
    out = Path(options.out)
    if options.to == "executorch":
        return [out / f"{name_of(options)}.pte"]
    if options.to == "onnx":
        return [out, adapter_beside(out)] if options.adapter else [out]
    if target.suffix:
        return [out]
    return list(out.iterdir()) if out.is_dir() else []


def adapter_beside(model: Path) -> Path:
    """Return the file for the adapter of an ONNX model."""
    return model.with_suffix(".onnx_adapter")


def _about_package(options: argparse.Namespace, target: Target) -> str | None:
    if importlib.util.find_spec(target.package) is None:
        return f"--to {options.to} needs {target.package}: pip install 'lora_lite_fx[{target.extra}]'"
    return None
