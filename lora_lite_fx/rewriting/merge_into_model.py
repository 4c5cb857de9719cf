"""Fold adapters into the modules of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.placement import site_bias, site_weight
from ..errors import AdapterError, ConfigError
from ..graph.replacing import replace_modules
from ..graph.tensors import is_quantized, register_tensor, tensor_of
from ..passes import MergedSite, merge_sites
from ..sites.finding import find_sites
from ..sites.site import Site
from ..storage.dequantized import DequantizedLinear, StandIn, error_of, stand_ins


def fold_into(
    model: Any, gm: fx.GraphModule, coefficients: Mapping[str, float] | None, requantise: bool = False
) -> None:
    """Give the modules of `model` the weights and biases that compute what the adapters of `gm` do.

    A module reads its parameters by its own names. A tied weight is therefore untied here, where `MergeAdapters` asks
    who reads it in the graph.

    Args:
        model: the Hugging Face model of the graph, without adapters. It is changed.
        gm: the graph with adapters.
        coefficients: as for `merge_sites`.
        requantise: quantize the weights of quantized modules again, as `merge` does.

    Raises:
        AdapterError: the weights are to be quantized again, and no module is quantized.
        ConfigError: an adapter adds a bias to a module that has no place for one, or changes a weight or bias that the
            model computes.

    Warns:
        UserWarning: an adapter adds a bias to a module that has none, which is lost in the files of the model.
    """
    if requantise and not stand_ins(model):
        raise AdapterError("merge(requantise=True): no module of the base is quantized. The way out: merge(model).")
    modules = ModelWeights(model, requantise)
    if requantise:
        vars(model)["requantised"] = modules.errors
    for merged in merge_sites(gm, find_sites(gm), coefficients):
        site = merged.site
        change_bias = merged.bias is not None and not _is_kept(gm, merged)
        if site.computed_weight is None or not torch.equal(merged.weight, site_weight(gm, site)):
            modules.put_weight(merged)
        if change_bias:
            modules.put_bias(merged)
    if modules.new_biases:
        warnings.warn(
            f"The merged {type(model).__name__} has biases that its class has not, at {modules.new_biases[0]} for one:"
            " it computes with them, but from_pretrained of what save_pretrained writes leaves them out.",
            stacklevel=6,
        )
    modules.finish()


class ModelWeights:
    """The modules of a model by name, some of which get other weights.

    Args:
        model: the model, a copy that has stand-ins for its quantized modules. It is changed.
        requantise: quantize the weights of quantized modules again; else they become dense.

    Attributes:
        errors: how far the weights that are quantized again are from the exact ones, by site.
        new_biases: the names of the modules that had no bias and have one now.
    """

    def __init__(self, model: Any, requantise: bool = False) -> None:
        self.errors: dict[str, float] = {}
        self.new_biases: list[str] = []
        self._model, self._requantise = model, requantise
        self._modules = dict(model.named_modules())
        self._dense: list[str] = []
        self._has_untied = False

    def module_of(self, site: Site) -> tuple[nn.Module, str, str]:
        """Return the module that has the weight of a site, its name, and the name of the weight in it.

        Raises:
            AdapterError: the model has no such module.
        """
        if isinstance(getattr(self._modules.get(site.name), "weight", None), Tensor):
            owner, name = site.name, "weight"  # if the weight is tied, the graph may read it from another module
        else:
            owner, _, leaf = site.weight.rpartition(".")
            name = own_name(leaf)
        if owner not in self._modules:
            raise AdapterError(f"{type(self._model).__name__} has no module {owner!r}, which has the weight of a site.")
        return self._modules[owner], owner, name

    def put_weight(self, merged: MergedSite) -> None:
        """Give a module the merged weight in place of its own."""
        module, owner, name = self.module_of(merged.site)
        if not isinstance(module, DequantizedLinear):
            self._change_weight(module, name, merged)
            return
        if self._requantise:
            stored = module.requantized(merged.weight)
            self.errors[merged.site.name] = error_of(merged.weight, stored)
            self._put(owner, stored)
        else:
            self._dense.append(owner)
            self._put(owner, _dense(module, merged.weight))

    def put_bias(self, merged: MergedSite) -> None:
        """Give a module the merged bias in place of its own, or of none.

        Raises:
            ConfigError: it has no place for one.
        """
        site = merged.site
        module, owner, _ = self.module_of(site)
        name = own_name(site.bias.rpartition(".")[2]) if site.bias else "bias"
        current = getattr(module, name, None)
        if current is None:
            if not isinstance(module, (nn.Linear, DequantizedLinear)):
                raise ConfigError(
                    f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
                )
            self.new_biases.append(owner)
        else:
            self._note_ties(current)
        module.register_parameter(name, merged.new_bias(current))

    def _change_weight(self, module: nn.Module, name: str, merged: MergedSite) -> None:
        if merged.site.computed_weight is not None or is_parametrized(module, name):
            _drop_parametrization(module, name, merged.site)
        current = getattr(module, name)
        self._note_ties(current)
        module.register_parameter(name, merged.new_weight(current))

    def _note_ties(self, tensor: Tensor) -> None:
        """Note that another module keeps the frozen tensor, if it is tied."""
        parameters = self._model.named_parameters(remove_duplicate=False)
        self._has_untied |= sum(parameter is tensor for _, parameter in parameters) > 1

    def _put(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one that has this name, wherever the model has that."""
        old, self._modules[name] = self._modules[name], module
        replace_modules(self._model, {old: module})

    def finish(self) -> None:
        """Note in the config what is tied or quantized no more, so that the model is loaded as it is saved."""
        if self._has_untied:
            _end_ties(self._model)
        tell_config(self._model, self._dense)


def own_name(name: str) -> str:
    """Return the name that a module has for a tensor: a graph may call a merged one `merged_weight`."""
    return name.removeprefix("merged_")


def _end_ties(model: Any) -> None:
    """Let the files of a model have each tensor, because one of those that it ties has another value now.

    A config ties all that a class ties, or nothing. So the other pairs become equal tensors: of tied ones a file has
    one, and a model that ties nothing would miss the other.
    """
    if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
        model.config.tie_word_embeddings = False
    pairs = getattr(model, "all_tied_weights_keys", {})
    for tied, source in pairs.items():
        value = tensor_of(model, tied)
        if value.data_ptr() == tensor_of(model, source).data_ptr():
            register_tensor(model, tied, nn.Parameter(value.detach().clone(), requires_grad=False))
    pairs.clear()


def tell_config(model: Any, dense: Sequence[str] = ()) -> None:
    """Note in the config what is quantized no more.

    Args:
        model: a copy that has stand-ins for its quantized modules.
        dense: the names of the modules that were quantized and have dense weights now.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    if not _holds_quantized(model):
        # transformers calls a model quantized that it has read from a GGUF file, and refuses to save it.
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)
        else:
            del model.config.quantization_config
        model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        return
    if not dense:
        return
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, name):
            others = getattr(config, name)
            setattr(config, name, [*(others or _left_dense(model)), *dense])
    if (inner := getattr(config, "quantization_config", None)) is not None:  # compressed-tensors
        inner.ignore = [*(inner.ignore or ()), *dense]


def _holds_quantized(model: nn.Module) -> bool:
    """Return whether a copy with stand-ins has a weight that is not stored as plain numbers."""
    return any(isinstance(module, StandIn) for module in model.modules()) or any(
        type(parameter) is not nn.Parameter or is_quantized(parameter) for parameter in model.parameters()
    )


def _left_dense(model: Any) -> list[str]:
    """Return what transformers leaves dense unless it is told: the head."""
    return [name for name, module in model.named_modules() if module is model.get_output_embeddings()]


def _dense(module: DequantizedLinear, weight: Tensor) -> nn.Module:
    """Return a plain linear in place of a quantized one, with a dense weight."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def _is_kept(gm: fx.GraphModule, merged: MergedSite) -> bool:
    """Return whether a site keeps the bias that the model computes, because the adapters do not change it.

    Raises:
        ConfigError: they change it.
    """
    bias = site_bias(gm, merged.site) if merged.site.computed_bias is not None else None
    if bias is None or merged.bias is None:
        return False
    if not torch.equal(merged.bias, bias):
        raise _computes("bias", merged.site)
    return True


def _drop_parametrization(module: nn.Module, name: str, site: Site) -> None:
    """Give `module` an ordinary parameter in place of the parametrization that computes it.

    Raises:
        ConfigError: the tensor is computed in another way.
    """
    if not is_parametrized(module, name) or len(list(module.parametrizations.children())) > 1:  # type: ignore[union-attr]
        raise _computes("weight", site)
    value = getattr(module, name)
    # Not remove_parametrizations, because it deletes the property from the class, which the user's model has too.
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _computes(tensor: str, site: Site) -> ConfigError:
    """Return the error for adapters that change a tensor which the model's code computes and would not read again."""
    return ConfigError(
        f"The model computes the {tensor} of {site.name}, and its adapters change it, so that they cannot be folded"
        " into the model. The way out: llfx.merge of a rewritten graph."
    )
