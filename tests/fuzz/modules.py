"""Random modules: nets of blocks, as ordinary modules and as models of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tests.fuzz.blocks import BLOCKS, WIDTH


class Blocks(nn.Module):
    """A net of blocks `b0`, `b1`, ..., with a linear at its end."""

    def build(self, names: tuple[str, ...]) -> None:
        self.names = tuple(f"b{i}" for i in range(len(names)))
        for name, cls in zip(self.names, names, strict=True):
            self.add_module(name, BLOCKS[cls]())
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x)


class Plain(Blocks):
    """The net as an ordinary module."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.build(names)


class NetConfig(PretrainedConfig):
    """The config of `HuggingFace`."""

    model_type = "fuzzed"

    def __init__(self, names: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__(**fields)
        self.names = list(names)


class HuggingFace(PreTrainedModel, Blocks):
    """The net as a model of transformers, which `adapt` takes."""

    config_class = NetConfig

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.build(tuple(config.names))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as torch draws them."""

    def forward(self, x: Tensor) -> Any:
        return Blocks.forward(self, x)


@dataclass(frozen=True)
class Net:
    """A net to be built.

    Args:
        blocks: the names of its blocks.
        single: whether it is in float32, and not in float64.
    """

    blocks: tuple[str, ...] = ("Linear",)
    single: bool = False

    def build(self, hugging_face: bool = False, kinds: tuple[Any, Any] = (Plain, HuggingFace)) -> Any:
        """Return the net, in evaluation mode, with the same weights each time.

        Args:
            hugging_face: whether it is a model of transformers.
            kinds: the class that it has, and the class of models of transformers.
        """
        with torch.random.fork_rng():
            torch.manual_seed(1)
            made = kinds[1](NetConfig(self.blocks)) if hugging_face else kinds[0](self.blocks)
            generator = torch.Generator().manual_seed(2)
            for name, buffer in made.named_buffers():  # not those of a new norm, which hide what is done with them
                if "running" in name:
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        return made.eval() if self.single else made.double().eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters and inputs."""
        return torch.float32 if self.single else torch.float64

    @property
    def tolerance(self) -> float:
        """How far results may be apart."""
        return 2e-5 if self.single else 1e-9

    def inputs(self, rows: int = 3, seed: int = 0) -> Tensor:
        """Return a batch, whose gradients are compared, too."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, 4, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)
