"""Variants: the maths of an adapter, the tensors that it adds, and the sites that it goes to.

A variant is a frozen dataclass. Its fields are the hyper-parameters and the targets, its methods are the
maths. `forward` is an ordinary tensor function; the same function defines the eager wrapper, the inserted
subgraph and the merged weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import ConfigError
from ..graph.insertion import SHARED
from ..graph.tensors import HALF
from ..sites.finding import KINDS
from ..sites.roles import GROUPS, ROLES
from ..sites.site import Site
from .arguments import ALL_LINEAR, ALL_LINEAR_HERE, check_arguments
from .calibration_data import Observe, Statistic
from .declaration import check_class
from .frozen_linear import FrozenLinear
from .param_spec import ParamSpec as ParamSpec
from .param_spec import is_finite
from .patterns import check_pattern, occurs

_DTYPES = (*HALF, torch.float32, torch.float64)  # torch has no arithmetic in narrower ones


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Base class of all variants; the fields common to them.

    A site is adapted if it satisfies every target given. With neither names nor roles the variant's default
    roles apply. The head is adapted only if its role or a `target_names` pattern asks for it. Wherever several values
    are possible a single one will do: `layers=0` is `layers=(0,)`. The config keeps them as a tuple.

    A variant that has a rank, a scale or dropout derives from `WithRank`, `WithScale`, `WithDropout`, or several.

    Args:
        dtype: of the adapter's tensors; None means float32 on a float16/bfloat16 base, else the base's own.
        target_roles: roles or groups of roles (`attention`, `mlp`) to adapt.
        target_names: regular expressions, searched in the qualified name.
        exclude_names: regular expressions; a site whose name matches one is left alone.
        layers: indices of layers (the first number in the qualified name) to adapt.
        slots: the number of adapters of a bank, see `Bank`; None for one adapter.
        target_kinds: kinds of sites to adapt: `linear`, `embedding`, `conv`, `grouped_conv`, `experts`, `norm`. Only
            linears have roles; sites of the other kinds are chosen by kind, name and layer.

    Raises:
        ConfigError: an argument is unknown or positional, or a field has an impossible value.
    """

    dtype: torch.dtype | None = None
    target_roles: str | Sequence[str] | None = None
    target_names: str | Sequence[str] | None = None
    exclude_names: str | Sequence[str] = ()
    layers: int | Sequence[int] | None = None
    target_kinds: str | Sequence[str] = ("linear",)
    slots: int | None = None

    default_roles: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    """The roles adapted when the config names no targets."""
    affine: ClassVar[bool] = True
    """Whether `forward` is affine in `x`, outside dropout. `merge` tries it out; False says that it is not."""
    by_update: ClassVar[bool] = False
    """Whether `forward` multiplies its input with matrices in the shape of the weight only, as grouped convolutions
    need it."""
    ties_to_weight: ClassVar[bool] = False
    """Whether the values mean something only on the weights they were made for (loading elsewhere is an error)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments before the generated `__init__` sees them, because its errors name no way out."""
        check_class(cls, Variant)
        check_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # a list, as JSON has it, could be changed later
            object.__setattr__(self, field.name, _without_lists(getattr(self, field.name)))
        for name in ("target_roles", "layers", "target_kinds"):
            self._make_tuple(name)
        for name in ("target_names", "exclude_names"):
            self._check_names(name)
        self._check_plain_fields()
        self._require(
            self.dtype in (None, *_DTYPES),
            f"dtype must be None or a floating-point torch.dtype of 16, 32 or 64 bits, got {self.dtype!r}",
        )
        for name in ("target_roles", "target_names"):
            self._require(
                ALL_LINEAR not in as_tuple(getattr(self, name)),
                f"{name}={ALL_LINEAR!r} is PEFT's way to choose linears. Here {ALL_LINEAR_HERE}; or"
                ' target_names="." for all linears of the model, its head too',
            )
        for role in as_tuple(self.target_roles):
            near = difflib.get_close_matches(str(role), [*ROLES, *GROUPS])
            self._require(
                role in ROLES or role in GROUPS,
                f"unknown role {role!r}"
                + (f", did you mean {near[0]!r}?" if near else ".")
                + f" The roles are {', '.join(ROLES)}; the groups are {', '.join(GROUPS)}. A role says what a linear"
                f" does; its name goes to another field: target_names={role!r}",
            )
        for kind in self.target_kinds:
            self._require(kind in KINDS, f"unknown kind of site {kind!r}; the kinds are {', '.join(KINDS)}")
        for layer in as_tuple(self.layers):
            self._require(isinstance(layer, int) and layer >= 0, f"layers are indices from 0, got {layer!r}")
        self._require(
            self.slots is None or (type(self.slots) is int and self.slots > 0),
            f"slots is the number of adapters of a bank, a positive integer, got {self.slots!r}",
        )

    def _make_tuple(self, name: str) -> None:
        """Turn the field into a tuple. It may be one value, a list as JSON has it, or None where that is allowed."""
        value = getattr(self, name)
        optional = value is None and name not in ("exclude_names", "target_kinds")
        self._require(
            optional or isinstance(value, (int, Iterable)),
            f"{name} must be a tuple (of roles, names, ...), got {value!r}",
        )
        object.__setattr__(self, name, None if optional else as_tuple(value))

    def _check_names(self, name: str) -> None:
        """Check a field that holds regular expressions, and turn it into a tuple."""
        self._make_tuple(name)
        for pattern in as_tuple(getattr(self, name)):
            self._check_pattern(pattern)

    def _make_pairs(self, name: str, valid: Callable[[object], bool], values: str) -> None:
        """Check a field that maps regular expressions to valid values, and turn it into a tuple of pairs."""
        patterns = getattr(self, name)
        given = patterns.items() if isinstance(patterns, Mapping) else patterns
        entries: list[Any] = list(given) if isinstance(given, Iterable) else [None]
        well_formed = all(isinstance(entry, (tuple, list)) and len(entry) == 2 for entry in entries)
        self._require(
            well_formed and all(valid(value) for _, value in entries),
            f"{name} must map regular expressions to {values}, got {patterns!r}",
        )
        for pattern, _ in entries:
            self._check_pattern(pattern)
        object.__setattr__(self, name, tuple((pattern, value) for pattern, value in entries))

    def _check_plain_fields(self) -> None:
        """Check the fields that are a flag, an integer, a number or a choice, whichever class declares them."""
        cls: Any = type(self)
        for name, kind in _field_types(cls).items():
            value = getattr(self, name)
            if kind is bool:
                self._require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
            elif kind is int:
                self._require(type(value) is int, f"{name} must be an integer, got {value!r}")
                self._require(value.bit_length() <= 64, f"{name} does not fit 64 bits: {value!r}")
            elif kind is float:
                self._require(is_finite(value), f"{name} must be a finite number, got {value!r}")
            elif get_origin(kind) is Literal:
                choices = ", ".join(map(repr, get_args(kind)))
                self._require(
                    any(type(value) is type(choice) and value == choice for choice in get_args(kind)),
                    f"{name} must be one of {choices}, got {value!r}",
                )

    def _check_pattern(self, pattern: object) -> None:
        """Check that `pattern` is a regular expression."""
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: {error}.") from error

    def _require(self, condition: bool, message: str) -> None:
        """Raise `ConfigError` with `message` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}.")

    # A variant defines these.

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        """Return the tensors that the variant adds to `site`, by name.

        A name is a Python identifier that nothing in the module of the site has; begin it with `lora_`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        """Return the adapted linear.

        It must call `base` exactly once and act on the last dimension only. If it is affine in `x` outside dropout,
        `merge` can fold it into the weight; if it is not, as a gate that reads `x`, it can do all but that.

        `base(x, weight=w, bias=b)` computes with other tensors in place of the frozen ones, of their shapes. No product
        is computed twice then. It must be the innermost adapter of its sites, the first in a list of configs.

        Types: `x` and `base(x)` have the model's type, `p` the adapter's, which is float32 on a base in half precision.
        Inside `forward` products (`x @ p.lora_A.T`, `F.linear`, `einsum`) promote as sums do: what meets float32 is
        computed in float32. What goes into `base` is cast to the type of `x`, and the result to that of `base(x)`. So
        the formula as it is written is right on any base and under autocast. Cast only to compute in another type.

        It is traced. A cast of `x` itself that has nothing to do returns `x`, and a later capture may take one for the
        other; cast what is computed from `x` instead. Numbers and fields of the config become constants of the trace.

        Args:
            x: `(..., d_in)`. At an embedding, a convolution or experts an object in its place, which can be cast,
                dropped out, and multiplied (`F.linear`, `@`) with matrices of `d_in` columns; any other use of it is a
                ConfigError. Of experts, `p` and `base.weight` are such objects too, with the shapes of one expert.
            base: the frozen linear.
            p: the variant's tensors as attributes.

        Returns:
            `(..., d_out)`.
        """
        raise NotImplementedError

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        """Overwrite, in place, the tensors that start from the frozen weight `(d_out, d_in)`, in float32 or wider.

        Write `p.lora_A.copy_(...)`. The weight, and the tensors that all sites share, may only be read.
        """

    def init_bias(self, site: Site, bias: Tensor, p: Any) -> None:
        """Overwrite, in place, the tensors that start from the frozen bias `(d_out,)`, if there is one."""

    def init_shared(self, site: Site, weight: Tensor, p: Any) -> None:
        """Overwrite, in place, the tensors that all sites share, from the frozen weight of the first of them."""

    def observer(self, site: Site, weight: Tensor) -> Observe | None:
        """Return a function that observes the site's inputs on calibration data; None to start without data.

        The function takes the inputs of one batch, `(tokens, d_in)` in float32 or wider without padding, and returns a
        tensor to be summed over all batches. If it has a second argument without a default, that is the `Batch`: the
        inputs in the model's shape, the mask, the arguments of the call, and the number of the batch. It is called at
        each call of the site. `weight` is as for `init`.
        """
        return None

    def finalize(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Variant:
        """Return the config for these sites, with the fields that depend on all of them or on calibration data.

        The returned config is inserted and saved. It may select fewer of the sites.
        """
        return self

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        """Overwrite, in place, the tensors that start from data. Called instead of `init` with calibration data."""

    def low_rank_change(self, p: Any) -> tuple[Tensor, Tensor] | None:
        """Return `A (..., k, d_in)` and `B (..., d_out, k)` of the change `B A` of the weight, for exact sums.

        None if the change is of another form. Then sums compute it from what `merge` folds.
        """
        return None

    # The base class provides these.

    def overrides(self, name: str) -> dict[str, Any]:
        """Return the fields that have another value at the site called `name` than in this config."""
        return {}

    def for_site(self, name: str) -> Self:
        """Return the config for the site called `name`, with the rank and alpha that the patterns give it."""
        overrides = self.overrides(name)
        return dataclasses.replace(self, **overrides) if overrides else self

    def check(self, site: Site) -> None:
        """Raise `ConfigError` if the variant cannot be applied to `site`."""

    def tensor_specs(self, site: Site) -> Mapping[str, ParamSpec]:
        """Return the tensors that `site` gets: those of `params`; of experts and of a bank, one for each of these."""
        count = site.experts or self.slots
        return {
            name: spec.repeated(count) if count and not name.startswith(SHARED) else spec
            for name, spec in self.params(site).items()
        }

    def param_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the adapter's tensors on a base of `base_dtype`."""
        return self.dtype or (torch.float32 if base_dtype in HALF else base_dtype)

    def selects(self, site: Site) -> bool:
        """Return whether the config's targets include `site`."""
        if site.kind.name not in self.target_kinds or occurs(as_tuple(self.exclude_names), site.name):
            return False
        if self.layers is not None and site.layer not in as_tuple(self.layers):
            return False
        named = self.target_names is not None
        if named and not occurs(as_tuple(self.target_names), site.name):
            return False
        roles = self.target_roles
        if roles is None:
            if named or not site.kind.has_roles:
                return True
            roles = self.default_roles
        wanted = {member for role in roles for member in GROUPS.get(role, (role,))}
        if "head" in site.roles and "head" not in wanted and not named:
            return False
        return bool(wanted & site.roles)


def _without_lists(value: Any) -> Any:
    return tuple(map(_without_lists, value)) if type(value) in (list, tuple) else value


@functools.lru_cache(maxsize=256)  # a deep model has a variant at each of hundreds of sites
def _field_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the values of a field that holds one value, several, or None for no value."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, int)) else tuple(value)
