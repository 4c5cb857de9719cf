"""The slots of a bank: where they are, and an optimizer for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import AdapterError, ConfigError
from ..graph.insertion import DEFAULT, SHARED
from ..graph.tensors import tensor_of
from .bank import check_ids, check_slots
from .placement import Placement, adapter_names, bank_slots, placements
from .state import adapter_tensors
from .switches import known_names


def bank_placements(
    model: nn.Module, slot: object, adapter: str | None, placed: Sequence[Placement] | None = None
) -> list[Placement]:
    """Return the placements of a bank.

    Args:
        model: has the bank.
        slot: is checked to be one of its slots.
        adapter: the name of the bank; None if there is one alone.
        placed: the placements of the model, if they are known already.

    Raises:
        ConfigError: there is no such bank or slot.
    """
    banks = bank_slots(model)
    if adapter is not None:
        known_names(model, adapter)
    name = adapter if adapter is not None else next(iter(banks), DEFAULT)
    if name not in banks:
        raise ConfigError(
            f"{name!r} is not a bank; the model has {', '.join(adapter_names(model))}. The way out: rewrite(model,"
            " Bank(LoRA(r=8), slots=4))."
        )
    if adapter is None and len(banks) > 1:
        raise ConfigError(f"The model has the banks {', '.join(banks)}. The way out: adapter={name!r} names one.")
    if type(slot) is not int or not 0 <= slot < banks[name]:
        raise ConfigError(f"{slot!r} is not a slot of {name!r}, which has {banks[name]}: 0 to {banks[name] - 1}.")
    known = placements(model) if placed is None else placed
    return [placement for placement in known if placement.adapter_name == name]


class SlotOptimizer:
    """An optimizer for each slot of a bank, of any class of `torch.optim`: many adapters trained in one step.

    Each slot has its own state, number of steps, learning rate and clipping, as if it were trained alone. A slot that
    has no rows in a batch is not touched: no decay, and no step is counted.

        optimizer = SlotOptimizer(gm, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), max_norm=1.0)
        losses_of_rows(gm(**batch, adapter_ids=ids)).sum().backward()
        optimizer.step(ids)
        optimizer.zero_grad()

    The loss is a sum over slots of what each would have alone: a mean over all tokens of a batch would make the step of
    a slot depend on the rows of the others.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load` that has a bank.
        make: makes the optimizer of a slot, from its parameters.
        adapter: the name of the bank; None if there is one alone.
        max_norm: the norm to which the gradients of a slot are clipped before its step; None for no clipping.

    Attributes:
        slots: the optimizer of each slot, for schedulers and `param_groups`. Its parameters are views of the model's.

    Raises:
        ConfigError: the model has no such bank.
        AdapterError: it has no adapters; or no tensor of the bank requires grad.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[list[nn.Parameter]], Optimizer],
        *,
        adapter: str | None = None,
        max_norm: float | None = None,
    ) -> None:
        adapter_tensors(model)  # refuses a model without adapters, and says what to pass instead
        bank = bank_placements(model, 0, adapter)
        paths = [path for each in bank for name, path in each.tensors.items() if not name.startswith(SHARED)]
        tensors = [tensor_of(model, path) for path in paths]
        self._parameters = [tensor for tensor in tensors if tensor.requires_grad]
        if not self._parameters:
            raise AdapterError("No tensor of the bank requires grad, so that there is nothing to train.")
        self._count = len(self._parameters[0])
        self._views = [[nn.Parameter(p.detach()[slot]) for p in self._parameters] for slot in range(self._count)]
        self.slots = [make(views) for views in self._views]
        self.max_norm = max_norm

    @torch.no_grad()
    def step(self, adapter_ids: Tensor | Iterable[Tensor]) -> None:
        """Take one step in each slot that has rows.

        Args:
            adapter_ids: the ids of the batch whose gradients these are; of all of them, if several were added up.

        Raises:
            ConfigError: they are not tensors `(batch,)` of integers.
            AdapterError: one is not a slot of the bank.
        """
        given = [adapter_ids] if isinstance(adapter_ids, Tensor) else list(adapter_ids)
        for ids in given:
            check_slots(check_ids(ids), self._count)
        for slot in sorted({slot for ids in given for slot in ids.tolist() if slot >= 0}):
            views = self._views[slot]
            for view, parameter in zip(views, self._parameters, strict=True):
                view.grad = None if parameter.grad is None else parameter.grad[slot]
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(views, self.max_norm)
            self.slots[slot].step()
            for view in views:
                view.grad = None

    def zero_grad(self) -> None:
        """Let the parameters of the bank have no gradient."""
        for parameter in self._parameters:
            parameter.grad = None

    def reset(self, slot: int) -> None:
        """Forget the state of a slot, as after `reset_slot` or `load_slot`; its learning rate stays."""
        self.slots[slot].state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all slots, for `load_state_dict`."""
        return {"slots": [optimizer.state_dict() for optimizer in self.slots]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the states of all slots.

        Raises:
            ConfigError: they are of another number of slots.
        """
        if len(state["slots"]) != self._count:
            raise ConfigError(f"The state is of {len(state['slots'])} slots, and the bank has {self._count}.")
        for optimizer, each in zip(self.slots, state["slots"], strict=True):
            optimizer.load_state_dict(each)
