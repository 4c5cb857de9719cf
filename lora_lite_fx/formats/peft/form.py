"""The form in which PEFT has a variant: the names of its fields and tensors, what these may be, and what is peculiar.

A method of PEFT is one file in `methods/`, which lists its forms in `FORMS`. A form that needs no more than the tables
below is a `PeftForm`. What is peculiar about a method overrides a function of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...adapters.placement import Placement
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...graph.insertion import SHARED, inner_name
from ...sites.dataflow import op_name
from ...sites.kinds.convolution import Convolution
from ...sites.matching import Call
from ...sites.site import Site
from ...variants import LoRA
from .beside import PREFIX, TIED, BesideFields, is_beside
from .fields_and_tensors import PeftField, PeftTensor
from .target_modules import excluded_patterns, target_patterns, with_flags_inside

_UNREAD = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type"}
_UNREAD |= {"peft_version", "revision", "runtime_config", "task_type"}
"""Fields that say where an adapter comes from, or how PEFT is to run it."""

_READ_FOR_ALL = {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}
_READ_FOR_ALL |= {"feedforward_modules", "modules_to_save", "bias", "trainable_token_indices"}
"""Fields that say what an adapter is at, or what trains beside it."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT has it, read and checked without a model.

    Args:
        form: its form.
        config: the content of its `adapter_config.json`.
        variant: our config.
        tensors: all tensors, by PEFT's keys.
        path: of the file of tensors, for messages.
        prints: the fingerprints of the weights that it was made for, by site, if they are known.
        modules: the adapter's tensors by PEFT's modules, by our names and in our layout. Those that modules share are
            at each.
        beside: the other tensors by key: weights and biases of the model.
        fields: what the config says about these.
    """

    form: PeftForm
    config: Mapping[str, Any]
    variant: Variant
    tensors: Mapping[str, Tensor]
    path: Path
    prints: Mapping[str, str] | None
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    fields: BesideFields = field(default_factory=BesideFields)


@dataclass(frozen=True)
class PeftForm:
    """The form in which PEFT has a variant.

    Args:
        variant: the variant.
        peft_type: PEFT's name of the method.
        fields: PEFT's fields, by ours.
        tensors: PEFT's tensors, by ours.
        fixed: the values that our other fields must have, because one variant here may be several methods there.
        constants: PEFT's fields that tell these forms apart; a file that leaves one out counts as having this value.
        written: fields of PEFT that it needs in a file, and that are not read.
        unread: fields that say only how an adapter starts, or what its other fields make pointless.
        unread_in_files: fields that say how an adapter starts or trains, and do not matter to what a file computes.
        ignored: endings of keys of tensors that do not either.
        start: PEFT's field that says how a new adapter starts; empty if it is one of `fields`.
        starts: the starts that a new adapter has here too: our fields, by the value of that field.
        patterns: PEFT's fields that have other values by name, called as here.
        conv1d: whether PEFT has it for `Conv1D`.
        kinds: of the sites that can be read and written.
        kernels: the numbers of dimensions that kernels of convolutions may have.
        own_conv: whether PEFT computes a convolution of its own, of which it does not give all settings over.
        rest: our tensors that a file may lack, as they follow from the weight or the config.
        counted: our field that may not be above the number of entries of a weight.
        trains_otherwise: why an adapter with this field of PEFT's trains otherwise here, by the field.
        beside_only: whether the method trains weights of the model and has no adapter.
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
    patterns: frozenset[str] = frozenset()
    conv1d: bool = False
    kinds: tuple[str, ...] = ("linear",)
    kernels: tuple[int, ...] = (1, 2, 3)
    own_conv: bool = False
    rest: tuple[str, ...] = ()
    counted: str = ""
    trains_otherwise: Mapping[str, str] = field(default_factory=dict)
    beside_only: bool = False

    @property
    def name(self) -> str:
        """Our name of the variant, for messages."""
        return self.variant.__name__

    # Which form a config or a variant has.

    def start_in(self, config: Mapping[str, Any]) -> Any:
        """Return the start that a config names, where one that leaves no trace in a file is the usual one."""
        start = config.get(self.start)
        return True if start in (True, False, None) else start

    def told(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a config says, with its start as `start_in` returns it."""
        return {**config, self.start: self.start_in(config)}

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config of the method is of this form."""
        told = self.told(config)
        return all(told.get(key, value) == value for key, value in self.constants.items())

    def has(self, variant: Variant) -> bool:
        """Return whether the form is that of a variant."""
        fixed = all(getattr(variant, name, None) == value for name, value in self.fixed.items())
        return self.variant is type(variant) and fixed

    def default_tables(self) -> dict[str, str]:
        """Return the parts of the names of PEFT's tables of default targets, by the field that they fill."""
        return {"target_modules": f"{self.peft_type}_TARGET"}

    # Configs.

    def variant_of(self, config: Mapping[str, Any], new: bool) -> Variant:
        """Return the variant that a config describes.

        Args:
            config: of this form.
            new: whether the adapter is to start as the config says. If not, its tensors come from a file.

        Raises:
            ConfigError: a field has an impossible value or cannot be represented, or there is no such start here.
        """
        values: dict[str, Any] = dict(self.fixed)
        for ours, theirs in self.fields.items():
            value = config.get(theirs.name, theirs.default)
            try:
                values[ours] = theirs.to_ours(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"{self.name}: PEFT's {theirs.name}={value!r} is not a valid value.") from error
        beside = BesideFields.of(config, self.name)
        self.check_fields(config, {"ensure_weight_tying", *(() if new else self.unread_in_files)})
        for key in self.patterns:
            pairs = config.get(key) or {}
            if not isinstance(pairs, Mapping):
                raise ConfigError(f"{self.name}: PEFT's {key} must map patterns to values, got {pairs!r}.")
            others = ((rf"^(.*\.)?({with_flags_inside(pattern)})$", value) for pattern, value in pairs.items())
            values[key] = tuple(others)
        values |= self.start_fields(config) if new else {}
        values["target_names"] = target_patterns(config, self.name, new)
        values["target_kinds"] = (*self.kinds, "experts") if config.get("target_parameters") else self.kinds
        values["exclude_names"] = (*excluded_patterns(config, self.name), *beside.excluded)
        try:
            variant = self.variant(**values)
        except TypeError as error:
            raise ConfigError(f"{self.name}: {error}.") from error
        if new and beside.are_tied(config, self.name):
            raise ConfigError(
                f"{self.name}: PEFT's ensure_weight_tying=True with {' or '.join(TIED)} cannot be represented here:"
                " adapters of an embedding and of the head that is tied to it are two. Leave it out to train them"
                " apart; for a few tokens, trainable_token_indices ties them."
            )
        return variant

    def check_fields(self, config: Mapping[str, Any], further: Collection[str] = ()) -> None:
        """Raise `ConfigError` if a field that is not known, and not one of `further`, says something."""
        known = {theirs.name for theirs in self.fields.values()} | self.unread | self.patterns | {self.start}
        known |= {*self.constants, *self.written, *further, *_UNREAD, *_READ_FOR_ALL}
        for key in sorted(config.keys() - known, key=str):
            if config[key] not in (None, False, 0, "none", [], {}, ()):
                raise ConfigError(f"{self.name}: PEFT's {key}={config[key]!r} cannot be represented here.")

    def start_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that let a new adapter start as PEFT's does.

        Raises:
            ConfigError: the variant has no such start, or PEFT ignores what the config says about it.
        """
        start = config.get(self.start, True)
        if self.start and not any(type(start) is type(known) and start == known for known in self.starts):
            known = " or ".join(map(repr, self.starts))
            raise ConfigError(
                f"{self.name}: PEFT's {self.start}={start!r} cannot be represented here: a new adapter starts as with"
                f" {known}."
            )
        return dict(self.starts[start]) if self.start else {}

    def warnings_of(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield in what an adapter of a file computes or trains otherwise here than in PEFT, to be warned of."""
        for key, why in self.trains_otherwise.items():
            if config.get(key):
                yield (
                    f"with {key}={config[key]!r} an adapter computes the same here as in PEFT, and trains otherwise,"
                    f" because {why}."
                )

    def config_of(self, variant: Variant, sites: Sequence[Site]) -> dict[str, Any]:
        """Return the fields of PEFT's config that say what the variant is at these sites of modules."""
        config: dict[str, Any] = {theirs.name: theirs.to_peft(getattr(variant, n)) for n, theirs in self.fields.items()}
        config |= {"peft_type": self.peft_type, "inference_mode": True, **self.constants, **self.written}
        if self.conv1d:
            config["fan_in_fan_out"] = {site.transposed for site in sites if site.kind.vector_dims} == {True}
        return config

    # Tensors.

    def read(self, adapter: PeftAdapter) -> PeftAdapter:
        """Sort the tensors of an adapter by modules.

        Raises:
            CheckpointError: a key is not that of a tensor of this form, of one of the model or of tokens.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        shared: dict[str, Tensor] = {}
        beside: dict[str, Tensor] = {}
        for key, tensor in adapter.tensors.items():
            if key.endswith(self.ignored):
                continue
            parsed = self._parsed(key)
            if parsed is not None:
                name, module = parsed
                of_module = shared if module is None else modules.setdefault(module, {})
                try:
                    of_module[name] = self.tensors[name].to_ours(tensor)
                except (RuntimeError, IndexError) as error:
                    message = f"{adapter.path}: {key} cannot have the shape {tuple(tensor.shape)}."
                    raise CheckpointError(message) from error
            elif is_beside(key):
                beside[key] = tensor
            else:
                known = ", ".join(theirs.key for theirs in self.tensors.values())
                raise CheckpointError(
                    f"{adapter.path}: {key} cannot be represented here; of {self.name}, modules have {known}."
                )
        by_module = {module: {**tensors, **shared} for module, tensors in modules.items()}
        return replace(adapter, modules=by_module, beside=beside, fields=BesideFields.of(adapter.config, self.name))

    def _parsed(self, key: str) -> tuple[str, str | None] | None:
        """Return our name of the tensor called `key`, and its module, which is None if modules share it."""
        for name, theirs in self.tensors.items():
            if name.startswith(SHARED) and key == f"base_model.{theirs.key}":
                return name, None
            for ending in (theirs.key, theirs.embedding):
                if ending and key.startswith(PREFIX) and key.endswith(f".{ending}"):
                    return name, key.removeprefix(PREFIX).removesuffix(f".{ending}")
        return None

    def key_of(self, name: str, module: str, site: Site) -> str:
        """Return PEFT's key of the tensor called `name` at a module."""
        theirs = self.tensors[name]
        if name.startswith(SHARED):
            return f"base_model.{theirs.key}"
        key = theirs.embedding if site.kind.token_dim == 1 and theirs.embedding else theirs.key
        return f"{PREFIX}{module}.{key}"

    def tensor_to_peft(self, variant: Variant, site: Site, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor called `name` in PEFT's layout."""
        theirs = self.tensors[name]
        if isinstance(site.kind, Convolution) and theirs.conv is not None:
            return theirs.conv(tensor, site.kind.kernel)
        return theirs.to_peft(tensor)

    def as_written(
        self, model: nn.Module, variant: Variant, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[Variant, Mapping[str, Tensor]]:
        """Return the config and the tensors that a file has of an adapter, which computes the same.

        Raises:
            ConfigError: PEFT cannot hold it.
        """
        return variant, state

    def filed(self, variant: Variant, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a file by their keys, of which those of modules are given by their modules.

        Raises:
            ConfigError: PEFT cannot hold them.
        """
        return tensors

    def as_lora(
        self, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[LoRA, Mapping[str, Tensor]] | None:
        """Return the adapter as a `LoRA` that computes the same, if its tensors say so; else None."""
        return None

    # Sites.

    def reasons_against(self, variant: Variant, site: Site) -> Iterator[str]:
        """Yield why PEFT does not have the variant at a site, or computes something else; the words follow "PEFT"."""
        kind = site.kind
        if kind.name not in self.kinds:
            yield f"has it for {', '.join(self.kinds)} only"
        if self.counted and getattr(variant.for_site(site.name), self.counted) > site.d_in * site.d_out:
            yield "wants no more coefficients than the weight has entries"
        if not isinstance(kind, Convolution):
            return
        if len(kind.kernel) not in self.kernels:
            yield f"has it for convolutions of {' or '.join(map(str, self.kernels))} dimensions"
        if any(self.pads_otherwise(site, call) for call in site.calls):
            yield "pads with zeros where the module pads otherwise"
        if self.own_conv and set(kind.dilation) != {1}:
            yield "has no dilation there"
        settings = (kind.kernel, kind.stride, kind.padding)
        if self.own_conv and self.kernels == (2,) and any(len(set(setting)) > 1 for setting in settings):
            yield "takes one kernel size, stride and padding for all dimensions there"

    def pads_otherwise(self, site: Site, call: Call) -> bool:
        """Return whether PEFT does not pad the input of a convolution as its module does, unless that is with zeros."""
        return "pad" in op_name(call.x) and inner_name(call.x) == site.name


def check_site(form: PeftForm, variant: Variant, site: Site) -> None:
    """Raise `ConfigError` if PEFT does not have `variant` at `site`, or computes something else there."""
    reason = next(form.reasons_against(variant, site), None)
    if reason is not None:
        raise ConfigError(f"{form.name}: PEFT {reason}, and {site.name!r} is {site.kind.article}.")
