"""The six variants: their formulas, written out a second time, and the traps that others fell into."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from tests.support.selection import broad_after, slow_after

R, ALPHA = 4, 6.0
S = ALPHA / R
D_IN, D_OUT = 6, 10
F64, BF16 = torch.float64, torch.bfloat16
CONFIGS: dict[str, Any] = {
    "LoRA": llfx.LoRA(r=R, alpha=ALPHA, target_names=("fc",)),
    "PiSSA": llfx.PiSSA(r=R, alpha=ALPHA, target_names=("fc",)),
    "DoRA": llfx.DoRA(r=R, alpha=ALPHA, target_names=("fc",)),
    "DeLoRA": llfx.DeLoRA(r=R, lambda0=3.0, target_names=("fc",)),
    "HRA": llfx.HRA(r=R, target_names=("fc",)),
    "IA3": llfx.IA3(target_names=("fc",)),
}
some_variants = pytest.mark.parametrize("name", broad_after(3, CONFIGS))
with_dropout = pytest.mark.parametrize("name", broad_after(1, ["LoRA", "PiSSA", "DoRA"]))


class Net(nn.Module):
    """A feed-forward block: `fc1` is the `up` projection, `fc2` the `down`."""

    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(D_IN, D_OUT), linear(D_OUT, D_IN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(F.gelu(self.fc1(x)))
        return y


class Conv1DNet(Net):
    def __init__(self) -> None:
        super().__init__(lambda d_in, d_out: Conv1D(d_out, d_in))


class KeywordNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(input=F.gelu(self.fc1(input=x)))
        return y


def ready(model: nn.Module, dtype: torch.dtype = F64) -> Any:
    """The model with random weights and biases of a size at which everything matters."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * sample(*parameter.shape, seed=10 + i)
    return model.eval().to(dtype)


def single(dtype: torch.dtype = F64) -> Any:
    return ready(nn.Sequential(OrderedDict(fc=nn.Linear(D_IN, D_OUT))), dtype)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def randomised(model: Any, seed: int = 100) -> Any:
    """The model with random values in every adapter tensor, frozen ones included; norms are positive, indices stay."""
    state = llfx.adapter_state_dict(model)
    for i, (name, tensor) in enumerate(state.items()):
        if tensor.is_floating_point():
            value = sample(*tensor.shape, seed=seed + i)
            state[name] = (value.abs() + 0.5 if name.endswith(("_m", "_wnorm")) else value).to(tensor.dtype)
    llfx.load_adapter_state_dict(model, state)
    return model


def tensors(model: nn.Module, site: str) -> dict[str, Tensor]:
    """The adapter's tensors at a site, by the names that formulas use."""
    state, prefix = llfx.adapter_state_dict(model), f"{site}.lora_"
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def sites(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in llfx.adapter_state_dict(model)}


def grad_of(tensor: Tensor) -> Tensor:
    """Return the gradient of `tensor`, which must have one."""
    assert tensor.grad is not None
    return tensor.grad


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """The gradient of a random functional of `y`, for each trainable parameter."""
    model.zero_grad()
    (y * sample(*y.shape, seed=7, dtype=y.dtype)).sum().backward()
    return {name: grad_of(p) for name, p in model.named_parameters() if p.requires_grad}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def weight_of(linear: Any) -> Tensor:
    return (linear.weight.t() if isinstance(linear, Conv1D) else linear.weight).detach()


def reflections(u: Tensor) -> list[Tensor]:
    """The Householder matrix of each row of `u`."""
    return [torch.eye(u.shape[1], dtype=u.dtype) - 2 * torch.outer(v, v) / v.dot(v) for v in u]


def effective(name: str, linear: Any, p: dict[str, Tensor], down: bool = False) -> tuple[Tensor, Tensor]:
    """The weight and bias that a variant makes of a linear."""
    w, b = weight_of(linear), linear.bias.detach()
    if name == "LoRA":
        w = w + S * p["B"] @ p["A"]
    elif name == "PiSSA":
        w = (w - S * p["B0"] @ p["A0"]) + S * p["B"] @ p["A"]
    elif name == "DoRA":
        v = w + S * p["B"] @ p["A"]
        w = torch.diag(p["m"] / (v**2).sum(1).sqrt()) @ v
    elif name == "DeLoRA":
        for row, column in zip(p["A"], p["B"].t(), strict=True):
            strength = p["lambda"] / (R * row.norm().clamp(min=1e-4) * column.norm().clamp(min=1e-4))
            w = w + strength * torch.outer(column, row * p["wnorm"])
    elif name == "HRA":
        w = torch.linalg.multi_dot([w, *reflections(p["U"])])
    else:
        w, b = (w @ torch.diag(p["g"]), b) if down else (torch.diag(p["g"]) @ w, p["g"] * b)
    return w, b


@pytest.mark.parametrize("example_inputs", broad_after(1, [None, (sample(2, 4, D_IN),)]), ids=["symbolic", "exported"])
@pytest.mark.parametrize("cls", broad_after(1, slow_after(2, [Net, Conv1DNet, KeywordNet])))
@some_variants
def test_rewrite_wrap_and_merge_compute_the_formula(name: str, cls: Any, example_inputs: Any) -> None:
    model, x = ready(cls()), sample(3, 5, D_IN)
    gm = randomised(llfx.rewrite(model, CONFIGS[name], example_inputs))
    up = effective(name, model.fc1, tensors(gm, "fc1"))
    down = effective(name, model.fc2, tensors(gm, "fc2"), down=True)
    expected = x + F.linear(F.gelu(F.linear(x, *up)), *down)
    assert (expected - model(x)).abs().max() > 0.1, "the adapters do nothing"
    merged = llfx.merge(gm)
    for adapted in (gm, merged, randomised(llfx.wrap(model, CONFIGS[name]))):
        close(adapted(x), expected)
    for site, (weight, bias) in {"fc1": up, "fc2": down}.items():
        stored = merged.get_parameter(f"{site}.weight")
        close(stored.t() if cls is Conv1DNet else stored, weight)
        close(merged.get_parameter(f"{site}.bias"), bias)


@with_dropout
def test_rank_stabilized_scales_by_the_root_of_the_rank(name: str) -> None:
    cls, x = type(CONFIGS[name]), sample(3, D_IN)
    stabilized = cls(r=4, alpha=ALPHA, rank_stabilized=True, target_names=("fc",))
    plain = cls(r=4, alpha=2 * ALPHA, target_names=("fc",))
    close(*(randomised(llfx.rewrite(single(), cfg))(x) for cfg in (stabilized, plain)))


@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
@pytest.mark.parametrize("dtype", broad_after(1, slow_after(2, [F64, torch.float32, BF16])), ids=str)
@some_variants
def test_start_is_the_identity(name: str, dtype: torch.dtype, how: Any) -> None:
    model, x = ready(Net(), dtype), sample(5, 3, D_IN, dtype=dtype)
    y, expected = how(model, CONFIGS[name])(x), model(x)
    if name in ("LoRA", "DeLoRA", "IA3"):
        assert torch.equal(y, expected)
    else:  # in bfloat16 a last bit may flip in each of the two linears
        close(y, expected, {F64: 1e-12, torch.float32: 1e-6, BF16: 2**-6}[dtype])


@some_variants
def test_each_element_gets_a_gradient_at_the_start_or_once_b_has_moved(name: str) -> None:
    gm, x = llfx.rewrite(ready(Net()), CONFIGS[name]), sample(5, 3, D_IN)
    waiting = {"LoRA": {"lora_A"}, "DoRA": {"lora_A"}, "DeLoRA": {"lora_A", "lora_lambda"}}.get(name, ())
    for parameter, grad in gradients(gm, gm(x)).items():
        dead = parameter.rpartition(".")[2] in waiting
        assert ((grad == 0) == dead).all(), f"{parameter}: {grad}"
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=1e-3)
    for _ in range(2):
        gradients(gm, gm(x))
        optimizer.step()
    for parameter, grad in gradients(gm, gm(x)).items():
        assert (grad != 0).all(), f"{parameter} is dead after two steps"


@some_variants
def test_on_a_bfloat16_base_all_tensors_are_float32_and_a_small_step_moves_them(name: str) -> None:
    gm = llfx.rewrite(ready(Net(), BF16), CONFIGS[name])
    assert {tensor.dtype for tensor in llfx.adapter_state_dict(gm).values()} == {torch.float32}
    if name != "IA3":  # whose gates are to move from exactly one
        randomised(gm)
    before = [parameter.detach().clone() for parameter in llfx.adapter_parameters(gm)]
    gradients(gm, gm(sample(5, 3, D_IN, dtype=BF16)))
    torch.optim.Adam(llfx.adapter_parameters(gm), lr=1e-4).step()
    for was, parameter in zip(before, llfx.adapter_parameters(gm), strict=True):
        assert (parameter != was).all()


@pytest.mark.broad
@pytest.mark.parametrize("at_once", slow_after(1, [True, False]), ids=["in one list", "one after the other"])
@pytest.mark.parametrize("second", slow_after(1, ["LoRA", "IA3"]))
@some_variants
def test_second_adapter_does_not_freeze_the_first(name: str, second: str, at_once: bool) -> None:
    first, then, model = CONFIGS[name], CONFIGS[second], single()
    gm = llfx.rewrite(model, [first, then] if at_once else first)
    gm = randomised(gm if at_once else llfx.rewrite(gm, then))
    grads = gradients(gm, gm(sample(3, D_IN)))
    alone = [llfx.adapter_parameters(llfx.rewrite(model, cfg)) for cfg in (first, then)]
    assert len(grads) == len(llfx.adapter_parameters(gm)) == sum(map(len, alone))
    assert [parameter for parameter, grad in grads.items() if grad is None or not grad.any()] == []


@some_variants
def test_square_linears_without_a_role_that_nobody_targets_are_left_alone(name: str) -> None:
    modules = {"fc": nn.Linear(D_IN, D_OUT), "tanh": nn.Tanh(), "zorg": nn.Linear(D_OUT, D_OUT)}
    for how in (llfx.rewrite, llfx.wrap):
        assert sites(how(ready(nn.Sequential(OrderedDict(modules))), CONFIGS[name])) == {"fc"}


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_match_at_the_root_of_the_model(layer: int) -> None:
    model = ready(nn.Sequential(OrderedDict(layers=nn.Sequential(Net(), Net()))))
    gm = llfx.rewrite(model, llfx.LoRA(r=R, layers=(layer,)))
    assert sites(gm) == {f"layers.{layer}.fc1", f"layers.{layer}.fc2"}


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        projections = nn.ModuleDict({"query": nn.Linear(8, 4), "key": nn.Linear(8, 4), "value": nn.Linear(8, 6)})
        self.attention = nn.ModuleDict({"self": projections, "output": nn.ModuleDict({"dense": nn.Linear(6, 8)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(8, 12)})
        self.output = nn.ModuleDict({"dense": nn.Linear(12, 8)})

    def forward(self, x: Tensor) -> Tensor:
        attention: Any = self.attention
        q, k, v = (attention["self"][name](x)[:, None] for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = F.layer_norm(x + attention["output"]["dense"](mixed), (8,))
        return F.layer_norm(x + self.output["dense"](F.gelu(self.intermediate["dense"](x))), (8,))


@pytest.mark.parametrize("example_inputs", [None, (sample(2, 4, 8),)], ids=["symbolic", "exported"])
def test_ia3_gates_outputs_of_key_and_value_and_the_input_of_down_alone(example_inputs: Any) -> None:
    gm = llfx.rewrite(ready(BertLayer()), llfx.IA3(), example_inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in llfx.adapter_state_dict(gm).items()}
    key, value, down = "attention.self.key", "attention.self.value", "output.dense"
    assert shapes == {f"{key}.lora_g": (4,), f"{value}.lora_g": (6,), f"{down}.lora_g": (12,)}


def test_dora_does_not_scale_the_bias() -> None:
    gm = randomised(llfx.rewrite(single(), CONFIGS["DoRA"]))
    bias = single().fc.bias
    close(gm(torch.zeros(2, D_IN, dtype=F64)), bias.expand(2, -1), 1e-14)
    close(llfx.merge(gm).get_parameter("fc.bias").detach(), bias, 1e-14)


def test_dora_norm_is_a_constant_for_autograd() -> None:
    model, x = single(), sample(3, D_IN)
    gm = randomised(llfx.rewrite(model, CONFIGS["DoRA"]))

    def reference(constant: bool) -> dict[str, Tensor]:
        p = {name: tensor.clone().requires_grad_() for name, tensor in tensors(gm, "fc").items()}
        v = weight_of(model.fc) + S * p["B"] @ p["A"]
        norm = v.norm(dim=1, keepdim=True)
        y = F.linear(x, p["m"][:, None] / (norm.detach() if constant else norm) * v)
        (y * sample(*y.shape, seed=7)).sum().backward()
        return {f"fc.lora_{name}": grad_of(tensor) for name, tensor in p.items()}

    ours, constant, flowing = gradients(gm, gm(x)), reference(True), reference(False)
    assert ours.keys() == constant.keys()
    for name, grad in ours.items():
        close(grad, constant[name])
        assert name == "fc.lora_m" or (grad - flowing[name]).abs().max() > 0.1 * flowing[name].abs().max()


def test_dora_takes_the_norm_of_a_bfloat16_weight_in_float32() -> None:
    model = ready(nn.Sequential(OrderedDict(fc=nn.Linear(D_IN, D_OUT, bias=False))), BF16)
    gm = llfx.rewrite(model, CONFIGS["DoRA"])
    m, weight = gm.get_parameter("fc.lora_m"), weight_of(model.fc)
    assert m.dtype == torch.float32
    close(m.detach(), weight.float().norm(dim=1), 1e-6)
    p = tensors(randomised(gm), "fc")
    v = weight.double() + S * p["B"].double() @ p["A"].double()
    # The forward pass is exact on a unit vector but for the norm, and dy/dm is a column over the norms.
    for unit, column in zip(torch.eye(D_IN, dtype=BF16), v.t(), strict=True):
        gm.zero_grad()
        gm(unit).sum().backward()
        close(grad_of(m).double(), column / v.norm(dim=1), 1e-5)


def test_delora_norms_are_those_of_each_row_of_a_and_column_of_b_and_clamped() -> None:
    model, x = single(), sample(3, D_IN)
    gm = randomised(llfx.rewrite(model, CONFIGS["DeLoRA"]))
    a, b, before = gm.get_parameter("fc.lora_A"), gm.get_parameter("fc.lora_B"), gm(x)
    with torch.no_grad():
        a.mul_(sample(R, 1, seed=3).abs() + 0.1)
        b.mul_(sample(1, R, seed=4).abs() + 0.1)
    close(gm(x), before, 1e-12)
    with torch.no_grad():
        a[1] *= 1e-5
        b[:, 0] *= 1e-5
    close(gm(x), F.linear(x, *effective("DeLoRA", model.fc, tensors(gm, "fc"))), 1e-12)
    assert (gm(x) - before).abs().max() > 0.01, "no norm was clamped"


def test_delora_weight_norm_is_a_buffer_that_is_saved(tmp_path: Path) -> None:
    model, file = single(), tmp_path / "adapter.safetensors"
    gm = llfx.rewrite(model, CONFIGS["DeLoRA"])
    close(gm.get_buffer("fc.lora_wnorm"), weight_of(model.fc).norm(dim=0), 1e-14)
    llfx.save(randomised(gm), file)
    for saved in (load_file(file)["fc.lora_wnorm"], llfx.load(model, file).get_buffer("fc.lora_wnorm")):
        assert torch.equal(saved, gm.get_buffer("fc.lora_wnorm"))


def test_hra_multiplies_reflections_in_order_and_is_orthogonal() -> None:
    model = single()
    gm = randomised(llfx.rewrite(model, CONFIGS["HRA"]))
    rotation = torch.linalg.pinv(weight_of(model.fc)) @ llfx.merge(gm).get_parameter("fc.weight")
    h = reflections(tensors(gm, "fc")["U"])
    close(rotation, torch.linalg.multi_dot(h))
    assert (rotation - torch.linalg.multi_dot(h[::-1])).abs().max() > 0.1, "the values cannot tell the order"
    close(rotation @ rotation.t(), torch.eye(D_IN, dtype=F64))


@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
@pytest.mark.parametrize("cls", broad_after(1, [Net, Conv1DNet]))
def test_pissa_starts_at_the_principal_part_divided_by_the_scale(cls: Any, stabilized: bool) -> None:
    model, s = ready(cls()), ALPHA / (math.sqrt(R) if stabilized else R)
    cfg = llfx.PiSSA(r=R, alpha=ALPHA, rank_stabilized=stabilized, target_names=("fc",))
    p = tensors(llfx.rewrite(model, cfg), "fc1")
    u, values, vh = torch.linalg.svd(weight_of(model.fc1), full_matrices=False)
    close(s * p["B0"] @ p["A0"], u[:, :R] * values[:R] @ vh[:R])
    close(p["A0"].norm(dim=1), (values[:R] / s).sqrt())
    assert torch.equal(p["A"], p["A0"])
    assert torch.equal(p["B"], p["B0"])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_pissa_keeps_the_frozen_weight_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, file = ready(Net(), dtype), tmp_path / "adapter.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm = randomised(llfx.rewrite(model, CONFIGS["PiSSA"]))
    llfx.save(gm, file)
    for after in (model, gm, llfx.remove(gm), llfx.remove(llfx.load(model, file))):
        for name, tensor in before.items():
            assert torch.equal(after.get_parameter(name), tensor), name
            assert after.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr(), name


@pytest.mark.parametrize("example_inputs", [None, (torch.zeros(2, 3).long(),)], ids=["symbolic", "exported"])
@pytest.mark.parametrize("target", broad_after(1, ["target_roles", "target_names"]))
def test_pissa_on_a_tied_head_does_not_reach_the_embedding(target: str, example_inputs: Any) -> None:
    modules = {"embed": nn.Embedding(D_OUT, D_IN), "tanh": nn.Tanh(), "head": nn.Linear(D_IN, D_OUT)}
    model, ids = ready(nn.Sequential(OrderedDict(modules))), torch.arange(D_OUT).view(2, -1)
    model.head.weight = model.embed.weight
    targets: dict[str, Any] = {target: ("head",)}
    gm = llfx.rewrite(model, llfx.PiSSA(r=R, alpha=ALPHA, **targets), example_inputs)
    close(gm(ids), model(ids), 1e-12)
    changed = effective("PiSSA", model.head, tensors(randomised(gm), "head"))
    expected = F.linear(torch.tanh(model.embed(ids)), *changed)
    assert (expected - model(ids)).abs().max() > 0.1
    for adapted in (gm, llfx.merge(gm)):
        close(adapted(ids), expected)


@pytest.mark.parametrize("cls", [llfx.HRA, llfx.IA3])
def test_a_variant_without_dropout_refuses_it(cls: Any) -> None:
    with pytest.raises(llfx.ConfigError, match=f"{cls.__name__} has no dropout: remove dropout=0.1"):
        cls(dropout=0.1)


BAD = [(llfx.HRA, "r", 1), (llfx.HRA, "r", 3)] + [(llfx.DeLoRA, "lambda0", x) for x in (0, -0.0, math.inf)]


@pytest.mark.parametrize(("cls", "field", "value"), BAD)
def test_odd_rank_of_hra_and_zero_lambda_of_delora_are_refused(cls: Any, field: str, value: float) -> None:
    with pytest.raises(llfx.ConfigError, match=field):
        cls(**{field: value})


@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
@with_dropout
def test_dropout_drops_elements_of_the_branch_input_in_training_and_keeps_the_mean(name: str, how: Any) -> None:
    cfg = type(CONFIGS[name])(r=R, alpha=ALPHA, dropout=0.25, target_names=("fc",))
    adapted, x = randomised(how(single(), cfg)), sample(1, D_IN)
    expected = adapted(x).detach()
    adapted.train()

    def trained(seed: int, rows: int = 50) -> Tensor:
        torch.manual_seed(seed)
        y: Tensor = adapted(x.expand(rows, -1))
        return y.detach()

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
    assert (trained(0) - expected).abs().max() > 0.1
    torch.testing.assert_close(trained(0, 40_000).mean(0), expected[0], rtol=0.05, atol=0.05)
    assert len({tuple(row) for row in trained(0, 10_000).tolist()}) == 2**D_IN
    with torch.no_grad():
        adapted.get_parameter("fc.lora_B").zero_()
    close(trained(0), adapted.eval()(x).detach().expand(50, -1), 1e-12)
