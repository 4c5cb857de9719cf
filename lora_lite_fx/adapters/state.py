"""Read and write the tensors of a model's adapters, as parameters or as a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError
from ..graph.tensors import tensor_of
from .placement import adapter_tensor_names


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of an adapted model. No other tensor of the model requires grad.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.

    Raises:
        AdapterError: the model has no adapters.
    """
    tensors = (tensor_of(model, name) for name in _names_or_raise(model))
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by qualified name, `"<module path>.<param>"`.

    The tensors are detached and share the model's storage.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.

    Raises:
        AdapterError: the model has no adapters.
    """
    return {name: tensor_of(model, name).detach() for name in _names_or_raise(model)}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the values of `state_dict` into the adapters of `model`.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        state_dict: tensors by qualified name, with the keys, shapes and dtypes that `adapter_state_dict` returns.

    Raises:
        CheckpointError: keys, shapes or dtypes differ. The model is unchanged then.
        AdapterError: the model has no adapters.
    """
    tensors = adapter_state_dict(model)
    check_fit(tensors, state_dict)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state_dict[name])


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
