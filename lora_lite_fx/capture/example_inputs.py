"""Make example inputs for a transformers model from what its config and its signature say.

A model takes its images and sounds in one of a few forms: pixels, tiles, patches in a row with their grid, a waveform,
a spectrogram. Its arguments tell most forms apart. Where they do not, the model is asked: the first form that it runs
on, without data, is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from .example_images import IMAGES, images, takes_images, with_parts
from .example_series import series, takes_series
from .example_values import BATCH, CHOICES, READS_VALUES, SEQUENCE, Inputs, Values
from .stacks import built_alike, shortened

# Sizes for models whose config tells none: they are built of convolutions, and take every size.
_SAMPLES, _FRAMES = 4000, 64


def example_inputs_of(model: Any, text_alone: bool = False) -> Inputs:
    """Make keyword arguments for a training call of a transformers model.

    `input_ids`, `attention_mask` and `labels`, as far as the model takes them; images or sound as the model takes them,
    with the tokens that stand for parts of the images. Random, but not from the global generator.

    Args:
        model: a transformers model.
        text_alone: leave out images and sound, also where the model takes them.

    Raises:
        CaptureError: no inputs can be made; the message says which are missing, or what the model raised.
    """
    maker = _Maker(model)
    problems: list[str] = []
    try:
        for form in maker.of_text() if text_alone else maker.forms():
            try:
                inputs = with_parts(maker, form)
                inputs = maker.completed(inputs)
            except Exception as error:  # the model does not take inputs of this form
                problems.append(f"it raises {_first_line(error)}")
            else:
                if problems and takes_images(maker) and not any(name in inputs for name in IMAGES):
                    warn_of_text_alone(model, f"no example images can be made from its config, because {problems[0]}")
                return inputs
    except Exception as error:  # the config lacks what the inputs would be made of
        problems.append(_first_line(error))
    problem = problems[0] if problems else f"its main input is {model.main_input_name!r}"
    missing = [name for name in maker.required() if name not in _KNOWN]
    raise CaptureError(
        f"No example inputs can be made for {type(model).__name__} from its config: {problem}."
        + (f" It requires {', '.join(missing)}." if missing else "")
        + " The way out: pass example_inputs={...}."
    )


def decide_problem_type(config: Any, labels: Tensor) -> None:
    """Set the kind of loss in the config of a classifier that leaves it open, in place, as its first call would.

    Some models read the values of the labels as long as it is open, which a graph cannot.
    """
    if getattr(config, "problem_type", None) is not None:
        return
    if config.num_labels == 1:
        config.problem_type = "regression"
    else:
        multiple = labels.is_floating_point()
        config.problem_type = "multi_label_classification" if multiple else "single_label_classification"


def takes_text_and_images(model: Any) -> bool:
    """Tell whether example inputs with images can be followed by some without, for a model of transformers."""
    maker = _Maker(model)
    return maker.takes_text() and takes_images(maker)


def warn_of_text_alone(model: Any, problem: str) -> None:
    """Warn that a graph has nothing of images, and why."""
    warnings.warn(
        f"{type(model).__name__} is captured for text alone, and what it computes of images is not in the graph:"
        f" {problem}. Calls with images need a graph that example_inputs={{...}} with images are passed for.",
        stacklevel=4,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"


_KNOWN = {*IMAGES, "input_ids", "pixel_values_videos", "input_values", "input_features", "attention_mask"}


class _Maker(Values):
    def forms(self) -> Iterator[Inputs]:
        """Yield inputs in forms that the model may take, those first that hold most of what it takes."""
        text = self.text() if self.takes_text() else {}
        for other in self.others():
            yield {**text, **other}
        yield from self.of_text()
        if text and "input_features" in self.parameters:
            yield from ({**text, **sound} for sound in self.sounds())

    def of_text(self) -> Iterator[Inputs]:
        """Yield the forms of text alone: a sequence, one for each choice, or several codebooks for each sample."""
        if not self.takes_text():
            return
        text = self.text()
        yield text
        yield {name: tokens[:, None].repeat(1, CHOICES, 1) for name, tokens in text.items()}
        if "bbox" in self.parameters:
            yield {**text, "bbox": self.boxes()}
        if (books := self.field("num_codebooks")) is not None:
            yield {**text, "input_ids": text["input_ids"].repeat(books, 1)}
        if (channels := getattr(self.field("decoder_config"), "num_channels", None)) is not None:
            yield {**text, "decoder_input_ids": self.tokens(SEQUENCE)[..., None].repeat(1, 1, channels)}

    def takes_text(self) -> bool:
        if "input_ids" not in self.parameters:
            return False
        return self.model.main_input_name == "input_ids" or "input_ids" in self.required() or self.model.can_generate()

    def text(self) -> Inputs:
        names = ["input_ids", *(name for name in self.required() if name.endswith("_input_ids"))]
        inputs = {name: self.tokens(SEQUENCE) for name in names}
        if "attention_mask" in self.parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.config.is_encoder_decoder and "labels" not in self.parameters:
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
        elif main == "pixel_values_videos":
            yield {"pixel_values_videos": self.noise(BATCH, self.field("num_frames") or 4, *self.pixels())}
        elif main == "input_values":
            yield {"input_values": self.noise(BATCH, self.field("channels") or 1, _SAMPLES)[:, 0]}
            yield from ({"input_values": spectrogram} for spectrogram in self.spectrograms())
            yield {"input_values": self.noise(BATCH, self.field("audio_channels") or 1, _SAMPLES)}
        elif main == "input_features":
            yield from self.sounds()

    def sounds(self) -> Iterator[Inputs]:
        """Yield spectrograms, with a mask of their frames where the model takes one, or with a channel."""
        masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in self.parameters]
        for spectrogram in self.spectrograms():
            yield {"input_features": spectrogram}
            for name in masks:
                yield {"input_features": spectrogram, name: self.ones(BATCH, spectrogram.shape[2])}
        yield from ({"input_features": spectrogram[:, None]} for spectrogram in self.spectrograms())

    def spectrograms(self) -> Iterator[Tensor]:
        features = (self.field(name) for name in _SPECTRUM)
        bins = next((size for size in features if isinstance(size, int)), 80)
        positions = self.field("max_source_positions") or self.field("max_length")
        frames = self.field("max_length") if self.field("max_source_positions") is None else 2 * positions
        # At last a length that gives a frame for each token of text, eight of a spectrogram in one.
        for length in dict.fromkeys((frames or _FRAMES, _FRAMES, 8 * SEQUENCE)):
            yield self.noise(BATCH, bins, length)
            yield self.noise(BATCH, length, bins)

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


_SPECTRUM = ("num_mel_bins", "feature_projection_input_dim", "feature_size", "input_feat_per_channel", "n_mels")
