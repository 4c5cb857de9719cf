"""Fold adapters into the modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.placement import site_bias, site_weight
from ..errors import AdapterError, ConfigError
from ..graph.replacing import replace_modules
from ..passes import MergedSite, merge_sites
from ..sites.finding import find_sites
from ..sites.site import Site
from ..storage.dequantized import DequantizedLinear, error_of, stand_ins


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
    """
    modules = dict(model.named_modules())
    errors: dict[str, float] = {}
    if requantise:
        vars(model)["requantised"] = errors
    if requantise and not stand_ins(model):
        raise AdapterError("merge(requantise=True): no module of the base is quantized. The way out: merge(model).")
    dense: list[str] = []
    for merged in merge_sites(gm, find_sites(gm), coefficients):
        owner, name = _place_of_weight(modules, merged)
        module, site = modules[owner], merged.site
        change_weight = site.computed_weight is None or not torch.equal(merged.weight, site_weight(gm, site))
        change_bias = merged.bias is not None and not _is_kept(gm, merged)
        if change_bias and site.bias is None and not isinstance(module, (nn.Linear, DequantizedLinear)):
            raise ConfigError(
                f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
            )
        if change_weight and isinstance(module, DequantizedLinear):
            stored = module.requantized(merged.weight) if requantise else None
            if stored is not None:
                errors[site.name] = error_of(merged.weight, stored)
            else:
                dense.append(owner)
            module = stored or _dense(module, merged.weight)
            _put(model, modules, owner, module)
        elif change_weight:
            _change_weight(model, module, owner, name, merged)
        if change_bias:
            bias_name = site.bias.rpartition(".")[2] if site.bias else "bias"
            module.register_parameter(bias_name, merged.new_bias(getattr(module, bias_name)))
    if dense:
        _tell_config(model, dense)


def _change_weight(model: Any, module: nn.Module, owner: str, name: str, merged: MergedSite) -> None:
    """Give a module, `owner` in the model, the merged weight in place of its own."""
    if merged.site.computed_weight is not None or is_parametrized(module, name):
        _drop_parametrization(module, name, merged.site)
    current = getattr(module, name)
    if sum(parameter is current for _, parameter in model.named_parameters(remove_duplicate=False)) > 1:
        model.config.tie_word_embeddings = False  # the other module keeps the frozen weight
        model.all_tied_weights_keys.pop(f"{owner}.{name}", None)
    module.register_parameter(name, merged.new_weight(current))


def _tell_config(model: Any, dense: list[str]) -> None:
    """Note in the config which modules are quantized no more, so that the model is loaded as it is saved."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    if not stand_ins(model):
        del model.config.quantization_config
        vars(model).pop("hf_quantizer", None)
        model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        return
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, name):
            others = getattr(config, name)
            setattr(config, name, [*(others or _left_dense(model)), *dense])
    if (inner := getattr(config, "quantization_config", None)) is not None:  # compressed-tensors
        inner.ignore = [*(inner.ignore or ()), *dense]


def _left_dense(model: Any) -> list[str]:
    """Return what transformers leaves dense unless it is told: the head."""
    return [name for name, module in model.named_modules() if module is model.get_output_embeddings()]


def _dense(module: DequantizedLinear, weight: Tensor) -> nn.Module:
    """Return a plain linear in place of a quantized one, with a dense weight."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def _put(model: nn.Module, modules: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name, wherever the model has that."""
    old, modules[name] = modules[name], module
    replace_modules(model, {old: module})


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


def _place_of_weight(modules: dict[str, nn.Module], merged: MergedSite) -> tuple[str, str]:
    """Return the module that has the weight of a site, and the name of the weight in it."""
    if isinstance(getattr(modules.get(merged.site.name), "weight", None), Tensor):
        return merged.site.name, "weight"  # if the weight is tied, the graph may read it from another module
    owner, _, name = merged.site.weight.rpartition(".")
    return owner, name
