"""Training: from its start every variant gets going, and nothing but its parameters moves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from tests.support.conformance import calibration, for_any_linear
from tests.support.selection import broad_unless, is_typical, slow_unless
from tests.variants.test_low_rank import grad_of

D_IN, INNER, D_OUT = 8, 12, 4
SMALL: dict[str, Any] = {"r": 4, "alpha": 4.0, "block_size": 4, "group_size": 4, "mini_r": 2, "n_frequency": 20} | {
    "vector_length": 4,
    "num_vectors": 6,
}
# What no flag or choice shows: forms that take other tensors.
FORMS: dict[str, list[dict[str, Any]]] = {
    "BOFT": [{"block_size": 2, "butterfly_factors": 2}],
    "GraLoRA": [{"hybrid_r": 2}],
    "IA3": [{"feedforward_names": (".",)}],
    "LoKr": [{"r": 1, "decompose_both": True}, {"r": 1}],
}
# Tensors whose gradient is zero at the start, and why.
ZERO = {
    "LoRA": {"lora_A": "B = 0"},
    "DoRA": {"lora_A": "B = 0"},
    "EVA": {"lora_A": "B = 0"},
    "HiRA": {"lora_A": "B = 0"},
    "GraLoRA": {"lora_A": "B = 0", "lora_hybrid_A": "hybrid B = 0"},
    "DeLoRA": {"lora_A": "B = 0", "lora_lambda": "it scales B A, and B = 0"},
    "LoHa": {"lora_A1": "A2 = 0", "lora_B1": "A2 = 0", "lora_B2": "A2 = 0"},
    "LoKr": {
        "lora_W2": "W1 = 0 or B1 = 0",
        "lora_A2": "W1 = 0 or B1 = 0",
        "lora_B2": "W1 = 0 or B1 = 0",
        "lora_A1": "B1 = 0",
    },
    "GLoRA": {f"lora_{name}u": f"lora_{name}d = 0" for name in "ABC"},
    "AntiPaSTODPLR": {"lora_A": "B = 0"},
    "VeRA": {"lora_ld": "lb = 0"},
    "AdaLoRA": {"lora_A": "E = 0", "lora_B": "E = 0"},
    "RandLoRA": {"lora_gamma": "lambda = 0"},
}


def configs(cls: type[llfx.Variant]) -> Iterator[llfx.Variant]:
    """The variant with each of its flags and choices."""
    kinds = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    plain = cls(**{name: value for name, value in SMALL.items() if name in names}, target_names=(".",))
    yield plain
    for name in sorted(names):
        choices = (True, False) if kinds[name] is bool else get_args(kinds[name])
        if kinds[name] is bool or get_origin(kinds[name]) is Literal:
            yield from (
                dataclasses.replace(plain, **{name: value}) for value in choices if value != getattr(plain, name)
            )
    for fields in FORMS.get(cls.__name__, ()):
        yield dataclasses.replace(plain, **fields)


CONFIGS = [cfg for cls in for_any_linear().values() for cfg in configs(cls)]
EVERYDAY = {next(configs(cls)) for cls in for_any_linear().values()}


def named(cfg: llfx.Variant) -> str:
    plain = type(cfg)()
    own = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    said = [f"{k}={v}" for k, v in own.items() if v != getattr(plain, k) and k not in ("alpha", "target_names")]
    return " ".join([type(cfg).__name__, *said])


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return llfx.capture(nn.Sequential(nn.Linear(D_IN, INNER), nn.Tanh(), nn.Linear(INNER, D_OUT)))


X, Y = (torch.randn(40, width, generator=torch.Generator().manual_seed(width)) for width in (D_IN, D_OUT))


@pytest.fixture(
    scope="module",
    params=broad_unless(
        lambda cfg: is_typical(type(cfg)) and cfg in EVERYDAY,
        slow_unless(EVERYDAY.__contains__, CONFIGS),
    ),
    ids=named,
)
def adapted(request: pytest.FixtureRequest, graph: fx.GraphModule) -> tuple[llfx.Variant, fx.GraphModule]:
    """Each config, and the model with it at its start."""
    torch.manual_seed(2)
    return request.param, llfx.rewrite(graph, request.param, calibration=calibration(request.param, None, (X,)))


class Run:
    """A copy of an adapted model, trained on one batch."""

    def __init__(self, model: fx.GraphModule, optimizer: Any) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = optimizer(
            llfx.adapter_parameters(self.model), lr=0.2 if optimizer is torch.optim.SGD else 0.02
        )
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self) -> set[str]:
        """One step of training; returns the parameters whose gradient was zero."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return {name for name, parameter in self.trained.items() if not grad_of(parameter).any()}

    def loss(self) -> Tensor:
        loss: Tensor = (self.model(X) - Y).square().mean()
        return loss

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize(
    "optimizer",
    slow_unless(lambda cls: cls is torch.optim.SGD, [torch.optim.SGD, torch.optim.Adam]),
    ids=["SGD", "Adam"],
)
def test_every_parameter_is_trained_from_the_start_or_from_the_second_step(
    adapted: tuple[llfx.Variant, fx.GraphModule], optimizer: Any
) -> None:
    cfg, model = adapted
    run = Run(model, optimizer)
    start = run.state()
    waiting = {name for name in run.trained if name.rpartition(".")[2] in ZERO.get(type(cfg).__name__, {})}
    assert run.step() == waiting
    assert run.step() == set()
    moved = {name for name, tensor in run.state().items() if not torch.equal(tensor, start[name])}
    assert moved == run.trained.keys()


@pytest.mark.broad
def test_training_lowers_the_loss(adapted: tuple[llfx.Variant, fx.GraphModule]) -> None:
    run = Run(adapted[1], torch.optim.Adam)
    before = run.loss()
    for _ in range(20):
        run.step()
    assert run.loss() < before
    assert all(torch.isfinite(tensor).all() for tensor in run.state().values())


def test_every_reason_is_that_of_a_tensor_of_some_config(graph: fx.GraphModule) -> None:
    sites = find_sites(graph)
    trained = {
        (type(cfg).__name__, name)
        for cfg in CONFIGS
        for site in sites
        for name, spec in cfg.finalize(sites, {}).params(site).items()
        if spec.trainable
    }
    assert {(variant, name) for variant, reasons in ZERO.items() for name in reasons} <= trained
