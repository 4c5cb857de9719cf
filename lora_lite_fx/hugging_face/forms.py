"""Find out in which form a graph may take the calls of a kind.

The normal form of a call has arguments that the call lacks. Whether the model computes the same with them is seen on a
run of the model with the call as it came, and one in that form. Each kind of call is tried when the first call of it
comes. Calls of text alone are tried on a few tokens, all others on what they bring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..capture.comparable import comparable, revealed, varied
from ..capture.depth.stacks import built_alike, shortened
from ..capture.differences import agree
from ..compat.torch import constant_when_compiled, not_compiled
from ..errors import AdapterError, CaptureError
from ..graph.calls_and_traces import tracing
from ..graph.sharded import is_sharded, refuse_sharded
from .caches import BATCH, LENGTH, PAST, Decoder, caches, cut_windows, probe, some_text, uncut_windows
from .call_structure import Leaves, assemble, disassemble
from .causal_lm import Form, NormalizedCall, join_mask, normalize_call, with_loss
from .positions import Counted, count_positions

_MOST_LAYERS = 8
"""As many layers of a stack are run to try a form: more than the kinds that take turns in a stack."""

Kind = tuple[Any, ...]
"""What calls have in common whose arguments have the same names and types, with or without tokens in a cache."""


class Forms:
    """The forms of the calls of a model, by kind.

    Args:
        model: the adapted model.
        copied: returns a plain copy of it to be run, see `ModelAdapters.shadow`.
    """

    def __init__(self, model: Any, copied: Callable[..., Any]) -> None:
        self._model = model
        self._copied = copied
        self._known: list[tuple[Kind, Form]] = []
        self._decoders: dict[torch.dtype | None, Decoder | None] = {}  # by what autocast computes in

    def normalized(self, part: Any, arguments: dict[str, Any], fuses_loss: bool) -> NormalizedCall:
        """Return a call of a part of the model in its normal form; it raises as `of` does."""
        counted = count_positions(part, arguments)
        decoder = self._decoder_for(part, arguments)
        form = self.of(part, decoder, arguments, counted, fuses_loss)
        if counted.positions is not None:
            arguments = {**arguments, "position_ids": counted.positions}
        return normalize_call(part, decoder, arguments, form, fuses_loss)

    def _decoder_for(self, part: Any, arguments: Mapping[str, Any]) -> Decoder | None:
        """Return what a run of the model has shown, if it is a causal language model, and is called whole.

        Under autocast its cache has other types. The cache of a training call is read by no later one, and such calls
        have one graph with and without autocast. Of a model that is sharded no copy can be run.
        """
        if part is not self._model:
            return None
        device, dtype = part.device.type, None
        has_later_calls = not part.training or bool(caches(arguments))
        if torch.is_autocast_enabled(device) and has_later_calls and not is_sharded(part):
            dtype = torch.get_autocast_dtype(device)
        if dtype not in self._decoders:
            self._probe_now(dtype)
        return self._decoders[dtype]

    @not_compiled
    def _probe_now(self, dtype: torch.dtype | None) -> None:
        with torch.autocast(self._model.device.type, dtype=dtype, enabled=dtype is not None):
            self._decoders[dtype] = probe(self._copied())

    def of(
        self, part: Any, decoder: Decoder | None, arguments: dict[str, Any], counted: Counted, fuses_loss: bool
    ) -> Form:
        """Return the form for a call, None if a graph takes it as it comes; try it if it is the first of its kind.

        Raises:
            CaptureError: the model computes something else with these positions.
            AdapterError: the call is the first of its kind, and the model is sharded.
        """
        if decoder is None and counted.positions is None:
            return None
        kind = self._kind(part, part.training, arguments, counted, fuses_loss)
        if self._knows(kind):
            return self._form_of(kind)
        if torch.compiler.is_exporting():  # there are no values to try it on
            raise AdapterError(
                f"torch.export meets the first call of the model with {', '.join(arguments)}, which is to be captured"
                " before. The way out: call what is exported once, with the same arguments, under torch.no_grad()."
            )
        return self._tried(part, decoder, arguments, counted, fuses_loss)

    # What is known of a kind stays, so that torch.compile does not guard on what is known of others.
    @constant_when_compiled
    def _knows(self, kind: Kind) -> bool:
        return any(known == kind for known, _ in self._known)

    @constant_when_compiled
    def _form_of(self, kind: Kind) -> Form:
        return next(form for known, form in self._known if known == kind)

    @not_compiled
    def _tried(
        self, part: Any, decoder: Decoder | None, arguments: dict[str, Any], counted: Counted, fuses_loss: bool
    ) -> Form:
        refuse_sharded(
            self._model,
            f"No call with {', '.join(arguments)} was made before, and its form cannot be tried on a model",
            "call the model once like this before it is sharded",
        )
        with tracing():
            model = self._copied(own_buffers=True)  # a run may write to them
            model.config.return_dict = True
            plain = model.get_submodule(path_of(part))
            counted.recall(plain)
            # Layers that are built alike take a form alike, so some of them show whether a model does.
            few_layers = built_alike(model)
            if decoder is not None and [*few_layers.values()] == [len(decoder.layers)]:
                decoder = decoder._replace(layers=decoder.layers[:_MOST_LAYERS])
                few_layers = dict.fromkeys(few_layers, _MOST_LAYERS)
            with shortened(model, few_layers):
                return self._first_form(plain, part, decoder, arguments, counted, fuses_loss)

    def _first_form(
        self,
        plain: Any,
        part: Any,
        decoder: Decoder | None,
        arguments: dict[str, Any],
        counted: Counted,
        fuses_loss: bool,
    ) -> Form:
        """Try the forms on a plain copy of the part that is called, and note the first with equal results."""
        brought = [(each, part.training) for each in (arguments, _with_others(arguments)) if each is not None]
        for calls in (_small_calls(plain, decoder, arguments, counted), brought):
            # On what a call brings, padding may be missing, beside which positions could be other ones.
            may_count = calls is not brought and "position_ids" not in arguments
            forms: tuple[Form, ...] = (None,) if decoder is None else (True, False, None)[not may_count :]
            if (equal := _first_equal(plain, calls, forms, decoder, counted.positions, fuses_loss)) is None:
                continue  # the model raises
            if not equal and counted.positions is not None:
                raise CaptureError(
                    f"{type(part).__name__} computes something else with the positions that its own method returns"
                    f" for a call with {', '.join(arguments)}. The way out: pass position_ids."
                )
            form = equal[0] if equal else None
            for call, training in calls:
                alike = {**arguments, "use_cache": call["use_cache"]} if "use_cache" in call else arguments
                self._known.append((self._kind(part, training, alike, counted, fuses_loss), form))
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


def _with_others(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return a call with other numbers in tensors of one number, as embeddings of zeros; None without such."""
    others = varied({name: value for name, value in arguments.items() if isinstance(value, Tensor)})
    return None if others is None else {**arguments, **others}


def _first_equal(
    part: Any, calls: _Calls, forms: Iterable[Form], decoder: Decoder | None, positions: Any, fuses_loss: bool
) -> list[Form] | None:
    """Return a list of the first form in which calls have the results that they have as they come.

    Returns:
        An empty list if there is none; None if the model raises on each call.
    """

    @functools.cache
    def expected(in_any_order: bool) -> list[Leaves | None]:
        return [_results(part, *call, in_any_order) for call in calls]

    taken = [number for number, results in enumerate(expected(False)) if results is not None]
    if not taken:
        return None
    given = {} if positions is None else {"position_ids": positions}
    for form in forms:

        def normal(call: dict[str, Any], form: Form = form) -> NormalizedCall:
            return normalize_call(part, decoder, {**call, **given}, form, fuses_loss)

        for in_any_order in (False, True):  # a form may draw random numbers in another order, which is slow to allow
            results = expected(in_any_order)
            if all(_are_same(results[i], _results(part, *calls[i], in_any_order, normal)) for i in taken):
                return [form]
    return []


def _results(
    part: Any,
    arguments: Mapping[str, Any],
    training: bool,
    in_any_order: bool,
    normal: Callable[[dict[str, Any]], NormalizedCall] | None = None,
) -> Leaves | None:
    """Return the tensors and numbers of the result, and of the caches after the call; None if the model raises.

    `in_any_order` is as for `comparable`. `normal` brings a copy of the call into a form; without it, the call is made
    as it came.
    """
    own = _copied(arguments)
    part.train(training)
    try:
        with (
            comparable(part, in_any_order=in_any_order),
            revealed(part),
            torch.autocast(part.device.type, enabled=False),
        ):
            if normal is None:
                return _leaves_of(part(**own), own, keeps_cache=True)
            call = normal(own)
            arguments = dict(call.arguments)
            join_mask(arguments)
            with uncut_windows(arguments):
                result = part(**arguments)
            cut_windows(arguments)
            return _leaves_of(with_loss(part, call, result), arguments, call.keeps_cache)
    except Exception:
        return None


def _leaves_of(result: Any, arguments: Mapping[str, Any], keeps_cache: bool) -> Leaves:
    from ..compat.transformers import CACHE

    leaves: Leaves = {}
    disassemble(result, "result", leaves)
    if not keeps_cache:
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith(f"result_{CACHE}_")}
    else:
        disassemble(caches(arguments), "after", leaves)
    return leaves


def _are_same(expected: Leaves | None, actual: Leaves | None) -> bool:
    """Tell whether a call in normal form has the results of the call as it came; its cache may be left beside them."""
    if expected is None or actual is None or any(name.startswith("result") and name not in expected for name in actual):
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
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if tokens is None or (cache is not None and type(cache) is not DynamicCache):
        return None
    past = PAST if cache is not None and cache.get_seq_length() else 0
    device = tokens.device
    ids, mask = some_text(past + LENGTH, text, device)
    if cache is not None:
        cache = DynamicCache(config=text)
        if past:
            part(**{"input_ids": ids[:, :past], "attention_mask": mask[:, :past], CACHE: cache, "use_cache": True})
    ids, masked = ids[:, past:], arguments.get("attention_mask")
    labels = ids.where((ids % 3 > 0) & mask[:, past:].bool(), -100)
    is_whole = not isinstance(masked, Tensor) or masked.shape[-1] != tokens.shape[1]
    positions = torch.arange(past, past + LENGTH, device=device).repeat(BATCH, 1)
    of_text = {
        ("input_ids", 2): ids,
        ("attention_mask", 2): mask if is_whole else mask[:, past:],
        ("labels", 2): labels,
        ("shift_labels", 2): labels,
        ("position_ids", 2): positions,
        ("position_ids", 3): positions.repeat(len(arguments.get("position_ids", ())), 1, 1),
        ("token_type_ids", 2): torch.zeros_like(ids),
        ("mm_token_type_ids", 2): torch.zeros_like(ids),
        ("num_items_in_batch", 0): torch.tensor(5, device=device),
        ("logits_to_keep", 1): torch.arange(2, device=device),
    }
    if "inputs_embeds" in arguments:
        of_text["inputs_embeds", 3] = part.get_input_embeddings()(ids).detach()
    small: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and (name, value.dim()) not in of_text:
            return None
        small[name] = of_text[name, value.dim()] if isinstance(value, Tensor) else value
    return small if cache is None else {**small, CACHE: cache}
