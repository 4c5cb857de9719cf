"""The model and the adapter that a command line names, and the errors for those that are not there."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..errors import AdapterError
from ..formats.checkpoint import load
from ..formats.peft.directory import load_peft
from ..formats.untrusted_files import MOST_TENSORS, check_regular, read_json
from ..log import logger, looking_up, phase, waiting

_PACKAGE = str(Path(__file__).parents[1])


class Refused(Exception):
    """Bad input; the message is for the user."""


def import_module(module: str) -> None:
    """Import a module of the user's, which may print: standard output is for the table alone."""
    file = Path(module)
    if file.suffix == ".py":
        raise Refused(
            f"--import takes the name of a module, not a file: --import {file.stem}, in {file.parent.resolve()}"
        )
    with contextlib.redirect_stdout(sys.stderr):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise Refused(f"--import {module} needs the module {error.name}, which is not there") from error
            raise Refused(
                f"--import {module}: there is no module {error.name} in {Path.cwd()} or among the installed packages"
            ) from error
        except Exception as error:
            raise Refused(f"--import {module} failed: {type(error).__name__}: {error}") from error


def exported_program(model: str, trust: bool) -> ExportedProgram:
    """Return what a .pt2 file has.

    Raises:
        Refused: it is not there, or not trusted, or broken.
    """
    if not Path(model).exists():
        raise Refused(f"there is no {model}")
    check_regular(Path(model), MOST_TENSORS)
    if not trust:
        raise Refused(
            f"{model} is not opened, because torch.export.load may run code from a .pt2 file. If you trust whoever"
            " made it, pass --trust"
        )
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.modeling_outputs")  # whose classes torch finds by name
    try:
        with phase(f"loaded {model}", f"loading {model}"):
            return torch.export.load(model)
    except Exception as error:
        raise Refused(f"{model} is not a readable exported program: {error}") from error


def with_adapter(model: Any, adapter: str, example_inputs: Any = None) -> nn.Module:
    """Return a model, a graph or a program with the adapter of a file or of a PEFT directory."""
    # Adapters that a .pt2 file has already are shown with it.
    return (load_peft if Path(adapter).is_dir() else load)(model, adapter, example_inputs, stack=True)


def model_with_weights(model: str) -> nn.Module:
    """Return the model in a folder or at the hub.

    Raises:
        Refused: it is not there, or cannot be loaded.
    """
    config, model_class = config_and_class(model)
    if Path(model).is_file():
        raise Refused("an adapter is shown on a model with its weights: give the folder, not its config.json")
    try:
        with phase(f"loaded {model}", f"loading {model}"):
            loaded: nn.Module = model_class.from_pretrained(model, config=config)
    except Exception as error:
        raise Refused(f"{model} cannot be loaded: {error}") from error
    return loaded


def config_and_class(model: str) -> tuple[Any, Any]:
    """Return the config that `model` names, and the class of its model."""
    try:
        with waiting("importing transformers"):
            import transformers
    except ImportError as error:
        raise Refused(f"{model} needs transformers: pip install 'lora_lite_fx[hf]'") from error
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if path.exists():
        read_json(file)  # raises if it is broken; transformers would take some broken files for hub ids
    elif path.suffix or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise Refused(f"there is no {model}")
    is_here = path.exists()
    try:
        with contextlib.nullcontext() if is_here else looking_up(model):
            config = transformers.AutoConfig.from_pretrained(str(file) if is_here else model, trust_remote_code=False)
    except Exception as error:
        raise Refused(f"{model} has no config that transformers can read: {error}") from error
    name = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, name, None) if name else transformers.MODEL_MAPPING.get(type(config), None)
    if model_class is None:
        raise Refused(f"{model}: transformers has no class {name or f'for a config of {type(config).__name__}'}")
    return config, model_class


@contextlib.contextmanager
def phases_on(stream: Any) -> Iterator[None]:
    """Show the phases and warnings of this library on a stream, and nothing that other libraries print."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(stream)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    nowhere = io.StringIO()
    loggers = [other for other in (logging.root, *logging.root.manager.loggerDict.values()) if other is not logger]
    others = [other for each in loggers if isinstance(each, logging.Logger) for other in each.handlers]
    for other in others:
        other.addFilter(_nothing)
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("always")
            yield
        for warning in caught:
            if issubclass(warning.category, UserWarning) and warning.filename.startswith(_PACKAGE):
                print(f"warning: {warning.message}", file=stream)
    finally:
        for other in others:
            other.removeFilter(_nothing)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _nothing(record: logging.LogRecord) -> bool:
    return False


def one_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Errors of other libraries are long; those of this library have the way out in their second line.
    return " ".join(lines if isinstance(error, AdapterError) else lines[:1]) or type(error).__name__
