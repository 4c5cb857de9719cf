"""Call a variant's `forward` by the rule for mixed types: products promote as sums do, and results are rounded once.

A base in half precision has float32 adapters, because small steps of training are lost in half precision. So `x` and
the adapter's tensors differ in type. PyTorch promotes `x * g` and `x + d` to float32, and refuses `x @ A`. In `forward`
products follow the same rule. So the formula of a paper is right on any base, as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..graph.tensors import HALF
from .frozen_linear import FrozenLinear
from .maths import cast
from .variant import Variant

# One function arrives as several objects.
_PRODUCTS: frozenset[Any] = frozenset(
    {
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, torch.einsum, torch.tensordot),
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
        *(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv, torch.dot, Tensor.dot),
        *(torch.inner, Tensor.inner, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm),
    }
)


def call_forward(
    variant: Variant, call: Callable[..., Any], base: FrozenLinear, p: Any, x: Any, **given: Tensor
) -> Any:
    """Return what `variant` makes of a function: its `forward`, with the types of inputs and results as they must be.

    Args:
        variant: the config for the site.
        call: the function to adapt, the frozen linear or one with adapters around it. It gets the type of `x`.
        base: the frozen linear.
        p: the variant's tensors as attributes.
        x: the input.
        given: a weight or bias in place of the frozen one, from an adapter around this one: there is no place for it.

    Returns:
        The output, in the type that `call` returned.

    Raises:
        ConfigError: an adapter around this one replaces the weight or bias.
    """
    if given:
        raise not_innermost("An adapter", base.site.name)
    outputs: list[Any] = []

    def frozen(entered: Any, **given: Tensor) -> Any:
        outputs.append(call(cast(entered, x), **given))
        return outputs[-1]

    # dataclasses.replace would look at every field, which a watching subclass would note.
    linear = type(base)(**{**vars(base), "call": frozen})
    mixed = len({dtype for operand in (x, *vars(p).values()) for dtype in _dtypes(operand)}) > 1
    with PromotedProducts() if mixed else nullcontext():
        result = variant.forward(x, linear, p)
    if not outputs or not _dtypes(result) or result.dtype == outputs[0].dtype:
        return result
    return result.type_as(outputs[0])  # which a trace follows under autocast too; a dtype would be a constant of it


def not_innermost(variant: str, site: str) -> ConfigError:
    """Return the error of an adapter that replaces the weight or bias of a site around another adapter."""
    return ConfigError(
        f"{variant} replaces the weight or bias of {site!r} and is around another adapter there, which computes with"
        " the frozen ones. The way out: put it first in the list of configs, as in [Full(...), LoRA(...)]."
    )


class PromotedProducts(TorchFunctionMode):
    """A mode in which products of floating-point tensors of several types are computed in the widest of them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            operands = [*args, *kwargs.values()]
            dtypes = {dtype for operand in operands for dtype in _dtypes(operand)}
            if len(dtypes) > 1:
                wide = _widest(dtypes)
                args = tuple(_promoted(operand, wide) for operand in args)
                kwargs = {name: _promoted(operand, wide) for name, operand in kwargs.items()}
        return func(*args, **kwargs)


def _dtypes(operand: Any) -> list[torch.dtype]:
    """Return the floating-point types of an operand; of a list of operands, as `einsum` takes it, those of all."""
    if isinstance(operand, (tuple, list)):
        return [dtype for member in operand for dtype in _dtypes(member)]
    dtype = getattr(operand, "dtype", None)
    return [dtype] if isinstance(dtype, torch.dtype) and dtype.is_floating_point else []


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that holds the values of all. It is not `torch.promote_types`, which a trace would record."""
    kept = {torch.float32 if dtype in HALF else dtype for dtype in dtypes}
    return torch.float64 if torch.float64 in kept else torch.float32


def _promoted(operand: Any, wide: torch.dtype) -> Any:
    if isinstance(operand, (tuple, list)):
        return type(operand)(_promoted(member, wide) for member in operand)
    return operand if _dtypes(operand) in ([], [wide]) else operand.to(wide)
