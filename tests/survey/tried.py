"""A model that is tried, and what several steps need of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from tests.support.conformance import randomise

from .calls import example_of
from .comparing import Unequal

_MOST_EXCLUDED = 12


class Tried:
    """A model, and what several steps need of it.

    Args:
        build: makes the model.
        given: whether it is captured with the inputs that the survey gives it.
        double: whether it is in double precision.
    """

    def __init__(self, build: Callable[[], Any], given: bool = False, double: bool = False) -> None:
        self.build = build
        self.given = given
        self.model = build().double() if double else build()
        self.without: set[str] = set()
        self.modules = dict(self.model.named_modules())
        self.linears = [name for name, module in self.modules.items() if isinstance(module, (nn.Linear, Conv1D))]

    def doubled(self) -> Tried:
        return Tried(self.build, self.given, double=True)

    @cached_property
    def base(self) -> Any:
        """The graph that is captured without inputs, if the class can be."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gm = llfx.capture(self.model, self.required)
        for warning in caught:
            left_out = re.search(r"is captured without (.*?), and what", str(warning.message))
            self.without |= set(left_out.group(1).split(" and ") if left_out else ())
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return gm

    @property
    def required(self) -> Any:
        """The inputs without which the class cannot be captured; None if it can."""
        return example_of(self.model, self.given) if self.given else None

    @cached_property
    def adapted(self) -> tuple[Any, Any]:
        """The model as `adapt` makes it, and the eager wrapper, with the same adapters."""
        adapted = llfx.adapt(self.model, self.config, example_inputs=self.required)
        wrapped = llfx.wrap(self.base, self.config)
        randomise(adapted, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
        return adapted, wrapped

    @property
    def config(self) -> llfx.LoRA:
        """Adapters at all linear modules that the wrapper can wrap; at convolutions where there are no linears."""
        return self._configured[0]

    @property
    def excluded(self) -> list[str]:
        """The linear modules that the wrapper refuses to wrap."""
        return self._configured[1]

    @cached_property
    def _configured(self) -> tuple[llfx.LoRA, list[str]]:
        names = [row.name for row in llfx.inspect(self.base)]
        names = [name for name in names if type(self.modules.get(name)) in (nn.Linear, Conv1D)]
        convolutions = [(n, m) for n, m in self.modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
        names = names or [name for name, module in convolutions if module.groups == 1]
        if not names:
            raise Unequal("no linear module or convolution of the model is a site")
        pattern = "^(" + "|".join(map(re.escape, names)) + ")$"
        excluded: list[str] = []
        while True:
            exclude = [f"^{re.escape(name)}$" for name in excluded]
            kinds = ("linear", "conv")
            cfg = llfx.LoRA(r=1, alpha=2, target_names=pattern, exclude_names=exclude, target_kinds=kinds)
            try:
                llfx.wrap(self.base, cfg)
            except llfx.ConfigError as error:
                found = [name for name in names if f"'{name}'" in str(error) and name not in excluded]
                if not found or len(excluded) > _MOST_EXCLUDED:
                    raise
                excluded += found
            else:
                return cfg, excluded
