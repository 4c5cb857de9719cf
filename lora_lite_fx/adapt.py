"""`adapt`: a Hugging Face model whose `forward` runs rewritten graphs.

The model is a copy of the user's, with the weights shared and the adapters' tensors registered in it. Each call
signature (which arguments are given, their types and structure) has a graph of its own, captured when it is first
used; all graphs read the tensors of the copy, so that there is one set of adapters.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .adapters import Placement, adapter_state_dict, placements
from .calibration import Batches
from .capture import Inputs, share
from .checkpoint import load, save
from .errors import AdapterError, ConfigError
from .graphs import Graphs
from .hf import is_hugging_face
from .passes import merged_tensors
from .peft import CONFIG, load_peft
from .rewrite import Config, rewrite
from .site import find_sites

_WEIGHTS = "model.safetensors"  # what a Trainer looks for in a checkpoint


def adapt(
    model: Any,
    cfg: Config | str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    calibration: Batches | None = None,
    max_graphs: int = 16,
) -> Any:
    """A copy of a Hugging Face model, of the same class and with the weights shared, that runs rewritten graphs.

    `generate`, `Trainer` and pipelines take it as they take the model. A graph is captured when a call differs from
    those before in which arguments are given or in their structure; that is logged with the reason, by the logger
    `lora_lite_fx`. The calls of a causal language model that train, prefill a dynamic cache and decode have one graph
    together.

    Args:
        model: the model, which is not changed.
        cfg: as for `rewrite`; or a path, of a file that `save` wrote, of a PEFT directory, or of a folder that
            `save_pretrained` of an adapted model or a `Trainer` wrote.
        example_inputs: as for `rewrite`: the first call to capture, which decides on the sites.
        calibration: as for `rewrite`.
        max_graphs: the most graphs to keep; the one that was not used for longest is dropped for a new one.

    Returns:
        The copy, in the model's mode. Only the adapters' parameters require grad. Its parts (`get_encoder()`, the
        model without its head) run graphs of their own; a layer that is adapted refuses to run alone.
        `save_pretrained` writes the adapters alone; `gradient_checkpointing_enable` checkpoints the layers of graphs.

    Raises:
        AdapterError: `model` is not a transformers model, or is adapted already.
        As `rewrite`, and, with a path, as `load` or `load_peft`.
    """
    if not is_hugging_face(model):
        raise AdapterError(
            f"adapt takes a model of transformers, not {type(model).__name__}; for other modules there is rewrite."
        )
    if placements(model):
        raise AdapterError(f"{type(model).__name__} is adapted already. The way out: pass several configs at once.")
    if type(max_graphs) is not int or max_graphs < 1:
        raise ConfigError(f"max_graphs must be a positive integer, got {max_graphs!r}.")
    graphs = Graphs(share(model), example_inputs, max_graphs)
    graphs.start(lambda base, batches: _insert(base, cfg, batches), calibration)
    return _adopted(graphs)


def _insert(base: fx.GraphModule, cfg: Any, calibration: Batches | None) -> fx.GraphModule:
    if not isinstance(cfg, (str, os.PathLike)):
        return rewrite(base, cfg, calibration=calibration)
    if calibration is not None:
        raise ConfigError("calibration is for adapters that start; those of a file have started.")
    path = Path(cfg)
    if (path / CONFIG).is_file():
        return load_peft(base, path)
    return load(base, path / _WEIGHTS if path.is_dir() else path)


def _adopted(graphs: Graphs) -> Any:
    """Make the modules of the copy run graphs, or refuse to run."""
    model = graphs.model
    sites = {placement.site for placement in graphs.placements}
    for name, module in model.named_modules():
        cls: Any = type(module)
        if is_hugging_face(module):
            module.__class__ = _subclass(Adapted if module is model else _Part, cls)
            module._graphs, module._path = graphs, name
        elif name in sites:
            module.__class__ = _subclass(_Alone, cls)
            module._path = name
    trained = adapter_state_dict(model)
    # What transformers leaves out of checkpoints, and does not miss in them.
    model._keys_to_ignore_on_save = [name for name in model.state_dict() if name not in trained]
    return model


@functools.cache
def _subclass(kind: Any, cls: Any) -> type:
    """A subclass of `cls`, of the same name, with the methods of `kind`."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "base": cls}
    if issubclass(kind, _Part):

        @functools.wraps(cls.forward)  # its signature is what generate and Trainer look at
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._graphs.run(self, args, kwargs)

        names["forward"] = forward
    return type(cls.__name__, (kind, cls), names)


class _Alone:
    """A module with a site, in a model that runs graphs."""

    _path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: this would run without the adapter, unnoticed."""
        raise AdapterError(
            f"{self._path!r} was called by itself: that would run it without its adapter, which is in the graphs of the"
            " model. The way out: call the model, or use wrap, where every module is adapted."
        )


class _Part:
    """A model of transformers that runs graphs: the adapted model, or a part of it."""

    _graphs: Graphs
    _path: str


class Adapted(_Part):
    """What `adapt` adds to a model."""

    @property
    def placements(self) -> list[Placement]:
        """The adapters, as `adapters.placements` asks for them."""
        return self._graphs.placements

    def adapted_graph(self) -> fx.GraphModule:
        """The graph with all sites, over the tensors of the model."""
        return self._graphs.first_graph()

    def without_adapters(self, fold: bool) -> Any:
        """The model in its own class, with the adapters folded into copies of the adapted weights, or left out."""
        plain = self._graphs.plain()
        if fold:
            _fold_into(plain, self.adapted_graph())
        return plain

    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **_: Any) -> None:
        """Write the adapters as `save` does, to `model.safetensors`, which `adapt` and a resumed `Trainer` read.

        There is no config beside it: the folder does not hold a whole model and is not for `from_pretrained`.

        Args:
            save_directory: made if it is not there.
            is_main_process: whether to write at all.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save(self, folder / _WEIGHTS)  # type: ignore[arg-type]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Let the graphs checkpoint their layers, as `rewrite(..., checkpoint_layers=True)` does.

        Args:
            gradient_checkpointing_kwargs: as for the model; `use_reentrant` may not be true.

        Raises:
            ConfigError: the reentrant kind is asked for.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError("The layers of a graph are checkpointed with use_reentrant=False; the other kind is not.")
        self._switch_checkpointing("enable", gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Let the graphs save all activations again."""
        self._switch_checkpointing("disable")

    def _switch_checkpointing(self, how: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name calls the old one if that is overridden
            getattr(super(), f"gradient_checkpointing_{how}")(*args, **kwargs)
        self._graphs.drop()

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Refuse: the graphs read the weights that there are."""
        raise AdapterError("Resize the embeddings before adapt; the graphs of an adapted model read these weights.")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._tensors()
        applied = super()._apply(fn, recurse)  # type: ignore[misc]
        if self._tensors() != before:
            self._graphs.drop()
        return applied

    def _tensors(self) -> list[Any]:
        tensors = [*self.parameters(), *self.buffers()]  # type: ignore[attr-defined]
        return [(id(tensor), tensor.dtype, tensor.device) for tensor in tensors]


def _fold_into(model: Any, gm: fx.GraphModule) -> None:
    """Give the adapted sites of a model, which is that of the graph without adapters, weights that do what these do.

    Raises:
        ConfigError: an adapter adds a bias where there is no place for one.
    """
    around: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements(gm):
        around[placement.site].append(placement)
    modules = dict(model.named_modules())
    for site in find_sites(gm):
        if site.name not in around:
            continue
        weight, bias = merged_tensors(gm, site, around[site.name])
        owner, _, name = site.weight.rpartition(".")
        if isinstance(getattr(modules.get(site.name), "weight", None), Tensor):
            owner, name = site.name, "weight"  # where it is tied, the graph reads it from another module
        module = modules[owner]
        if bias is not None and site.bias is None and not isinstance(module, nn.Linear):
            raise ConfigError(
                f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
            )
        aliases = sum(tensor is getattr(module, name) for _, tensor in model.named_parameters(remove_duplicate=False))
        if aliases > 1:
            model.config.tie_word_embeddings = False  # the other keeps the frozen weight
            model.all_tied_weights_keys.pop(f"{owner}.{name}", None)
        # Of a tensor that several sites are parts of, the other rows are as they are by now.
        stored = site.product.stored(weight, getattr(module, name).detach())
        module.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        if bias is not None:
            place = site.bias.rpartition(".")[2] if site.bias else "bias"
            if site.bias is not None:
                bias = site.stored_bias(bias, getattr(module, place).detach())
            module.register_parameter(place, nn.Parameter(bias, requires_grad=False))
