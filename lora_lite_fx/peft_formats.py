"""How each variant is written in PEFT's format: the names of its config's fields and of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .site import Site
from .variant import Variant
from .variants import EVA, HRA, IA3, DeLoRA, DoRA, LoRA, OLoRA, PiSSA


@dataclass(frozen=True)
class PeftField:
    """One field of a config.

    Args:
        name: what PEFT calls it.
        default: what PEFT takes where a file leaves it out.
        to_ours, to_peft: converters of its value.
    """

    name: str
    default: Any
    to_ours: Callable[[Any], Any] = lambda value: value
    to_peft: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a site.

    Args:
        key: what follows the module's path in PEFT's files; of a tensor that sites share, the whole key.
        to_ours, to_peft: converters of its layout.
    """

    key: str
    to_ours: Callable[[Tensor], Tensor] = lambda tensor: tensor
    to_peft: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class PeftFormat:
    """How a variant is written by PEFT.

    Args:
        variant: the variant.
        peft_type: PEFT's name of the method.
        fields: PEFT's fields, by ours.
        tensors: PEFT's tensors, by ours.
        constants: fields that PEFT has and this variant fixes; a file says the same where it says anything.
        unread: fields that say only how the tensors were started, or what the format here does not need.
        patterns: which of `rank_pattern` and `alpha_pattern` PEFT has for it.
        conv1d: whether PEFT has it for `Conv1D`.
        rest: names of our tensors that follow from the weight, and are in no file.
    """

    variant: type[Variant]
    peft_type: str
    fields: Mapping[str, PeftField]
    tensors: Mapping[str, PeftTensor]
    constants: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    conv1d: bool = False
    rest: tuple[str, ...] = ()

    def tensor_to_peft(self, variant: Variant, site: Site, name: str, tensor: Tensor) -> Tensor:
        """The tensor called `name` in PEFT's layout."""
        if isinstance(variant, IA3):
            return tensor[None, :] if variant.gates_input(site) else tensor[:, None]
        return self.tensors[name].to_peft(tensor)


def _lora(variant: type[Variant], start: object, **constants: Any) -> PeftFormat:
    """One of the variants that PEFT treats as a LoRA."""
    magnitude = {"lora_m": PeftTensor("lora_magnitude_vector")} if variant is DoRA else {}
    bias = {"lora_bias": PeftTensor("lora_B.bias")} if variant is LoRA else {}
    return PeftFormat(
        variant,
        "LORA",
        {
            "r": PeftField("r", 8),
            "alpha": PeftField("lora_alpha", 8),
            "dropout": PeftField("lora_dropout", 0.0),
            "rank_stabilized": PeftField("use_rslora", False),
            **({"bias": PeftField("lora_bias", False)} if variant is LoRA else {}),
        },
        {"lora_A": PeftTensor("lora_A.weight"), "lora_B": PeftTensor("lora_B.weight"), **magnitude, **bias},
        {"use_dora": variant is DoRA, "init_lora_weights": start, **constants},
        frozenset({"eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size"}),
        frozenset({"rank_pattern", "alpha_pattern"}),
        conv1d=variant is not OLoRA,
        rest=("lora_A0", "lora_B0") if variant in (PiSSA, OLoRA) else (),
    )


FORMATS = (
    _lora(LoRA, True),
    _lora(DoRA, True),
    _lora(PiSSA, "pissa"),
    _lora(OLoRA, "olora"),
    _lora(EVA, "eva"),
    PeftFormat(IA3, "IA3", {}, {"lora_g": PeftTensor("ia3_l", to_ours=Tensor.flatten)}, conv1d=True),
    PeftFormat(
        HRA,
        "HRA",
        {"r": PeftField("r", 8), "orthogonal": PeftField("apply_GS", False)},
        {"lora_U": PeftTensor("hra_u", to_ours=Tensor.t, to_peft=Tensor.t)},
    ),
    PeftFormat(
        DeLoRA,
        "DELORA",
        {"r": PeftField("r", 8), "lambda0": PeftField("delora_lambda", 15.0, to_ours=float)},
        {
            "lora_A": PeftTensor("delora_A"),
            "lora_B": PeftTensor("delora_B"),
            "lora_lambda": PeftTensor("delora_lambda", to_ours=Tensor.squeeze, to_peft=lambda t: t.reshape(1)),
            "lora_wnorm": PeftTensor("delora_w_norm"),
        },
        patterns=frozenset({"rank_pattern"}),
    ),
)
