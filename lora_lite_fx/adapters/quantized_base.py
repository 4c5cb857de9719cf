"""Refuse frozen weights through which adapters would train wrongly."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from ..storage.storages import rounds_inputs


def check_gradients(model: nn.Module) -> None:
    """Check that gradients pass through the frozen weights of `model`.

    torchao rounds the input of a product with some of its weights to 8 bits (`Int8DynamicActivation...`), and the
    rounding passes no gradient on. Adapters anywhere before such a product would train wrongly, or not at all.

    Raises:
        ConfigError: they do not; the message names a weight.
    """
    parts = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    names = [name for name, part in parts if rounds_inputs(part)]
    if names:
        raise ConfigError(
            f"The base quantizes the inputs of {len(names)} of its products ({', '.join(names[:3])}, ...), and no right"
            " gradient passes through them to adapters, which so cannot be trained. Adapt a base of which only the"
            " weights are quantized (torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig) or that is not quantized,"
            " and quantize the merged model."
        )
