"""Configs and values for tests, beside what `lora_lite_fx.testing` has: the same checks that users run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import Pipeline
from lora_lite_fx.testing.comparisons import close as close
from lora_lite_fx.testing.comparisons import gradients as gradients
from lora_lite_fx.testing.comparisons import observe as observe
from lora_lite_fx.testing.comparisons import output as output
from lora_lite_fx.testing.comparisons import unchanged as unchanged
from lora_lite_fx.testing.graphs import check_export as check_export
from lora_lite_fx.testing.graphs import check_file as check_file
from lora_lite_fx.testing.graphs import check_merge as check_merge
from lora_lite_fx.testing.graphs import check_mode
from lora_lite_fx.testing.graphs import check_remove as check_remove
from tests.support.selection import is_distinct

Config = llfx.Variant | Sequence[llfx.Variant]
IN_EACH_BLOCK = "(in|gate|fc|q|qkv|mix|one|head)$"
"""Matches a site of each block in models.py, and mostly not all of them: they get another rank than the others."""


_OF_BLOCKS = ("_size", "_length")
"""Endings of the names of fields that must divide the sides of a weight."""


def for_any_linear() -> dict[str, type[llfx.Variant]]:
    """Return the registered variants that can adapt every linear of a model, by name."""
    return {name: cls for name, cls in llfx.registry().items() if cls is not llfx.TrainableTokens}


def representatives() -> dict[str, type[llfx.Variant]]:
    """Return one variant of each form, by name: conformance is checked of every variant, most else of these."""
    return {name: cls for name, cls in for_any_linear().items() if is_distinct(name)}


def innermost_first(variants: Sequence[type[llfx.Variant]]) -> list[type[llfx.Variant]]:
    """Return the variants in an order in which they can adapt one site: at most one replaces the weight, the first."""
    others = [cls for cls in variants if cls is not llfx.Full]
    return [llfx.Full, *others] if llfx.Full in variants else others


def configs(cls: type[llfx.Variant], **fixed: Any) -> st.SearchStrategy[llfx.Variant]:
    """Return random configs of a variant: rank, scale, and its own flags, choices, sizes and dropout."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "r": st.sampled_from([2, 4]),
        "alpha": st.sampled_from([1.0, 2.0, 6.0]),
        "rank_pattern": st.sampled_from([(), {".": 2}, {IN_EACH_BLOCK: 4}]),
        "dropout": st.sampled_from([0.0, 0.3]),
        "scaling": st.sampled_from([0.5, 2.0]),  # of a weight in place of its start, which is zero or small
    }
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if kinds[field.name] is bool:
            drawn[field.name] = st.booleans()
        elif get_origin(kinds[field.name]) is Literal:
            drawn[field.name] = st.sampled_from(get_args(kinds[field.name]))
        elif field.name.endswith(_OF_BLOCKS):
            drawn[field.name] = st.sampled_from([2, 4])
    if cls is llfx.Full:
        drawn["weight"] = st.just(True)  # not every model has biases
    if cls is llfx.GLoRA:
        drawn["weight_form"] = st.sampled_from(["lora", "vector", "constant"])  # for the same reason
    names = {field.name for field in dataclasses.fields(cls)}
    drawn = {name: strategy for name, strategy in drawn.items() if name in names}
    return st.builds(_built, st.just(cls), **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


def _built(cls: type[llfx.Variant], **fields: Any) -> llfx.Variant:
    """Return the config; combinations that the variant refuses, at a site too, are not drawn."""
    try:
        cfg = cls(**fields)
        cfg.for_site("blocks.0.lin")
    except llfx.ConfigError:
        reject()
    return cfg


def small(cls: type[llfx.Variant], size: int = 4, **fields: Any) -> llfx.Variant:
    """Return a config that fits small models: the rank, blocks and groups that it has are of that size.

    An `alpha` among `fields` is for the variants that have one.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    sizes: dict[str, Any] = {name: size for name in names if name == "r" or name.endswith(_OF_BLOCKS)}
    if cls is llfx.TrainableTokens:
        sizes["token_indices"] = (1, 2)
    return cls(**sizes | {name: value for name, value in fields.items() if name in names or name != "alpha"})


def randomise(model: nn.Module, seed: int) -> None:
    """Give every adapter tensor random values, frozen ones included: start values hide too much."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (0.25 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + 0.1).to(tensor.dtype)
        for name, tensor in llfx.adapter_state_dict(model).items()
        if tensor.is_floating_point()
    }
    llfx.load_adapter_state_dict(model, {**llfx.adapter_state_dict(model), **state})


def calibration(cfg: Config, example_inputs: Any, args: tuple[Any, ...]) -> Any:
    """Return calibration data, if a variant of `cfg` starts from data."""
    variants = [cfg] if isinstance(cfg, llfx.Variant) else cfg
    if any(type(variant).observer is not llfx.Variant.observer for variant in variants):
        return [args] if example_inputs is None else [example_inputs, args]
    return None


def rewrite_and_wrap(graph: fx.GraphModule, cfg: Config, data: Any = None) -> tuple[fx.GraphModule, nn.Module]:
    """Return a model adapted by `rewrite` and by `wrap`.

    `graph` is the captured model, because capturing takes most of a test's time. It refers to the model weakly, so
    the caller must hold the model.
    """
    return llfx.rewrite(graph, cfg, calibration=data), llfx.wrap(graph, cfg, calibration=data)


def check_rewrite_equals_wrap(
    model: nn.Module, gm: fx.GraphModule, wrapped: nn.Module, args: tuple[Any, ...], tolerance: float, seed: int
) -> None:
    """Check that outputs and adapter gradients, plain and optimized, are the wrapper's in both modes."""
    with unchanged(model):
        assert type(wrapped) is type(model)
        assert list(llfx.adapter_state_dict(gm)) == list(llfx.adapter_state_dict(wrapped))
        randomise(gm, seed)
        randomise(wrapped, seed)
        trainable = [p for p in gm.parameters() if p.requires_grad]
        assert {id(p) for p in llfx.adapter_parameters(gm)} == {id(p) for p in trainable}
        plain = llfx.optimize(copy.deepcopy(gm), Pipeline(()))
        for training in (True, False):
            for graph, rounding in ((plain, 0), (gm, 20)):
                _, count = check_mode(graph, wrapped, args, tolerance, training, rounding)
                assert count == len(trainable), "base gradients, or missing adapter gradients"
