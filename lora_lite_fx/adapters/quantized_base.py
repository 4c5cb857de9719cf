"""Refuse frozen weights through which adapters would train wrongly."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError, is_instance_of
from ..storage.torchao import quantizes_input


def check_gradients(model: nn.Module) -> None:
    """Check that gradients pass through the frozen weights of `model`.

    torchao rounds the input of a product with some of its weights to 8 bits (`Int8DynamicActivation...`), and the
    rounding passes no gradient on. Adapters anywhere before such a product would train wrongly, or not at all.

    Raises:
        ConfigError: they do not; the message names a weight.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = [name for name, tensor in tensors if quantizes_input(tensor)]
    names += [name for name, module in model.named_modules() if is_instance_of(module, "torchao", *_MODULES)]
    if names:
        raise ConfigError(
            f"The base quantizes the inputs of {len(names)} of its products ({', '.join(names[:3])}, ...), and no right"
            " gradient passes through them to adapters, which so cannot be trained. Adapt a base of which only the"
            " weights are quantized (torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig) or that is not quantized,"
            " and quantize the merged model."
        )


_MODULES = ("Int8DynActInt4WeightLinear", "Int8DynActInt8WeightLinear")
