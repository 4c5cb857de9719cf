"""Adapters on a quantized base compute what they compute on the dense weights that the base stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.shared_copy import shared_copy
from lora_lite_fx.storage.dequantized import DequantizedLinear, restore_quantized, stand_ins
from lora_lite_fx.testing.comparisons import close
from tests.support.quantized import STORAGES, dequantized, effective_weight, held, library, quantized, storages
from tests.support.saved import saved_bytes
from tests.support.selection import broad_after, slow_unless


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


@pytest.mark.parametrize("storage", broad_after(1, storages("torchao int4", "nf4 twice")))
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
    return saved_bytes(lambda: model(X[0].clone().requires_grad_()), (*model.parameters(), *model.buffers()))


@pytest.mark.broad
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
    if not storage.startswith(("torchao", "quanto")):  # whose tensors have no memory of their own
        assert removed.get_parameter("out.weight").data_ptr() == held(model.get_submodule("out")).data_ptr()
    close(removed(*X), dequantized(model)(*X), 1e-5, "the base")


# quanto compiles an extension to read 4 bits.
@pytest.mark.parametrize("storage", broad_after(12, slow_unless(lambda name: name != "quanto int4", STORAGES)))
def test_the_weight_is_read_to_the_bits_of_its_library(storage: str) -> None:
    model = base(storage)
    for name, stand_in in shared_copy(model).named_modules():
        if isinstance(stand_in, DequantizedLinear):
            exact = effective_weight(model.get_submodule(name))
            close(stand_in.effective_weight(), exact, 1e-7 if storage == "int8" else 0, name)


def test_cut_blocks_and_exponents_of_fp8_are_read_to_the_bit() -> None:
    fp8 = library("transformers.integrations.finegrained_fp8")
    for form in ("float", "ue8m0"):
        module = fp8.FP8Linear(40, 24, (16, 16), scale_fmt=form).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        module.weight.copy_(torch.randn(24, 40, generator=generator))
        module.weight_scale_inv.copy_(2.0 ** torch.randint(-4, 4, (2, 3), generator=generator))
        (stand_in,) = stand_ins(shared_copy(nn.Sequential(module))).values()
        assert torch.equal(stand_in.effective_weight(), effective_weight(module))


@pytest.mark.broad
@pytest.mark.parametrize(
    ("zero_point", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)]
)
def test_the_groups_of_quanto_are_read_to_the_bit(zero_point: bool, dtype: torch.dtype) -> None:
    quanto = library("optimum.quanto")
    model = nn.Sequential(nn.Linear(256, 32, dtype=dtype))  # quanto keeps bfloat16 in an order of its own
    quanto.quantize(model, weights="qint4", optimizer=partial(quanto.MaxOptimizer(), zeropoint=zero_point))
    quanto.freeze(model)
    (stand_in,) = stand_ins(shared_copy(model)).values()
    assert torch.equal(stand_in.effective_weight(), effective_weight(model[0]))
    assert stand_in.tensors["weight"].nbytes == 256 * 32 / 2


@pytest.mark.parametrize("name", slow_unless(lambda name: "Intx" in name, DYNAMIC))
def test_bases_that_quantize_inputs_are_refused(name: str) -> None:
    model = Net()
    torchao = library("torchao.quantization")
    torchao.quantize_(model, getattr(torchao, name)())
    for path in ("traced", "wrap"):
        with pytest.raises(llfx.ConfigError, match="quantizes the inputs of 5 of its products"):
            PATHS[path](model, CFG)
    with pytest.raises(llfx.ConfigError, match="quantizes the inputs"):
        llfx.backend(CFG, inner="eager").adapt(model, *X)


UNREADABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bitsandbytes, 8 bits in each call": (
        lambda: library("bitsandbytes").nn.Linear8bitLt(32, 64),
        "it has_fp16_weights, which it quantizes in each call",
    ),
    "bitsandbytes, not yet": (
        lambda: library("bitsandbytes").nn.Linear4bit(32, 64),
        r"Linear4bit.* is not quantized yet.*model\.to",
    ),
    "bitsandbytes, 8 bits, not yet": (
        lambda: library("bitsandbytes").nn.Linear8bitLt(32, 64, has_fp16_weights=False),
        r"Linear8bitLt.* is not quantized yet.*model\.to",
    ),
    "quanto, in each call": (
        lambda: _quanto(weights="qint8"),
        r"it quantizes its weight in each call.*optimum\.quanto\.freeze",
    ),
    "quanto, inputs too": (
        lambda: _quanto(weights="qint8", activations="qint8"),
        "it rounds its input and output to quanto.qint8, and no right gradient passes.*weights alone",
    ),
    "compressed-tensors, inputs too": (
        lambda: _compressed(input_activations=True),
        "Linear of compressed-tensors.*it rounds its inputs or outputs.*dequantize=True",
    ),
    "compressed-tensors, in each call": (
        lambda: _compressed(),
        r"it rounds its weight in each call.*ModelCompressor\.compress_model",
    ),
    "compressed-tensors, three bits": (
        lambda: _compressed(3, compressed=True),
        "its format pack-quantized of 3 bits is not known here.*dequantize=True",
    ),
    "fp8, four bits": (lambda: _of_transformers("finegrained_fp8", "FP8Linear", int4=True), "its values have 4 bits"),
    "fp8, groups": (
        lambda: _of_transformers("finegrained_fp8", "FP8GroupedLinear", n_groups=2),
        "A FP8GroupedLinear .* it keeps its weight in a form that this library cannot read.*dense weights",
    ),
    "fp8 of compressed-tensors": (
        lambda: _of_transformers("compressed_tensors", "CompressedTensorsFP8Linear"),
        "A CompressedTensorsFP8Linear .* cannot read",
    ),
    "gemma": (lambda: _of_transformers("gemma_quant", "QuantizedLinear"), "A QuantizedLinear .* cannot read"),
    "mxfp4": (lambda: _mxfp4_experts(), "A Mxfp4GptOssExperts .* cannot read"),
    "GPTQ": (
        lambda: _gptq(),
        "A QuantLinear .* in the form of GPTQ or AWQ that this library cannot read.*bitsandbytes",
    ),
    "quanto, inputs alone": (lambda: _quanto(activations="qint8"), "it rounds its input and output to quanto.qint8"),
}


def _quanto(**options: str) -> nn.Module:
    quanto = library("optimum.quanto")
    return quanto.QLinear.from_module(nn.Linear(32, 64), **options)  # type: ignore[no-any-return]


def _compressed(bits: int = 8, input_activations: bool = False, compressed: bool = False) -> nn.Module:
    schemes = library("compressed_tensors.quantization")
    args = schemes.QuantizationArgs(num_bits=bits, strategy="tensor")
    scheme = schemes.QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=args if input_activations else None
    )
    model = nn.Sequential(nn.Linear(32, 64))
    schemes.apply_quantization_config(model, schemes.QuantizationConfig(config_groups={"all": scheme}))
    linear: Any = model[0]
    linear.weight_scale.data.fill_(0.1)
    linear.weight_zero_point.data.zero_()
    if compressed:
        library("compressed_tensors.compressors").compress_module(linear)
    return linear  # type: ignore[no-any-return]


def _of_transformers(place: str, name: str, int4: bool = False, **fields: int) -> nn.Module:
    module: nn.Module = getattr(library(f"transformers.integrations.{place}"), name)(32, 64, **fields)
    if int4:
        module.weight = nn.Parameter(torch.zeros(64, 16, dtype=torch.int8), requires_grad=False)
    return module


def _mxfp4_experts() -> nn.Module:
    config = SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=32)
    return library("transformers.integrations.mxfp4").Mxfp4GptOssExperts(config)  # type: ignore[no-any-return]


def _gptq() -> nn.Module:
    class QuantLinear(nn.Module):
        """Looks like one of gptqmodel, which is not installed."""

        __module__ = "gptqmodel.nn_modules.qlinear.torch"

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 64, dtype=torch.int32))

    return QuantLinear()


@pytest.mark.parametrize("case", UNREADABLE)
def test_modules_whose_weight_cannot_be_read_are_refused(case: str) -> None:
    make, message = UNREADABLE[case]
    module = make()
    for path in ("traced", "wrap"):
        with pytest.raises(llfx.ConfigError, match=message):
            PATHS[path](nn.Sequential(module), llfx.LoRA(r=2))


class Listed(nn.Module):
    """Registers its linear, and calls it by a list of its own."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.layers = linear, [linear]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_quantized_module_that_a_list_holds_is_stood_for_and_put_back_there() -> None:
    model = Listed(quantized("nf4", nn.Sequential(nn.Linear(32, 32))).get_submodule("0"))
    copy: Any = shared_copy(model)
    assert isinstance(copy.linear, DequantizedLinear)
    assert copy.layers == [copy.linear]
    restore_quantized(copy)
    assert type(copy.linear) is type(model.linear)
    assert copy.layers == [copy.linear]


def test_evaluation_on_a_cpu_reorders_a_weight_of_four_bits_and_it_is_read_as_before() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    twin = quantized("nf4 twice", model)
    expected = effective_weight(twin.get_submodule("0"))
    with torch.no_grad():
        twin.eval()(torch.randn(1, 64))
    gm = llfx.capture(twin)
    close(gm(torch.eye(64)).T, expected, 2e-2, "the weight, with scales in bfloat16")


def test_whole_numbers_of_a_model_of_transformers_are_no_weight() -> None:
    """All of its models inherit from a mixin of an integration, and XLM's keeps its positions in a buffer."""
    sizes: dict[str, Any] = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40}
    model = transformers.XLMModel(transformers.XLMConfig(**sizes))
    assert len(llfx.adapters(llfx.wrap(model, llfx.LoRA(r=2, target_names=("q_lin",))))) == 1
