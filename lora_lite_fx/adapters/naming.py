"""Name the variant, the site and the user's line in errors that come out of a variant's functions."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..capture.function_tracing.rehearsal import Refused
from ..errors import AdapterError, ConfigError
from ..sites.site import Site


def described(variant: object, function: str, site: Site | None) -> str:
    """Return the words by which errors name a function of a variant, such as `LoRA.init at 'fc' (d_in=4, d_out=8)`."""
    place = "" if site is None else f" at {site.name!r} (d_in={site.d_in}, d_out={site.d_out})"
    return f"{type(variant).__name__}.{function}{place}"


@contextmanager
def naming(
    variant: object, function: str, site: Site | None, tensors: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Turn an unexpected error inside a function of a variant into one that says which, where, and on what.

    The user's own error is the cause of the new one, with its traceback. An error of this library that names the
    variant passes.

    Args:
        variant: the config.
        function: the name of its method.
        site: the site that it runs for, or None.
        tensors: its tensors by name, whose shapes the message shows.

    Raises:
        ConfigError: the function raised an error.
    """
    who = described(variant, function, site)
    try:
        yield
    except Refused as error:
        raise ConfigError(f"{who} {_plain(error)}.{_line(variant, function, error)}") from error
    except AdapterError as error:
        if type(variant).__name__ in str(error):
            raise
        raise ConfigError(f"{who}: {error}{_line(variant, function, error)}") from error
    except Exception as error:
        message = _plain(error).partition("\n")[0].removesuffix(".")
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (tensors or {}).items())
        line = _line(variant, function, error)
        raise ConfigError(
            f"{who} failed, {type(error).__name__}: {message}.{line}{f' Shapes: {shapes}.' if shapes else ''}"
        ) from error


def _plain(error: Exception) -> str:
    """Return the message without the name of the class of stand-ins, which a user has not heard of."""
    return str(error).strip().replace("FakeTensor", "Tensor")


def _line(variant: object, function: str, error: Exception) -> str:
    """Say in which line of the file of the function the error was raised, if that is known."""
    code = getattr(getattr(type(variant), function, None), "__code__", None)
    frames = [] if code is None else traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename and frame.line]
    return f" Line {own[-1].lineno} of {Path(own[-1].filename).name}: {own[-1].line}." if own else ""
