"""What a graph remembers of the model that it was captured from: everything but the weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from ..compat.torch import FakeTensor
from ..compat.torch_modules import parameters_of
from ..storage.dequantized import StandIn
from .origins.origin import is_hugging_face
from .origins.transformers_model import new_head
from .shared_copy import shared_copy


@dataclass(frozen=True, eq=False)
class ModelRecord:
    """A model without its weights, as it was when a graph was captured from it. Copies of the graph share the record.

    The record has the modules and not the config alone, because a config does not tell what was changed in the modules
    since (another rate of dropout, a new head), which buffers they have, and how a library has quantized them.

    Args:
        skeleton: a copy of the model: its class, modules, config, generation config and buffers. Its parameters are on
            the device "meta", tied as those of the model are. Those of quantized modules are the model's, because
            what a module holds besides depends on them.
        original: a weak reference to the model, for weights that the graph does not read.
        new_head: the modules of its head that were drawn at random, see `transformers_model.new_head`.
    """

    skeleton: nn.Module
    original: weakref.ref[nn.Module]
    new_head: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> ModelRecord | None:
        """Return the record of a model, which is left as it is; None for a model of tensors without data."""
        # torch 2.13 crashes where the collector frees both a graph of such a model and a copy of the model.
        if any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
            return None
        skeleton = shared_copy(model)
        without_data: dict[nn.Parameter, nn.Parameter] = {}
        for module in skeleton.modules():
            parameters = {} if isinstance(module, StandIn) else parameters_of(module)
            for name, parameter in parameters.items():
                if parameter is not None:
                    if parameter not in without_data:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                        without_data[parameter] = nn.Parameter(empty, requires_grad=False)
                    parameters[name] = without_data[parameter]
        return cls(skeleton, weakref.ref(model), new_head(model) if is_hugging_face(model) else ())
