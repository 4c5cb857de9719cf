"""Find out in which form a graph may take the calls of a kind.

The normal form of a call has arguments that the call lacks. Whether the model computes the same with them is seen on a
run of the model with the call as it came, and one in that form. Each kind of call is tried when the first call of it
comes. Calls of text alone are tried on a few tokens, all others on what they bring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..capture.differences import agree
from ..capture.outputs import comparable
from ..capture.shared_copy import shared_copy
from ..compat.torch import constant_when_compiled, not_compiled
from ..errors import CaptureError
from ..graph.calls_and_traces import tracing
from ..graph.sharded import refuse_sharded
from .call_structure import Leaves, assemble, disassemble
from .causal_lm import Form, NormalizedCall, caches, join_mask, normalize_call, with_loss
from .decoder import BATCH, LENGTH, PAST, Decoder
from .positions import Counted
from .sliding_window import cut_windows, uncut_windows

Kind = tuple[Any, ...]
"""What calls have in common whose arguments have the same names and types, with or without tokens in a cache."""

_FORMS = (Form(True, True), Form(False, True), Form(True, False), Form(False, False))


class Forms:
    """The forms of the calls of a model, by kind.

    Args:
        model: the adapted model.
        copied: returns a plain copy of it to be run.
    """

    def __init__(self, model: Any, copied: Callable[[], Any]) -> None:
        self._model = model
        self._copied = copied
        self._known: list[tuple[Kind, Form | None]] = []

    def of(
        self, part: Any, decoder: Decoder | None, arguments: dict[str, Any], counted: Counted, fuses_loss: bool
    ) -> Form | None:
        """Return the form for a call, None if a graph takes it as it comes; try it if it is the first of its kind.

        Args:
            part: the model that is called.
            decoder: what runs of that part have shown, if it is a causal language model.
            arguments: as the call has them.
            counted: positions that are computed for the call.
            fuses_loss: as in `normalize_call`.

        Raises:
            CaptureError: the model computes something else with these positions.
            AdapterError: the call is the first of its kind, and the model is sharded.
        """
        if decoder is None and counted.positions is None:
            return None
        kind = self._kind(part, part.training, arguments, counted, fuses_loss)
        if self._knows(kind):
            return self._form_of(kind)
        return self._tried(part, decoder, arguments, counted, fuses_loss)

    # What is known of a kind stays, so that torch.compile does not guard on what is known of others.
    @constant_when_compiled
    def _knows(self, kind: Kind) -> bool:
        return any(known == kind for known, _ in self._known)

    @constant_when_compiled
    def _form_of(self, kind: Kind) -> Form | None:
        return next(form for known, form in self._known if known == kind)

    @not_compiled
    def _tried(
        self, part: Any, decoder: Decoder | None, arguments: dict[str, Any], counted: Counted, fuses_loss: bool
    ) -> Form | None:
        refuse_sharded(
            self._model,
            f"No call with {', '.join(arguments)} was made before, and its form cannot be tried on a model",
            "call the model once like this before it is sharded",
        )
        with tracing():
            model = self._copied()
            # A run may write to buffers.
            model = shared_copy(model, [name for name, _ in model.named_buffers()])
            model.config.return_dict = True
            plain = model.get_submodule(path_of(part))
            counted.recall(plain)
            for calls in (_small_calls(plain, decoder, arguments, counted), [(arguments, part.training)]):
                forms = _forms(decoder, arguments, is_small=len(calls) > 1)
                if (found := _first_equal(plain, calls, forms, decoder, counted.positions, fuses_loss)) is None:
                    continue  # the model raises
                if not found and counted.positions is not None:
                    raise CaptureError(
                        f"{type(part).__name__} computes something else with the positions that its own method returns"
                        f" for a call with {', '.join(arguments)}. The way out: pass position_ids."
                    )
                form = found[0] if found else None
                same = [({**arguments, **_caching(call)}, training) for call, training in calls]
                kinds = [self._kind(part, training, call, counted, fuses_loss) for call, training in same]
                self._known += [(kind, form) for kind in kinds]
                return form
        return None

    def _kind(
        self, part: Any, training: bool, arguments: Mapping[str, Any], counted: Counted, fuses_loss: bool
    ) -> Kind:
        return (*kind_of(part, arguments), training, counted.positions is None, fuses_loss)


def path_of(part: Any) -> str:
    """Return the qualified name of a part of an adapted model; empty for the model."""
    return getattr(part, "_path", "")


def kind_of(part: Any, arguments: Mapping[str, Any]) -> Kind:
    """Return the kind of a call of a part of an adapted model."""
    return (path_of(part), *((name, _kind_of(arguments[name])) for name in sorted(arguments)))


def _kind_of(value: Any) -> Any:
    from transformers.cache_utils import Cache

    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, Cache):
        return type(value), value.is_initialized, value.get_seq_length() > 0
    return value if isinstance(value, (bool, int, float, str)) else type(value)


_Calls = list[tuple[dict[str, Any], bool]]
"""The arguments of calls, each with whether the model is in training."""


def _small_calls(part: Any, decoder: Decoder | None, arguments: dict[str, Any], counted: Counted) -> _Calls:
    """Return calls of a few tokens in both modes, and with and without a cache in the result; none if it has more."""
    small = _few_tokens(part.eval(), arguments) if decoder is not None and counted.positions is None else None
    if small is None:
        return []
    caching = [small] if caches(small) else [{**small, "use_cache": keeps} for keeps in (True, False)]
    return [(call, training) for training in (True, False) for call in caching]


def _caching(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_cache": call["use_cache"]} if "use_cache" in call else {}


def _first_equal(
    part: Any, calls: _Calls, forms: Iterable[Form | None], decoder: Decoder | None, positions: Any, fuses_loss: bool
) -> list[Form | None] | None:
    """Return a list of the first form in which calls have the results that they have as they come.

    Returns:
        An empty list if there is none; None if the model raises on each call.
    """
    expected = [(call, results) for call in calls if (results := _results(part, *call)) is not None]
    if not expected:
        return None
    given = {} if positions is None else {"position_ids": positions}
    for form in forms:
        normal = functools.partial(_normal, part, decoder, form, given, fuses_loss)
        if all(_are_same(results, _results(part, *call, normal)) for call, results in expected):
            return [form]
    return []


def _normal(
    part: Any, decoder: Decoder | None, form: Form | None, given: dict[str, Any], fuses_loss: bool, call: dict[str, Any]
) -> NormalizedCall:
    return normalize_call(part, decoder, {**call, **given}, form, fuses_loss)


def _forms(decoder: Decoder | None, arguments: Mapping[str, Any], is_small: bool) -> Iterator[Form | None]:
    """Yield the forms to try, those first that most kinds of calls have in common."""
    for form in _FORMS if decoder is not None else ():
        may_count = is_small and "position_ids" not in arguments
        if (may_count or not form.counts) and (form.loss_apart or "labels" in arguments):
            yield form
    yield None


def _results(
    part: Any,
    arguments: Mapping[str, Any],
    training: bool,
    normal: Callable[[dict[str, Any]], NormalizedCall] | None = None,
) -> Leaves | None:
    """Return the tensors and numbers of the result, and of the caches after the call; None if the model raises.

    Args:
        part: the model that is called.
        arguments: of the call; they are copied.
        training: the mode to call it in.
        normal: brings the call into a form; None for the call as it came.
    """
    own = _copied(arguments)
    part.train(training)
    try:
        with comparable(part), torch.autocast(part.device.type, enabled=False):
            if normal is None:
                return _leaves_of(part(**own), own, keeps_cache=True)
            call = normal(own)
            return _leaves_of(_run(part, call), call.arguments, call.keeps_cache)
    except Exception:
        return None


def _run(part: Any, call: NormalizedCall) -> Any:
    arguments = dict(call.arguments)
    join_mask(arguments)
    with uncut_windows(arguments):
        result = part(**arguments)
    cut_windows(arguments)
    return with_loss(part, call, result)


def _leaves_of(result: Any, arguments: Mapping[str, Any], keeps_cache: bool) -> Leaves:
    from ..compat.transformers import CACHE

    leaves: Leaves = {}
    disassemble(result, "result", leaves)
    if not keeps_cache:
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith(f"result_{CACHE}_")}
    else:
        disassemble(caches(arguments), "after", leaves)
    return leaves


def _are_same(expected: Leaves, actual: Leaves | None) -> bool:
    """Tell whether a call in normal form has the results of the call as it came; its cache may be left beside them."""
    if actual is None or any(name.startswith("result") and name not in expected for name in actual):
        return False
    return all(name in actual and agree(actual[name], value) for name, value in expected.items())


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    leaves: Leaves = {}
    structure = disassemble(dict(arguments), "a", leaves)
    own = {name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for name, leaf in leaves.items()}
    copied: dict[str, Any] = assemble(structure, own)
    return copied


def _few_tokens(part: Any, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call of the same kind with a few tokens; None if this one brings more than text."""
    from transformers.cache_utils import DynamicCache

    from ..compat.transformers import CACHE

    text = part.config.get_text_config(decoder=True)
    cache = arguments.get(CACHE)
    if cache is not None and type(cache) is not DynamicCache:
        return None
    past = PAST if cache is not None and cache.get_seq_length() else 0
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if tokens is None:
        return None
    ids, mask = _text(past + LENGTH, text, tokens.device)
    if cache is not None:
        cache = DynamicCache(config=text)
        if past:
            part(**{"input_ids": ids[:, :past], "attention_mask": mask[:, :past], CACHE: cache, "use_cache": True})
    ids, count = ids[:, past:], tokens.shape[1]
    small: dict[str, Any] = {}
    for name, value in arguments.items():
        dims = value.dim() if isinstance(value, Tensor) else None
        if name == CACHE:
            small[name] = cache
        elif dims is None:
            small[name] = value
        elif (name, dims) == ("input_ids", 2):
            small[name] = ids
        elif (name, dims) == ("inputs_embeds", 3):
            small[name] = part.get_input_embeddings()(ids).detach()
        elif (name, dims) == ("attention_mask", 2):
            small[name] = mask[:, past:] if past and value.shape[1] == count else mask
        elif dims == 2 and name in ("labels", "shift_labels"):
            small[name] = ids.where((ids % 3 > 0) & mask[:, past:].bool(), -100)
        elif name == "position_ids" and dims in (2, 3):
            positions = torch.arange(past, past + LENGTH, device=value.device)
            small[name] = positions.repeat(*value.shape[:-2], BATCH, 1)
        elif dims == 2 and name in ("token_type_ids", "mm_token_type_ids"):
            small[name] = torch.zeros_like(ids)
        elif (name, dims) == ("num_items_in_batch", 0):
            small[name] = torch.full_like(value, 5)
        elif (name, dims) == ("logits_to_keep", 1):
            small[name] = torch.arange(2, device=value.device)
        else:
            return None
    return small


def _text(length: int, config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens, and a mask with padding on the left. A token for padding is in the text too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < config.vocab_size:
        ids[0, :2] = ids[1, 3] = padding
    return ids.to(device), mask.to(device)
