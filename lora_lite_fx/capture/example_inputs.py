"""Make example inputs for a transformers model from what its config and its signature say.

A model takes its images and sounds in one of a few forms: pixels, tiles, patches in a row with their grid, a waveform,
a spectrogram. Its arguments tell most forms apart. Where they do not, the model is asked: the first form that it runs
on, without data, is taken.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ..errors import CaptureError

# Give every dynamic dimension a size of its own, because torch.export specializes ones and may equate equal sizes.
_BATCH, _SEQUENCE, _CHOICES = 3, 7, 4
# Sizes for models whose config tells none: they are built of convolutions, and take every size.
_PIXELS, _SAMPLES, _FRAMES = 224, 4000, 64
_READS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)

Inputs = dict[str, Any]


def example_inputs_of(model: Any) -> Inputs:
    """Make keyword arguments for a training call of a transformers model.

    `input_ids`, `attention_mask` and `labels`, as far as the model takes them; images or sound as the model takes them,
    with the tokens that stand for parts of the images. Random, but not from the global generator.

    Raises:
        CaptureError: no inputs can be made; the message says which are missing, or what the model raised.
    """
    maker = _Maker(model)
    problems: list[str] = []
    try:
        for form in maker.forms():
            try:
                inputs = maker.with_parts(form)
                logits = maker.logits(inputs)
            except _READS_VALUES:  # such as the count of the tokens for images: nothing is known of the results
                return maker.with_decoder(inputs)
            except Exception as error:  # the model does not take inputs of this form
                problems.append(f"it raises {_first_line(error)}")
            else:
                if problems and maker.takes_images() and "pixel_values" not in inputs:
                    _warn_of_text_alone(model, problems[0])
                return maker.with_labels(inputs, logits)
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


def _warn_of_text_alone(model: Any, problem: str) -> None:
    warnings.warn(
        f"{type(model).__name__} is captured for text alone, and what it computes of images is not in the graph: no"
        f" example images can be made from its config, because {problem}. Calls with images need a graph that"
        " example_inputs={...} with images are passed for.",
        stacklevel=4,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"


_TEXT = {"input_ids", "attention_mask", "decoder_input_ids"}
_KNOWN = {"input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features", "attention_mask"}


class _Maker:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = inspect.signature(model.forward).parameters
        self.config = model.config
        self.generator = torch.Generator().manual_seed(0)

    def required(self) -> list[str]:
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = (p for p in self.parameters.values() if p.default is inspect.Parameter.empty and p.kind not in kinds)
        return [parameter.name for parameter in needed]

    def forms(self) -> Iterator[Inputs]:
        """Yield inputs in forms that the model may take, those first that hold most of what it takes."""
        text = self.text() if self.takes_text() else {}
        for other in self.others():
            yield {**text, **other}
        if text:
            yield text
            yield {name: tokens[:, None].repeat(1, _CHOICES, 1) for name, tokens in text.items()}

    def takes_text(self) -> bool:
        if "input_ids" not in self.parameters:
            return False
        return self.model.main_input_name == "input_ids" or "input_ids" in self.required() or self.model.can_generate()

    def takes_images(self) -> bool:
        is_main = self.model.main_input_name == "pixel_values" or "pixel_values" in self.required()
        return "pixel_values" in self.parameters and (is_main or self.field("patch_size", "image_size") is not None)

    def text(self) -> Inputs:
        names = ["input_ids", *(name for name in self.required() if name.endswith("_input_ids"))]
        inputs = {name: self.tokens(_SEQUENCE) for name in names}
        if "attention_mask" in self.parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.config.is_encoder_decoder and "labels" not in self.parameters:
            inputs["decoder_input_ids"] = self.tokens(_SEQUENCE)
        return inputs

    def others(self) -> Iterator[Inputs]:
        """Yield images or sound in each form that the arguments allow."""
        main = self.model.main_input_name
        if self.takes_images():
            yield from self.images()
        elif main == "pixel_values_videos":
            yield {"pixel_values_videos": self.noise(_BATCH, self.field("num_frames") or 4, *self.pixels())}
        elif main == "input_values":
            yield {"input_values": self.noise(_BATCH, self.field("channels") or 1, _SAMPLES)[:, 0]}
            yield from ({"input_values": spectrogram} for spectrogram in self.spectrograms())
            yield {"input_values": self.noise(_BATCH, self.field("audio_channels") or 1, _SAMPLES)}
        elif main == "input_features":
            yield from ({"input_features": spectrogram} for spectrogram in self.spectrograms())

    def images(self) -> Iterator[Inputs]:
        channels, height, width = self.pixels()
        patch = self.field("patch_size") or 1
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        if "image_grid_thw" in self.parameters:
            side = 2 * (self.field("spatial_merge_size") or 1)
            grid = torch.tensor([[1, side, 2 * side]] * _BATCH, device=self.model.device)
            patches = _BATCH * 2 * side * side
            values = channels * patch * patch * (self.field("temporal_patch_size") or 1)
            yield {"pixel_values": self.noise(patches, values), "image_grid_thw": grid}
            return
        if "spatial_shapes" in self.parameters:
            shapes = torch.tensor([[2, 4]] * _BATCH, device=self.model.device)
            mask = torch.ones(_BATCH, 8, dtype=torch.long, device=self.model.device)
            pixels = self.noise(_BATCH, 8, channels * patch * patch)
            yield {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
            return
        sizes = torch.tensor([[height, width]] * _BATCH, device=self.model.device)
        known = {"image_sizes": sizes} if "image_sizes" in self.parameters else {}
        tiles = self.field("max_num_tiles")
        if "aspect_ratio_ids" in self.parameters and tiles:
            ids = torch.ones(_BATCH, 1, dtype=torch.long, device=self.model.device)
            yield {
                "pixel_values": self.noise(_BATCH, 1, tiles, channels, height, width),
                "aspect_ratio_ids": ids,
                "aspect_ratio_mask": torch.ones(_BATCH, 1, tiles, dtype=torch.long, device=self.model.device),
                "cross_attention_mask": ids.new_ones(_BATCH, _SEQUENCE, 1, tiles),
            }
            return
        # Models that show an image whole and in tiles have a function of this name, which counts them.
        count = getattr(sys.modules[type(self.model).__module__], "image_size_to_num_patches", None)
        if (pinpoints := getattr(self.config, "image_grid_pinpoints", None)) and count is not None:
            tiles = count((height, width), pinpoints, height)
            yield {"pixel_values": self.noise(_BATCH, tiles, channels, height, width), **known}
        pixels = self.noise(_BATCH, channels, height, width)
        several = {"pixel_values": pixels.unsqueeze(1), **known}
        if "image_attention_mask" in self.parameters:
            several["image_attention_mask"] = torch.ones(_BATCH, _SEQUENCE, 1, dtype=torch.long)
        yield from ([several] if {"pixel_attention_mask", "image_attention_mask"} & set(self.parameters) else [])
        yield {"pixel_values": pixels}
        if known:
            yield {"pixel_values": pixels, **known}
        yield several

    def spectrograms(self) -> Iterator[Tensor]:
        features = (self.field(name) for name in _SPECTRUM)
        bins = next((size for size in features if isinstance(size, int)), 80)
        positions = self.field("max_source_positions") or self.field("max_length")
        frames = self.field("max_length") if self.field("max_source_positions") is None else 2 * positions
        for length in dict.fromkeys((frames or _FRAMES, _FRAMES)):
            yield self.noise(_BATCH, bins, length)
            yield self.noise(_BATCH, length, bins)

    def with_parts(self, inputs: Inputs) -> Inputs:
        """Put the token that stands for a part of an image into `input_ids`, as often as an image has parts."""
        token = getattr(self.config, "image_token_id", None)
        token = getattr(self.config, "image_token_index", None) if token is None else token
        if token is None or not {"input_ids", "pixel_values"} <= inputs.keys():
            return inputs
        if not hasattr(self.model, "get_image_features"):
            return inputs
        takes = inspect.signature(self.model.get_image_features).parameters
        given = {name: value for name, value in inputs.items() if name in takes and name not in _TEXT}
        try:
            with self.without_data(given) as fakes:
                features = self.model.get_image_features(**fakes)
        except _READS_VALUES:  # of the grid
            with torch.no_grad():
                features = self.model.get_image_features(**given)
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, (list, tuple)) else [features]
        parts = sum(math.prod(image.shape[:-1]) for image in features) // _BATCH
        ids = inputs["input_ids"]
        text = ids.where(ids != token, 0 if token else 1)
        ids = torch.cat([text[:, :1], torch.full_like(ids[:, :1], token).expand(-1, parts), text[:, 1:]], dim=1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in self.parameters:
            inputs["mm_token_type_ids"] = (ids == token).long()
            inputs |= self.positions(inputs)
        if attends_by_type(self.model):
            inputs["token_type_ids"] = (ids != token).long()
        return inputs

    def positions(self, inputs: Inputs) -> Inputs:
        """Return positions along the sides of images, which a model otherwise computes in a loop over all tokens."""
        of_model = (
            getattr(module, "get_rope_index", None) for module in (self.model, getattr(self.model, "model", None))
        )
        index = next((method for method in of_model if method is not None), None)
        if index is None or "position_ids" not in self.parameters:
            return {}
        takes = inspect.signature(index).parameters
        positions, _ = index(**{name: value for name, value in inputs.items() if name in takes})
        return {"position_ids": positions}

    @contextmanager
    def without_data(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yield inputs without data for a run in which only the shapes are of interest."""
        experts = getattr(self.config, "_experts_implementation", None)
        if experts is not None:
            self.model.set_experts_implementation("batched_mm")  # the default has no shapes without data
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # which logs errors that are raised, too
        logger.disabled, before = True, logger.disabled
        try:
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                yield {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        finally:
            logger.disabled = before
            if experts is not None:
                self.model.set_experts_implementation(experts)

    def logits(self, inputs: Inputs) -> Tensor | None:
        """Return the model's logits for these inputs, without data; None if it has none."""
        if self.config.is_encoder_decoder and "labels" in self.parameters:
            inputs = {**inputs, "decoder_input_ids": torch.zeros_like(self.tokens(_SEQUENCE))}
        with self.without_data(inputs) as fakes:
            logits = getattr(self.model(**fakes), "logits", None)
        return logits if isinstance(logits, Tensor) else None

    def with_labels(self, inputs: Inputs, logits: Tensor | None) -> Inputs:
        """Return `inputs` with labels that fit the logits, if the model computes a loss from them and from sizes."""
        # Make no labels for a transcription, because its loss branches on their values.
        if "labels" not in self.parameters or logits is None or ("input_values" in inputs and logits.dim() == 3):
            return self.with_decoder(inputs)
        labels = self.labels(tuple(int(size) for size in logits.shape))
        try:
            with self.without_data({**inputs, "labels": labels}) as fakes:
                self.model(**fakes)
        except Exception:  # the labels are of another form, or the loss reads their values
            return self.with_decoder(inputs)
        return {**inputs, "labels": labels}

    def with_decoder(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with the decoder's tokens, which a model otherwise makes of labels."""
        if not self.config.is_encoder_decoder or "decoder_input_ids" not in self.parameters:
            return inputs
        return {"decoder_input_ids": self.tokens(_SEQUENCE), **inputs}

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
        return torch.randint(classes, (batch, *sequence), generator=self.generator).to(self.model.device)

    def tokens(self, length: int) -> Tensor:
        vocabulary = self.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (_BATCH, length), generator=self.generator).to(self.model.device)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.model.device, self.model.dtype)

    def pixels(self) -> tuple[int, int, int]:
        size = self.field("image_size") or _PIXELS
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.field("num_channels", "in_channels", "in_chans") or 3, height, width

    def field(self, *names: str) -> Any:
        """Return the first of the fields that the config has, or the config of a part; None if none has."""
        parts = [getattr(self.config, name, None) for name in _PARTS]
        for config in (self.config, *(part for part in parts if hasattr(part, "to_dict"))):
            for name in names:
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
        return None


_PARTS = ("vision_config", "audio_config", "backbone_config", "encoder", "encoder_config")
_SPECTRUM = ("num_mel_bins", "feature_projection_input_dim", "feature_size", "input_feat_per_channel", "n_mels")


def attends_by_type(model: Any) -> bool:
    """Tell whether tokens see all others unless their types say otherwise, as in PaliGemma."""
    config = getattr(model, "config", None)
    if "token_type_ids" not in inspect.signature(model.forward).parameters or config is None:
        return False
    return bool(getattr(config.get_text_config(), "use_bidirectional_attention", False))
