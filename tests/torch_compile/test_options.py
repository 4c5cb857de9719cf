"""Settings of the inner backend: they reach it, or they are an error that names what is wrong and the nearest right."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.torch_compile.backend import NAME, backend
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.torch_compile.test_backend import _fresh  # noqa: F401

CFG = llfx.LoRA(r=2, target_names=(".",))
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
anything: Any = backend


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).eval()


def adapted() -> nn.Module:
    return backend(CFG).adapt(model(), X)


class Recorded:
    """Stands in for Inductor: it records the options that it is given, and runs the graph."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __call__(self, gm: Any, inputs: Any, *, config_patches: Any = None, **_: Any) -> Any:
        self.options.append(dict(config_patches or {}))
        return gm.forward


BESIDE: dict[str, Any] = {
    "backend": lambda **settings: {"backend": backend(**settings)},
    "torch.compile": lambda **settings: {"backend": backend(), **settings},
}


@pytest.mark.parametrize("given_to", broad_after(1, BESIDE))
@pytest.mark.parametrize(
    ("settings", "expected"),
    broad_after(
        2,
        [
            ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
            ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
            (
                {"options": {"max_autotune": True, "epilogue-fusion": False}},
                {"max_autotune": True, "epilogue_fusion": False},
            ),
            ({"mode": "default"}, {}),
            ({"options": {}}, {}),
        ],
        several=True,
    ),
    ids=str,
)
def test_mode_and_options_reach_inductor(given_to: str, settings: Any, expected: Any) -> None:
    arguments = BESIDE[given_to](**settings)
    recorded = Recorded()
    with mock.patch("torch._inductor.compile_fx.compile_fx", recorded):
        y = torch.compile(adapted(), **arguments)(X)
    assert recorded.options == [expected]
    torch.manual_seed(0)
    close(y, model()(X), 1e-6, "at the start")


def test_a_model_compiled_with_options_is_adapted() -> None:
    plain, adapting = model(), backend(CFG)
    carrier = adapting.adapt(plain, X)
    fast = torch.compile(carrier, backend=adapting, options={"epilogue_fusion": False})
    randomise(carrier, 1)
    wrapped = llfx.wrap(plain, CFG)
    randomise(wrapped, 1)
    close(fast(X), wrapped(X), 1e-5, "compiled")


def test_another_backend_gets_the_settings_that_it_takes() -> None:
    given: list[Any] = []

    def inner(gm: Any, inputs: Any, options: Any = None) -> Any:
        given.append(options)
        return gm.forward

    torch.compile(adapted(), backend=backend(inner=inner, options={"level": 3}))(X)
    assert given == [{"level": 3}]


def without_settings(gm: Any, inputs: Any) -> Any:
    return gm.forward


MODES = "default, lite, reduce-overhead, max-autotune-no-cudagraphs, max-autotune"
MISTAKES: dict[str, tuple[Any, str]] = {
    "name": (
        lambda: backend(CFG, inner="inducter"),
        "inner='inducter' is not a backend of torch.compile. The nearest: inductor.",
    ),
    "number": (
        lambda: anything(CFG, inner=3),
        "inner is the backend that compiles the rewritten graphs: a function or a name such as 'inductor', not 3.",
    ),
    "own name": (
        lambda: backend(CFG, inner=NAME),
        "inner compiles graphs that have their adapters, and 'lora_lite_fx' inserts them: leave it out.",
    ),
    "own": (
        lambda: backend(CFG, inner=backend()),
        "inner compiles graphs that have their adapters, and 'lora_lite_fx' inserts them: leave it out.",
    ),
    "mode": (
        lambda: backend(CFG, mode="fast"),
        f"mode='fast' is not a mode of torch.compile. The modes are {MODES}.",
    ),
    "option": (
        lambda: backend(CFG, options={"max_autotun": True}),
        "options: 'max_autotun' is not an option of Inductor. The nearest: max_autotune, max_autotune_gemm,"
        " max_autotune_pointwise.",
    ),
    "type of an option": (
        lambda: backend(CFG, options={"max_autotune": 3}),
        "options: Unexpected type of attr max_autotune, got int should be bool.",
    ),
    "list of options": (
        lambda: anything(CFG, options=["max_autotune"]),
        "options must be a dict of options of Inductor, not ['max_autotune'].",
    ),
    "both": (
        lambda: backend(CFG, mode="max-autotune", options={"max_autotune": True}),
        "mode is a set of options: give a mode or options, and not both.",
    ),
    "not taken": (
        lambda: backend(CFG, inner=without_settings, mode="reduce-overhead"),
        "The backend inner=without_settings does not take mode: got an unexpected keyword argument 'mode'.",
    ),
    "bad mode beside": (
        lambda: torch.compile(adapted(), backend=backend(), mode="fast")(X),
        f"mode='fast' is not a mode of torch.compile. The modes are {MODES}.",
    ),
    "twice": (
        lambda: torch.compile(adapted(), backend=backend(mode="max-autotune"), mode="reduce-overhead")(X),
        "torch.compile and backend(...) were both given a mode or options. The way out: give them to one.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_setting_is_an_error_when_it_is_given(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(llfx.ConfigError) as caught:
        call()
    assert str(caught.value) == message


def test_the_default_backend_is_not_looked_up_before_it_is_used() -> None:
    with mock.patch("torch._dynamo.list_backends", side_effect=AssertionError):
        backend(CFG)
