"""The form in which PEFT writes a variant: the names of its fields and tensors, and what these may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ...adapters.variant import Variant
from ...sites.kinds.convolution import Convolution
from ...sites.site import Site
from ...variants import IA3


@dataclass(frozen=True)
class PeftField:
    """One field of a config.

    Args:
        name: PEFT's name.
        default: PEFT's value where a file leaves it out.
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
        key: the part after the module's path in PEFT's files; of a tensor that sites share, the whole key.
        to_ours, to_peft: converters of its layout.
        embedding: the key at an embedding, if it is another.
        conv: its layout at a convolution, from ours and the size of the kernel.
    """

    key: str
    to_ours: Callable[[Tensor], Tensor] = lambda tensor: tensor
    to_peft: Callable[[Tensor], Tensor] = lambda tensor: tensor
    embedding: str = ""
    conv: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None

    def key_at(self, kind: str) -> str:
        """Return the key at a site of that kind."""
        return self.embedding if kind == "embedding" and self.embedding else self.key


@dataclass(frozen=True)
class PeftFormat:
    """The form in which PEFT writes a variant.

    Args:
        variant: the variant.
        peft_type: PEFT's name of the method.
        fields: PEFT's fields, by ours.
        tensors: PEFT's tensors, by ours.
        fixed: the values that our other fields must have, because one variant here may be several formats there.
        constants: PEFT's fields that tell these formats apart; a file that leaves one out counts as having this value.
        written: fields of PEFT that it needs in a file, and that are not read.
        unread_in_files: fields that say how an adapter starts or trains, and do not matter to what a file computes.
        ignored: endings of keys of tensors that do not either.
        unread: fields that say only how an adapter starts, or what its other fields make pointless.
        start: PEFT's field that says how a new adapter starts; empty if it is one of `fields`.
        starts: the starts that a new adapter has here too: our fields, by the value of that field.
        from_file: a field, and the tensor whose first side says it better than a file's config: PEFT without CUDA makes
            one factor of BOFT whatever its config says.
        same_rank: the tensor whose first side is the rank, if PEFT gives all sites the rank `r` whatever
            `rank_pattern` says. A file is read by the tensor, and written with the largest rank for all.
        patterns: PEFT's fields that have other values by name, called as here.
        conv1d: whether PEFT has it for `Conv1D`.
        kinds: of the sites that can be read and written.
        kernels: the numbers of dimensions that kernels of convolutions may have.
        own_conv: whether PEFT computes a convolution of its own, of which it does not give all settings over.
        rest: our tensors that a file may lack, as they follow from the weight or the config.
    """

    variant: type[Variant]
    peft_type: str
    fields: Mapping[str, PeftField]
    tensors: Mapping[str, PeftTensor]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    unread_in_files: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    start: str = "init_weights"
    starts: Mapping[Any, Mapping[str, Any]] = field(default_factory=lambda: {True: {}})
    from_file: tuple[str, str] | None = None
    same_rank: str = ""
    patterns: frozenset[str] = frozenset()
    conv1d: bool = False
    kinds: tuple[str, ...] = ("linear",)
    kernels: tuple[int, ...] = (1, 2, 3)
    own_conv: bool = False
    rest: tuple[str, ...] = ()

    def tensor_to_peft(self, variant: Variant, site: Site, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor called `name` in PEFT's layout."""
        if isinstance(variant, IA3):
            if site.kernel:
                return tensor[(None, slice(None), *[None] * len(site.kernel))]
            return tensor[None, :] if variant.gates_input(site) else tensor[:, None]
        theirs = self.tensors[name]
        if isinstance(site.kind, Convolution) and theirs.conv is not None:
            return theirs.conv(tensor, site.kind.kernel)
        return theirs.to_peft(tensor)


# What several formats have.

BOTH_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
R = {"r": PeftField("r", 8)}
R_ALPHA = {**R, "alpha": PeftField("alpha", 8)}
GAUSSIAN = {"gaussian": {"init_weights": "gaussian"}}


def as_patches(a: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `A (r, d_in)` as the weight of a convolution."""
    weight: Tensor = a.unflatten(1, (-1, *kernel))
    return weight


def as_points(b: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `B (d_out, r)` as the weight of a convolution whose kernel is a point."""
    return b[(..., *[None] * len(kernel))]


as_rows = partial(Tensor.flatten, start_dim=1)
