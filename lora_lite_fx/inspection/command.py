"""The command `inspect` of the command line: it prints the sites of a model, and writes the page."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..errors import AdapterError
from ..formats.checkpoint import load
from ..formats.peft.directory import load_peft
from ..formats.untrusted_files import MOST_TENSORS, check_regular, read_json
from .table import SiteTable, inspect

_MOST_REAL = 10**9  # parameters to fill at random, 4 GB of them


class _Refused(Exception):
    """Bad input; the message is for the user."""


def run(options: argparse.Namespace, program: str) -> int:
    """Run `inspect`.

    Args:
        options: of the command line.
        program: its name, for messages.

    Returns:
        The exit status.
    """
    try:
        for module in options.modules:
            _import(module)
        with _quiet():
            table = _table(options.model, options.adapter, options.passes, options.trust)
        if options.html is not None:
            table.save_html(options.html)
            size = Path(options.html).stat().st_size
            # Standard output is for the data, if they were asked for.
            told = sys.stderr if options.json else sys.stdout
            print(f"wrote {options.html} ({size / 1000:,.0f} kB): open it in a browser", file=told)
    except (_Refused, AdapterError) as error:
        print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(table.to_dict(), indent=2))
    elif options.html is None:
        print(table)
    return 0


def _import(module: str) -> None:
    """Import a module of the user's, which may print: standard output is for the table alone."""
    file = Path(module)
    if file.suffix == ".py":
        raise _Refused(
            f"--import takes the name of a module, not a file: --import {file.stem}, in {file.parent.resolve()}"
        )
    with contextlib.redirect_stdout(sys.stderr):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise _Refused(f"--import {module} needs the module {error.name}, which is not there") from error
            raise _Refused(
                f"--import {module}: there is no module {error.name} in {Path.cwd()} or among the installed packages"
            ) from error
        except Exception as error:
            raise _Refused(f"--import {module} failed: {type(error).__name__}: {error}") from error


def _table(model: str, adapter: str | None, passes: bool, trust: bool) -> SiteTable:
    if adapter is not None and not Path(adapter).exists():
        raise _Refused(f"there is no {adapter}")
    if model.endswith(".pt2"):
        if not Path(model).exists():
            raise _Refused(f"there is no {model}")
        check_regular(Path(model), MOST_TENSORS)
        if not trust:
            raise _Refused(
                f"{model} is not opened, because torch.export.load may run code from a .pt2 file. If you trust whoever"
                " made it, pass --trust"
            )
        program = _exported(model)
        return inspect(program if adapter is None else _load(program, adapter), passes=passes)
    if adapter is not None:
        return inspect(_load(_with_weights(model), adapter), passes=passes)
    return _without_weights(model, passes)


def _exported(model: str) -> ExportedProgram:
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.modeling_outputs")  # whose classes torch finds by name
    try:
        return torch.export.load(model)
    except Exception as error:
        raise _Refused(f"{model} is not a readable exported program: {error}") from error


def _load(model: Any, adapter: str) -> nn.Module:
    # Adapters that a .pt2 file has already are shown with it.
    return (load_peft if Path(adapter).is_dir() else load)(model, adapter, stack=True)


def _without_weights(model: str, passes: bool) -> SiteTable:
    """Return the table of a model from its config alone, on the meta device if the model can be captured there.

    A model of any size then takes no memory.
    """
    config, model_class = _config(model)
    try:
        with torch.device("meta"):
            empty = _built(model_class, config)
    except Exception as error:
        raise _Refused(f"{model_class.__name__} cannot be built from {model}: {error}") from error
    try:
        try:
            return inspect(empty, passes=passes)
        except Exception:
            # Some operators cannot be captured without data. Random weights serve too, if they are not too many.
            if sum(parameter.numel() for parameter in empty.parameters()) > _MOST_REAL:
                raise
            return inspect(_built(model_class, config), passes=passes)
    except AdapterError:
        raise
    except Exception as error:
        raise _Refused(f"{model_class.__name__} cannot be captured: {error}") from error


def _built(model_class: Any, config: Any) -> nn.Module:
    from ..compat.transformers import made_from_config

    built: nn.Module = made_from_config(model_class, config)
    return built.eval()


def _with_weights(model: str) -> nn.Module:
    config, model_class = _config(model)
    if Path(model).is_file():
        raise _Refused("an adapter is shown on a model with its weights: give the folder, not its config.json")
    try:
        loaded: nn.Module = model_class.from_pretrained(model, config=config)
    except Exception as error:
        raise _Refused(f"{model} cannot be loaded: {error}") from error
    return loaded


def _config(model: str) -> tuple[Any, Any]:
    """Return the config that `model` names, and the class of its model."""
    try:
        import transformers
    except ImportError as error:
        raise _Refused(f"{model} needs transformers: pip install 'lora_lite_fx[hf]'") from error
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if path.exists():
        read_json(file)  # raises if it is broken; transformers would take some broken files for hub ids
    elif path.suffix or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise _Refused(f"there is no {model}")
    try:
        config = transformers.AutoConfig.from_pretrained(str(file) if path.exists() else model, trust_remote_code=False)
    except Exception as error:
        raise _Refused(f"{model} has no config that transformers can read: {error}") from error
    name = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None:
        try:
            model_class = transformers.MODEL_MAPPING[type(config)] if name is None else None
        except KeyError:
            model_class = None
    if model_class is None:
        raise _Refused(f"{model}: transformers has no class {name or f'for a config of {type(config).__name__}'}")
    return config, model_class


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the progress bars, warnings and logs of other libraries, which would stand between the lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Errors of other libraries are long; those of this library have the way out in their second line.
    return " ".join(lines if isinstance(error, AdapterError) else lines[:1]) or type(error).__name__
