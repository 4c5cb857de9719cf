"""Make example series over time for a transformers model: of numbers to forecast, or of states and actions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .config_values import BATCH, SEQUENCE, Inputs, Values


def takes_series(values: Values) -> bool:
    """Tell whether the model computes something of past values."""
    return "past_values" in values.parameters


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
        needed = {*values.required(), "past_values", "future_values", "future_time_features"}
        yield {name: value for name, value in made.items() if name in needed & values.parameters.keys()}


def takes_episodes(values: Values) -> bool:
    """Tell whether the model computes something of states and actions."""
    return {"states", "actions", "returns_to_go", "timesteps"} <= values.parameters.keys()


def episode(values: Values) -> Inputs:
    """Return the states, actions and rewards of an episode."""
    sizes = {"states": values.field("state_dim"), "actions": values.field("act_dim"), "rewards": 1, "returns_to_go": 1}
    made = {name: values.noise(BATCH, SEQUENCE, size or 1) for name, size in sizes.items()}
    return made | {"timesteps": torch.arange(SEQUENCE, device=values.model.device).expand(BATCH, -1).contiguous()}
