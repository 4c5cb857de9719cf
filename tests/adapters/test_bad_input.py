"""Check that bad input raises an error of the right class, which names the mistake and leaves the model unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.untouched import untouched

CFG = llfx.LoRA(r=2)
anything: Any = llfx  # takes arguments of wrong types, as a user without a type checker may pass them
X = torch.ones(2, 3, 8)
HERE = Path(__file__).name


class Net(nn.Module):
    """A feed-forward block and a head, with hooks, gradients and modes that a rewrite must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(8, 5)
        self.fc1.register_forward_hook(lambda module, args, output: None)
        self.fc2.weight.requires_grad_(False)
        self.fc1.weight.grad = torch.ones(12, 8)
        self.norm.eval()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(x + self.fc2(F.gelu(self.fc1(x)))))


class Branch(Net):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Counts(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[: int(x.argmax())].repeat(int(x.argmin()), 1, 1).numpy()


class Noisy(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class NoisyPart(Net):
    """A net with noise in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Noise()

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.part(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return x


class LayerDrop(Net):
    def forward(self, x: Tensor) -> Any:
        if self.training and random.random() < 1.1:
            return self.head(x)
        return super().forward(x)


class Jitter(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * float(torch.rand(())))


@contextmanager
def fails(model: nn.Module, error: type[Exception], *parts: str) -> Iterator[None]:
    """Expect exactly this error, with these parts in its message and notes. Check that `model` is unchanged."""
    with untouched(model), pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error, repr(caught.value)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


# Fields of configs.


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: anything.LoRA(r=0), ["LoRA", "r must be a positive integer", "0"]),
        (lambda: anything.DoRA(r=-4), ["DoRA", "r must be a positive integer", "-4"]),
        (lambda: anything.LoRA(r=2.5), ["r must be a positive integer", "2.5"]),
        (lambda: anything.LoRA(r="8"), ["r must be a positive integer", "'8'"]),
        (lambda: anything.HRA(r=3), ["HRA", "r=3 must be even"]),
        (lambda: anything.LoRA(alpha=float("nan")), ["alpha must be a finite number", "nan"]),
        (lambda: anything.PiSSA(alpha=float("inf")), ["PiSSA", "alpha must be a finite number", "inf"]),
        (lambda: anything.LoRA(alpha="16"), ["alpha must be a finite number", "'16'"]),
        (lambda: anything.LoRA(alpha=10**400), ["alpha must be a finite number"]),
        (lambda: anything.LoRA(dtype=torch.int32), ["dtype", "floating-point", "int32"]),
        (lambda: anything.LoRA(dtype="float32"), ["dtype", "'float32'"]),
        (
            lambda: anything.LoRA(target_roles="qurey"),
            ["unknown role 'qurey', did you mean 'query'?", "router", "mlp"],
        ),
        (lambda: anything.LoRA(target_roles=("mlp", "attentoin")), ["'attentoin', did you mean 'attention'?"]),
        (lambda: anything.IA3(target_roles=("zzz",)), ["IA3", "unknown role 'zzz'", "query, key, value"]),
        (
            lambda: anything.LoRA(target_names=("ok", "q_(proj")),
            ["'q_(proj' is not a regular expression", "position"],
        ),
        (lambda: anything.LoRA(exclude_names="["), ["'[' is not a regular expression"]),
        (lambda: anything.LoRA(target_names=(3,)), ["3 is not a regular expression"]),
        (lambda: anything.LoRA(layers=-1), ["layers are indices from 0", "-1"]),
        (lambda: anything.LoRA(layers=(0, "1")), ["layers are indices from 0", "'1'"]),
        (lambda: anything.DeLoRA(lambda0=0), ["DeLoRA", "lambda0=0", "every gradient zero", "15"]),
        (lambda: anything.DeLoRA(lambda0=float("nan")), ["lambda0", "nan"]),
        (lambda: anything.LoRA(dropout=1.0), ["dropout is a probability below 1", "1.0"]),
        (lambda: anything.DoRA(dropout=-0.1), ["dropout", "-0.1"]),
        (lambda: anything.LoRA(dropout=float("nan")), ["dropout", "nan"]),
        (lambda: anything.LoRA(dropout="0.1"), ["dropout", "'0.1'"]),
        (lambda: anything.DeLoRA(lambda0="15"), ["lambda0", "'15'"]),
        (lambda: anything.LoRA(exclude_names=None), ["exclude_names"]),
        (lambda: anything.LoRA(layers=1.5), ["layers", "1.5"]),
        (lambda: anything.LoRA(target_roles=1.5), ["role", "1.5"]),
    ],
)
def test_an_impossible_field_is_a_config_error(build: Callable[[], llfx.Variant], parts: list[str]) -> None:
    with fails(nn.Identity(), llfx.ConfigError, *parts):
        build()


# Arguments of rewrite.


@pytest.mark.parametrize("adapt", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize(
    ("cfg", "error", "parts"),
    [
        (llfx.MiSS(r=9), llfx.ConfigError, ["MiSS: r=9 is larger than site 'fc1' allows (12 x 8)", "r <= 8"]),
        ([llfx.IA3(), llfx.MiSS(r=9)], llfx.ConfigError, ["r=9", "fc1"]),
        ([], llfx.ConfigError, ["cfg must be a variant such as LoRA(r=8)", "an empty list"]),
        (None, llfx.ConfigError, ["cfg must be a variant", "None"]),
        (llfx.LoRA, llfx.ConfigError, ["cfg must be a variant", "LoRA"]),
        ([CFG, {"r": 8}], llfx.ConfigError, ["cfg must be a variant", "{'r': 8}"]),
        (
            llfx.LoRA(r=2, target_names="fc3"),
            llfx.SelectionError,
            ["LoRA: no site matches", "'fc3'", "fc1", "roles"],
        ),
        (
            [CFG, llfx.LoRA(r=2, layers=0)],
            llfx.SelectionError,
            ["no site matches layers=(0,)", "3 sites", "head"],
        ),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    adapt: Callable[..., Any], cfg: Any, error: type[Exception], parts: list[str]
) -> None:
    model = Net()
    with fails(model, error, *parts):
        adapt(model, cfg)


def test_a_model_without_linears_is_a_selection_error() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
    with fails(model, llfx.SelectionError, "the model has no linear site"):
        llfx.rewrite(model, CFG)


def test_calibration_that_nothing_uses_is_refused() -> None:
    model = Net()
    with fails(model, llfx.ConfigError, "calibration was given", "LoRA, IA3 does not start from data"):
        llfx.rewrite(model, [CFG, llfx.IA3()], calibration=[(X,)])


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ((X, X), ["example_inputs do not fit Net.forward(x", "too many positional arguments"]),
        ((), ["Net.forward(x", "missing a required argument: 'x'"]),
        ({"x": X, "y": X}, ["Net.forward(x", "unexpected keyword argument 'y'"]),
        (X, ["tuple", "dict", "not Tensor", "example_inputs=(x,)"]),
        ([X], ["tuple", "dict", "not list"]),
        (
            (torch.ones(2, 3, 7),),
            ["Net itself raises for the example inputs", "self.fc1(x)", "cannot be multiplied (6x7 and 8x12)"],
        ),
        (("x",), ["Net itself raises for the example inputs", "must be Tensor, not str"]),
    ],
    ids=["count", "none", "keyword", "tensor", "list", "size", "type"],
)
def test_example_inputs_that_do_not_fit_are_refused(inputs: Any, parts: list[str]) -> None:
    model = Net()
    with fails(model, llfx.CaptureError, *parts):
        llfx.rewrite(model, CFG, inputs)


def test_a_model_that_is_not_a_module_is_refused() -> None:
    with fails(nn.Identity(), llfx.CaptureError, "torch.nn.Module or an ExportedProgram", "Tensor"):
        anything.rewrite(X, CFG)


# Models that cannot be captured.


@pytest.mark.parametrize("adapt", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize(
    ("model_class", "inputs", "parts"),
    [
        (
            Branch,
            None,
            ["symbolic tracing", "`if x.sum() > 0:`", f"{HERE}:", "pass example_inputs"],
        ),
        (Counts, None, ["symbolic tracing", "int(x.argmax())", "pass example_inputs"]),
        (Counts, (X,), ["torch.export", "int(x.argm", "The way out"]),
        (
            Noisy,
            None,
            ["other operations in training", f"{HERE}", "if self.training else x", "The way out: pass example_inputs"],
        ),
        (NoisyPart, None, [f"{HERE}", "x = x + torch.randn_like(x)", "The way out: pass example_inputs"]),
        (Jitter, None, ["draws numbers of torch in its forward", "torch.rand_like(x)", "pass example_inputs"]),
        (LayerDrop, None, ["draws numbers of random in its forward", "layerdrop", "self.training"]),
        (LayerDrop, (X,), ["draws numbers of random in its forward", "layerdrop", "self.training"]),
    ],
)
def test_an_uncapturable_model_is_refused_with_the_construct_and_the_way_out(
    adapt: Callable[..., Any], model_class: type[Net], inputs: Any, parts: list[str]
) -> None:
    model = model_class()
    with fails(model, llfx.CaptureError, *parts):
        adapt(model, CFG, inputs)


@pytest.mark.parametrize(
    ("model_class", "switch"),
    [(transformers.OPTForCausalLM, "layerdrop"), (transformers.BartForConditionalGeneration, "decoder_layerdrop")],
)
def test_layer_drop_in_a_hugging_face_config_is_refused(model_class: Any, switch: str) -> None:
    sizes = {"vocab_size": 29, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = model_class(model_class.config_class(**sizes, **sides, **{switch: 0.25}))
    with fails(model, llfx.CaptureError, "whole layers at random", f"({switch}=0.25)", f"model.config.{switch} = 0"):
        llfx.rewrite(model, CFG)


# Models without adapters.


@pytest.mark.parametrize("model", [Net(), fx.symbolic_trace(Net())], ids=["module", "graph"])
@pytest.mark.parametrize(
    "use",
    [
        llfx.merge,
        llfx.remove,
        lambda model: llfx.save(model, "never-written.safetensors"),
        llfx.adapter_parameters,
        llfx.adapter_state_dict,
        lambda model: llfx.load_adapter_state_dict(model, {}),
    ],
    ids=["merge", "remove", "save", "adapter_parameters", "adapter_state_dict", "load_adapter_state_dict"],
)
def test_a_model_without_adapters_is_refused(use: Callable[..., Any], model: nn.Module) -> None:
    with fails(model, llfx.AdapterError, "has no adapters", type(model).__name__):
        use(model)
    assert not Path("never-written.safetensors").exists()


@pytest.mark.parametrize("use", [llfx.merge, llfx.remove])
def test_adapters_of_an_eager_wrapper_cannot_be_merged_or_removed(use: Callable[..., Any]) -> None:
    wrapped = llfx.wrap(Net(), CFG)
    with fails(wrapped, llfx.AdapterError, "no adapters in its graph"):
        use(wrapped)
