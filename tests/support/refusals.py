"""A variant and a model of a user's own, and the message by which a way to adapt the model refuses a variant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from tests.support.untouched import untouched


@dataclass(frozen=True, kw_only=True)
class Mine(llfx.Variant):
    """A variant without a mistake, from which tests derive others that differ in one function."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {
            "lora_A": llfx.ParamSpec((2, site.d_in), init="kaiming"),
            "lora_B": llfx.ParamSpec((site.d_out, 2), init="ones"),
        }

    def update(self, x: Tensor, p: Any) -> Tensor:
        return F.linear(F.linear(x, p.lora_A), p.lora_B)

    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + self.update(x, p)


class Net(nn.Module):
    """Two linears, the first of which has a buffer that is used outside of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 6)
        self.fc.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc(x) * next(self.buffers()))
        return y


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
WAYS = [llfx.rewrite, llfx.wrap]


def refusal(way: Callable[..., Any], cls: type[llfx.Variant], targets: str = "fc", **options: Any) -> str:
    """Return the message of the error by which `way` refuses the variant, with N for the number of a line.

    The class is registered meanwhile, and the model must stay as it is.
    """
    model = Net()
    with pytest.MonkeyPatch.context() as patch, untouched(model):
        patch.setitem(_REGISTRY, cls.__name__, cls)
        with pytest.raises(llfx.ConfigError) as caught:
            way(model, cls(target_names=targets), (X,), **options)
    return re.sub(r"Line \d+ of", "Line N of", str(caught.value))
