"""One step of a causal language model as a graph whose cache is plain tensors, which come in and go out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from ..capture.export import take_for_one
from ..capture.origins.origin import is_hugging_face
from ..capture.shared_copy import shared_copy
from ..errors import ConfigError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..hugging_face.adapt import adapt
from ..hugging_face.adapted_model import Adapted
from ..hugging_face.caches import BATCH, LENGTH, PAST, Decoder, opened, probe, uncut_windows
from ..hugging_face.capture_call import with_forward
from ..rewriting.capture import base_graph
from .served_graph import Tensors, as_graph, inputs_by_name

_AS_TEXT = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")


def step_with_cache(
    model: Any, inputs: Tensors | None, outputs: str | Sequence[str] | None
) -> tuple[AdaptedGraphModule, dict[str, Tensor]]:
    """Return a graph of one step of a causal language model, and an example of its inputs.

    The graph takes the inputs for `n` tokens, with a mask `(batch, past + n)` for those before them too, and the cache
    as `past_key_<layer>` and `past_value_<layer>`, `(batch, heads, past, d)`. It returns the outputs, `logits` by
    default, and then `present_key_<layer>` and `present_value_<layer>` of `past + n` tokens. One graph prefills from an
    empty cache (`past` is 0) and decodes token by token. Layers with a sliding window keep all tokens.

    Args:
        model: a result of `adapt`, or of `rewrite` whose model still exists; or a merged model of transformers.
        inputs: an example, whose names are those of the inputs; None for `input_ids` and `attention_mask`.
        outputs: names of fields of the model's output.

    Raises:
        ConfigError: the model is not a causal language model that appends tokens to its cache, or an input is not one
            for tokens.
        AdapterError: the model of a graph does not exist any more.
        CaptureError: the step cannot be captured.
    """
    if isinstance(model, fx.GraphModule):
        model = adapt(model)
    if not is_hugging_face(model):
        raise ConfigError(f"cache=True takes a causal language model of transformers, not {shown(model)}.")
    base = model.adapters_taken_off() if isinstance(model, Adapted) else shared_copy(model)
    decoder = probe(base.eval())
    if decoder is None:
        raise ConfigError(
            f"cache=True: {type(model).__name__} is not a causal language model that appends tokens to its cache. The"
            " way out: cache=False."
        )
    names = ("input_ids", "attention_mask") if inputs is None else tuple(inputs)
    example = _example(base, decoder, names, inputs)
    base.__class__ = _step(type(base), decoder, tuple(example), (outputs,) if isinstance(outputs, str) else outputs)
    sizes = {name: _sizes(name, tensor) for name, tensor in example.items()}
    gm = as_graph(base_graph(base, example, dynamic_shapes=sizes, made=True))
    if isinstance(model, Adapted):
        model.give_adapters_to(gm)
    return gm, example


def _example(model: Any, decoder: Decoder, names: Sequence[str], inputs: Tensors | None) -> dict[str, Tensor]:
    """Return some tokens after some cached ones."""
    if unknown := [name for name in names if name not in _AS_TEXT]:
        raise ConfigError(f"cache=True takes inputs for tokens ({', '.join(_AS_TEXT)}), and not {unknown[0]}.")
    device = model.device
    example: dict[str, Tensor] = {}
    for name in names:
        given = None if inputs is None else inputs[name]
        if given is not None and not isinstance(given, Tensor):
            raise inputs_by_name(inputs)
        if name == "attention_mask":
            example[name] = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long, device=device)
        elif name == "inputs_embeds":
            width = model.get_input_embeddings().embedding_dim if given is None else given.shape[-1]
            example[name] = torch.randn(BATCH, LENGTH, width, dtype=model.dtype, device=device)
        elif name == "position_ids":
            example[name] = torch.arange(PAST, PAST + LENGTH, device=device).repeat(BATCH, 1)
        else:
            example[name] = torch.randint(
                model.config.get_text_config(decoder=True).vocab_size, (BATCH, LENGTH), device=device
            )
    for index, layer in enumerate(decoder.layers):
        for kind, empty in (("key", layer.keys), ("value", layer.values)):
            example[f"past_{kind}_{index}"] = torch.randn(
                BATCH, empty.shape[1], PAST, empty.shape[3], dtype=empty.dtype, device=device
            )
    return example


def _sizes(name: str, tensor: Tensor) -> dict[int, Any]:
    fixed = (1, 3) if name.startswith("past_") else (2,)  # heads and widths
    return {dim: Dim.STATIC if dim in fixed else Dim.AUTO for dim in range(tensor.dim())}


def _step(cls: type, decoder: Decoder, names: tuple[str, ...], outputs: Sequence[str] | None) -> type:
    """Return a subclass of `cls`, by the same name, that takes and returns the tensors of its cache."""

    from ..compat.transformers import CACHE

    def forward(self: Any, **given: Tensor) -> dict[str, Tensor]:
        arguments = {name: given[name] for name in names if not name.startswith("past_")}
        tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
        assert tokens is not None
        text = self.config.get_text_config(decoder=True)
        cache = opened(None, text, decoder.layers, tokens.shape[0], tokens.device)
        past = given["past_key_0"].shape[2]
        if "attention_mask" in arguments:
            # Its length stays a size of its own, because torch.export would bound a sum of two sizes by 4 from below.
            seen = torch.arange(past + tokens.shape[1], device=tokens.device)
            arguments["attention_mask"] = arguments["attention_mask"].index_select(1, seen)
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = given[f"past_key_{index}"], given[f"past_value_{index}"]
            for size in (layer.keys.shape[2], layer.values.shape[2]):
                take_for_one(size, past)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = past
        with uncut_windows({CACHE: cache}):
            result = cls.forward(self, **arguments, **{CACHE: cache}, use_cache=True)  # type: ignore[attr-defined]
        found = {name: result[name] for name in outputs or ("logits",)}
        for index, layer in enumerate(cache.layers):
            found |= {f"present_key_{index}": layer.keys, f"present_value_{index}": layer.values}
        return found

    return with_forward(cls, forward, names)
