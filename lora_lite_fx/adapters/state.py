"""The tensors of the adapters of a model, as parameters and as a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError
from ..graph.tensors import tensor_of
from .placement import adapter_tensor_names


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of an adapted model; nothing else in it requires grad.

    Args:
        model: what `rewrite`, `wrap`, `adapt` or `load` returned.

    Raises:
        AdapterError: the model has no adapters.
    """
    tensors = (tensor_of(model, name) for name in _names_or_raise(model))
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by qualified name, `"<module path>.<param>"`; detached, and sharing the model's storage.

    Args:
        model: what `rewrite`, `wrap`, `adapt` or `load` returned.

    Raises:
        AdapterError: the model has no adapters.
    """
    return {name: tensor_of(model, name).detach() for name in _names_or_raise(model)}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the values of `state_dict` into the adapters of `model`.

    Args:
        model: what `rewrite`, `wrap`, `adapt` or `load` returned.
        state_dict: as `adapter_state_dict` gives it, with the same keys, shapes and dtypes.

    Raises:
        CheckpointError: keys, shapes or dtypes differ; nothing has been changed then.
        AdapterError: the model has no adapters.
    """
    own = adapter_state_dict(model)
    check_fit(own, state_dict)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])


def check_fit(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless `state_dict` has the keys, shapes and dtypes of `own`; values do not count."""
    problems = [f"missing: {name}" for name in own if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in own]
    for name in own.keys() & state_dict.keys():
        ours, theirs = own[name], state_dict[name]
        if not isinstance(theirs, Tensor):
            problems.append(f"not a tensor: {name}")
        elif ours.shape != theirs.shape:
            problems.append(f"shape of {name}: {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"dtype of {name}: {theirs.dtype} instead of {ours.dtype}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"The tensors do not fit the model's adapters: {'; '.join(sorted(problems)[:5])}{more}.")


def _names_or_raise(model: nn.Module) -> list[str]:
    names = adapter_tensor_names(model)
    if not names:
        raise AdapterError(
            f"{type(model).__name__} has no adapters; it is not what rewrite, wrap, adapt or load returned."
        )
    return names
