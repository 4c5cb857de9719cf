"""The one signature of the functions that load adapters: `load`, `load_peft`, `load_lora_lite`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, get_type_hints

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.changed_buffers import check_same_buffers, put_buffers, warn_of_moving_buffers
from ..adapters.listing import describe_adapters
from ..adapters.named_configs import check_free, check_name
from ..adapters.placement import adapter_names, adapter_tensor_names
from ..capture.capture import Inputs
from ..errors import AdapterError, CheckpointError
from ..execution.module import AdaptedGraphModule
from ..execution.optimize import draft_of
from ..graph.provenance import DEFAULT
from ..graph.tensors import outside_inference_mode
from ..rewriting.capture import capture
from ..rewriting.named import act_as_before, acting_now, insert_as
from ..rewriting.rewrite import remove
from .finite import check_finite
from .mistakes import as_path


@dataclass(frozen=True)
class AdapterFile:
    """What a reader of files returns.

    Args:
        tensors: those of the file.
        insert: checks that the adapters of the file fit a captured model, and inserts them.
        names: of its adapters.
        buffers: the buffers of the model among the tensors.
    """

    tensors: Mapping[str, Tensor]
    insert: Callable[[fx.GraphModule], None]
    names: tuple[str, ...] = (DEFAULT,)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


class Load(Protocol):
    """A function that loads adapters."""

    def __call__(
        self,
        model: nn.Module | ExportedProgram,
        path: str | os.PathLike[str],
        example_inputs: Inputs | None = None,
        *,
        name: str | None = None,
        stack: bool = False,
        allow_nonfinite: bool = False,
        fuse_loss: bool | None = None,
    ) -> fx.GraphModule: ...


_DOC = """
    Only safetensors and JSON are read.

    Args:
        model: the base, which is not changed.
        path: of the file or directory.
        example_inputs: as for `capture`.
        name: the name that the adapter gets, in place of the one that it has in the file. Beside the adapters of the
            model it does not act until `active` names it.
        stack: whether an adapter without a name goes around those that the model has, so that both act; else that is an
            error. `load(remove(model), path)` loads it in their place, and `load_adapter_state_dict` copies values
            into the present ones.
        allow_nonfinite: load values that are NaN or infinite too, in place of an error.
        fuse_loss: as for `rewrite`.

    Returns:
        A graph module as `rewrite` returns it.

    Raises:
        CheckpointError: the file is unreadable or foreign, or its keys, shapes, dtypes, config or sites do not fit the
            model; or a value is not finite; or the adapter does something that cannot be represented here. The message
            says what.
        AdapterError: the model has adapters, and neither `name` nor `stack` is given.
        ConfigError: the name is taken; or the file has adapters of several names, and `name` is given.
        CaptureError: the model cannot be captured.
    """


def loader(read: Callable[[Path], AdapterFile], called: str = "") -> Load:
    """Make a function that loads adapters out of one that reads a file. For decorating.

    Args:
        read: reads and checks a file without a model. Its name and docstring become those of the result, and the
            documentation of the common arguments is put after the docstring.
        called: what the function is called in messages, if not like `read`.
    """
    called = called or read.__name__

    @functools.wraps(read)
    def load(
        model: nn.Module | ExportedProgram,
        path: str | os.PathLike[str],
        example_inputs: Inputs | None = None,
        *,
        name: str | None = None,
        stack: bool = False,
        allow_nonfinite: bool = False,
        fuse_loss: bool | None = None,
    ) -> fx.GraphModule:
        file = as_path(path, f"{called}(model, path)")
        found = read(file)
        with outside_inference_mode():
            gm = capture(model, example_inputs, fuse_loss=fuse_loss)
            assert isinstance(gm, AdaptedGraphModule)
            present, acting = adapter_names(gm), acting_now(gm)
            buffers = _fitting_buffers(gm, model, found.buffers, file)
            if name is not None:
                check_free([check_name(name)], present)
                if present:
                    check_same_buffers(gm, buffers, file, CheckpointError)
                loaded = remove(gm) if present else draft_of(gm)
                found.insert(loaded)
                insert_as(gm, loaded, name)
            else:
                if found.names == (DEFAULT,) and not stack:
                    _check_plain(gm, called, file)
                check_free((each for each in found.names if each != DEFAULT), present)
                if present:
                    check_same_buffers(gm, buffers, file, CheckpointError)
                found.insert(gm)
            if stack and acting is not None:
                acting = (*acting, *found.names)
            if not present:
                put_buffers(gm, buffers)
                warn_of_moving_buffers(gm)
            act_as_before(gm, acting)
        if not allow_nonfinite:
            check_finite(found.tensors, file, "it is not loaded")
        return gm

    del load.__dict__["__wrapped__"]  # its signature is not that of the result
    load.__annotations__ = get_type_hints(Load.__call__)  # resolved here, because `read` is of another module
    load.__doc__ = f"{(read.__doc__ or '').rstrip()}\n{_DOC}"
    return load


def _fitting_buffers(gm: fx.GraphModule, model: object, buffers: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return those buffers of a file that the graph reads.

    Raises:
        CheckpointError: the model lacks one, or has it in another form.
    """
    known = dict(model.named_buffers(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    read = dict(gm.named_buffers(remove_duplicate=False))
    for name, value in buffers.items():
        now = read.get(name, known.get(name))
        if now is None:
            raise CheckpointError(f"{path} holds the buffer {name!r}, which the model does not have.")
        if (now.shape, now.is_floating_point()) != (value.shape, value.is_floating_point()):
            raise CheckpointError(
                f"{path} holds the buffer {name!r} of shape {tuple(value.shape)} in {value.dtype}, and the model has it"
                f" of {tuple(now.shape)} in {now.dtype}."
            )
    return {name: value for name, value in buffers.items() if name in read}


def _check_plain(gm: fx.GraphModule, name: str, path: Path) -> None:
    """Raise `AdapterError` if the graph has adapters, because a second load would add up in silence."""
    if not adapter_tensor_names(gm):
        return
    call = f"llfx.{name}({{}}, {str(path)!r}{{}})"
    raise AdapterError(
        f"The model has adapters already: {'; '.join(describe_adapters(gm))}. To put those of {path} around them, so"
        f" that both act: {call.format('model', ', stack=True')}. To load them beside the present ones, and let"
        f" llfx.active choose: {call.format('model', ', name=...')}. To load them in place of the present ones:"
        f" {call.format('llfx.remove(model)', '')}, or copy their values into those:"
        f" llfx.load_adapter_state_dict(model, llfx.adapter_state_dict({call.format('llfx.remove(model)', '')}))."
    )
