"""Make example text for a transformers model, and what stands beside text by the names of its arguments."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config_values import BATCH, CHOICES, SEQUENCE, Inputs, Values


def takes_text(values: Values) -> bool:
    """Tell whether the model computes something of tokens."""
    if "input_ids" not in values.parameters:
        return False
    main = values.model.main_input_name
    is_main = main == "input_ids" or not {main} & {"inputs", *values.parameters}  # some classes inherit another's
    return is_main or "input_ids" in values.required or values.model.can_generate()


def text(values: Values) -> Inputs:
    """Return tokens, with a mask and the tokens of a decoder if the model takes them."""
    names = ["input_ids", *(name for name in values.required if name.endswith("_input_ids"))]
    inputs = {name: values.tokens(SEQUENCE) for name in names}
    if "attention_mask" in values.parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    has_decoder = values.config.is_encoder_decoder and "decoder_input_ids" in values.parameters
    if has_decoder and "labels" not in values.parameters:
        inputs["decoder_input_ids"] = values.tokens(SEQUENCE)
    if "visual_bbox" in values.parameters:
        inputs["bbox"] = _boxes(values)
    return inputs


def forms_of_text(values: Values) -> Iterator[Inputs]:
    """Yield the forms of text alone: a sequence, one for each choice, or several codebooks for each sample."""
    inputs = text(values)
    ids = inputs["input_ids"]
    yield inputs
    yield {name: tokens[:, None].repeat(1, CHOICES, 1) for name, tokens in inputs.items()}
    if "bbox" in values.parameters:
        yield {**inputs, "bbox": _boxes(values)}
    if "visual_feats" in values.parameters:  # of regions of an image, with their boxes
        regions = values.noise(BATCH, SEQUENCE, values.field("visual_feat_dim") or 1)
        yield {**inputs, "visual_feats": regions, "visual_pos": _boxes(values)}
    if (books := values.field("num_codebooks")) is not None:
        yield {**inputs, "input_ids": ids.repeat(books, 1)}
        yield {**inputs, "input_ids": ids[..., None].repeat(1, 1, books + 1)}  # beside a word
    if (channels := getattr(values.field("decoder_config"), "num_channels", None)) is not None:
        yield {**inputs, "decoder_input_ids": values.tokens(SEQUENCE)[..., None].repeat(1, 1, channels)}


def _boxes(values: Values) -> Tensor:
    """Return a box around each word, from its upper left to its lower right corner."""
    corners = torch.rand(BATCH, SEQUENCE, 4, generator=values.generator).sort(dim=2).values
    return corners.to(values.model.device, values.model.dtype)
