"""The classes of models and modules that run graphs: their `forward`, and `generate`, with an adapter for each row."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..adapters.bank import IDS, check_ids
from ..adapters.switches import by_row
from ..capture.forward_signature import forward_signature
from ..errors import AdapterError
from ..execution.frozen import frozen
from ..execution.layer_modules import RunsParts, running_parts
from .graph_cache import GraphCache

_PEFT = (
    "PEFT has changed the modules of this adapted model, which do not run: its graphs do. PEFT's adapters would have no"
    " effect. The way out: give adapt all configs, adapt(model, [LoRA(r=8), llfx.from_peft_config(config)])."
)


@functools.cache
def subclass(kind: Any, cls: Any) -> type:
    """Return a subclass of `cls`, of the same name, whose models run graphs: `kind` is `Adapted` or `AdaptedPart`."""

    @functools.wraps(cls.forward)  # generate and Trainer look at its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "peft_config" in vars(self):
            raise AdapterError(_PEFT)
        with _of_rows(self, kwargs):
            return self._graphs.run(self, args, kwargs)

    forward.__signature__ = forward_signature(cls)  # type: ignore[attr-defined]  # read in each call
    adapted: Any = running_parts(cls, kind)
    adapted.forward = forward
    if kind.is_whole and hasattr(cls, "generate"):

        @functools.wraps(cls.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            copies = _copies_of_a_row(self, kwargs)
            by_rows = kwargs.get("adapter_names", kwargs.get(IDS)) is not None
            if copies > 1 and by_rows and self.config.is_encoder_decoder:
                raise AdapterError(
                    f"generate of {cls.__name__} with beams or several sequences calls the encoder with one row of each"
                    f" text and the decoder with {copies}. So rows cannot have adapters of their own. The way out:"
                    " num_beams=1 and one sequence; or one generate for each adapter, as with active(model, name)."
                )
            with _of_rows(self, kwargs, copies), frozen(self):
                return cls.generate(self, *args, **kwargs)

        adapted.generate = generate
    return adapted  # type: ignore[no-any-return]


def _of_rows(model: Any, kwargs: dict[str, Any], copies: int = 1) -> AbstractContextManager[Any]:
    """Return a scope in which each row of the batch has the adapter that `adapter_names` or `adapter_ids` say.

    Args:
        model: the adapted model.
        kwargs: the arguments of a call, from which these are taken out. PEFT's name for the frozen model is `__base__`.
        copies: how many rows there will be of each.
    """
    names, ids = kwargs.pop("adapter_names", None), kwargs.pop(IDS, None)
    if ids is not None:
        return by_row(model, check_ids(ids).repeat_interleave(copies) if copies > 1 else check_ids(ids))
    if names is not None:
        return by_row(model, [None if name == "__base__" else name for name in names for _ in range(copies)])
    return nullcontext()


def _copies_of_a_row(model: Any, kwargs: dict[str, Any]) -> int:
    """Return how many rows `generate` makes of one: a beam each, or a sequence each to sample."""
    config = kwargs.get("generation_config") or model.generation_config
    asked = (kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))
    return int(max(asked))


class AdaptedLayer(RunsParts):
    """A module with an adapted site, in a model that runs graphs."""

    _graphs: GraphCache
    _path: str

    def run_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Run a graph of the module alone, because its adapter is in graphs and its own code lacks it."""
        return self._graphs.run(self, args, kwargs)


class AdaptedPart:
    """A transformers model that runs graphs: the adapted model, or a part of it."""

    _graphs: GraphCache
    _path: str
    is_whole = False
