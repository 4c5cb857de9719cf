"""Check on many architectures that the roles match the tables, and that `rewrite` computes the same as `wrap`."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.sites.finding import find_sites
from lora_lite_fx.sites.roles import GROUPS
from lora_lite_fx.sites.site import Site
from tests.support.architectures import DECODERS, Architecture
from tests.support.architectures_others import OTHERS
from tests.support.conformance import close, randomise, rewrite_and_wrap, unchanged
from tests.support.releases import has
from tests.support.selection import broad_after, broad_unless, slow_unless

ARCHITECTURES = DECODERS | OTHERS
CAPTURED = list(ARCHITECTURES)
FEW = ("llama", "bert")
# The others are built of nearly the same constructs, under other names.
DISTINCT = (
    *("llama", "gemma3", "gpt2", "bloom", "deepseek_v3", "gpt_oss", "lfm2", "mamba", "bert", "deberta-v2"),
    *("xlnet", "t5", "vit", "swin", "clip", "wav2vec2", "llama-classifier"),
)
NAMES = broad_unless(FEW.__contains__, slow_unless(DISTINCT.__contains__, CAPTURED))
COARSE = {"reader", "writer", "inner"}
WRITTEN_ANEW = ("gpt_neox", "mamba")


@functools.cache
def captured(name: str) -> tuple[Any, fx.GraphModule]:
    """Return the model and its graph; every model is captured once."""
    if name in WRITTEN_ANEW and not has("transformers", "5.20"):
        pytest.skip(f"{name} is the one of the table since transformers 5.20")
    model = ARCHITECTURES[name].build()
    return model, llfx.capture(model)


def sites_of(name: str) -> list[Site]:
    """Return the linear sites of an architecture, because sites of other kinds have no roles."""
    return [site for site in find_sites(captured(name)[1]) if site.kind.name == "linear"]


# Roles.


@pytest.mark.parametrize("name", broad_unless("llama".__eq__, NAMES))
def test_sites_and_roles_are_those_of_the_table(name: str) -> None:
    sites = sites_of(name)
    assert {site.name: set(site.roles) for site in sites} == ARCHITECTURES[name].table()
    assert all(site.reasons.keys() == site.roles for site in sites)


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_is_a_site_or_is_listed_with_a_reason(name: str) -> None:
    architecture = ARCHITECTURES[name]
    assert architecture.linears() - architecture.table().keys() == architecture.no_site.keys()


def score() -> str:
    """Count the sites with the roles of the tables, those of unknown role, and those with other roles."""
    right = unknown = wrong = 0
    for name in CAPTURED:
        expected: dict[str, Any] = ARCHITECTURES[name].table()
        for site in sites_of(name):
            right += site.roles == expected.get(site.name)
            unknown += site.roles <= COARSE
            wrong += not site.roles - COARSE <= expected.get(site.name, set())
    return (
        f"{len(CAPTURED)} architectures: {right} sites right ({unknown} with no role but a coarse one), {wrong} wrong"
    )


@pytest.mark.slow
def test_score_over_all_architectures() -> None:
    assert len({ARCHITECTURES[name].model for name in CAPTURED}) >= 40
    assert score().endswith(" 0 wrong")


# Rewritten graphs and eager wrappers.


@functools.cache
def inputs(name: str) -> dict[str, Tensor]:
    """Return inputs whose batch size and length differ from those of the capture."""

    architecture = ARCHITECTURES[name]

    def smaller(tensor: Tensor) -> Tensor:
        tensor = tensor if architecture.fixed_batch else tensor[:2]
        if tensor.dim() == 2 and not architecture.fixed_length:
            tensor = tensor[:, :-500] if tensor.is_floating_point() else tensor[:, :-2]
        return tensor.contiguous()

    return {key: smaller(value) for key, value in example_inputs_of(copy.deepcopy(captured(name)[0])).items()}


def target_roles(architecture: Architecture) -> tuple[str, ...]:
    """Return the roles of attention and feed-forward, or coarse roles for an architecture that has neither."""
    roles = set().union(*architecture.table().values())
    return tuple(GROUPS) if roles & set().union(*GROUPS.values()) else ("reader", "writer", "inner")


def outputs_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all outputs, and the gradients of a random functional of them, by parameter."""
    model.zero_grad()
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(dict(model(**inputs)))
    results = {f"tensor {index}": leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for result in results.values():
        if result.requires_grad:
            direction = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
            total = total + (result * direction).sum()
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: result.detach() for key, result in results.items()}, gradients


@pytest.mark.broad
@pytest.mark.parametrize("name", NAMES)
def test_rewritten_graph_equals_the_eager_wrapper(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, gm = captured(name)
    exclude = tuple(f"^{re.escape(site)}$" for site in architecture.unwrapped)
    cfg = llfx.LoRA(r=2, alpha=4.0, target_roles=target_roles(architecture), exclude_names=exclude)
    with unchanged(model):
        rewritten, wrapped = rewrite_and_wrap(gm, cfg)
        assert llfx.adapter_state_dict(rewritten).keys() == llfx.adapter_state_dict(wrapped).keys()
        randomise(rewritten, seed=0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(rewritten))
        tolerance = 1e-9 if architecture.dtype == torch.float64 else 1e-4
        for training in (True, False):
            actual, gradients = outputs_and_gradients(rewritten.train(training), inputs(name))
            expected, expected_gradients = outputs_and_gradients(wrapped.train(training), inputs(name))
            assert actual
            assert gradients
            assert actual.keys() == expected.keys()
            for key, value in actual.items():
                close(value, expected[key], tolerance, f"{key}, training={training}")
            assert gradients.keys() == expected_gradients.keys()
            for key, value in gradients.items():
                close(value, expected_gradients[key], tolerance, f"gradient of {key}, training={training}")


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, [name for name in CAPTURED if ARCHITECTURES[name].unwrapped]))
def test_wrap_refuses_sites_that_are_not_called_modules_and_rewrite_adapts_them(name: str) -> None:
    _, gm = captured(name)
    for site in ARCHITECTURES[name].unwrapped:
        cfg = llfx.LoRA(r=2, target_names=(f"^{re.escape(site)}$",))
        with pytest.raises(llfx.ConfigError, match="cannot be wrapped eagerly"):
            rewrite_and_wrap(gm, cfg)
        assert llfx.adapter_state_dict(llfx.rewrite(gm, cfg))


# Calls.


# Their graphs say so in the error of a call without it.
ANSWERS_DIFFERENTLY = {
    "bart": "without labels it takes the input as the start of the output",
    "llava": "the example has tokens that stand for an image",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_is_called_like_its_model(name: str) -> None:
    """With nothing but its main input, if the model can do with it; else the graph says why it cannot."""
    model: Any
    model, graph = captured(name)
    main = {model.main_input_name: inputs(name)[model.main_input_name]}
    training = graph.training
    with torch.no_grad():
        try:
            expected = model(**main)
        except (ValueError, AttributeError) as error:
            refused = f"cannot be left out, because the model then raises {type(error).__name__}"
        else:
            refused = "because the model then computes another" if name in ANSWERS_DIFFERENTLY else ""
        if refused:
            with pytest.raises(llfx.CallError, match=refused):
                graph(**main)
            return
        result = graph.eval()(**main)
    graph.train(training)
    assert type(result) is type(expected)
    assert result.keys() <= expected.keys()  # caches and the like are switched off
    assert "loss" not in result
    for key, value in result.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
