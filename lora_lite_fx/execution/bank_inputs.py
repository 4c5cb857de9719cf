"""What calls of a graph with banks say beside the inputs of its model: the slot of each row of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..adapters.bank import IDS, check_ids, check_rows, check_slots, ids_of
from ..adapters.placement import bank_slots
from ..adapters.switches import Switches
from ..capture.graph_calls import count_arguments
from ..compat.torch import pytree, trace_is_active, version_of
from ..graph.direct_calls import reading_waits
from ..sites.batch.batch_dimension import inputs_with_rows


@dataclass
class BankInputs:
    """The input `adapter_ids` of a graph.

    Args:
        slots: the number of slots of each bank, by name.
        with_rows: the indices of the inputs whose first dimension is the batch.
        arguments: how many arguments the graph takes by position, with the ids.
        checked: the ids that were checked last, how often they had been written to, and the slots that they fit.
    """

    slots: Mapping[str, int]
    with_rows: tuple[int, ...]
    arguments: int
    checked: tuple[Tensor, tuple[int, int]] | None = None

    @classmethod
    def of(cls, gm: fx.GraphModule, graph: fx.Graph) -> BankInputs | None:
        """Return those of a module with this graph; None if it has no bank."""
        slots = bank_slots(gm)
        return cls(slots, inputs_with_rows(graph), count_arguments(graph)) if slots else None

    def acting(self, switches: Switches) -> list[int]:
        """Return the numbers of slots of the banks that act."""
        return [slots for name, slots in self.slots.items() if switches.acts(name)]

    def taken_out(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], by_position: bool
    ) -> tuple[tuple[Any, ...], Any]:
        """Return the positional arguments of the model, and the ids of a call or None; take these out of `kwargs`.

        Args:
            args, kwargs: of the call.
            by_position: whether the ids may be the last positional argument, as torch.fx calls what it traces.
        """
        if by_position and IDS not in kwargs and len(args) == self.arguments:
            return args[:-1], args[-1]
        return args, kwargs.pop(IDS, None)

    def further(self, switches: Switches, values: Any, ids: Any) -> dict[str, Any]:
        """Return the input of the program of a call, checked.

        Args:
            switches: of the model; they say the ids if the call does not.
            values: the inputs of the model.
            ids: those of the call, or None.

        Raises:
            CallError, ConfigError, AdapterError: there are none, or they do not fit the batch or the banks.
        """
        slots = self.acting(switches)
        if not slots:
            return {IDS: None}
        if trace_is_active() and ids is not None:
            return {IDS: ids}
        # An export or a trace would keep the ids of the switches as a constant.
        of_switches = None if torch.compiler.is_exporting() or trace_is_active() else switches.ids
        checked = check_ids(ids_of(of_switches if ids is None else ids))
        leaves = pytree.tree_leaves(values)
        for index in self.with_rows:
            if isinstance(leaves[index], Tensor):
                check_rows(checked, leaves[index].shape[0])
        self._check_slots(checked, min(slots))
        return {IDS: checked}

    def _check_slots(self, ids: Tensor, slots: int) -> None:
        """Check ids against a number of slots; on a GPU once as long as nothing writes to them, because that waits.

        On a CPU each call checks: writes by numpy are not counted.
        """
        if torch.compiler.is_compiling() or ids.is_inference() or not reading_waits(ids):
            check_slots(ids, slots)
            return
        known, state = self.checked, (version_of(ids), slots)
        if known is None or known[0] is not ids or known[1] != state:
            check_slots(ids, slots)
            self.checked = ids, state
