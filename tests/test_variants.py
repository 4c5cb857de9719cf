"""The six variants: their formulas, written out a second time, and the traps that others fell into."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx

R, ALPHA = 4, 6.0
S = ALPHA / R
D_IN, D_OUT = 6, 10
F64 = torch.float64
CONFIGS = {
    "LoRA": llfx.LoRA(r=R, alpha=ALPHA, target_names=("fc",)),
    "PiSSA": llfx.PiSSA(r=R, alpha=ALPHA, target_names=("fc",)),
    "DoRA": llfx.DoRA(r=R, alpha=ALPHA, target_names=("fc",)),
    "DeLoRA": llfx.DeLoRA(r=R, lambda0=3.0, target_names=("fc",)),
    "HRA": llfx.HRA(r=R, target_names=("fc",)),
    "IA3": llfx.IA3(target_names=("fc",)),
}
LOW_RANK = ("LoRA", "PiSSA", "DoRA")
every_variant = pytest.mark.parametrize("name", CONFIGS)


class Net(nn.Module):
    """`fc1` is an `up` projection, `fc2` a `down`; both are called in a way that frozen linears may be."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear, keyword: str | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(D_IN, D_OUT), linear(D_OUT, D_IN)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        if self.keyword:
            return x + self.fc2(**{self.keyword: F.gelu(self.fc1(**{self.keyword: x}))})
        return x + self.fc2(F.gelu(self.fc1(x)))


def conv1d(d_in: int, d_out: int) -> nn.Module:
    return Conv1D(d_out, d_in)


def ready(model: nn.Module, dtype: torch.dtype = F64) -> Any:
    """The model with random weights and biases of a size at which everything matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64)
    return model.eval().to(dtype)


def single(dtype: torch.dtype = F64) -> Any:
    """One linear, called `fc`."""
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(D_IN, D_OUT))
    return ready(model, dtype)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Random values for every adapter tensor, frozen ones included; positive where they are norms."""
    state = llfx.adapter_state_dict(model)
    for i, (name, tensor) in enumerate(state.items()):
        value = sample(*tensor.shape, seed=100 * seed + i)
        state[name] = (value.abs() + 0.5 if name.endswith(("_m", "_wnorm")) else value).to(tensor.dtype)
    llfx.load_adapter_state_dict(model, state)


def tensors(model: nn.Module, site: str) -> dict[str, Tensor]:
    """The adapter's tensors at a site, by the names that formulas use."""
    state = llfx.adapter_state_dict(model)
    prefix = f"{site}.lora_"
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """The gradient of a random functional of `y`, for each trainable parameter."""
    model.zero_grad()
    (y * sample(*y.shape, seed=7, dtype=y.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The formulas.


def reflections(u: Tensor) -> list[Tensor]:
    """The Householder matrix of each row of `u`."""
    return [torch.eye(u.shape[1], dtype=u.dtype) - 2 * torch.outer(v, v) / v.dot(v) for v in u]


def dense_lora(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return w + S * p["B"] @ p["A"], b


def dense_pissa(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return (w - S * p["B0"] @ p["A0"]) + S * p["B"] @ p["A"], b


def dense_dora(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    v = w + S * p["B"] @ p["A"]
    return torch.stack([m * row / row.norm() for m, row in zip(p["m"], v, strict=True)]), b


def dense_delora(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    for row, column in zip(p["A"], p["B"].t(), strict=True):
        strength = p["lambda"] / (R * row.norm().clamp(min=1e-4) * column.norm().clamp(min=1e-4))
        w = w + strength * torch.outer(column, row * p["wnorm"])
    return w, b


def dense_hra(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    for reflection in reflections(p["U"]):
        w = w @ reflection
    return w, b


def dense_ia3(w: Tensor, b: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    is_down = w.shape == (D_IN, D_OUT)
    return (w @ torch.diag(p["g"]), b) if is_down else (torch.diag(p["g"]) @ w, p["g"] * b)


DENSE = dict(zip(CONFIGS, (dense_lora, dense_pissa, dense_dora, dense_delora, dense_hra, dense_ia3), strict=True))


def dense(model: nn.Module, adapted: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The effective weight and bias of each linear of a `Net`, or of `single`."""
    result = {}
    for site, module in model.named_modules():
        if hasattr(module, "weight"):
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            result[site] = DENSE[name](weight.detach(), module.bias.detach(), tensors(adapted, site))
    return result


def check_formula(model: Net, name: str, example_inputs: Any) -> None:
    x = sample(3, 5, D_IN)
    gm, wrapped = (how(model, CONFIGS[name], example_inputs) for how in (llfx.rewrite, llfx.wrap))
    randomise(gm)
    randomise(wrapped)
    effective = dense(model, gm, name)
    expected = x + F.linear(F.gelu(F.linear(x, *effective["fc1"])), *effective["fc2"])
    merged = llfx.merge(gm)
    for adapted in (gm, wrapped, merged):
        close(adapted(x), expected)
    assert (expected - model(x)).abs().max() > 0.1, "the adapters do nothing"
    for site, (weight, bias) in effective.items():
        stored = merged.get_parameter(f"{site}.weight")
        close(stored.t() if isinstance(model.get_submodule(site), Conv1D) else stored, weight)
        close(merged.get_parameter(f"{site}.bias"), bias)


@pytest.mark.parametrize("example_inputs", [None, (sample(2, 4, D_IN),)], ids=["symbolic", "exported"])
@pytest.mark.parametrize("linear", [nn.Linear, conv1d], ids=["Linear", "Conv1D"])
@every_variant
def test_rewrite_wrap_and_merge_compute_the_formula(name: str, linear: Any, example_inputs: Any) -> None:
    check_formula(ready(Net(linear)), name, example_inputs)


@pytest.mark.parametrize("example_inputs", [None, (sample(2, 4, D_IN),)], ids=["symbolic", "exported"])
@every_variant
def test_linears_called_with_keyword_arguments_compute_the_formula(name: str, example_inputs: Any) -> None:
    check_formula(ready(Net(keyword="input")), name, example_inputs)


@pytest.mark.parametrize("name", LOW_RANK)
def test_rank_stabilized_scales_by_the_root_of_the_rank(name: str) -> None:
    model, x = single(), sample(3, D_IN)
    cls = type(CONFIGS[name])
    stabilized = llfx.rewrite(model, cls(r=4, alpha=ALPHA, rank_stabilized=True, target_names=("fc",)))
    plain = llfx.rewrite(model, cls(r=4, alpha=2 * ALPHA, target_names=("fc",)))
    randomise(stabilized)
    randomise(plain)
    close(stabilized(x), plain(x))


# Starts and gradients.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_variant
def test_start_is_the_identity(name: str, dtype: torch.dtype) -> None:
    exact = name in ("LoRA", "DeLoRA", "IA3")
    if dtype == torch.bfloat16 and not exact:
        pytest.skip("exact to rounding only, which bfloat16 magnifies")
    torch.manual_seed(0)
    model, x = ready(Net(), dtype), sample(5, 3, D_IN, dtype=dtype)
    for adapted in (llfx.rewrite(model, CONFIGS[name]), llfx.wrap(model, CONFIGS[name])):
        if exact:
            assert torch.equal(adapted(x), model(x))
        else:
            close(adapted(x), model(x), 1e-12 if dtype == torch.float64 else 1e-6)


DEAD_AT_START = {"LoRA": {"lora_A"}, "DoRA": {"lora_A"}, "DeLoRA": {"lora_A", "lora_lambda"}}


@every_variant
def test_each_parameter_gets_a_gradient_at_the_start_or_once_b_has_moved(name: str) -> None:
    torch.manual_seed(0)
    gm = llfx.rewrite(ready(Net()), CONFIGS[name])
    x = sample(5, 3, D_IN)
    for parameter, grad in gradients(gm, gm(x)).items():
        dead = parameter.rpartition(".")[2] in DEAD_AT_START.get(name, ())
        assert (grad.abs().max() == 0) == dead, f"{parameter}: {grad}"
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=1e-3)
    for _ in range(2):
        gradients(gm, gm(x))
        optimizer.step()
    for parameter, grad in gradients(gm, gm(x)).items():
        assert grad.abs().max() > 0, f"{parameter} is dead after two steps"


@every_variant
def test_a_small_step_moves_every_float32_parameter_on_a_bfloat16_base(name: str) -> None:
    torch.manual_seed(0)
    gm = llfx.rewrite(ready(Net(), torch.bfloat16), CONFIGS[name])
    assert {tensor.dtype for tensor in llfx.adapter_state_dict(gm).values()} == {torch.float32}
    if name != "IA3":
        randomise(gm)
    before = [parameter.detach().clone() for parameter in llfx.adapter_parameters(gm)]
    y = gm(sample(5, 3, D_IN, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    gradients(gm, y)
    torch.optim.Adam(llfx.adapter_parameters(gm), lr=1e-4).step()
    for was, parameter in zip(before, llfx.adapter_parameters(gm), strict=True):
        assert (parameter != was).all()


@pytest.mark.parametrize("second", CONFIGS)
@pytest.mark.parametrize("first", CONFIGS)
@pytest.mark.parametrize("at_once", [True, False], ids=["in one list", "one after the other"])
def test_second_adapter_does_not_freeze_the_first(first: str, second: str, at_once: bool) -> None:
    configs = [CONFIGS[first], CONFIGS[second]]
    model = single()
    alone = llfx.rewrite(model, configs[0])
    gm = llfx.rewrite(model, configs) if at_once else llfx.rewrite(alone, configs[1])
    randomise(gm)
    count = 2 * len(llfx.adapter_parameters(alone)) if first == second else None
    grads = gradients(gm, gm(sample(3, D_IN)))
    assert len(grads) == len(llfx.adapter_parameters(gm))
    assert count is None or len(grads) == count
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), grads


# Targets.


class Odd(nn.Module):
    """A square linear among others, in a model that tells nothing of its roles."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.zorg = nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.zorg(torch.cos(self.fc(x)))).sum(-1)


@every_variant
def test_square_linears_that_nobody_targets_are_left_alone(name: str) -> None:
    for how in (llfx.rewrite, llfx.wrap):
        adapted = how(ready(Odd()), CONFIGS[name])
        assert {tensor.rpartition(".")[0] for tensor in llfx.adapter_state_dict(adapted)} == {"fc"}


class Stack(nn.Module):
    """Layers at the root of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_match_at_the_root_of_the_model(layer: int) -> None:
    gm = llfx.rewrite(ready(Stack()), llfx.LoRA(r=R, layers=(layer,)))
    sites = {name.rpartition(".")[0] for name in llfx.adapter_state_dict(gm)}
    assert sites == {f"layers.{layer}.fc1", f"layers.{layer}.fc2"}


@every_variant
def test_tensors_of_conv1d_have_the_shapes_of_the_equal_linear(name: str) -> None:
    of_linear, of_conv1d = (
        {key: tensor.shape for key, tensor in llfx.adapter_state_dict(gm).items()}
        for gm in (llfx.rewrite(ready(Net(linear)), CONFIGS[name]) for linear in (nn.Linear, conv1d))
    )
    assert of_conv1d == of_linear


# IA3.


class BertBlock(nn.Module):
    """The names of a BERT layer; every width is different where it can be."""

    def __init__(self) -> None:
        super().__init__()
        own = {"query": nn.Linear(8, 4), "key": nn.Linear(8, 4), "value": nn.Linear(8, 6)}
        attention = {"self": nn.ModuleDict(own), "output": nn.ModuleDict({"dense": nn.Linear(6, 8)})}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(8, 12)})
        self.output = nn.ModuleDict({"dense": nn.Linear(12, 8)})
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attention["self"][name](x)[:, None] for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = self.norms[0](x + self.attention["output"]["dense"](mixed))
        return self.norms[1](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


@pytest.mark.parametrize("example_inputs", [None, (sample(2, 4, 8),)], ids=["symbolic", "exported"])
def test_ia3_gates_outputs_of_key_and_value_and_the_input_of_down_alone(example_inputs: Any) -> None:
    gm = llfx.rewrite(ready(BertBlock()), llfx.IA3(), example_inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in llfx.adapter_state_dict(gm).items()}
    assert shapes == {
        "attention.self.key.lora_g": (4,),
        "attention.self.value.lora_g": (6,),
        "output.dense.lora_g": (12,),
    }


def test_ia3_gates_up_at_its_output_and_down_at_its_input_where_both_are_targeted() -> None:
    gm = llfx.rewrite(ready(Net()), CONFIGS["IA3"])
    shapes = {name: tuple(tensor.shape) for name, tensor in llfx.adapter_state_dict(gm).items()}
    assert shapes == {"fc1.lora_g": (D_OUT,), "fc2.lora_g": (D_OUT,)}
    with torch.no_grad():
        gm.get_parameter("fc2.lora_g").zero_()
    x = sample(3, D_IN)
    close(gm(x), x + gm.get_parameter("fc2.bias"))


# DoRA.


def test_dora_does_not_scale_the_bias() -> None:
    model = single()
    gm = llfx.rewrite(model, CONFIGS["DoRA"])
    randomise(gm)
    close(gm(torch.zeros(2, D_IN, dtype=F64)), model.fc.bias.expand(2, -1), 1e-14)
    close(llfx.merge(gm).get_parameter("fc.bias"), model.fc.bias, 1e-14)


def test_dora_norm_is_a_constant_for_autograd() -> None:
    model, x = single(), sample(3, D_IN)
    gm = llfx.rewrite(model, CONFIGS["DoRA"])
    randomise(gm)
    actual = gradients(gm, gm(x))

    def reference(constant: bool) -> dict[str, Tensor]:
        p = {name: tensor.clone().requires_grad_() for name, tensor in tensors(gm, "fc").items()}
        v = model.fc.weight.detach() + S * p["B"] @ p["A"]
        norm = v.norm(dim=1, keepdim=True)
        y = F.linear(x, p["m"][:, None] / (norm.detach() if constant else norm) * v)
        (y * sample(*y.shape, seed=7)).sum().backward()
        return {f"fc.lora_{name}": tensor.grad for name, tensor in p.items()}

    constant, flowing = reference(True), reference(False)
    assert actual.keys() == constant.keys()
    for name, grad in actual.items():
        close(grad, constant[name])
    for name in ("fc.lora_A", "fc.lora_B"):
        assert (constant[name] - flowing[name]).abs().max() > 0.1 * flowing[name].abs().max()


def test_dora_takes_the_norm_of_a_bfloat16_weight_in_float32() -> None:
    model = single(torch.bfloat16)
    gm = llfx.rewrite(model, CONFIGS["DoRA"])
    m, weight = gm.get_parameter("fc.lora_m"), model.fc.weight.detach()
    assert m.dtype == torch.float32
    close(m.detach(), weight.float().norm(dim=1), 1e-6)
    # In the forward pass: on unit vectors all but the norm is exact, and dy/dm is the row over its norm.
    randomise(gm)
    p = tensors(gm, "fc")
    v = weight.double() + S * p["B"].double() @ p["A"].double()
    for i in range(D_IN):
        gm.zero_grad()
        gm(torch.eye(D_IN, dtype=torch.bfloat16)[i]).sum().backward()
        bias = model.fc.bias.detach()
        rounding = (weight[:, i] + bias).double() - weight[:, i].double() - bias.double()
        close(m.grad.double(), (v[:, i] + rounding) / v.norm(dim=1), 1e-5)


# DeLoRA.


def test_delora_norms_are_those_of_each_row_of_a_and_column_of_b() -> None:
    gm, x = llfx.rewrite(single(), CONFIGS["DeLoRA"]), sample(3, D_IN)
    randomise(gm)
    before = gm(x)
    with torch.no_grad():
        gm.get_parameter("fc.lora_A").mul_(sample(R, 1, seed=3).abs() + 0.1)
        gm.get_parameter("fc.lora_B").mul_(sample(1, R, seed=4).abs() + 0.1)
    close(gm(x), before, 1e-12)


def test_delora_norms_are_clamped_and_not_shifted() -> None:
    model, x = single(), sample(3, D_IN)
    gm = llfx.rewrite(model, CONFIGS["DeLoRA"])
    randomise(gm)
    with torch.no_grad():
        gm.get_parameter("fc.lora_B")[:, 0].mul_(1e-6)
    close(gm(x), F.linear(x, *dense(model, gm, "DeLoRA")["fc"]), 1e-12)


@pytest.mark.parametrize("lambda0", [0, 0.0, math.nan, math.inf])
def test_delora_refuses_a_start_at_which_every_gradient_is_dead(lambda0: float) -> None:
    with pytest.raises(llfx.ConfigError, match="lambda0"):
        llfx.DeLoRA(lambda0=lambda0)


def test_delora_weight_norm_is_a_buffer_that_is_saved(tmp_path: Path) -> None:
    model = single()
    gm = llfx.rewrite(model, CONFIGS["DeLoRA"])
    close(gm.get_buffer("fc.lora_wnorm"), model.fc.weight.norm(dim=0), 1e-14)
    assert len(llfx.adapter_parameters(gm)) == 3
    randomise(gm)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    saved = load_file(tmp_path / "adapter.safetensors")["fc.lora_wnorm"]
    loaded = llfx.load(model, tmp_path / "adapter.safetensors").get_buffer("fc.lora_wnorm")
    assert torch.equal(saved, gm.get_buffer("fc.lora_wnorm"))
    assert torch.equal(saved, loaded)


# HRA.


def test_hra_applies_reflections_in_order_and_is_orthogonal() -> None:
    model = single()
    gm = llfx.rewrite(model, CONFIGS["HRA"])
    randomise(gm)
    rotation = torch.linalg.pinv(model.fc.weight.detach()) @ llfx.merge(gm).get_parameter("fc.weight")
    h = reflections(tensors(gm, "fc")["U"])
    close(rotation, h[0] @ h[1] @ h[2] @ h[3])
    assert (rotation - h[3] @ h[2] @ h[1] @ h[0]).abs().max() > 0.1, "the values cannot tell the order"
    close(rotation @ rotation.t(), torch.eye(D_IN, dtype=F64))


def test_hra_starts_in_distinct_pairs_of_vectors_with_gradients() -> None:
    torch.manual_seed(0)
    gm = llfx.rewrite(single(), CONFIGS["HRA"])
    u = gm.get_parameter("fc.lora_U").detach()
    assert torch.equal(u[::2], u[1::2])
    assert not torch.equal(u[0], u[2])
    grad = gradients(gm, gm(sample(3, D_IN)))["fc.lora_U"]
    assert (grad.norm(dim=1) > 1e-3).all(), "a vector is dead"


@pytest.mark.parametrize("r", [1, 3])
def test_hra_refuses_an_odd_rank(r: int) -> None:
    with pytest.raises(llfx.ConfigError, match="even"):
        llfx.HRA(r=r)


# PiSSA.


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("linear", [nn.Linear, conv1d], ids=["Linear", "Conv1D"])
def test_pissa_starts_at_the_principal_part_divided_by_the_scale(linear: Any, stabilized: bool) -> None:
    model = ready(Net(linear))
    cfg = llfx.PiSSA(r=R, alpha=ALPHA, rank_stabilized=stabilized, target_names=("fc1",))
    gm = llfx.rewrite(model, cfg)
    weight = model.fc1.weight.t() if linear is conv1d else model.fc1.weight
    u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    p, scale = tensors(gm, "fc1"), ALPHA / math.sqrt(R) if stabilized else ALPHA / R
    close(scale * p["B"] @ p["A"], u[:, :R] * s[:R] @ vh[:R])
    close(p["A"].norm(dim=1), (s[:R] / scale).sqrt())
    close(p["B"].norm(dim=0), (s[:R] / scale).sqrt())
    assert torch.equal(p["A"], p["A0"])
    assert torch.equal(p["B"], p["B0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pissa_keeps_the_frozen_weight_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ready(Net(), dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm = llfx.rewrite(model, CONFIGS["PiSSA"])
    randomise(gm)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    loaded = llfx.load(model, tmp_path / "adapter.safetensors")
    for after in (model, gm, llfx.remove(gm), llfx.remove(loaded)):
        for name, tensor in before.items():
            assert torch.equal(after.get_parameter(name), tensor), name
            assert after.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr(), name


class Tied(nn.Module):
    """An embedding and a head of one weight; both outputs are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(D_OUT, D_IN), nn.Linear(D_IN, D_OUT, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(ids)
        return self.head(torch.tanh(h)), h


@pytest.mark.parametrize("example_inputs", [None, (torch.arange(6).view(2, 3),)], ids=["symbolic", "exported"])
@pytest.mark.parametrize("target", [{"target_roles": ("head",)}, {"target_names": ("head",)}], ids=["role", "name"])
def test_pissa_on_a_tied_head_does_not_reach_the_embedding(target: Any, example_inputs: Any) -> None:
    model, ids = ready(Tied()), torch.arange(D_OUT).view(2, -1)
    logits, embedded = model(ids)
    gm = llfx.rewrite(model, llfx.PiSSA(r=R, alpha=ALPHA, **target), example_inputs)
    close(gm(ids)[0], logits, 1e-12)
    randomise(gm)
    changed = F.linear(torch.tanh(embedded), dense_pissa(model.head.weight, torch.empty(0), tensors(gm, "head"))[0])
    assert (changed - logits).abs().max() > 0.1
    for adapted in (gm, llfx.merge(gm)):
        close(adapted(ids)[0], changed)
        assert torch.equal(adapted(ids)[1], embedded)


# Dropout.


@pytest.mark.parametrize("cls", [llfx.DeLoRA, llfx.HRA, llfx.IA3])
def test_dropout_is_refused_where_it_cannot_be_honoured(cls: type[llfx.Variant]) -> None:
    with pytest.raises(TypeError, match="dropout"):
        cls(dropout=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("name", LOW_RANK)
def test_dropout_acts_in_training_on_the_branch_alone_and_keeps_the_mean(name: str, how: Any) -> None:
    x = sample(1, D_IN)
    cfg = type(CONFIGS[name])(r=R, alpha=ALPHA, dropout=0.25, target_names=("fc",))
    adapted = how(single(), cfg)
    randomise(adapted)
    expected = adapted.eval()(x)
    assert torch.equal(expected, adapted(x))
    adapted.train()

    def seeded(seed: int, rows: int = 1) -> Tensor:
        torch.manual_seed(seed)
        return adapted(x.expand(rows, -1)).detach()

    assert torch.equal(seeded(0, 50), seeded(0, 50))
    assert not torch.equal(seeded(0, 50), seeded(1, 50))
    assert (seeded(0, 50) - expected).abs().max() > 0.1
    torch.testing.assert_close(seeded(0, 40_000).mean(0), expected[0].detach(), rtol=0.05, atol=0.05)
    dropped = {tuple(row) for row in seeded(0, 4000).tolist()}
    assert len(dropped) == 2**D_IN, "elements of the input are dropped, each on its own"
    with torch.no_grad():
        adapted.get_parameter("fc.lora_B").zero_()
    close(seeded(0, 50), adapted.eval()(x).detach().expand(50, -1), 1e-12)
