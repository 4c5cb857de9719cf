"""Variants: what an adapter computes, what it adds, and where it goes.

A variant is a frozen dataclass. Its fields are the hyper-parameters and the targets, its methods are the
maths. `forward` is an ordinary tensor function; the same function defines the eager wrapper, the inserted
subgraph and the merged weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, SelectionError
from .roles import GROUPS, ROLES
from .site import Site

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ParamSpec:
    """One tensor that a variant adds to a site.

    Args:
        shape: its shape.
        init: how it starts: `"zeros"`, `"ones"`, `"kaiming"` (uniform, a = sqrt(5)), or a number to fill with.
        trainable: a parameter if true, else a frozen buffer. Both are saved with the adapter.
    """

    shape: tuple[int, ...]
    init: str | float = "zeros"
    trainable: bool = True

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor, allocated and not yet filled: a Parameter if trainable."""
        tensor = torch.empty(self.shape, dtype=dtype, device=device)
        return torch.nn.Parameter(tensor) if self.trainable else tensor

    def fill(self, tensor: Tensor) -> None:
        """Write the start values into `tensor`, in place."""
        if self.init == "kaiming":
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        elif isinstance(self.init, str):
            tensor.fill_({"zeros": 0.0, "ones": 1.0}[self.init])
        else:
            tensor.fill_(self.init)


@dataclass(frozen=True)
class FrozenLinear:
    """The frozen linear that a variant adapts: `base(x)` is `x W^T + b`.

    Args:
        call: computes `base(x)` for `x (..., d_in)`.
        weight: `W (d_out, d_in)`, frozen; whatever its layout in the model.
        bias: `b (d_out,)`, or None.
        site: the site, with its roles.
        training: whether the model is in training mode, for dropout.
    """

    call: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    site: Site
    training: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


def compose(base: FrozenLinear, around: Iterable[tuple[Variant, Any]]) -> Callable[[Tensor], Tensor]:
    """The site with its adapters, as a function of `x (..., d_in)`.

    Args:
        base: the frozen linear.
        around: the variants with their tensors, the innermost first. Each adapts what the ones before it compute;
            `base.weight` and `base.bias` are the frozen ones for all.
    """
    adapted: Callable[[Tensor], Tensor] = base.call
    for variant, p in around:
        adapted = partial(variant.forward, base=dataclasses.replace(base, call=adapted), p=p)
    return adapted


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Base class of all variants; the fields common to them.

    A site is adapted if it satisfies every target given. With neither names nor roles the variant's default
    roles apply. The head is adapted only if its role or a `target_names` pattern asks for it.

    Args:
        r: rank. Variants without a rank (`IA3`) do not use it.
        alpha: scale numerator; low-rank branches are multiplied by `alpha / r`. Unused where there is no scale.
        dtype: of the adapter's tensors; None means float32 on a float16/bfloat16 base, else the base's own.
        target_roles: roles or groups of roles (`attention`, `mlp`) to adapt.
        target_names: regular expressions, searched in the qualified name.
        exclude_names: regular expressions; a site whose name matches one is left alone.
        layers: indices of layers (the first number in the qualified name) to adapt.

    Raises:
        ConfigError: a field has an impossible value.
    """

    r: int = 8
    alpha: float = 16.0
    dtype: torch.dtype | None = None
    target_roles: tuple[str, ...] | None = None
    target_names: tuple[str, ...] | None = None
    exclude_names: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    default_roles: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    """The roles adapted when the config names no targets."""
    ties_to_weight: ClassVar[bool] = False
    """Whether the values mean something only on the weights they were made for (loading elsewhere is an error)."""
    bounded_rank: ClassVar[bool] = True
    """Whether `r` may not exceed the smaller side of the weight."""

    def __post_init__(self) -> None:
        for field in ("target_roles", "target_names", "exclude_names", "layers"):
            value = getattr(self, field)
            if isinstance(value, (str, int)):
                value = (value,)
            optional = value is None and field != "exclude_names"
            self._require(
                optional or isinstance(value, Iterable),
                f"{field} must be a tuple (of roles, names, ...), got {value!r}",
            )
            object.__setattr__(self, field, None if optional else tuple(value))
        self._require(isinstance(self.r, int) and self.r >= 1, f"r must be a positive integer, got {self.r!r}")
        self._require(is_finite(self.alpha), f"alpha must be a finite number, got {self.alpha!r}")
        self._require(
            self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point),
            f"dtype must be None or a floating-point torch.dtype, got {self.dtype!r}",
        )
        for role in self.target_roles or ():
            near = difflib.get_close_matches(str(role), [*ROLES, *GROUPS])
            self._require(
                role in ROLES or role in GROUPS,
                f"unknown role {role!r}"
                + (f", did you mean {near[0]!r}?" if near else ".")
                + f" The roles are {', '.join(ROLES)}; the groups are {', '.join(GROUPS)}",
            )
        for pattern in (*(self.target_names or ()), *self.exclude_names):
            self._require(isinstance(pattern, str), f"{pattern!r} is not a regular expression: it must be a string")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{self._name()}: {pattern!r} is not a regular expression: {error}") from error
        for layer in self.layers or ():
            self._require(isinstance(layer, int) and layer >= 0, f"layers are indices from 0, got {layer!r}")

    def _name(self) -> str:
        return type(self).__name__

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{self._name()}: {message}.")

    # What a variant defines.

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        """The tensors that the variant adds to `site`, by name."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        """The adapted linear.

        It must call `base` exactly once, be affine in `x` outside dropout, and act on the last dimension only.

        Args:
            x: `(..., d_in)`.
            base: the frozen linear.
            p: the variant's tensors as attributes.

        Returns:
            `(..., d_out)`, in the dtype of `base(x)`.
        """
        raise NotImplementedError

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        """Overwrite, in place, what starts from the frozen weight. `weight (d_out, d_in)` is float32 or wider."""

    # What it gets.

    def check(self, site: Site) -> None:
        """Raise `ConfigError` if the variant cannot be applied to `site`."""
        limit = min(site.d_in, site.d_out)
        self._require(
            not self.bounded_rank or self.r <= limit,
            f"r={self.r} is larger than site {site.name!r} allows ({site.d_out} x {site.d_in}); use r <= {limit}",
        )

    def start(self, site: Site, weight: Tensor, p: Any) -> None:
        """Write all start values into `p`, in place."""
        with torch.no_grad():
            for name, spec in self.params(site).items():
                spec.fill(getattr(p, name))
            self.init(site, wide(weight), p)

    def param_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the adapter's tensors on a base of `base_dtype`."""
        return self.dtype or (torch.float32 if base_dtype in _HALF else base_dtype)

    def selects(self, site: Site) -> bool:
        """Whether the config's targets include `site`."""
        if any(re.search(pattern, site.name) for pattern in self.exclude_names):
            return False
        if self.layers is not None and site.layer not in self.layers:
            return False
        named = self.target_names is not None
        if named and not any(re.search(pattern, site.name) for pattern in self.target_names or ()):
            return False
        roles = self.target_roles
        if roles is None:
            if named:
                return True
            roles = self.default_roles
        wanted = {member for role in roles for member in GROUPS.get(role, (role,))}
        if "head" in site.roles and "head" not in wanted and not named:
            return False
        return bool(wanted & site.roles)


def select(variant: Variant, sites: Iterable[Site]) -> list[Site]:
    """The sites that the config's targets include, checked to fit the variant.

    Raises:
        SelectionError: none does; the message lists the nearest names and the roles found.
        ConfigError: the variant cannot be applied to one of them.
    """
    sites = list(sites)
    chosen = [site for site in sites if variant.selects(site)]
    if not chosen:
        raise SelectionError(_nothing_matched(variant, sites))
    for site in chosen:
        variant.check(site)
    return chosen


def _nothing_matched(variant: Variant, sites: list[Site]) -> str:
    targets = {
        field: getattr(variant, field)
        for field in ("target_roles", "target_names", "exclude_names", "layers")
        if getattr(variant, field)
    } or {"default roles": variant.default_roles}
    wanted = ", ".join(f"{field}={value!r}" for field, value in targets.items())
    if not sites:
        return f"{type(variant).__name__}: the model has no linear site to adapt."
    names = [site.name for site in sites]
    by_tail = {name.rsplit(".", 1)[-1]: name for name in names}
    near = [
        by_tail[tail]
        for pattern in variant.target_names or ()
        for tail in difflib.get_close_matches(pattern.strip("^$\\").rsplit(".", 1)[-1], by_tail, n=3, cutoff=0.4)
    ]
    roles = sorted({role for site in sites for role in site.roles})
    return (
        f"{type(variant).__name__}: no site matches {wanted}. The model has {len(sites)} sites"
        f" ({'the nearest' if near else 'the first'}: {', '.join(dict.fromkeys(near or names[:5]))})"
        f" with the roles: {', '.join(roles) or 'none that could be inferred'}."
    )


# The registry.

_REGISTRY: dict[str, type[Variant]] = {}
V = TypeVar("V", bound=type[Variant])


def register(cls: V) -> V:
    """Class decorator: make a variant known by its class name, so that its checkpoints can be loaded.

    Raises:
        ConfigError: another class has the name, or `cls` is not a frozen dataclass derived from `Variant`.
    """
    if not (issubclass(cls, Variant) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{cls.__name__} must be a frozen dataclass derived from Variant.")
    known = _REGISTRY.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"A variant named {cls.__name__} is already registered, by {known.__module__}.")
    _REGISTRY[cls.__name__] = cls
    return cls


def registry() -> dict[str, type[Variant]]:
    """The registered variants by name, in the order of registration."""
    return dict(_REGISTRY)


def to_config(variant: Variant) -> dict[str, Any]:
    """The variant as JSON-ready data: its class name under `"variant"`, then its fields."""
    fields = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    fields["dtype"] = None if variant.dtype is None else str(variant.dtype).removeprefix("torch.")
    return {"variant": type(variant).__name__, **fields}


def from_config(config: Mapping[str, Any]) -> Variant:
    """The variant that `to_config` described.

    Raises:
        ConfigError: the variant or one of its fields is unknown, or a value is invalid.
    """
    fields = dict(config)
    name = fields.pop("variant", None)
    if name not in _REGISTRY:
        raise ConfigError(f"Unknown variant {name!r}; the registered variants are {', '.join(_REGISTRY)}.")
    cls = _REGISTRY[name]
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}.")
    if fields.get("dtype") is not None:
        dtype = getattr(torch, str(fields["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{name}: dtype {fields['dtype']!r} is not the name of a torch.dtype.")
        fields["dtype"] = dtype
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error


# Helpers for the maths of variants.


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision, else as it is. For norms and factorisations."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def is_finite(value: object) -> bool:
    """Whether `value` is a number that a float can hold. For checking the fields of variants."""
    return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max


def cast(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the dtype of `like`; adds nothing to the graph where the dtypes agree."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A x` in activation space: `x (..., d_in)`, `A (r, d_in)`, `B (d_out, r)` to `(..., d_out)`."""
    return F.linear(F.linear(cast(x, a), a), b)


def adapter_namespace(tensors: Mapping[str, Tensor]) -> Any:
    """The tensors as attributes, the form in which `forward` takes them."""
    return SimpleNamespace(**tensors)
