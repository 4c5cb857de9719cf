"""Copy a model without copying its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..compat.torch_modules import buffers_of, parameters_of
from ..errors import CaptureError
from ..graph.copies import share_signatures
from ..graph.tensors import tensor_of
from ..storage.dequantized import put_decompression_aside, share_dequantized
from .rebound import rebind_functions


def shared_copy(model: nn.Module, own: Sequence[str] = ()) -> Any:
    """Return a copy of `model` whose frozen parameters and buffers are new objects over the same storage.

    In the place of each quantized linear the copy has a `DequantizedLinear` over its tensors, whose weight is a value
    that every capture can follow. Functions that were put on modules, as a `forward`, call the modules of the copy.

    Args:
        model: left as it is; ties between its tensors are kept in the copy.
        own: qualified names of tensors that the copy gets as copies of its own, trainable as they are.
    """
    owned = {id(tensor_of(model, name)) for name in own}
    memo: dict[int, Any] = {}
    share_signatures(model, memo)
    share_dequantized(model, memo)
    for module in model.modules():
        for tensor in (*parameters_of(module).values(), *buffers_of(module).values(), *module.__dict__.values()):
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            if id(tensor) in owned:
                memo[id(tensor)] = copy.deepcopy(tensor)
            elif isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
            else:
                memo[id(tensor)] = tensor.detach()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied with its weights shared, {error}."
            " Remove attributes that cannot be copied (locks, open files, generators) before rewriting."
        ) from error
    rebind_functions(copied, memo)
    put_decompression_aside(copied)
    return copied
