"""Compute the positions of tokens beside images and sound as the model does, before a graph is called.

Such a model counts along the sides of images, in a loop over the values of all tokens, which a graph cannot follow. It
remembers by how much the positions of a text differ from the number of its tokens, for calls that go on with the text.
So its own method runs in each call, on the adapted model, which remembers what the model would.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..compat.torch_modules import children_of

_METHOD = "compute_3d_position_ids"
_REMEMBERED = "rope_deltas"
"""The attribute in which models remember how much further positions are than the number of tokens."""


class Counted(NamedTuple):
    """The positions that a model computed for a call.

    Args:
        positions: None if the call brings some, or if the model leaves them to its layers.
        before: what the model remembered before, by attribute.
    """

    positions: Tensor | None
    before: dict[str, Any]

    def recall(self, part: Any) -> None:
        """Let a copy of the model remember what the model did before the call."""
        if self.before:
            vars(_owner(part)).update(self.before)


def count_positions(part: Any, arguments: Mapping[str, Any]) -> Counted:
    """Compute the positions of a call by a method of the model, which may remember something of them."""
    owner = _owner(part)
    if owner is None or "position_ids" in arguments:
        return Counted(None, {})
    before = {name: value for name, value in vars(owner).items() if value is None or isinstance(value, (int, Tensor))}
    tokens = arguments.get("input_ids")
    # The method reads the sizes of the embeddings alone.
    embeddings = arguments.get("inputs_embeds", None if tokens is None else tokens[..., None])
    known = {**arguments, "inputs_embeds": embeddings, "inputs_tensor": embeddings}
    if "feature_attention_mask" in arguments:  # of sounds, whose lengths a forward takes from it
        known["audio_feature_lengths"] = arguments["feature_attention_mask"].sum(1)
    kind: Any = type(owner)
    positions = getattr(owner, _METHOD)(**{name: known.get(name) for name in _parameters(kind)})
    return Counted(positions, before)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(kind, _METHOD)).parameters)[1:]


def _owner(part: Any) -> Any:
    """Return the model that has the method: this one, or the one without its head; None if neither has it."""
    inner = children_of(part).get("model")
    return next((model for model in (inner, part) if hasattr(type(model), _METHOD)), None)


def forget_positions(model: nn.Module) -> None:
    """Let a copy of a model forget what it remembers of calls, which a graph of it would have for good."""
    for module in model.modules():
        if vars(module).get(_REMEMBERED) is not None:
            setattr(module, _REMEMBERED, None)
