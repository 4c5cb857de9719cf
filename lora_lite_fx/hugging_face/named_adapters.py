"""The methods by which transformers, PEFT and trainers name, switch, add and delete the adapters of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..adapters.changed_buffers import check_same_buffers, moved_buffers
from ..adapters.named_configs import check_free, check_name
from ..adapters.placement import adapter_names, adapter_tensor_names
from ..adapters.switches import active, let_train, scaled, set_adapter
from ..errors import CheckpointError, ConfigError
from ..execution.execution import elsewhere
from ..formats.any_file import load_any
from ..graph.insertion import DEFAULT
from ..graph.tensors import outside_inference_mode
from ..rewriting.named import act_as_before, acting_now, add, delete
from ..rewriting.rewrite import merge, remove


class NamedAdapters:
    """The part of an adapted model that answers by the names of its adapters, as other libraries ask."""

    _acted: tuple[str, ...] | None = None  # before `disable_adapters`

    if not TYPE_CHECKING:  # a checker would take each name for an attribute

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError as error:
                raise elsewhere(name, "An adapted model", "model") or error from None

    def set_adapter(self: Any, adapter_name: str | Sequence[str]) -> None:
        """Let these adapters act and train, and no others, as `llfx.set_adapter` does.

        Args:
            adapter_name: one name, or several.

        Raises:
            ConfigError: the model has no adapter of such a name.
        """
        set_adapter(self, adapter_name)

    def active_adapters(self: Any) -> list[str]:
        """Return the names of the adapters that act."""
        return list(acting_now(self) or ())

    @property
    def active_adapter(self: Any) -> str | list[str]:
        """The name of the adapter that acts; a list of names unless it is one."""
        names: list[str] = self.active_adapters()
        return names[0] if len(names) == 1 else names

    def disable_adapters(self: Any) -> None:
        """Let no adapter act, until `enable_adapters`."""
        if acting := acting_now(self):
            self._acted = acting
        active(self, [])

    def enable_adapters(self: Any) -> None:
        """Let those adapters act that acted before `disable_adapters`; all if there was none."""
        present = adapter_names(self)
        active(self, [name for name in self._acted or present if name in present])
        self._acted = None

    def disable_adapter(self: Any) -> AbstractContextManager[Any]:
        """Return a scope without adapters: the frozen model, as the reference of a trainer."""
        return active(self, [])

    @outside_inference_mode()
    def add_adapter(self: Any, adapter_config: Any, adapter_name: str = DEFAULT) -> None:
        """Add an adapter, which acts and trains from now on, and no other, as transformers' does.

        Args:
            adapter_config: a variant, several, or a config of PEFT. Swapped arguments, as PEFT's models take them, are
                taken too.
            adapter_name: its name.

        Raises:
            ConfigError: the name is taken; or as `rewrite`.
        """
        if isinstance(adapter_config, str):
            adapter_config, adapter_name = adapter_name, adapter_config
        add(self, {adapter_name: adapter_config})
        set_adapter(self, adapter_name)

    @outside_inference_mode()
    def load_adapter(
        self: Any,
        peft_model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str = "",
    ) -> None:
        """Load the adapter of a directory or file under a name; `set_adapter` lets it act and train.

        Args:
            peft_model_id: a file that `save` wrote, a directory that PEFT, `save_peft` or `save_pretrained` wrote, or
                the "owner/name" of a repository on the Hub.
            adapter_name: its name in the model.
            is_trainable: whether its parameters require gradients, as PEFT has it, from the start.
            revision, subfolder: as for `load_peft`.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: as `load` and `load_peft`.
        """
        check_free([check_name(adapter_name)], adapter_names(self))
        acting = acting_now(self)
        first = self._graphs.first_graph()
        loaded = load_any(remove(first).eval(), peft_model_id, revision=revision, subfolder=subfolder)
        check_same_buffers(self, moved_buffers(loaded), peft_model_id, CheckpointError)
        self.insert_from(loaded, adapter_name)
        let_train(self, adapter_tensor_names(self, adapter_name), is_trainable)
        act_as_before(self, acting)

    def delete_adapter(self: Any, adapter_name: str | Sequence[str]) -> None:
        """Delete an adapter, or several, with their tensors.

        Raises:
            ConfigError: the model has none of such a name; or none would be left.
        """
        delete(self, adapter_name)

    delete_adapters = delete_adapter

    def merge_and_unload(
        self: Any,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> Any:
        """Return a model of the plain class with adapters folded in, as `llfx.merge` does; this one stays as it is.

        Args:
            progressbar: of PEFT; nothing is shown.
            safe_merge: of PEFT; values that are not finite are refused whatever it says.
            adapter_names: the adapters to fold; None for those that act.

        Raises:
            ConfigError: the model has no adapter of such a name.
            AdapterError: as `merge`.
        """
        with active(self, self.active_adapters() if adapter_names is None else adapter_names):
            return merge(self)

    def unload(self: Any) -> Any:
        """Return the model without adapters, as `llfx.remove` does; this one stays as it is."""
        return remove(self)

    get_base_model = unload

    def set_adapters(
        self: Any, adapter_names: str | Sequence[str], weights: float | Sequence[float] | None = None
    ) -> None:
        """Let these adapters act and train together, each by its weight, as diffusers asks for.

        Args:
            adapter_names: one name, or several.
            weights: a coefficient for all or one for each; None for 1.

        Raises:
            ConfigError: the numbers of names and weights differ; or as `active` and `scaled`.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        factors = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
        if len(factors) != len(names):
            raise ConfigError(f"There are {len(names)} adapters and {len(factors)} weights.")
        set_adapter(self, names)
        if weights is not None:
            scaled(self, dict(zip(names, factors, strict=True)))
