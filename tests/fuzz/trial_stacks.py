"""Trials of kind "stacks": adapters of random variants around one another, against their definition and `wrap`.

By definition an adapter sees the linear below it as its base. So a stack computes what the outermost adapter computes
on a linear that has the merged weight and bias of the others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.fuzz.oracle import gradients_of
from tests.fuzz.verdict import Wrong, require_close
from tests.support.conformance import configs, for_any_linear, randomise

TOLERANCE = 1e-8
SITE = "0"


@dataclass(frozen=True)
class Stack:
    """Adapters around one linear.

    Args:
        variants: their configs, the innermost first.
        bias: whether the linear has a bias.
        unfrozen: whether the frozen weight gets a gradient, too.
        training: the mode. Dropout is left out of the comparison with merged weights.
    """

    variants: tuple[llfx.Variant, ...]
    bias: bool = True
    unfrozen: bool = False
    training: bool = False

    def features(self) -> frozenset[str]:
        *inner, last = self.variants
        words = {type(last).__name__ if not inner else f"{type(last).__name__} around another"}
        words |= {"Full of the bias" for each in self.variants if isinstance(each, llfx.Full) and not each.weight}
        return frozenset(words | ({"base unfrozen"} if self.unfrozen else set()))

    def model(self) -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 12, self.bias), nn.Tanh()).double().train(self.training)

    def check(self) -> None:
        model, x = self.model(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        data = [(x,)] if any(isinstance(each, llfx.EVA) for each in self.variants) else None
        graph = llfx.capture(model)
        gm, wrapped = (adapt(graph, self.variants, calibration=data) for adapt in (llfx.rewrite, llfx.wrap))
        randomise(gm, 1)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
        self._compare_with_wrap(gm, wrapped, x)
        self._compare_with_merged(graph, gm, x, data)
        if not self.training:
            require_close(copy.deepcopy(llfx.merge(gm))(x), gm(x), TOLERANCE, "merged")

    def _compare_with_wrap(self, gm: Any, wrapped: Any, x: Tensor) -> None:
        results = []
        for adapted, weight in ((gm, f"{SITE}.weight"), (wrapped, f"{SITE}.base.weight")):
            named = dict(adapted.named_parameters())
            if self.unfrozen:
                named[weight].requires_grad_(True)
            tensors = {name.replace(".base.", "."): tensor for name, tensor in named.items()}
            torch.manual_seed(0)
            y = adapted(x)
            results.append((y, gradients_of(y, tensors), llfx.adapter_parameters(adapted)))
            named[weight].requires_grad_(False)
        (y, gradients, parameters), (expected, wanted, ordered) = results
        require_close(y, expected, TOLERANCE, "output of wrap")
        require_close(gradients, wanted, TOLERANCE, "gradient of wrap", "of ")
        if [p.shape for p in parameters] != [p.shape for p in ordered]:
            raise Wrong("order of adapter_parameters", "another one than wrap's")
        for one, other in zip(parameters, ordered, strict=True):
            if not torch.equal(one, other):
                raise Wrong("order of adapter_parameters", "another one than wrap's")

    def _compare_with_merged(self, graph: Any, gm: Any, x: Tensor, data: Any) -> None:
        if len(self.variants) < 2 or self.training:
            return
        inner, outer = self.variants[:-1], self.variants[-1]
        values = llfx.adapter_state_dict(gm)
        below = llfx.rewrite(graph, inner, calibration=data)
        llfx.load_adapter_state_dict(below, {name: values[name] for name in llfx.adapter_state_dict(below)})
        merged = llfx.merge(below)
        linear: Any = nn.Linear(8, 12).double()
        named = dict(merged.named_parameters())
        bias = named.get(f"{SITE}.bias", named.get(f"{SITE}.merged_bias"))  # the latter where the model has none
        with torch.no_grad():
            linear.weight.copy_(named[f"{SITE}.weight"])
            linear.bias = None if bias is None else nn.Parameter(bias.clone())
        model = nn.Sequential(linear, nn.Tanh()).eval()
        reference = llfx.rewrite(model, outer, calibration=data)
        suffix = f"_{len(self.variants)}"
        state = {
            name: values[f"{name}{suffix}"] if f"{name}{suffix}" in values else values[name]
            for name in llfx.adapter_state_dict(reference)
        }
        llfx.load_adapter_state_dict(reference, state)
        require_close(gm(x), reference(x), TOLERANCE, "output of a stack")


@st.composite
def stacks(draw: Any) -> Stack:
    """Draw a trial."""
    kinds = st.sampled_from(sorted(for_any_linear().values(), key=lambda cls: cls.__name__ != "LoRA"))
    drawn = draw(st.lists(kinds, min_size=1, max_size=3))
    bias = draw(st.booleans())
    variants = []
    for cls in drawn:
        given: dict[str, Any] = {"target_names": "."}
        if cls is llfx.Full and bias:
            given["weight"] = draw(st.booleans())
        variants.append(draw(configs(cls, **given)))
    return Stack(tuple(variants), bias, draw(st.booleans()), draw(st.booleans()))
