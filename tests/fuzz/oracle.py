"""The oracle of calls: an eager model, whose linears get their adapters by hooks that have the formulas of papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx

R, ALPHA = 2, 3.0
SCALE = ALPHA / R
Formula = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Computes the adapted output of a module of its input, its output, and the adapter's tensors by name."""


def _lora(module: Any, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return y + SCALE * F.linear(F.linear(x, p["lora_A"].to(x)), p["lora_B"].to(x))


def _dora(module: Any, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    weight = module.weight + SCALE * p["lora_B"] @ p["lora_A"]
    rows = (p["lora_m"] / weight.norm(dim=1).detach())[:, None]
    return F.linear(x, rows * weight, module.bias)


def _hira(module: Any, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return y + F.linear(x, module.weight * (p["lora_B"] @ p["lora_A"]))


def _full(module: Any, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return F.linear(x, p["lora_weight"], p.get("lora_bias", module.bias))


FORMULAS: dict[str, tuple[llfx.Variant, Formula]] = {
    "LoRA": (llfx.LoRA(r=R, alpha=ALPHA, target_names="."), _lora),
    "DoRA": (llfx.DoRA(r=R, alpha=ALPHA, target_names="."), _dora),
    "HiRA": (llfx.HiRA(r=R, target_names="."), _hira),
    "Full": (llfx.Full(target_names=".", target_kinds="linear"), _full),
}
"""The variants that calls are tried with: a config, and its formula once more."""


@dataclass
class Adapter:
    """An adapter of the oracle.

    Args:
        formula: what it computes at a site.
        tensors: by site and name, of its own.
        scale: its coefficient.
        acts: whether it acts.
    """

    formula: Formula
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scale: Any = 1.0
    acts: bool = True


class Oracle:
    """An eager model with adapters by hooks.

    Args:
        model: the model, which the oracle owns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.hook()

    def hook(self) -> None:
        """Put the hooks on the linears that the model has now and that have none."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and "of_oracle" not in vars(module):
                vars(module)["of_oracle"] = True
                module.register_forward_hook(self._at(name))

    def _at(self, site: str) -> Callable[..., Tensor]:
        def adapt(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            for adapter in self.adapters.values():
                if adapter.acts and site in adapter.tensors:
                    adapted = adapter.formula(module, args[0], y, adapter.tensors[site])
                    scale = adapter.scale
                    if isinstance(scale, Tensor):
                        scale = scale.to(y).reshape(-1, *[1] * (y.dim() - 1))
                    y = adapted if scale is None else y + scale * (adapted - y)
            return y

        return adapt

    def copy_adapters(self, adapted: nn.Module, formulas: Mapping[str, Formula]) -> None:
        """Take over the values of the adapters of a model, by name.

        Args:
            adapted: the model.
            formulas: of each adapter.
        """
        values = llfx.adapter_state_dict(adapted)
        for name, formula in formulas.items():
            known = self.adapters.get(name)
            tensors: dict[str, dict[str, Tensor]] = {}
            for key, value in values.items():
                site, _, leaf = key.rpartition(".")
                base, is_named = leaf.removesuffix(f"_{name}"), name != "default"
                if is_named == (base != leaf) and (is_named or not self._is_of_another(leaf, formulas)):
                    own = value.detach().clone().requires_grad_(value.is_floating_point())
                    tensors.setdefault(site, {})[base] = own
            scale, acts = (known.scale, known.acts) if known else (None, True)
            self.adapters[name] = Adapter(formula, tensors, scale, acts)

    @staticmethod
    def _is_of_another(leaf: str, formulas: Mapping[str, Formula]) -> bool:
        return any(name != "default" and leaf.endswith(f"_{name}") for name in formulas)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors of the adapters, by the names that they have in `adapter_state_dict`."""
        return {
            f"{site}.{leaf}" + ("" if name == "default" else f"_{name}"): tensor
            for name, adapter in self.adapters.items()
            for site, tensors in adapter.tensors.items()
            for leaf, tensor in tensors.items()
        }


def gradients_of(output: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a fixed functional of the outputs, of the tensors that have one."""
    if not output.requires_grad:
        return {}
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    found = torch.autograd.grad((output * direction.to(output)).sum(), [tensors[n] for n in names], allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
