"""Adapters on a quantized base compute what they compute on the dense weights that the base stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.share import share
from lora_lite_fx.storage.dequantized import DequantizedLinear
from lora_lite_fx.testing.compare import close
from tests.support.quantized import STORAGES, bnb, dequantized, effective_weight, held, quantized, storages, torchao
from tests.support.selection import slow_unless


class Net(nn.Module):
    """Two equal layers, whose linears read one input, and one that has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(32, 64) for _ in range(2)) for _ in range(2))
        self.out = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            gate, up = cast(nn.ModuleList, layer)
            x = x + self.out(torch.tanh(gate(x)) * up(x))
        return x


X = (torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),)
CFG = llfx.LoRA(r=4, target_names=(".",))

DYNAMIC = ("Int8DynamicActivationIntxWeightConfig", "Int8DynamicActivationInt8WeightConfig")
PATHS: dict[str, Callable[..., nn.Module]] = {
    "exported": lambda model, cfg: llfx.rewrite(model, cfg, X),
    "traced": lambda model, cfg: llfx.rewrite(model, cfg),
    "wrap": lambda model, cfg: llfx.wrap(model, cfg),
    "graph": lambda model, cfg: llfx.rewrite(llfx.capture(model, X), cfg),
}


def base(storage: str) -> nn.Module:
    torch.manual_seed(0)
    return quantized(storage, Net())


def result(model: nn.Module) -> dict[str, Tensor]:
    """Return the output, and the gradients of the input and of the adapters."""
    x = X[0].clone().requires_grad_()
    y = model(x)
    names = llfx.adapter_state_dict(model)
    gradients = torch.autograd.grad(y.square().sum(), [x, *(model.get_parameter(name) for name in names)])
    return {"output": y, **dict(zip(["input", *names], gradients, strict=True))}


def adapted(path: str, model: nn.Module, cfg: Any = CFG) -> nn.Module:
    """Return the model with adapters whose values depend on their names alone."""
    made = PATHS[path](model, cfg).train()
    values = torch.Generator().manual_seed(1)
    state = {
        name: 0.3 * torch.randn(t.shape, generator=values) for name, t in sorted(llfx.adapter_state_dict(made).items())
    }
    llfx.load_adapter_state_dict(made, state)
    return made


@pytest.mark.parametrize("storage", storages("torchao int4", "nf4 twice"))
def test_results_and_gradients_are_those_of_the_dense_weights(storage: str) -> None:
    model = base(storage)
    expected = result(adapted("wrap", dequantized(model)))
    for path in PATHS:
        actual = result(adapted(path, model))
        assert actual.keys() == expected.keys()
        for name, wanted in expected.items():
            close(actual[name], wanted, 1e-5, f"{name} of {storage}, {path}")


def kept(model: nn.Module) -> int:
    """Return the bytes that are kept for the backward pass beside the tensors of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (memory := tensor.untyped_storage()).data_ptr() not in own:
            seen[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(X[0].clone().requires_grad_())
    del y
    return sum(seen.values())


@pytest.mark.parametrize("storage", storages("int8"))
def test_neither_dense_weights_nor_inputs_are_kept_for_the_backward_pass(storage: str) -> None:
    model = base(storage)
    dense = dequantized(model)
    for path in ("graph", "traced", "wrap"):
        assert kept(adapted(path, model)) <= kept(adapted(path, dense)), path


def stored(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for _, tensor in sorted((*model.named_parameters(), *model.named_buffers()))]


@pytest.mark.parametrize("storage", storages("nf4 twice"))
def test_training_leaves_the_base_as_it_is_and_remove_gives_it_back(storage: str) -> None:
    model = base(storage)
    gm = adapted("exported", model)
    plain = stored(llfx.remove(gm))
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=0.1)
    for _ in range(2):
        gm(*X).square().sum().backward()
        optimizer.step()
    removed = llfx.remove(gm)
    assert all(map(torch.equal, stored(removed), plain))
    if not storage.startswith("torchao"):  # whose tensors have no memory of their own
        assert removed.get_parameter("out.weight").data_ptr() == held(model.get_submodule("out")).data_ptr()
    close(removed(*X), dequantized(model)(*X), 1e-5, "the base")


@pytest.mark.parametrize("storage", STORAGES)
def test_the_weight_is_read_to_the_bits_of_its_library(storage: str) -> None:
    model = base(storage)
    for name, stand_in in share(model).named_modules():
        if isinstance(stand_in, DequantizedLinear):
            exact = effective_weight(model.get_submodule(name))
            close(stand_in.effective_weight(), exact, 1e-7 if storage == "int8" else 0, name)


@pytest.mark.parametrize("name", slow_unless(lambda name: "Intx" in name, DYNAMIC))
def test_bases_that_quantize_inputs_are_refused(name: str) -> None:
    model = Net()
    torchao.quantize_(model, getattr(torchao, name)())
    for path in ("traced", "wrap"):
        with pytest.raises(llfx.ConfigError, match="quantizes the inputs of 5 of its products"):
            PATHS[path](model, CFG)
    with pytest.raises(llfx.ConfigError, match="quantizes the inputs"):
        llfx.backend(CFG, inner="eager").adapt(model, *X)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (bnb.nn.Linear8bitLt(32, 64), "it has_fp16_weights, which it quantizes in each call"),
        (bnb.nn.Linear4bit(32, 64), r"Linear4bit.* is not quantized yet.*model\.to"),
        (bnb.nn.Linear8bitLt(32, 64, has_fp16_weights=False), r"Linear8bitLt.* is not quantized yet.*model\.to"),
    ],
)
def test_modules_that_are_not_quantized_yet_are_refused(module: nn.Module, message: str) -> None:
    for path in ("traced", "wrap"):
        with pytest.raises(llfx.ConfigError, match=message):
            PATHS[path](nn.Sequential(module), llfx.LoRA(r=2))


def test_evaluation_on_a_cpu_reorders_a_weight_of_four_bits_and_it_is_read_as_before() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    twin = quantized("nf4 twice", model)
    expected = effective_weight(twin.get_submodule("0"))
    with torch.no_grad():
        twin.eval()(torch.randn(1, 64))
    gm = llfx.capture(twin)
    close(gm(torch.eye(64)).T, expected, 2e-2, "the weight, with scales in bfloat16")
