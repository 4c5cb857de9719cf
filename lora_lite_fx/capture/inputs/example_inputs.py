"""Make example inputs for a transformers model from what its config and its signature say.

A model takes its images and sounds in one of a few forms: pixels, tiles, patches in a row with their grid, a waveform,
a spectrogram. Its arguments tell most forms apart. Where they do not, the model is asked: the first form that it runs
on, without data, is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...errors import CaptureError
from ..depth.stacks import built_alike, shortened
from .config_values import BATCH, CHOICES, READS_VALUES, SEQUENCE, Inputs, Values
from .images import IMAGES, images, takes_images
from .parts import with_parts
from .series import episode, series, takes_episodes, takes_series
from .sounds import SOUNDS, sounds, sounds_of_a_codec, takes_sound


def example_inputs_of(model: Any, without: Collection[str] = ()) -> Inputs:
    """Make keyword arguments for a training call of a transformers model.

    `input_ids`, `attention_mask` and `labels`, as far as the model takes them; images and sound as the model takes
    them, with the tokens that stand for their parts. Random, but not from the global generator.

    Args:
        model: a transformers model.
        without: `"images"` or `"sound"` to leave them out, also where the model takes them.

    Raises:
        CaptureError: no inputs can be made; the message says which are missing, or what the model raised.

    Warns:
        UserWarning: the model takes images or sound beside text, and none could be made.
    """
    maker = _Maker(model)
    problems: list[str] = []
    try:
        for form in maker.of_text() if "images" in without else maker.forms():
            if (inputs := _tried(maker, form, problems)) is not None:
                if problems and takes_images(maker) and not any(name in inputs for name in IMAGES):
                    warn_of("images", model, f"no example images can be made from its config, because {problems[0]}")
                if "input_ids" in inputs:
                    _warn_of_other_names(maker, inputs)
                return inputs if "sound" in without else _with_sound(maker, form, inputs)
    except Exception as error:  # the config lacks what the inputs would be made of
        problems.append(_first_line(error))
    problem = problems[0] if problems else f"its main input is {model.main_input_name!r}"
    missing = [name for name in maker.required() if name not in _KNOWN]
    raise CaptureError(
        f"No example inputs can be made for {type(model).__name__} from its config: {problem}."
        + (f" It requires {', '.join(missing)}." if missing else "")
        + " The way out: pass example_inputs={...}."
    )


def _warn_of_other_names(maker: _Maker, inputs: Inputs) -> None:
    """Warn if a model of text takes images or sound by names that none are made for, as `image_pixel_values`."""
    for what, names in (("images", IMAGES), ("sound", SOUNDS)):
        endings = (*(f"_{known}" for known in names), *(("audio_input_ids",) if names is SOUNDS else ()))
        others = [name for name in maker.parameters if name.endswith(endings) and name not in inputs]
        if others and not any(name in maker.parameters for name in names):
            warn_of(what, maker.model, f"no example {what} can be made from its config, because they are {others[0]!r}")


def _tried(maker: _Maker, form: Inputs, problems: list[str]) -> Inputs | None:
    """Return this form of inputs with all that belongs to it; None, and its problem, if the model does not take it."""
    try:
        return maker.completed(with_parts(maker, form))
    except Exception as error:
        problems.append(f"it raises {_first_line(error)}")
        return None


def _with_sound(maker: _Maker, form: Inputs, inputs: Inputs) -> Inputs:
    """Return inputs with sound too, if the model takes it beside what `form` has; `inputs` and a warning if none runs.

    Args:
        maker: of the model.
        form: text, which may show images.
        inputs: all that belongs to it.
    """
    if "input_ids" not in form or not takes_sound(maker) or any(name in form for name in SOUNDS):
        return inputs
    problems: list[str] = []
    for sound in sounds(maker):
        if (heard := _tried(maker, {**form, **sound}, problems)) is not None:
            return heard
    warn_of("sound", maker.model, f"no example sound can be made from its config, because {problems[0]}")
    return inputs


def problem_type_of(config: Any, labels: Tensor) -> str | None:
    """Return the kind of loss that a classifier writes to its config in a call with labels, if it is open there.

    Args:
        config: of the model. None is returned for one that has no such field.
        labels: of the call.
    """
    if not hasattr(config, "problem_type"):
        return None
    if config.num_labels == 1:
        return "regression"
    single = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if single else "multi_label_classification"


def what_may_be_left_out(model: Any) -> tuple[tuple[str, ...], ...]:
    """Return which of images and sound example inputs of text may go without, the least first; for transformers."""
    maker = _Maker(model)
    if not maker.takes_text():
        return ()
    if not takes_sound(maker):
        return (("images",),) if takes_images(maker) else ()
    return (("sound",), ("images", "sound")) if takes_images(maker) else (("sound",),)


def warn_of(left_out: str, model: Any, problem: str) -> None:
    """Warn that a graph has nothing of images or sound, and why."""
    warnings.warn(
        f"{type(model).__name__} is captured without {left_out}, and what it computes of {left_out} is not in the"
        f" graph: {problem}. Calls with {left_out} need a graph that is captured with them: pass example_inputs={{...}}"
        f" with {left_out}.",
        stacklevel=4,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"


_KNOWN = {*IMAGES, *SOUNDS, "input_ids", "pixel_values_videos", "attention_mask"}


class _Maker(Values):
    def forms(self) -> Iterator[Inputs]:
        """Yield inputs in forms that the model may take, those first that hold most of what it takes."""
        required = self.by_name()
        for form in self.main_forms():
            yield {**required, **form}
        if "input_ids" in self.parameters:  # text that is not the main input, or is not enough
            text = self.text()
            yield from ({**required, **text, **sound} for sound in sounds(self))
            if any(name in self.parameters for name in IMAGES):
                yield from ({**required, **text, **image} for image in images(self))
        if required:
            yield required
            if "hidden_states" in required:
                yield from ({**required, "hidden_states": sound} for sound in sounds_of_a_codec(self))
            if "encoder_hidden_states" in self.parameters:
                width = self.field("encoder_hidden_size", "hidden_size") or 1
                yield {**required, "encoder_hidden_states": self.noise(BATCH, SEQUENCE, width)}

    def main_forms(self) -> Iterator[Inputs]:
        """Yield the main input in each form, with what may be beside it."""
        text = self.text() if self.takes_text() else {}
        for other in self.others():
            yield {**text, **other}
        yield from self.of_text()

    def by_name(self) -> Inputs:
        """Return what the model requires beside text, images and sound, as far as the names tell what it is."""
        made: Inputs = {}
        for name in self.required():
            if name.endswith(("_embeds", "hidden_states")):
                made[name] = self.noise(BATCH, SEQUENCE, self.field("hidden_size") or 1)
            elif name == "latents":  # of sound, which a codec decodes
                made[name] = self.noise(BATCH, self.field("hidden_size") or 1, SEQUENCE)
            elif name == "pixel_values_videos":
                made[name] = self.videos()
            elif name.endswith("_inputs"):  # tokens, such as those of a task
                made[name] = self.tokens(self.field(name.replace("_inputs", "_seq_len")) or SEQUENCE)
        return made

    def of_text(self) -> Iterator[Inputs]:
        """Yield the forms of text alone: a sequence, one for each choice, or several codebooks for each sample."""
        if not self.takes_text():
            return
        text = self.text()
        yield text
        yield {name: tokens[:, None].repeat(1, CHOICES, 1) for name, tokens in text.items()}
        if "bbox" in self.parameters:
            yield {**text, "bbox": self.boxes()}
        if "visual_feats" in self.parameters:  # of regions of an image, with their boxes
            regions = self.noise(BATCH, SEQUENCE, self.field("visual_feat_dim") or 1)
            yield {**text, "visual_feats": regions, "visual_pos": self.boxes()}
        if (books := self.field("num_codebooks")) is not None:
            yield {**text, "input_ids": text["input_ids"].repeat(books, 1)}
            yield {**text, "input_ids": text["input_ids"][..., None].repeat(1, 1, books + 1)}  # beside a word
        if (channels := getattr(self.field("decoder_config"), "num_channels", None)) is not None:
            yield {**text, "decoder_input_ids": self.tokens(SEQUENCE)[..., None].repeat(1, 1, channels)}

    def takes_text(self) -> bool:
        if "input_ids" not in self.parameters:
            return False
        main = self.model.main_input_name
        is_main = main == "input_ids" or not {main} & {"inputs", *self.parameters}  # some classes inherit another's
        return is_main or "input_ids" in self.required() or self.model.can_generate()

    def text(self) -> Inputs:
        names = ["input_ids", *(name for name in self.required() if name.endswith("_input_ids"))]
        inputs = {name: self.tokens(SEQUENCE) for name in names}
        if "attention_mask" in self.parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if (
            self.config.is_encoder_decoder
            and "labels" not in self.parameters
            and "decoder_input_ids" in self.parameters
        ):
            inputs["decoder_input_ids"] = self.tokens(SEQUENCE)
        if "visual_bbox" in self.parameters:
            inputs["bbox"] = self.boxes()
        return inputs

    def boxes(self) -> Tensor:
        """Return a box around each word, from its upper left to its lower right corner."""
        corners = torch.rand(BATCH, SEQUENCE, 4, generator=self.generator).sort(dim=2).values
        return corners.to(self.model.device, self.model.dtype)

    def others(self) -> Iterator[Inputs]:
        """Yield images or sound in each form that the arguments allow."""
        main = self.model.main_input_name
        if takes_images(self):
            yield from images(self)
        elif takes_series(self):
            yield from series(self)
        elif takes_episodes(self):
            yield episode(self)
        elif main == "pixel_values_videos":
            yield {"pixel_values_videos": self.videos()}
        elif main in SOUNDS or (main == "inputs" and takes_sound(self)):
            yield from sounds(self)
            if "pixel_values_videos" in self.parameters:
                yield from ({**sound, "pixel_values_videos": self.videos()} for sound in sounds(self))
        elif main == "inputs" and main in self.parameters:
            yield {"inputs": self.tokens(SEQUENCE)}

    def videos(self) -> Tensor:
        return self.noise(BATCH, self.field("num_frames") or 4, *self.pixels())

    def completed(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with labels or a decoder's tokens, or raise what the model raises of them."""
        try:
            logits = self.logits(inputs)
        except READS_VALUES:  # such as the count of the tokens for images
            inputs = self.with_decoder(inputs)
            if self.model.device.type != "meta":
                self.run(self.model, inputs)
            return inputs
        return self.with_labels(inputs, logits)

    def logits(self, inputs: Inputs) -> Tensor | None:
        """Return the model's logits for these inputs, without data; None if it has none."""
        if self.config.is_encoder_decoder and "labels" in self.parameters:
            inputs = {"decoder_input_ids": torch.zeros_like(self.tokens(SEQUENCE)), **inputs}
        logits = getattr(self.called_without_data(inputs), "logits", None)
        return logits if isinstance(logits, Tensor) else None

    def called_without_data(self, inputs: Inputs) -> Any:
        """Return what the model returns. Layers that are built alike are run once, because they change no sizes."""
        once = dict.fromkeys(built_alike(self.model), 1)
        if once:
            with suppress(Exception), shortened(self.model, once), self.without_data(inputs) as fakes:
                return self.model(**fakes)
        with self.without_data(inputs) as fakes:
            return self.model(**fakes)

    def with_labels(self, inputs: Inputs, logits: Tensor | None) -> Inputs:
        """Return `inputs` with labels that fit the logits, if the model computes a loss from them and from sizes."""
        # Make no labels for a transcription, because its loss branches on their values.
        if "labels" not in self.parameters or logits is None or ("input_values" in inputs and logits.dim() == 3):
            return self.with_decoder(inputs)
        labels = self.labels(tuple(int(size) for size in logits.shape))
        try:
            self.called_without_data({**inputs, "labels": labels})
        except Exception:  # the labels are of another form, or the loss reads their values
            return self.with_decoder(inputs)
        return {**inputs, "labels": labels}

    def with_decoder(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with the decoder's tokens, which a model otherwise makes of labels."""
        if not self.config.is_encoder_decoder or "decoder_input_ids" not in self.parameters:
            return inputs
        return {"decoder_input_ids": self.tokens(SEQUENCE), **inputs}

    def labels(self, shape: tuple[int, ...]) -> Tensor:
        batch, *sequence, classes = shape
        if not sequence:
            # Decide this here, because transformers derives it from the labels' dtype in the first call.
            kind = "regression" if classes == 1 else "single_label_classification"
            self.config.problem_type = getattr(self.config, "problem_type", None) or kind
            if self.config.problem_type == "regression":
                return torch.zeros(batch, *(() if classes == 1 else (classes,)), device=self.model.device)
            if self.config.problem_type == "multi_label_classification":
                return torch.zeros(batch, classes, device=self.model.device)
        return self.classes(classes, batch, *sequence)
