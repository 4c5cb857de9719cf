"""Models and configs for tests of ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import perturb

FIELDS: dict[str, dict[str, Any]] = {
    "OFT": {"block_size": 4},
    "BOFT": {"block_size": 4},
    "C3A": {"block_size": 4},
    "VBLoRA": {"vector_length": 8},
    "TrainableTokens": {"token_indices": (1, 5, 9), "target_names": "embedding"},
    "RoAd": {"group_size": 4},
}
"""Fields that fit the widths of `Small`, by variant."""


class Small(nn.Module):
    """An embedding and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.up = nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        result: Tensor = x + self.down_proj(torch.relu(self.up(x)))
        return result


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


def config(name: str, **fields: Any) -> Any:
    cls: Any = llfx.registry()[name]
    fields = {
        **({"r": 4} if hasattr(cls, "r") else {}),
        "target_names": ("up", "down_proj"),
        **FIELDS.get(name, {}),
        **fields,
    }
    return cls(**fields)


def adapted(cfg: Any, seed: int = 1, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """Return a model and its graph with an adapter whose values are random."""
    if model is None:
        torch.manual_seed(0)
        model = Small().eval()
    data: dict[str, Any] = {"calibration": [{"ids": ids(4, 9)}]} if isinstance(cfg, llfx.EVA) else {}
    gm = llfx.rewrite(model, cfg, {"ids": ids(2, 7)}, **data)
    perturb(gm, seed)
    return model, gm


class Session:
    """A session of ONNX Runtime, and the adapters that it has loaded."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.ort = onnxruntime
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.loaded: list[Any] = []

    @property
    def inputs(self) -> dict[str, list[Any]]:
        return {value.name: value.shape for value in self.session.get_overridable_initializers() or ()} | {
            value.name: value.shape for value in self.session.get_inputs()
        }

    def __call__(self, adapter: Path | None = None, **inputs: Tensor) -> list[Tensor]:
        options = self.ort.RunOptions()
        if adapter is not None:
            self.loaded.append(self.ort.LoraAdapter())  # the session reads it while it runs
            self.loaded[-1].Load(str(adapter))
            options.add_active_adapter(self.loaded[-1])
        results = self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}, options)
        return [torch.from_numpy(result) for result in results]
