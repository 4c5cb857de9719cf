"""Find out in which form a graph may take the calls of a kind.

The normal form of a call has arguments that the call lacks. Whether the model computes the same with them is seen on a
run of the model with the call as it came, and one in that form. Each kind of call is tried when the first call of it
comes. Calls of text alone are tried on a few tokens, all others on what they bring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.differences import agree
from ..capture.outputs import comparable
from ..capture.share import share
from ..errors import CaptureError
from .call_structure import Leaves, assemble, disassemble
from .causal_lm import Form, NormalizedCall, caches, join_mask, normalize_call, with_loss
from .decoder import BATCH, LENGTH, PAST, Decoder
from .sliding_window import cut_windows, uncut_windows

Kind = tuple[Any, ...]
"""What calls have in common whose arguments have the same names and types, with or without tokens in a cache."""

_FORMS = (Form(True, True), Form(False, True), Form(True, False), Form(False, False))


class _Known(NamedTuple):
    """The form of a kind of call, in one mode of the model or in both."""

    kind: Kind
    mode: bool | None
    form: Form | None


class KnownForms:
    """The forms of the kinds of calls that were tried."""

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def find(self, kind: Kind, training: bool) -> _Known | None:
        """Return what is known of a kind; None if it has not been tried."""
        for known in self._known:
            if known.mode in (None, training) and known.kind == kind:
                return known
        return None

    def add(self, kind: Kind, mode: bool | None, form: Form | None) -> None:
        """Keep the form of a kind, None for calls that a graph takes as they come."""
        self._known.append(_Known(kind, mode, form))


def kind_of(path: str, arguments: Mapping[str, Any], *more: Any) -> Kind:
    """Return the kind of a call of the part of that name."""
    return (path, *more, *((name, _kind_of(arguments[name])) for name in sorted(arguments)))


def _kind_of(value: Any) -> Any:
    from transformers.cache_utils import Cache

    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, Cache):
        return type(value), value.is_initialized, value.get_seq_length() > 0
    return value if isinstance(value, (bool, int, float, str)) else type(value)


def find_form(
    model: Any,
    path: str,
    decoder: Decoder | None,
    arguments: dict[str, Any],
    positions: Tensor | None,
    fuses_loss: bool,
) -> tuple[bool | None, Form | None] | None:
    """Return the mode in which a form was found, None for both modes, and the form; None if the model raises.

    Args:
        model: a plain copy, in the mode of the call, that remembers what the model did before it.
        path: of the part that is called.
        decoder: what runs of that part have shown, if it is a causal language model.
        arguments: as the call has them.
        positions: those that are computed for the call; None for a call that goes without.
        fuses_loss: as in `normalize_call`.

    Raises:
        CaptureError: the model computes something else with these positions.
    """
    model = share(model, [name for name, _ in model.named_buffers()])  # a run may write to buffers
    model.config.return_dict = True
    part = model.get_submodule(path)
    training = part.training
    part.eval()
    small = _few_tokens(part, arguments) if decoder is not None and positions is None else None
    for example, modes in ((small, (training, not training)), (arguments, (training,))):
        if example is None:
            continue
        expected = {mode: leaves for mode in modes if (leaves := _results(part, mode, example)) is not None}
        if not expected:  # the model raises
            continue
        mode = None if example is small else training
        for form in _forms(decoder, example, is_small=example is small):
            filled = example if positions is None else {**example, "position_ids": positions}
            ours = (_results(part, each, filled, (decoder, form, fuses_loss)) for each in expected)
            if all(map(_are_same, expected.values(), ours)):
                return mode, form
        if positions is not None:
            raise CaptureError(
                f"{type(part).__name__} computes something else with the positions that its own method returns for a"
                f" call with {', '.join(arguments)}. The way out: pass position_ids."
            )
        return mode, None
    return None


def _forms(decoder: Decoder | None, arguments: Mapping[str, Any], is_small: bool) -> Iterator[Form | None]:
    """Yield the forms to try, those first that most kinds of calls have in common."""
    for form in _FORMS if decoder is not None else ():
        if (form.counts and is_small and "position_ids" not in arguments) or not form.counts:
            if form.loss_apart is False and "labels" not in arguments:
                continue
            yield form
    yield None


def _results(
    part: Any,
    training: bool,
    arguments: Mapping[str, Any],
    form: tuple[Decoder | None, Form | None, bool] | None = None,
) -> Leaves | None:
    """Return the tensors and numbers of the result, and of the caches after the call; None if the model raises.

    Args:
        part: the model that is called.
        training: the mode to call it in.
        arguments: of the call; they are copied.
        form: the form to bring the call into, with the other arguments of `normalize_call`; None for the call itself.
    """
    own = _copied(arguments)
    part.train(training)
    try:
        with comparable(part), torch.autocast(part.device.type, enabled=False):
            if form is None:
                return _leaves_of(part(**own), own, keeps_cache=True)
            call = normalize_call(part, form[0], own, form[1], form[2])
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
