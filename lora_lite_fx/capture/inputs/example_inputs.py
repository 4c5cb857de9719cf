"""Make example inputs for a transformers model from what its config and its signature say.

A model takes its images and sounds in one of a few forms: pixels, tiles, patches in a row with their grid, a waveform,
a spectrogram. Its arguments tell most forms apart. Where they do not, the model is asked: the first form that it runs
on, without data, is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import CaptureError
from ..refusal import in_one_line
from .config_values import BATCH, CHOICES, SEQUENCE, Inputs, Values
from .images import IMAGES, images, takes_images
from .labels import completed
from .other_media import SOUNDS, VIDEO, other_media, sounds, sounds_of_a_codec, takes_sound, videos
from .parts import with_parts

_KNOWN = {*IMAGES, *SOUNDS, VIDEO, "input_ids", "attention_mask"}


def example_inputs_of(model: Any, without: Collection[str] = ()) -> Inputs:
    """Make keyword arguments for a training call of a transformers model.

    `input_ids`, `attention_mask` and `labels`, as far as the model takes them; images and sound as the model takes
    them, with the tokens that stand for their parts. Random, but not from the global generator.

    Args:
        model: a transformers model.
        without: `"images"`, `"sound"` or `"labels"` to leave them out, also where the model takes them.

    Raises:
        CaptureError: no inputs can be made; the message says which are missing, or what the model raised.

    Warns:
        UserWarning: the model takes images or sound beside text, and none could be made.
    """
    values = Values(model, labels="labels" not in without)
    problems: list[str] = []
    try:
        for form in _forms_of_text(values) if "images" in without else _forms(values):
            if (inputs := _tried(values, form, problems)) is None:
                continue
            if problems and takes_images(values) and not any(name in inputs for name in IMAGES):
                warn_of("images", model, f"no example images can be made from its config, because {problems[0]}")
            if "input_ids" in inputs:
                _warn_of_other_names(values, inputs)
            if "sound" in without or "input_ids" not in form or not takes_sound(values):
                return inputs
            return inputs if any(name in form for name in SOUNDS) else _with_sound(values, form, inputs)
    except Exception as error:  # the config lacks what the inputs would be made of
        problems.append(in_one_line(error))
    problem = problems[0] if problems else f"its main input is {model.main_input_name!r}"
    missing = [name for name in values.required if name not in _KNOWN]
    raise CaptureError(
        f"No example inputs can be made for {type(model).__name__} from its config: {problem}."
        + (f" It requires {', '.join(missing)}." if missing else "")
        + " The way out: pass example_inputs={...}."
    )


def _forms(values: Values) -> Iterator[Inputs]:
    """Yield inputs in forms that the model may take, those first that hold most of what it takes."""
    by_name = _required_by_name(values)
    beside = _text(values) if _takes_text(values) else {}
    for main in images(values) if takes_images(values) else other_media(values):
        yield {**by_name, **beside, **main}
    yield from ({**by_name, **form} for form in _forms_of_text(values))
    if "input_ids" in values.parameters:  # text that is not the main input, or is not enough
        words = {**by_name, **_text(values)}
        yield from ({**words, **sound} for sound in sounds(values))
        if any(name in values.parameters for name in IMAGES):
            yield from ({**words, **image} for image in images(values))
    if by_name:
        yield by_name
        if "hidden_states" in by_name:
            yield from ({**by_name, "hidden_states": sound} for sound in sounds_of_a_codec(values))
        if "encoder_hidden_states" in values.parameters:
            width = values.field("encoder_hidden_size", "hidden_size") or 1
            yield {**by_name, "encoder_hidden_states": values.noise(BATCH, SEQUENCE, width)}


def _takes_text(values: Values) -> bool:
    """Tell whether the model computes something of tokens."""
    if "input_ids" not in values.parameters:
        return False
    main = values.model.main_input_name
    is_main = main == "input_ids" or not {main} & {"inputs", *values.parameters}  # some classes inherit another's
    return is_main or "input_ids" in values.required or values.model.can_generate()


def _text(values: Values) -> Inputs:
    """Return tokens, with a mask and the tokens of a decoder if the model takes them."""
    names = ["input_ids", *(name for name in values.required if name.endswith("_input_ids"))]
    inputs = {name: values.tokens(SEQUENCE) for name in names}
    if "attention_mask" in values.parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if values.has_decoder and "labels" not in values.parameters:
        inputs["decoder_input_ids"] = values.tokens(SEQUENCE)
    if "visual_bbox" in values.parameters:
        inputs["bbox"] = _boxes(values)
    return inputs


def _forms_of_text(values: Values) -> Iterator[Inputs]:
    """Yield the forms of text alone: a sequence, one for each choice, or several codebooks for each sample."""
    if not _takes_text(values):
        return
    inputs = _text(values)
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


def _required_by_name(values: Values) -> Inputs:
    """Return what the model requires beside text, images and sound, as far as the names tell what it is."""
    made: Inputs = {}
    for name in values.required:
        if name.endswith(("_embeds", "hidden_states")):
            made[name] = values.noise(BATCH, SEQUENCE, values.field("hidden_size") or 1)
        elif name == "latents":  # of sound, which a codec decodes
            made[name] = values.noise(BATCH, values.field("hidden_size") or 1, SEQUENCE)
        elif name == VIDEO:
            made[name] = videos(values)
        elif name.endswith("_inputs"):  # tokens, such as those of a task
            made[name] = values.tokens(values.field(name.replace("_inputs", "_seq_len")) or SEQUENCE)
    return made


def _tried(values: Values, form: Inputs, problems: list[str]) -> Inputs | None:
    """Return this form of inputs with all that belongs to it; None, and its problem, if the model does not take it."""
    try:
        return completed(values, with_parts(values, form))
    except Exception as error:
        problems.append(f"it raises {in_one_line(error)}")
        return None


def _with_sound(values: Values, form: Inputs, inputs: Inputs) -> Inputs:
    """Return `form` with sound and all that belongs to both; `inputs`, which lack the sound, and warn if none runs."""
    problems: list[str] = []
    for sound in sounds(values):
        if (heard := _tried(values, {**form, **sound}, problems)) is not None:
            return heard
    warn_of("sound", values.model, f"no example sound can be made from its config, because {problems[0]}")
    return inputs


def _warn_of_other_names(values: Values, inputs: Inputs) -> None:
    """Warn if a model of text takes images or sound by names that none are made for, as `image_pixel_values`."""
    for what, names in (("images", IMAGES), ("sound", SOUNDS)):
        endings = (*(f"_{known}" for known in names), *(("audio_input_ids",) if names is SOUNDS else ()))
        others = [name for name in values.parameters if name.endswith(endings) and name not in inputs]
        if others and not any(name in values.parameters for name in names):
            warn_of(
                what, values.model, f"no example {what} can be made from its config, because they are {others[0]!r}"
            )


def what_may_be_left_out(model: Any) -> tuple[tuple[str, ...], ...]:
    """Return which of images and sound example inputs of text may go without, the least first; for transformers."""
    values = Values(model)
    if not _takes_text(values):
        return ()
    if not takes_sound(values):
        return (("images",),) if takes_images(values) else ()
    return (("sound",), ("images", "sound")) if takes_images(values) else (("sound",),)


def warn_of(left_out: str, model: Any, problem: str) -> None:
    """Warn that a graph has nothing of images or sound, and why."""
    warnings.warn(
        f"{type(model).__name__} is captured without {left_out}, and what it computes of {left_out} is not in the"
        f" graph: {problem}. Calls with {left_out} need a graph that is captured with them: pass example_inputs={{...}}"
        f" with {left_out}.",
        stacklevel=4,
    )
