"""The command `inspect` of the command line: it prints the sites of a model, and writes the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from .given_model import (
    Refused,
    config_and_class,
    exported_program,
    import_module,
    model_with_weights,
    one_line,
    phases_on,
    with_adapter,
)
from .table import SiteTable, inspect

_MOST_REAL = 10**9  # parameters to fill at random, 4 GB of them


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
            import_module(module)
        with phases_on(sys.stderr):
            table = _table(options.model, options.adapter, options.passes, options.trust)
        if options.html is not None:
            table.save_html(options.html)
            size = Path(options.html).stat().st_size
            # Standard output is for the data, if they were asked for.
            told = sys.stderr if options.json else sys.stdout
            print(f"wrote {options.html} ({size / 1000:,.0f} kB): open it in a browser", file=told)
    except (Refused, AdapterError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(table.to_dict(), indent=2))
    elif options.html is None:
        print(table)
    return 0


def _table(model: str, adapter: str | None, passes: bool, trust: bool) -> SiteTable:
    if adapter is not None and not Path(adapter).exists():
        raise Refused(f"there is no {adapter}")
    if model.endswith(".pt2"):
        program = exported_program(model, trust)
        return inspect(program if adapter is None else with_adapter(program, adapter), passes=passes)
    if adapter is not None:
        return inspect(with_adapter(model_with_weights(model), adapter), passes=passes)
    return _without_weights(model, passes)


def _without_weights(model: str, passes: bool) -> SiteTable:
    """Return the table of a model from its config alone, on the meta device if the model can be captured there.

    A model of any size then takes no memory.
    """
    config, model_class = config_and_class(model)
    try:
        with torch.device("meta"):
            empty = _built(model_class, config)
    except Exception as error:
        raise Refused(f"{model_class.__name__} cannot be built from {model}: {error}") from error
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
        raise Refused(f"{model_class.__name__} cannot be captured: {error}") from error


def _built(model_class: Any, config: Any) -> nn.Module:
    from ..compat.transformers import made_from_config

    built: nn.Module = made_from_config(model_class, config)
    return built.eval()
