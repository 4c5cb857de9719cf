"""Compute the positions of tokens beside images and sound as the model does, before a graph is called.

Such a model counts along the sides of images, in a loop over the values of all tokens, which a graph cannot follow. It
remembers by how much the positions of a text differ from the number of its tokens, for calls that go on with the text.
So its own method runs in each call, on the adapted model, which remembers what the model would.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_METHOD = "compute_3d_position_ids"
_REMEMBERED = "rope_deltas"
"""The attribute in which models remember how much further positions are than the number of tokens."""


def computed_positions(part: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the positions that a call computes by a method of the model, which may remember some of them.

    Args:
        part: the model that is called.
        arguments: of the call, by name; none is None.

    Returns:
        The positions. None if the call brings positions, or if the model leaves them to its layers.
    """
    owner = _counts_positions(part)
    if owner is None or "position_ids" in arguments:
        return None
    tokens = arguments.get("input_ids")
    # The method reads the sizes of the embeddings alone.
    embeddings = arguments.get("inputs_embeds", None if tokens is None else tokens[..., None])
    known = {**arguments, "inputs_embeds": embeddings, "inputs_tensor": embeddings}
    if "feature_attention_mask" in arguments:  # of sounds, whose lengths a forward takes from it
        known["audio_feature_lengths"] = arguments["feature_attention_mask"].sum(1)
    positions: Tensor | None = getattr(owner, _METHOD)(**{name: known.get(name) for name in _parameters(type(owner))})
    return positions


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(kind, _METHOD)).parameters)[1:]


def _counts_positions(part: Any) -> Any:
    """Return the model that has the method: this one, or the one without its head; None if neither has it."""
    inner = getattr(part, "model", None)
    return next((model for model in (inner, part) if hasattr(model, _METHOD)), None)


def remembered_positions(part: Any) -> dict[str, Any]:
    """Return the attributes of the model that has the method, by name, as they are before a call."""
    owner = _counts_positions(part)
    return {} if owner is None else {k: v for k, v in vars(owner).items() if v is None or isinstance(v, (int, Tensor))}


def remember_positions(part: Any, attributes: Mapping[str, Any]) -> None:
    """Let a copy of the model remember what the model did before a call."""
    vars(_counts_positions(part)).update(attributes) if attributes else None


def forget_positions(model: nn.Module) -> None:
    """Let a copy of a model forget what it remembers of calls, which a graph of it would have for good."""
    for module in model.modules():
        if vars(module).get(_REMEMBERED) is not None:
            setattr(module, _REMEMBERED, None)
