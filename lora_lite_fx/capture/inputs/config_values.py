"""What example inputs are made of: the fields of a model's config, random values, and runs that ask the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...compat.torch import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from ...compat.torch_modules import buffers_of
from ...graph.modes import in_mode
from ..forward_signature import signature_of
from ..quirks.all_quirks import without_data

# Give every dynamic dimension a size of its own, because torch.export specializes ones and may equate equal sizes.
BATCH, SEQUENCE, CHOICES = 3, 7, 4
# The size of images for models whose config tells none: they are built of convolutions, and take every size.
_PIXELS = 224
# For models of characters, whose config counts none.
_CHARACTERS = 128
READS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What a run without data raises where the model reads values. Nothing is known of the results then."""

Inputs = dict[str, Any]

_PARTS = ("vision_config", "audio_config", "backbone_config", "encoder", "encoder_config")


def required(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a function that have no default."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.default is each.empty and each.kind not in kinds]


class Values:
    """Makes values for a model of transformers.

    Args:
        model: it is not changed.
        labels: whether its inputs may have labels.
    """

    def __init__(self, model: Any, labels: bool = True) -> None:
        self.model = model
        self.labels = labels
        self.parameters = signature_of(model).parameters
        self.required = required(model.forward)
        self.config = model.config
        self.generator = torch.Generator().manual_seed(0)

    def field(self, *names: str) -> Any:
        """Return the first of the fields that the config has, or the config of a part; None if none has."""
        configs = [self.config]
        for config in configs:
            for name in names:
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
            parts = (getattr(config, name, None) for name in _PARTS)
            # That of WavTokenizer is a part of itself, made anew each time.
            known = {type(each) for each in configs}
            configs += [part for part in parts if hasattr(part, "to_dict") and type(part) not in known]
        return None

    def anywhere(self, name: str) -> Any:
        """Return this field of the config, or of the first of its parts that has it at any depth; None if none has."""
        configs = [self.config]
        for config in configs:
            if getattr(config, name, None) is not None:
                return getattr(config, name)
            configs += [part for part in vars(config).values() if hasattr(part, "to_dict")]
        return None

    def side(self, *names: str) -> int | None:
        """Return the first of the fields, or its first element if it is a list."""
        value = self.field(*names)
        side: int | None = value[0] if isinstance(value, (list, tuple)) else value
        return side

    def method(self, name: str) -> Callable[..., Any] | None:
        """Return a method of the model without its head, or of the model."""
        inner = getattr(self.model, "model", None)
        found: Callable[..., Any] | None = getattr(inner, name, None) or getattr(self.model, name, None)
        return found

    @property
    def has_decoder(self) -> bool:
        """Whether the model takes tokens of a decoder."""
        return self.config.is_encoder_decoder and "decoder_input_ids" in self.parameters

    def noise(self, *shape: int) -> Tensor:
        """Return random numbers in the model's dtype."""
        return torch.randn(shape, generator=self.generator).to(self.model.device, self.model.dtype)

    def tokens(self, length: int) -> Tensor:
        """Return a batch of random tokens of this length."""
        words = getattr(self.config.get_text_config(), "vocab_size", None)
        vocabulary = words or self.anywhere("vocab_size") or _CHARACTERS
        return torch.randint(vocabulary, (BATCH, length), generator=self.generator).to(self.model.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        """Return random numbers of classes."""
        return torch.randint(count, shape, generator=self.generator).to(self.model.device)

    def ones(self, *shape: int) -> Tensor:
        """Return a mask that shows everything."""
        return torch.ones(shape, dtype=torch.long, device=self.model.device)

    def rows(self, row: list[int]) -> Tensor:
        """Return the same numbers for each sample of the batch."""
        return torch.tensor([row] * BATCH, device=self.model.device)

    def pixels(self) -> tuple[int, int, int]:
        """Return the channels, the height and the width of an image."""
        size = self.field("image_size", "max_img_size") or _PIXELS
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.field("num_channels", "in_channels", "in_chans") or 3, height, width

    @contextmanager
    def without_data(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yield inputs without data for a run in which only the shapes are of interest."""
        from ...compat.transformers import can_set_experts, experts_of

        experts = experts_of(self.config) if can_set_experts(self.model) else None
        if experts is not None:
            self.model.set_experts_implementation("batched_mm")  # the default has no shapes without data
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        buffers = [(buffers_of(module), dict(buffers_of(module))) for module in self.model.modules()]
        try:
            with torch.no_grad(), without_data(self.model, mode):
                yield {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        finally:
            for now, then in buffers:  # a table that grew has no data
                now.update(then)
            if experts is not None:
                self.model.set_experts_implementation(experts)

    def run(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Run the model, or a method of it, on data and without a trace; it computes as in evaluation."""
        with in_mode(self.model, False), torch.no_grad(), torch.random.fork_rng():
            return function(**inputs)
