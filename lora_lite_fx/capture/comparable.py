"""Run what is compared under the same conditions: the same random numbers, and no fast paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..compat.torch import TorchDispatchMode


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
