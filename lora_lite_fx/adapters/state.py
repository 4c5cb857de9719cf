"""Read and write the tensors of a model's adapters, as parameters or as a state dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.origins.wrong_arguments import model_hint, wrapper_hint
from ..errors import AdapterError, CheckpointError, shown
from ..graph.sharded import copy_values, reshard
from ..graph.tensors import tensor_of
from .changed_buffers import warn_of_lost_buffers
from .placement import adapter_tensor_names, placements

_WITH_BUFFERS = (
    "llfx.save and llfx.load; or keep dict(model.named_buffers()) too, for model.load_state_dict(buffers, strict=False)"
)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the adapters that train: those that require grad.

    A parameter that the user froze, or that stays at its start, is not among them. Unless the user unfreezes more, no
    other tensor of the model requires grad.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.

    Raises:
        AdapterError: the model has no adapters.
    """
    names = adapter_tensors(model)
    reshard(model)
    tensors = (tensor_of(model, name) for name in names)
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.requires_grad]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by qualified name, `"<module path>.<param>"`.

    The tensors are detached and share the model's storage. Those of a sharded model are DTensors, as
    `torch.distributed.checkpoint` takes them. Buffers that training changes besides the adapters, as the statistics of
    batch norm, are not among them; files of `save` hold them.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.

    Raises:
        AdapterError: the model has no adapters.

    Warns:
        UserWarning: training has changed buffers.
    """
    values = adapter_values(model)
    warn_of_lost_buffers(model, "adapter_state_dict returns the tensors of", _WITH_BUFFERS)
    return values


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what `adapter_state_dict` returns, without its warning."""
    names = adapter_tensors(model)
    reshard(model)
    return {name: tensor_of(model, name).detach() for name in names}


def warn_of_trained_base(model: nn.Module, call: str, stacklevel: int = 2) -> None:
    """Warn of the parameters that require grad and are not adapters', because files of adapters do not hold them.

    Args:
        model: an adapted model.
        call: the function that writes the file, for the message.
        stacklevel: as for `warnings.warn`, seen from here.
    """
    own = {id(tensor_of(model, name)) for name in adapter_tensors(model)}
    left = [name for name, tensor in model.named_parameters() if tensor.requires_grad and id(tensor) not in own]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"{call} writes adapters only, and {', '.join(left[:3])}{more} train too (requires_grad=True): their values"
            " will not be in the file. Save them apart, {name: p for name, p in model.named_parameters() if"
            " p.requires_grad}, or freeze them.",
            stacklevel=stacklevel + 1,
        )


def check_unscaled(model: nn.Module) -> None:
    """Raise AdapterError if a coefficient is a part of the graph, because files have no place for it."""
    for placement in placements(model):
        if placement.scale != 1:
            raise AdapterError(
                f"The graph was exported inside a scope of scaled, and has the coefficient {placement.scale} of"
                f" {placement.adapter_name!r} in it, which a file of adapters does not hold. The way out: save the"
                " model that was exported."
            )


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the values of `state_dict` into the adapters of `model`. Its buffers stay as they are.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        state_dict: tensors by qualified name, with the keys, shapes and dtypes that `adapter_state_dict` returns. Each
            may be whole or sharded, whatever the model is. A sharded model takes whole values of process 0.

    Raises:
        CheckpointError: keys, shapes or dtypes differ, or `state_dict` is not a mapping. The model is unchanged then.
        AdapterError: the model has no adapters.

    Warns:
        UserWarning: training has changed buffers of the model.
    """
    load_adapter_values(model, state_dict)
    warn_of_lost_buffers(model, "load_adapter_state_dict writes to the tensors of", _WITH_BUFFERS)


def load_adapter_values(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Do what `load_adapter_state_dict` does, without its warning."""
    tensors = adapter_values(model)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"state_dict must map names to tensors, as adapter_state_dict returns it; it is {shown(state_dict)}."
            " A file is loaded by load(model, path)."
        )
    check_fit(tensors, state_dict)
    with torch.no_grad():
        for name, tensor in tensors.items():
            copy_values(tensor, state_dict[name])


def check_fit(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Check that `state_dict` has the keys, shapes and dtypes of `expected`. Values are not compared.

    Raises:
        CheckpointError: it does not; the message lists the differences.
    """
    problems = [f"missing: {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in expected]
    for name in expected.keys() & state_dict.keys():
        ours, theirs = expected[name], state_dict[name]
        if not isinstance(theirs, Tensor):
            problems.append(f"not a tensor: {name}")
        elif ours.shape != theirs.shape:
            problems.append(f"shape of {name}: {tuple(theirs.shape)} instead of the model's {tuple(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"dtype of {name}: {theirs.dtype} instead of the model's {ours.dtype}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"The tensors do not fit the model's adapters: {'; '.join(sorted(problems)[:5])}{more}.")


class CountsParameters:
    """The part of an adapted model that counts its parameters, by the names that PEFT's models have for it."""

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Return how many parameters train now, and of how many. A parameter that modules share counts once."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self: Any) -> None:
        """Print one line: how many parameters train now, of how many, as PEFT prints it."""
        trainable, total = self.get_nb_trainable_parameters()
        percentage = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percentage:.4f}")


def adapter_tensors(model: nn.Module) -> list[str]:
    """Return the qualified names of the tensors of all adapters of `model`, frozen ones included.

    Raises:
        AdapterError: the model has no adapters, or is around one that has; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"The model must be what rewrite, wrap, adapt or load returned, not {shown(model)}.{model_hint(model)}"
        )
    names = adapter_tensor_names(model)
    with suppress(AttributeError):  # of a module around the adapted one, in which the tensors have other names
        if names and tensor_of(model, names[0]) is not None:
            return names
    if names and not wrapper_hint(model):
        raise AdapterError(
            f"{type(model).__name__} is around an adapted graph: it has no {names[0]!r}, because its tensors have other"
            " names than those that the graph records. The way out: use the adapted graph itself, here and for"
            " torch.export."
        )
    way_out = wrapper_hint(model) or "they leave their argument as it is, so use their result."
    raise AdapterError(
        f"{type(model).__name__} has no adapters; it is not what rewrite, wrap, adapt or load returned: {way_out}"
    )
