"""Run what is compared under the same conditions, and with values that show what is computed.

The conditions are the same random numbers, and no fast paths.

A gate that starts at zero, as the last layer of a condition, makes whatever stands before it the same. So a comparison
at the start would find that a condition may be left out, and training would make it wrong. Inputs of zeros or ones, as
examples often are, hide as much. What a model computes does not depend on these values, so it is compared with values
that show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import TorchDispatchMode, pytree
from ..graph.tensors import has_values

_SMALL = 1e-3
"""The largest value of a tensor that hides something. The scales of layers start at 1e-4 or less."""


@contextmanager
def comparable(
    model: nn.Module, with_gradients: bool = False, in_any_order: bool = True, seed: int | None = None
) -> Iterator[None]:
    """Run something that is compared, and leave the random generators as they are.

    Args:
        model: what runs; says on which devices.
        with_gradients: whether to record for a backward pass.
        in_any_order: whether random numbers do not depend on the order in which they are drawn.
        seed: of the random numbers; None for those that the generators would draw now.
    """
    devices = list({tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})
    # The fast path of nn.TransformerEncoder computes the same but for padded positions, which it sets to zero.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(with_gradients))
            stack.enter_context(torch.random.fork_rng(devices))
            if seed is not None:
                torch.manual_seed(seed)
            if in_any_order:
                stack.enter_context(_SameDraws(devices))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _SameDraws(TorchDispatchMode):
    """Seed the generators before each operator that draws random numbers.

    So what it draws depends on its arguments alone. A graph may draw in another order than its model, for instance
    where a value is computed that nobody reads.
    """

    supports_higher_order_operators = True

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        cuda = [torch.cuda.default_generators[device.index] for device in devices]
        self.generators = [torch.default_generator, *cuda]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            for generator in self.generators:
                generator.manual_seed(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def revealed(model: nn.Module, *graphs: nn.Module) -> Iterator[None]:
    """Give parameters and buffers near zero other values for the body.

    Args:
        model: a model that has tensors of its own, which may share storage with a user's.
        graphs: of the model. They get the same values in tensors over the same storage, and in copies by their names.
    """
    values: dict[Any, Tensor] = {}
    hidden: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in _named_tensors(model):
            at = tensor.data_ptr(), tensor.shape
            if at not in values and _hides(tensor):
                values[at] = _drawn_matrix(tensor, len(values))
            if at in values:
                values[name] = values[at]
        for name, tensor in (each for module in (model, *graphs) for each in _named_tensors(module)):
            value = values.get((tensor.data_ptr(), tensor.shape), values.get(name))
            if value is not None and _hides(tensor):  # not a tensor that was met by another name
                hidden.append((tensor, tensor.data))
                tensor.data = value
        yield
    finally:
        for tensor, data in hidden:
            tensor.data = data


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that may get other values, by each of their names."""
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and has_values(tensor):
                yield name, tensor


def varied(values: Any, of_tokens: bool = False) -> Any:
    """Return the inputs of a call with other numbers where a tensor has the same in each place; None without such.

    Args:
        values: a tree.
        of_tokens: whether whole numbers vary too, but for those of a mask. Few of them may be valid.
    """
    leaves, spec = pytree.tree_flatten_with_path(values)
    others = []
    for seed, (path, leaf) in enumerate(leaves):
        if _is_uniform(leaf) and leaf.is_floating_point():
            others.append(_drawn(leaf, seed))
        elif of_tokens and _is_uniform(leaf) and "mask" not in pytree.keystr(path):
            others.append(_drawn_tokens(leaf, seed))
        else:
            others.append(leaf)
    changed = any(other is not leaf for other, (_, leaf) in zip(others, leaves, strict=True))
    return pytree.tree_unflatten(others, spec) if changed else None


def _is_uniform(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or not has_values(leaf) or leaf.numel() < 2 or leaf.is_complex():
        return False
    return leaf.dtype is not torch.bool and bool((leaf == leaf[(0,) * leaf.dim()]).all())


def _hides(tensor: Tensor) -> bool:
    value = tensor.detach()
    if not value.numel() or abs(value[(0,) * value.dim()].item()) >= _SMALL:  # the usual case, seen at one number
        return False
    return bool((value.abs() < _SMALL).all())


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Return a tensor of numbers between 0.1 and 1, which models take wherever they take zeros or ones."""
    drawn = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    return torch.empty_like(like.detach()).copy_(drawn)


def _drawn_matrix(like: Tensor, seed: int) -> Tensor:
    """Return values for a parameter; those of a matrix let results be as large as inputs, lest functions saturate."""
    drawn = _drawn(like, seed)
    return (2 * drawn - 1.1) / like[0].numel() ** 0.5 if like.dim() > 1 else drawn


def _drawn_tokens(like: Tensor, seed: int) -> Tensor:
    """Return whole numbers between zero and the one of `like`, which tables of models have as well."""
    most = int(like.flatten()[0])
    if most == 0 and like.device.type == "cpu":  # elsewhere a token that there is not may end the process
        most = 1
    if most <= 0:
        return like
    return torch.randint(most + 1, like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
