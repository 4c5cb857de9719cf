"""Make what few transformers models take beside text and images: sound, videos, and series over time.

Sounds are waveforms or spectrograms, series are numbers to forecast, or the states and actions of an episode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config_values import BATCH, SEQUENCE, Inputs, Values, required

SOUNDS = ("input_values", "input_features")
"""The arguments that sounds come in."""
VIDEO = "pixel_values_videos"
_EPISODE = {"states", "actions", "returns_to_go", "timesteps"}

# Sizes for models whose config tells none: they are built of convolutions, and take every size.
_SAMPLES, _FRAMES = 4000, 64
_BINS = [80, 128]
_SPECTRUM = (
    "num_mel_bins",
    "feature_projection_input_dim",
    "feature_size",
    "input_feat_per_channel",
    "n_mels",
    "input_size",
)
_MASKS = ("input_features_mask", "feature_attention_mask")


def other_media(values: Values) -> Iterator[Inputs]:
    """Yield the main input of a model that takes neither text nor images, in each form that the arguments allow."""
    main = values.model.main_input_name
    if "past_values" in values.parameters:
        yield from series(values)
    elif values.parameters.keys() >= _EPISODE:
        yield episode(values)
    elif main == VIDEO:
        yield {VIDEO: videos(values)}
    elif main in SOUNDS or (main == "inputs" and takes_sound(values)):
        yield from sounds(values)
        if VIDEO in values.parameters:
            yield from ({**sound, VIDEO: videos(values)} for sound in sounds(values))
    elif main == "inputs" and main in values.parameters:
        yield {"inputs": values.tokens(SEQUENCE)}


def videos(values: Values) -> Tensor:
    """Return a few images in a row for each sample."""
    return values.noise(BATCH, values.field("num_frames") or 4, *values.pixels())


def takes_sound(values: Values) -> bool:
    """Tell whether the model computes something of sound."""
    if getattr(values.config, "audio_config", values) is None:  # it was built without that part
        return False
    return any(name in values.parameters for name in SOUNDS)


def sounds(values: Values) -> Iterator[Inputs]:
    """Yield sounds in each form that the arguments allow."""
    if {*SOUNDS} <= {*values.required}:  # one encoder for each
        for spectrogram in _spectrograms(values):
            yield {"input_values": _waves(values, "audio_channels"), "input_features": spectrogram}
    elif "input_values" in values.parameters:
        yield {"input_values": _waves(values, "channels")[:, 0]}
        yield from ({"input_values": spectrogram} for spectrogram in _spectrograms(values))
        yield {"input_values": _waves(values, "audio_channels")}
    elif "input_features" in values.parameters:
        yield from _features(values)


def sounds_of_a_codec(values: Values) -> Iterator[Tensor]:
    """Yield what one part of a codec takes, in channels: the samples that it encodes, or the states that it decodes."""
    yield _waves(values, "channels")
    yield values.noise(BATCH, values.field("hidden_size") or 1, SEQUENCE)


def _waves(values: Values, channels: str) -> Tensor:
    """Return waveforms whose channels this field of the config counts, of as many samples as give whole tokens."""
    token = values.field("samples_per_token") or 1
    return values.noise(BATCH, values.field(channels) or 1, -(-_SAMPLES // token) * token)


def _features(values: Values) -> Iterator[Inputs]:
    """Yield spectrograms, with a mask of their frames where the model takes one, or with a channel."""
    masks = [name for name in _MASKS if name in values.parameters]
    features_of = values.method("get_audio_features")
    needed = [*values.required, *(required(features_of) if features_of is not None else ())]
    for spectrogram in _spectrograms(values):
        if not {*masks} & {*needed}:
            yield {"input_features": spectrogram}
        for name in masks:
            yield from (
                {"input_features": spectrogram, name: values.ones(BATCH, length)} for length in spectrogram.shape[:0:-1]
            )
    yield from ({"input_features": spectrogram[:, None]} for spectrogram in _spectrograms(values))


def _spectrograms(values: Values) -> Iterator[Tensor]:
    named = [size for name in _SPECTRUM if isinstance(size := values.anywhere(name), int)]
    positions = values.field("max_source_positions") or values.field("max_length")
    frames = values.field("max_length") if values.field("max_source_positions") is None else 2 * positions
    # At last a length that gives a frame for each token of text, eight of a spectrogram in one.
    windows = 2 * (values.field("n_window") or 0)  # of models that take whole windows
    beside_waves = _SAMPLES // (values.field("hop_length") or _SAMPLES + 1)
    stacked = [4 * size for size in named]  # frames and their differences, in pairs
    for bins in dict.fromkeys([*(named or _BINS), *stacked]):
        for length in dict.fromkeys((frames or _FRAMES, _FRAMES, 8 * SEQUENCE, windows, beside_waves)):
            if length:
                yield values.noise(BATCH, bins, length)
                yield values.noise(BATCH, length, bins)


def series(values: Values) -> Iterator[Inputs]:
    """Yield past values with a number for each channel, or one alone; and what the model requires beside them.

    A model with a decoder gets the values that it is to forecast, too.
    """
    lags = values.field("lags_sequence") or [0]
    length = (values.field("context_length") or 16) + max(lags)
    future = values.field("prediction_length", "horizon_length") or 4
    channels = values.field("num_input_channels", "input_size") or 1
    features = values.field("num_time_features") or 0
    shapes = [(BATCH, length), (BATCH, length, channels)]
    for shape in shapes if channels == 1 else reversed(shapes):
        made = {
            "past_values": values.noise(*shape),
            "past_time_features": values.noise(BATCH, length, features),
            "past_observed_mask": values.ones(*shape),
            "past_values_padding": torch.zeros(BATCH, length, dtype=torch.long, device=values.model.device),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long, device=values.model.device),
        }
        if values.config.is_encoder_decoder:
            made["future_values"] = values.noise(BATCH, future, *shape[2:])
            made["future_time_features"] = values.noise(BATCH, future, features)
        needed = {*values.required, "past_values", "future_values", "future_time_features"}
        yield {name: value for name, value in made.items() if name in needed & values.parameters.keys()}


def episode(values: Values) -> Inputs:
    """Return the states, actions and rewards of an episode."""
    sizes = {"states": values.field("state_dim"), "actions": values.field("act_dim"), "rewards": 1, "returns_to_go": 1}
    made = {name: values.noise(BATCH, SEQUENCE, size or 1) for name, size in sizes.items()}
    return made | {"timesteps": torch.arange(SEQUENCE, device=values.model.device).expand(BATCH, -1).contiguous()}
