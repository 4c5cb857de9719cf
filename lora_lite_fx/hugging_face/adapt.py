"""`adapt`: a Hugging Face model whose `forward` runs rewritten graphs.

The model is a copy of the user's, with the weights shared and the adapters' tensors registered in it. Each call
signature (which arguments are given, their types and structure) has a graph of its own, captured when it is first
used; all graphs read the tensors of the copy, so that there is one set of adapters.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import fx

from ..adapters.named_configs import Config, as_adapters
from ..adapters.placement import placements
from ..adapters.state import adapter_values
from ..adapters.switches import HasSwitches, Switches
from ..capture.capture_model import Inputs
from ..capture.origins.hooks import refuse_offloading
from ..capture.origins.origin import is_diffusers, is_hugging_face
from ..capture.origins.wrong_arguments import check_inputs, check_model, graph_hint
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError, CheckpointError, ConfigError, shown
from ..execution.layer_modules import plain_class
from ..execution.optimize import execution_of
from ..formats.any_file import load_any
from ..formats.peft.directory import CONFIG
from ..formats.untrusted_files import read_json
from ..graph.calls_and_traces import collection_put_off
from ..graph.modes import modes_of, set_modes
from ..graph.tensors import outside_inference_mode
from ..rewriting.choose_sites import Batches, check_calibration, check_gradients, choose_sites
from ..rewriting.rewrite import insert_new
from .adapted_model import Adapted
from .adapted_parts import subclass
from .diffusers_models import AdaptedDiffuser, require_example
from .graph_cache import GraphCache
from .own_forward import forget_replaced_forward, warn_of_replaced_forward
from .shared_adapters import model_to_adapt, share_adapters


@outside_inference_mode()
@collection_put_off()
def adapt(
    model: Any,
    cfg: Config | str | os.PathLike[str] | None = None,
    example_inputs: Inputs | None = None,
    *,
    calibration: Batches | None = None,
    max_graphs: int = 16,
    fuse_loss: bool | None = None,
    verify: bool = True,
) -> Any:
    """Return a copy of a Hugging Face model, of the same class and over the same weights, that runs rewritten graphs.

    The model is one of transformers, or one of diffusers: the UNet or transformer of a pipeline. `generate`, `Trainer`
    and pipelines take the copy as they take the model. A graph is captured when a call differs from
    those before in which arguments are given or in their structure; that is logged with the reason, by the logger
    `lora_lite_fx`. The calls of a causal language model that train, prefill a dynamic cache and decode have one graph
    together.

    Args:
        model: the model, which is not changed. Or a rewritten graph of one, without `cfg`: the result runs the adapters
            of the graph, the same parameters, so that a step of training one of them trains both.
        cfg: as for `rewrite`; or a path, of a file that `save` wrote, of a PEFT directory, of a folder that
            `save_pretrained` of an adapted model or a `Trainer` wrote, or of diffusers' file
            `pytorch_lora_weights.safetensors` or its folder.
        example_inputs: as for `rewrite`: the first call to capture, which decides on the sites. A model of diffusers
            needs them.
        calibration: as for `rewrite`.
        max_graphs: the most graphs to keep, of the model and of each part that is called by itself; the one that was
            not used for longest is dropped for a new one.
        fuse_loss: as for `rewrite`. None follows `model`, if that is a graph.
        verify: compare each graph with the model when it is captured, as `capture` does. With False nobody notices a
            model that asks the process how it is called, as whether autocast is on.

    Returns:
        The copy, each module in the mode of the model's, or of the graph's. Only the adapters' parameters require grad.
        A training call returns caches in the dtype of the weights, also under autocast, because one graph serves both.
        Its parts (`get_encoder()`, the model without its head) run graphs of their own, and so do modules with an
        adapter, as a layer calls them that is called by itself. A module that is replaced, or a number of one that is
        set (`dropout.p = 0`), acts in the next call, for which a graph is captured again; calls that torch.compile has
        compiled before see it in configs alone. `save_pretrained` writes the adapters alone;
        `gradient_checkpointing_enable` checkpoints the layers of graphs. `is_quantized`, `is_loaded_in_4bit` and
        `is_loaded_in_8bit` are False also over a quantized base: a Trainer would refuse the model, which is of no class
        of PEFT, and TRL would cast its adapters to bfloat16.

    Raises:
        AdapterError: `model` is not one of transformers or diffusers, or is adapted already; or it is a graph without
            adapters, or one that does not remember its model or lacks weights of it.
        CaptureError: a model of diffusers is given without example inputs.
        ConfigError, SelectionError: as `rewrite`.
        CheckpointError: as `load` or `load_peft`, with a path.

    Warns:
        UserWarning: `forward` of the model is replaced on the instance. The adapted model runs that of the class.
    """
    graph = None
    if isinstance(model, fx.GraphModule) and cfg is None:
        graph, model = model, model_to_adapt(model)
    else:
        adapters = _path_or_adapters(cfg, model)
    _check_model(model, example_inputs)
    check_calibration(calibration)
    if type(max_graphs) is not int or max_graphs < 1:
        raise ConfigError(f"max_graphs must be a positive integer, got {max_graphs!r}.")
    copied = shared_copy(model) if graph is None else model  # which is made for this already
    warn_of_replaced_forward(model, forget_replaced_forward(copied))
    if fuse_loss is None:
        fuse_loss = graph is not None and execution_of(graph).fuse_loss
    graphs = GraphCache(copied, example_inputs, max_graphs, verify, fuse_loss)
    if graph is None:
        graphs.start(lambda base, batches: _insert(base, adapters, batches), calibration)
        return _adopted(graphs)
    graphs.start(lambda base, _: share_adapters(graph, base), None)
    graphs.adapters.switches = graph.switches if isinstance(graph, HasSwitches) else Switches()
    adopted = _adopted(graphs)
    set_modes(adopted, modes_of(graph))
    return adopted


def _path_or_adapters(cfg: Any, model: Any) -> Any:
    if not isinstance(cfg, (str, os.PathLike)):
        return as_adapters(cfg, model)  # None is an error there
    if not os.path.exists(cfg):
        raise CheckpointError(
            f"There is no file {os.fspath(cfg)!r} to load adapters from. For new ones pass a config: LoRA(r=8)."
        )
    return cfg


def _check_model(model: Any, example_inputs: Any) -> None:
    if not isinstance(model, fx.GraphModule):
        check_model(model)
    if is_diffusers(model):
        require_example(model, example_inputs)
    elif not is_hugging_face(model):
        raise AdapterError(
            f"adapt takes a model of transformers or diffusers, not {shown(model)}; for other modules there is rewrite."
            f"{graph_hint(model)}"
        )
    if example_inputs is not None:
        check_inputs(example_inputs)
    if placements(model):
        raise AdapterError(
            f"{type(model).__name__} is adapted already. The way out: llfx.add(model, {{'name': cfg}}) gives it a"
            " further adapter; or pass several configs at once."
        )
    check_gradients(model)
    refuse_offloading(model)


def _insert(base: fx.GraphModule, adapters: Any, calibration: Batches | None) -> fx.GraphModule:
    if not isinstance(adapters, (str, os.PathLike)):
        insert_new(base, choose_sites(base, adapters, calibration), stacklevel=6)
        return base
    if calibration is not None:
        raise ConfigError("calibration is for adapters that start; those of a file have started.")
    return load_any(base, adapters)


def _adopted(graphs: GraphCache) -> Any:
    """Make the models in the copy run graphs, its layers parts of them, and its adapted modules graphs of their own."""
    model = graphs.model
    cls: Any = type(model)
    kind = LoadableModel if is_hugging_face(model) else LoadableDiffuser
    model.__class__ = subclass(kind, cls)
    model._graphs, model._path = graphs, ""
    model.let_parts_run()
    graphs.follow_model()
    trained = adapter_values(model)
    if kind is LoadableModel:
        from ..compat.transformers import KEYS_TO_IGNORE_ON_SAVE

        # Tell transformers to leave the frozen weights out of checkpoints, and not to miss them there.
        setattr(model, KEYS_TO_IGNORE_ON_SAVE, [name for name in model.state_dict() if name not in trained])
    graphs.bind()
    return model


class LoadableModel(Adapted):
    """The adapted model, whose class reads what `save_pretrained` writes."""

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load the base that a directory of adapters names, and adapt it with them.

        Args:
            directory: as `save_pretrained` or PEFT writes it.
            args, kwargs: for `from_pretrained` of the base.

        Raises:
            CheckpointError: there are no adapters in it, or it does not name its base.
        """
        base: Any = plain_class(cls)
        way_out = f"The way out: adapt({base.__name__}.from_pretrained(base), {os.fspath(directory)!r})."
        config = Path(directory) / CONFIG
        if not config.is_file():
            raise CheckpointError(
                f"from_pretrained of an adapted class reads a directory of adapters, and {config} does not exist."
                f" {way_out} For a model without adapters there is {base.__name__}.from_pretrained."
            )
        document = read_json(config)
        name = document.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{config} does not name its base, which was not loaded from anywhere. {way_out}")
        return adapt(base.from_pretrained(name, *args, **{"revision": document.get("revision"), **kwargs}), directory)


class LoadableDiffuser(AdaptedDiffuser, LoadableModel):
    """An adapted model of diffusers, whose class reads what `save_pretrained` writes."""
