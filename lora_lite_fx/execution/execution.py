"""How a graph is run, on which module, and what to use in place of what a graph lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..adapters.changed_buffers import BaseBuffers
from ..capture.model_record import ModelRecord
from ..capture.signature import CallSignature
from ..passes import OPTIMIZATIONS, Pipeline, Program
from .compile_layers import LayerCompiler
from .memory_plan import Memory


@dataclass(frozen=True)
class Execution:
    """The way in which a graph is run.

    Args:
        passes: the passes that optimize the programs.
        checkpoint_layers: whether the layers keep only their inputs for the backward pass, and run again in it.
        memory: how much the layers keep for the backward pass in training.
        fuse_loss: whether head and loss are one operation in training mode, so that with labels logits are None.
        compiler: compiles what the layers run; None if they run as they are.
        signature: how the graph is called; None for a graph that takes its inputs and nothing else.
        finish: changes a program, `finish(module, graph)`, after all passes; None if nothing does.
        held: the modules that `train(True)` and `train(False)` leave in the other mode, as those of the model do.
        made_from: what the graph remembers of the model that it was captured from; None for a graph from elsewhere.
        base_buffers: the base's buffers of which the graph has copies, because calls change them; by name.
        absent: the names of parameters and buffers that the model has a place for, and that were None.
        save_as_model: writes a graph without adapters as the files of the model that it was captured from; None if the
            library of the model has no such files.
        default_dtype: torch's default type when the graph was captured; None if the graph does not depend on it.
    """

    passes: Pipeline = OPTIMIZATIONS
    checkpoint_layers: bool = False
    memory: Memory = "fast"
    fuse_loss: bool = False
    compiler: LayerCompiler | None = None
    signature: CallSignature | None = None
    finish: Callable[[nn.Module, fx.Graph], None] | None = None
    held: Mapping[bool, Sequence[str]] = field(default_factory=dict)
    made_from: ModelRecord | None = None
    base_buffers: BaseBuffers = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    save_as_model: Callable[..., None] | None = None
    default_dtype: torch.dtype | None = None

    @property
    def programs(self) -> tuple[Program, Program]:
        """The program for training mode, and the one for inference."""
        return "checkpointed" if self.checkpoint_layers else "training", "inference"


@dataclass(frozen=True)
class Host:
    """The module whose tensors a graph reads and whose layers it calls, if that is not the graph's own module.

    A copy of a graph has no host.
    """

    module: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        return Host()


_ADAPT = "llfx.adapt(model, cfg) returns a model of the same class, which has it."
_ACTING = "llfx.adapters({it}) says which adapters act, and llfx.active({it}, names) lets others act."
_LISTED = "llfx.adapters({it}) and llfx.inspect({it}) list its adapters and sites."
_MERGE = "llfx.merge({it}) returns the model with its adapters folded in."
_NONE_ACTS = "`with llfx.active({it}, []):` is a scope without adapters."
_REMOVE = "llfx.remove({it}) returns the model without its adapters."
_ELSEWHERE = {
    "generate": _ADAPT,
    "config": _ADAPT,
    "save_pretrained": "llfx.save({it}, path) and llfx.save_peft({it}, folder) write its adapters;"
    " llfx.merge({it}).save_pretrained(folder) writes the model of transformers that it was captured from, with them.",
    "merge_and_unload": _MERGE,
    "merge_adapter": _MERGE,
    "unmerge_adapter": _MERGE,
    "unload": _REMOVE,
    "get_base_model": _REMOVE,
    "peft_config": "llfx.to_peft_config({it}, adapter=name) returns what adapter_config.json of an adapter holds.",
    "active_adapter": _ACTING,
    "active_adapters": _ACTING,
    "get_layer_status": _LISTED,
    "get_model_status": _LISTED,
    "disable_adapter": _NONE_ACTS,
    "disable_adapters": _NONE_ACTS,
    "disable_adapter_layers": _NONE_ACTS,
    "set_adapter": "llfx.set_adapter({it}, name) lets one adapter act and train.",
    "add_adapter": "llfx.add({it}, {{name: cfg}}) adds one.",
    "delete_adapter": "llfx.delete({it}, name) deletes one.",
    "load_adapter": "llfx.load_peft({it}, path, name=name) returns the graph with it.",
    "add_weighted_adapter": "llfx.combine({it}, {{name: weight, ...}}, name) adds a sum of adapters.",
}
"""The functions to use in place of attributes that transformers and PEFT give their models."""


def elsewhere(name: str, what: str, it: str) -> AttributeError | None:
    """Return an error that names our function for an attribute of PEFT's models; None if there is no such function.

    Args:
        name: of the attribute.
        what: lacks it, such as "A rewritten graph".
        it: what the function is called with, `graph` or `model`.
    """
    return AttributeError(f"{what} has no {name}. {_ELSEWHERE[name].format(it=it)}") if name in _ELSEWHERE else None
