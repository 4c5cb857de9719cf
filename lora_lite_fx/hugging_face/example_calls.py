"""Make examples to capture a call with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..capture.export import double_batch_of_one
from .call_structure import CACHES, Leaves, Structure, cached_layers
from .decoder import BATCH, LENGTH, PAST


def examples(structure: Structure, leaves: Leaves, by_values: bool) -> Iterator[Leaves]:
    """Yield leaves to capture a call with, those first with which the graph takes most other lengths and batches.

    Args:
        structure, leaves: of the call.
        by_values: whether all have the values of the call, and not just its form.
    """
    if not by_values and (normal := _normal_example(structure, leaves)) is not None:
        yield normal
    yield _grown(leaves)
    yield leaves


def _normal_example(structure: Structure, leaves: Leaves) -> Leaves | None:
    """Return some tokens after some cached ones; None if the call has leaves that the normal form does not have."""
    counters = {
        names[part]: names.get("cumulative_length", "")
        for _, names in cached_layers(structure)
        for part in ("keys", "values")
    }
    tokens = {"input_ids": 2, "inputs_embeds": 3, "position_ids": 2, "labels": 2}
    example: Leaves = {}
    for name, leaf in leaves.items():
        dim = leaf.dim() if isinstance(leaf, Tensor) else None
        if tokens.get(name) == dim and dim is not None:
            example[name] = leaf.new_zeros((BATCH, LENGTH, *leaf.shape[2:]))
        elif dim == 2 and name in ("attention_mask", "cached_mask"):
            example[name] = leaf.new_ones((BATCH, LENGTH if name == "attention_mask" else PAST))
        elif (name, dim) == ("logits_to_keep", 1):
            example[name] = torch.arange(2, device=leaf.device)
        elif name in counters and "_layers_" in name and name.startswith(CACHES) and dim == 4:
            seen = leaves.get(counters[name], leaf.shape[2])
            # A layer that has dropped tokens is shown as one that has dropped one.
            held = PAST - (seen > leaf.shape[2]) if isinstance(seen, int) else 0
            if not held:
                return None
            example[name] = leaf.new_zeros((BATCH, leaf.shape[1], held, leaf.shape[3]))
        elif name.endswith("cumulative_length") and isinstance(leaf, int):
            example[name] = PAST
        elif name.endswith("sliding_window_tensor"):
            example[name] = leaf
        else:
            return None
    return example if any(f"{cache}_layers_0_keys" in example for cache in CACHES) else None


def _grown(leaves: Leaves) -> Leaves:
    """Return the call with a batch of one shown twice, and with a second token in caches that hold one."""
    grown = dict(leaves)
    for name, leaf in leaves.items():
        if name.startswith(CACHES) and "cross" not in name:
            if name.endswith(("_keys", "_values")) and leaf.dim() == 4 and leaf.shape[2] == 1:
                grown[name] = torch.cat([leaf, leaf], dim=2)
            elif name.endswith("cumulative_length") and isinstance(leaf, int) and leaf == 1:
                grown[name] = 2
    return double_batch_of_one(grown) or grown
