"""Variants with random frozen parts: their formulas, written out a second time, and tensors that sites share."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.selection import broad_after, slow_after
from tests.variants.test_low_rank import (
    ALPHA,
    BF16,
    D_IN,
    D_OUT,
    F64,
    Conv1DNet,
    Net,
    R,
    close,
    grad_of,
    gradients,
    randomised,
    ready,
    sample,
    weight_of,
)
from tests.variants.test_low_rank import tensors as own_tensors

CONFIGS: dict[str, Any] = {
    "VeRA": llfx.VeRA(r=R, projection_seed=3, target_names=("fc",)),
    "RandLoRA": llfx.RandLoRA(r=R, alpha=ALPHA, projection_seed=3, target_names=("fc",)),
    "FourierFT": llfx.FourierFT(n_frequency=20, scaling=5.0, spectrum="zeros", target_names=("fc",)),
}
SHARED = {
    "VeRA": ("lora_shared_vera_A", "lora_shared_vera_B"),
    "RandLoRA": ("lora_shared_randlora_A", "lora_shared_randlora_B"),
}
every_variant = pytest.mark.parametrize("name", broad_after(3, CONFIGS))
every_sharing = pytest.mark.parametrize("name", SHARED)
captures = pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "exported"])


class Small(nn.Module):
    """No side of a linear is the largest of the sites': each reads a part of the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 9), nn.Linear(9, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return y


def tensors(model: nn.Module, site: str) -> dict[str, Tensor]:
    """The adapter's tensors at a site and those that it shares, by the names that formulas use."""
    shared = {name.rpartition("_")[2]: t for name, t in llfx.adapter_state_dict(model).items() if "." not in name}
    return own_tensors(model, site) | shared


def delta(name: str, p: dict[str, Tensor], d_in: int, d_out: int, r: int = R) -> Tensor:
    """What a variant adds to a weight `(d_out, d_in)`, term by term."""
    total = torch.zeros(d_out, d_in, dtype=F64)
    if name == "VeRA":
        for k in range(r):
            total += p["ld"][k] * torch.outer(p["lb"] * p["B"][:d_out, k], p["A"][k, :d_in])
    elif name == "RandLoRA":
        m, larger = sorted((d_in, d_out))
        n = math.ceil(m / r)
        columns = [p["B"][:larger, j, i] for j in range(n) for i in range(r)]
        for i in range(r):
            for j in range(n):
                row = p["lambda"][i, j] * p["A"][i, :m] * p["gamma"][j]
                term = torch.outer(columns[i * n + j], row)
                total += ALPHA / r * (term if m == d_in else term.t())
    else:
        row_of, column_of = torch.arange(d_out)[:, None], torch.arange(d_in)
        for coefficient, index in zip(p["spectrum"], p["index"].tolist(), strict=True):
            frequency, other = divmod(index, d_in)
            wave = torch.cos(2 * math.pi * (frequency * row_of.double() / d_out + other * column_of.double() / d_in))
            total += 5.0 * coefficient * wave / (d_out * d_in)
    return total


# The formulas.


@captures
@pytest.mark.parametrize("cls", broad_after(1, slow_after(1, [Net, Conv1DNet])))
@every_variant
def test_rewrite_wrap_and_merge_compute_the_formula(name: str, cls: Any, exported: bool) -> None:
    model, x = ready(cls()), sample(3, 5, D_IN)
    gm = randomised(llfx.rewrite(model, CONFIGS[name], (sample(2, 4, D_IN),) if exported else None))
    weights = [
        weight_of(fc) + delta(name, tensors(gm, site), *weight_of(fc).shape[::-1])
        for site, fc in (("fc1", model.fc1), ("fc2", model.fc2))
    ]
    expected = x + F.linear(F.gelu(F.linear(x, weights[0], model.fc1.bias)), weights[1], model.fc2.bias)
    assert (expected - model(x)).abs().max() > 0.1, "the adapters do nothing"
    merged = llfx.merge(gm)
    for adapted in (gm, merged, randomised(llfx.wrap(model, CONFIGS[name]))):
        close(adapted(x), expected)
    for site, weight in zip(("fc1", "fc2"), weights, strict=True):
        stored = merged.get_parameter(f"{site}.weight")
        close(stored.t() if cls is Conv1DNet else stored, weight)
        close(merged.get_parameter(f"{site}.bias"), model.get_parameter(f"{site}.bias").detach())


@pytest.mark.broad
@every_sharing
def test_sites_of_any_size_read_the_first_rows_and_columns_of_the_projections(name: str) -> None:
    model = ready(Small())
    merged = llfx.merge(gm := randomised(llfx.rewrite(model, CONFIGS[name])))
    for site in ("fc1", "fc2", "fc3"):
        weight = model.get_parameter(f"{site}.weight")
        changed = merged.get_parameter(f"{site}.weight") - weight
        close(changed, delta(name, tensors(gm, site), *weight.shape[::-1]))


@pytest.mark.broad
@every_sharing
def test_sites_of_other_ranks_read_a_part_of_projections_of_the_largest(name: str) -> None:
    model, ranks = ready(Small()), {"fc1": 3, "fc2": R, "fc3": 1}
    cfg = dataclasses.replace(CONFIGS[name], rank_pattern={"fc1": 3, "fc3": 1})
    merged = llfx.merge(gm := randomised(llfx.rewrite(model, cfg)))
    for site, r in ranks.items():
        weight = model.get_parameter(f"{site}.weight")
        changed = merged.get_parameter(f"{site}.weight") - weight
        close(changed, delta(name, tensors(gm, site), weight.shape[1], weight.shape[0], r))


@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("dtype", broad_after(1, [F64, torch.float32, BF16]), ids=str)
@every_variant
def test_start_is_the_identity(name: str, dtype: torch.dtype, how: Any) -> None:
    model, x = ready(Net(), dtype), sample(5, 3, D_IN, dtype=dtype)
    adapted = how(model, CONFIGS[name])
    assert torch.equal(adapted(x), model(x))
    assert all(tensor.isfinite().all() for tensor in llfx.adapter_state_dict(adapted).values())


WAITING = {"VeRA": {"lora_ld"}, "RandLoRA": {"lora_gamma"}}  # for a factor that starts at zero


@every_variant
def test_each_element_gets_a_gradient_at_the_start_or_a_step_later(name: str) -> None:
    gm, x = llfx.rewrite(ready(Net()), CONFIGS[name]), sample(5, 3, D_IN)
    for parameter, grad in gradients(gm, gm(x)).items():
        dead = parameter.rpartition(".")[2] in WAITING.get(name, ())
        assert ((grad == 0) == dead).all(), parameter
    torch.optim.SGD(llfx.adapter_parameters(gm), lr=1e-3).step()
    for parameter, grad in gradients(gm, gm(x)).items():
        assert (grad != 0).all(), f"{parameter} is dead after a step"


@pytest.mark.broad
@every_variant
def test_tensors_are_float32_on_a_bfloat16_base_and_autocast_changes_no_more_than_rounding(name: str) -> None:
    gm, x = randomised(llfx.rewrite(ready(Net(), BF16), CONFIGS[name])), sample(5, 3, D_IN, dtype=BF16)
    floating = [tensor.dtype for tensor in llfx.adapter_state_dict(gm).values() if tensor.is_floating_point()]
    assert set(floating) == {torch.float32}
    assert gm(x).dtype == BF16
    gm, x = randomised(llfx.rewrite(ready(Net(), torch.float32), CONFIGS[name])), sample(5, 3, D_IN).float()
    with torch.autocast("cpu", BF16):
        y = gm(x)
    close(y.float(), gm(x), 0.1 * gm(x).abs().max().item())


# What is drawn.


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, SHARED))
def test_projections_follow_from_the_seed_alone(name: str) -> None:
    models = {dtype: ready(Net(), dtype) for dtype in (F64, torch.float32, BF16)}
    before = torch.get_rng_state()

    def drawn(dtype: torch.dtype = F64, **changed: Any) -> list[Tensor]:
        cfg = type(CONFIGS[name])(r=R, target_names=("fc",), **changed)
        state = llfx.adapter_state_dict(llfx.rewrite(models[dtype], cfg))
        return [state[shared] for shared in SHARED[name]]

    first = drawn(projection_seed=7)
    for again in (drawn(projection_seed=7), drawn(torch.float32, projection_seed=7), drawn(BF16, projection_seed=7)):
        for ours, same in zip(first, again, strict=True):
            assert torch.equal(ours, same.double())
    for ours, other in zip(first, drawn(projection_seed=8), strict=True):
        assert not torch.equal(ours, other)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the user's"


@pytest.mark.broad
@every_sharing
def test_given_sizes_make_the_projections_of_adapters_at_other_sites_the_same(name: str) -> None:
    def drawn(target: str, **sizes: int) -> dict[str, Tensor]:
        cfg = type(CONFIGS[name])(r=2, target_names=(target,), **sizes)
        state = llfx.adapter_state_dict(llfx.rewrite(ready(Small()), cfg))
        return {shared: state[shared] for shared in SHARED[name]}

    sizes = {"shared_d_in": 12, "shared_d_out": 9, "shared_r": R}
    one, other = drawn("fc1", **sizes), drawn("fc3", **sizes)
    assert all(torch.equal(tensor, other[shared]) for shared, tensor in one.items())
    assert all(tensor.shape != one[shared].shape for shared, tensor in drawn("fc1").items())


@pytest.mark.parametrize("size", ["shared_r", "shared_d_in", "shared_d_out"])
@every_sharing
def test_projections_that_are_too_small_for_a_site_are_refused(name: str, size: str) -> None:
    cfg = type(CONFIGS[name])(r=R, target_names=("fc",), **{size: 3})
    with pytest.raises(llfx.ConfigError, match=rf"{size}=3 is too small for site 'fc1', which needs"):
        llfx.rewrite(ready(Net()), cfg)


@every_sharing
def test_a_file_whose_config_lost_the_sizes_of_the_projections_is_refused(name: str, tmp_path: Path) -> None:
    model, file = ready(Net()), tmp_path / "adapter.safetensors"
    llfx.save(llfx.rewrite(model, CONFIGS[name]), file)
    with safe_open(file, "pt") as saved:
        state, metadata = {key: saved.get_tensor(key) for key in saved.keys()}, saved.metadata()  # noqa: SIM118
    document = json.loads(metadata["lora_lite_fx"])
    document["adapters"][0]["config"]["shared_d_in"] = 0
    save_file(state, file, {"lora_lite_fx": json.dumps(document)})
    with pytest.raises(llfx.AdapterError, match="no sizes before rewrite settles them"):
        llfx.load(model, file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projection_seed", -1),
        ("projection_seed", 2**64),
        ("projection_seed", 0.5),
        ("shared_r", -1),
        ("shared_d_in", -1),
    ],
)
@every_sharing
def test_impossible_seeds_and_sizes_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(llfx.ConfigError, match=field):
        type(CONFIGS[name])(**{field: value})


def test_vera_refuses_a_start_that_cannot_train() -> None:
    with pytest.raises(llfx.ConfigError, match="d_initial"):
        llfx.VeRA(d_initial=0.0)


@pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
def test_sparse_bases_of_randlora_hold_two_opposite_values_and_zeros_in_their_share(basis: Any) -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    gm = llfx.rewrite(model, llfx.RandLoRA(r=30, basis=basis, target_names=("0",)))
    expected = 1 / 3 if basis == "sparse" else 1 / math.sqrt(300)
    for name in SHARED["RandLoRA"]:
        bases = gm.get_buffer(name)
        values = bases.unique()
        assert len(values) == 3
        assert values[1] == 0
        assert values[0] == -values[2]
        assert bases.std().item() == pytest.approx(1, abs=1e-4)
        assert (bases != 0).float().mean().item() == pytest.approx(expected, rel=0.1)


def test_randlora_has_the_rank_of_the_weight_whatever_its_own() -> None:
    gm = randomised(llfx.rewrite(model := ready(Net()), llfx.RandLoRA(r=2, target_names=("fc",))))
    merged = llfx.merge(gm)
    for site in ("fc1", "fc2"):
        changed = merged.get_parameter(f"{site}.weight") - model.get_parameter(f"{site}.weight")
        assert torch.linalg.matrix_rank(changed) == min(D_IN, D_OUT)


def test_randlora_refuses_too_few_bases_and_bases_that_are_one_number() -> None:
    with pytest.raises(llfx.ConfigError, match="shared_bases=1 is too small for site 'fc1', which needs 2"):
        llfx.rewrite(ready(Net()), llfx.RandLoRA(r=R, shared_bases=1, target_names=("fc",)))
    with pytest.raises(llfx.ConfigError, match="all one number; use a larger r"):
        llfx.rewrite(nn.Sequential(nn.Linear(5, 1)), llfx.RandLoRA(r=1, target_names=("0",)))


class Plain(nn.Module):
    """Two sites of one size, and one with fewer frequencies than asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(60, 40), nn.Linear(40, 2), nn.Linear(60, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.tanh(self.fc1(x) + self.fc3(x)))
        return y


@pytest.mark.broad
def test_fourierft_takes_the_frequencies_of_peft_and_all_where_there_are_fewer() -> None:
    model = Plain()
    gm = llfx.rewrite(model, llfx.FourierFT(n_frequency=500, target_names=("fc",)))
    config = peft.FourierFTConfig(n_frequency=500, target_modules=["fc1", "fc3"])
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    for site in ("fc1", "fc3"):
        module: Any = reference.get_submodule(f"base_model.model.{site}")
        rows, columns = module.indices["default"]
        index = gm.get_buffer(f"{site}.lora_index")
        assert index.dtype == torch.int64
        assert torch.equal(index, rows * 60 + columns)
    assert sorted(gm.get_buffer("fc2.lora_index").tolist()) == list(range(80))
    other = llfx.rewrite(model, llfx.FourierFT(n_frequency=500, seed=1, target_names=("fc1",)))
    assert not torch.equal(other.get_buffer("fc1.lora_index"), gm.get_buffer("fc1.lora_index"))


def test_fourierft_starts_from_standard_normal_coefficients_which_are_not_the_identity() -> None:
    model, x = nn.Sequential(nn.Linear(300, 200)), torch.randn(2, 300)
    gm = llfx.rewrite(model, llfx.FourierFT(n_frequency=20_000, target_names=("0",)))
    spectrum = gm.get_parameter("0.lora_spectrum")
    assert spectrum.mean().abs() < 0.03
    assert spectrum.std().item() == pytest.approx(1, rel=0.03)
    assert (spectrum.abs() < 1).double().mean().item() == pytest.approx(0.683, rel=0.03)
    assert (gm(x) - model(x)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_fourierft_transforms_in_float32_or_wider_under_autocast_too(dtype: torch.dtype) -> None:
    model, x = ready(Net(), dtype), sample(5, D_IN, dtype=dtype)
    gm = randomised(llfx.rewrite(model, dataclasses.replace(CONFIGS["FourierFT"], dtype=dtype), (x,)))
    exact = randomised(llfx.rewrite(ready(Net(), F64), CONFIGS["FourierFT"]))
    with torch.autocast("cpu", BF16):
        y = gm(x)
    y.float().sum().backward()
    assert all(grad_of(parameter).isfinite().all() for parameter in llfx.adapter_parameters(gm))
    close(y.double(), exact(x.double()), 0.05 * exact(x.double()).abs().max().item())


@pytest.mark.parametrize(("field", "value"), [("n_frequency", 0), ("scaling", 0.0), ("seed", -1), ("spectrum", "one")])
def test_fourierft_refuses_impossible_fields(field: str, value: Any) -> None:
    with pytest.raises(llfx.ConfigError, match=field):
        llfx.FourierFT(**{field: value})


# Tensors that all sites share.


def shared_names(model: nn.Module) -> list[str]:
    return [name for name in llfx.adapter_state_dict(model) if name.startswith("lora_shared_")]


def storages(model: nn.Module, name: str) -> set[int]:
    """Where the buffers are, of any name, that end in a name."""
    return {
        buffer.data_ptr()
        for path, buffer in model.named_buffers(remove_duplicate=False)
        if path.rpartition(".")[2] == name
    }


@captures
@every_sharing
def test_a_graph_holds_each_shared_tensor_once(name: str, exported: bool) -> None:
    gm = llfx.rewrite(ready(Small()), CONFIGS[name], (sample(2, 3),) if exported else None)
    assert tuple(shared_names(gm)) == SHARED[name]
    for shared in SHARED[name]:
        assert [path for path, _ in gm.named_buffers(remove_duplicate=False) if shared in path] == [shared]
        readers = [node for node in gm.graph.nodes if node.op == "get_attr" and "lora_shared" in node.target]
        assert {node.target for node in readers} == set(SHARED[name])
    trained = {id(parameter) for parameter in llfx.adapter_parameters(gm)}
    assert not trained & {id(gm.get_buffer(shared)) for shared in SHARED[name]}


@every_sharing
def test_wrapped_modules_see_the_same_object(name: str) -> None:
    wrapped = llfx.wrap(ready(Small()), CONFIGS[name])
    assert tuple(shared_names(wrapped)) == SHARED[name]
    for shared in SHARED[name]:
        owner = wrapped.get_buffer(shared)
        modules: list[Any] = [wrapped.get_submodule(site) for site in ("fc1", "fc2", "fc3")]
        read = [vars(placement.namespace(wrapped)) for module in modules for placement in module.placements]
        assert [tensors[shared] is owner for tensors in read] == [True] * 3
        assert [path for path, _ in wrapped.named_buffers(remove_duplicate=False) if shared in path] == [shared]
        assert [path for path in wrapped.state_dict() if shared in path] == [shared]


@pytest.mark.broad
@every_sharing
def test_shared_tensors_are_saved_once_and_come_back(name: str, tmp_path: Path) -> None:
    model, file, x = ready(Small()), tmp_path / "adapter.safetensors", sample(4, 3)
    for how in (llfx.rewrite, llfx.wrap):
        llfx.save(adapted := randomised(how(model, CONFIGS[name])), file)
        with safe_open(file, "pt") as saved:
            assert sorted(key for key in saved.keys() if "shared" in key) == sorted(SHARED[name])  # noqa: SIM118
            config = json.loads(saved.metadata()["lora_lite_fx"])["adapters"][0]["config"]
        assert {field: config[field] for field in ("shared_r", "shared_d_in", "shared_d_out")} == {
            "shared_r": R,
            "shared_d_in": 9,
            "shared_d_out": 9,
        }
        loaded = llfx.load(model, file)
        assert tuple(shared_names(loaded)) == SHARED[name]
        for key, tensor in llfx.adapter_state_dict(adapted).items():
            assert torch.equal(llfx.adapter_state_dict(loaded)[key], tensor)
        close(loaded(x), adapted(x), 1e-14)


@pytest.mark.broad
@pytest.mark.parametrize("again", [llfx.rewrite, llfx.load], ids=["rewritten", "loaded"])
@every_sharing
def test_a_second_adapter_has_shared_tensors_of_its_own(name: str, again: Any, tmp_path: Path) -> None:
    model, file, x = ready(Small()), tmp_path / "adapter.safetensors", sample(4, 3)
    # Not the sites of the first, hence other sizes too.
    second = type(CONFIGS[name])(r=2, projection_seed=9, target_names=("fc2", "fc3"))
    alone = randomised(llfx.rewrite(model, second), seed=500)
    first = randomised(llfx.rewrite(model, CONFIGS[name]))
    kept = {key: tensor.clone() for key, tensor in llfx.adapter_state_dict(first).items()}
    llfx.save(alone, file)
    both = llfx.rewrite(first, second) if again is llfx.rewrite else llfx.load(first, file, stack=True)
    state = llfx.adapter_state_dict(both)
    values = {f"{key}_2": tensor for key, tensor in llfx.adapter_state_dict(alone).items()}
    llfx.load_adapter_state_dict(both, {**state, **values})
    assert state.keys() == kept.keys() | values.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    if again is llfx.load:
        assert all(torch.equal(state[key], tensor) for key, tensor in values.items())
    together = llfx.wrap(model, [CONFIGS[name], second])
    llfx.load_adapter_state_dict(together, {**kept, **values})
    for adapted in (both, llfx.merge(both)):
        close(adapted(x), together(x))


@captures
@every_sharing
def test_shared_tensors_are_gone_after_removal_and_merge(name: str, exported: bool) -> None:
    model, example = ready(Small()), (sample(2, 3),) if exported else None
    gm = llfx.rewrite(model, [CONFIGS[name], CONFIGS[name]], example)
    assert len(shared_names(gm)) == 4
    for plain in (llfx.remove(gm), llfx.merge(gm)):
        assert plain.state_dict().keys() == model.state_dict().keys()
        assert not [name for name in dir(plain) if "lora" in name]
        assert "lora" not in str(plain.graph)
