"""Variants whose update is an elementwise or Kronecker product, or made of blocks: their formulas, written out entry
by entry, and their traps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.variants.lokr import _factors
from tests.support.selection import broad_after, slow_after
from tests.variants.test_low_rank import BF16, F64, close, grad_of, gradients, randomised, ready, sample, tensors

D_IN, D_OUT = 18, 24
FC: dict[str, Any] = {"target_names": ("fc",)}
CONFIGS = {
    "LoHa": llfx.LoHa(r=2, alpha=3.0, **FC),
    "LoHa of a high rank": llfx.LoHa(r=8, alpha=3.0, **FC),
    "LoKr": llfx.LoKr(r=2, alpha=3.0, **FC),
    "LoKr of full factors": llfx.LoKr(r=100, alpha=150.0, **FC),
    "LoKr of low ranks": llfx.LoKr(r=1, alpha=3.0, decompose_both=True, **FC),
    "LoKr of wide blocks": llfx.LoKr(r=1, alpha=3.0, decompose_factor=12, **FC),
    "MiSS": llfx.MiSS(r=6, **FC),
    "MiSS with a part of a block": llfx.MiSS(r=5, **FC),
    "MiSS mini": llfx.MiSS(r=5, mode="mini", mini_r=8, **FC),
    "MiSS bat": llfx.MiSS(r=6, mode="bat", **FC),
    "GraLoRA": llfx.GraLoRA(r=4, alpha=3.0, **FC),
    "GraLoRA hybrid": llfx.GraLoRA(r=6, alpha=3.0, k=3, hybrid_r=2, **FC),
    "HiRA": llfx.HiRA(r=4, **FC),
}
every_config = pytest.mark.parametrize("name", broad_after(3, CONFIGS))


def single(d_in: int = D_IN, d_out: int = D_OUT, dtype: torch.dtype = F64) -> Any:
    return ready(nn.Sequential(OrderedDict(fc=nn.Linear(d_in, d_out))), dtype)


def entries(entry: Callable[[int, int], Tensor], d_out: int = D_OUT, d_in: int = D_IN) -> Tensor:
    return torch.stack([torch.stack([entry(i, j) for j in range(d_in)]) for i in range(d_out)])


def update(name: str, w: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What a variant adds to the weight, entry by entry."""
    cfg = CONFIGS[name]
    if isinstance(cfg, llfx.LoHa):
        s = cfg.alpha / cfg.r
        return entries(lambda i, j: s * p["B1"][i].dot(p["A1"][:, j]) * p["B2"][i].dot(p["A2"][:, j]))
    if isinstance(cfg, llfx.LoKr):
        w1 = p["W1"] if "W1" in p else p["B1"] @ p["A1"]
        w2 = p["W2"] if "W2" in p else p["B2"] @ p["A2"]
        (k, n), s = w2.shape, cfg.alpha / cfg.r
        return entries(lambda i, j: s * w1[i // k, j // n] * w2[i % k, j % n])
    if isinstance(cfg, llfx.MiSS):
        d, r = p["D"], cfg.r
        if cfg.mode == "bat":
            return entries(
                lambda i, j: w[i, j - j % r : j - j % r + r].dot(d[i // r, :, j % r]) + d[i // r, i % r, j % r]
            )
        return entries(lambda i, j: d[j % r, i % d.shape[1]])
    if isinstance(cfg, llfx.GraLoRA):
        s, height, width, part = cfg.alpha / (cfg.r + cfg.hybrid_r), D_OUT // cfg.k, D_IN // cfg.k, cfg.r // cfg.k

        def entry(i: int, j: int) -> Tensor:
            row, column = i // height, j // width
            a = p["A"][column, j % width, row * part : (row + 1) * part]
            b = p["B"][row, column * part : (column + 1) * part, i % height]
            return s * a.dot(b)

        blocks = entries(entry)
        return blocks + s * p["hybrid_B"] @ p["hybrid_A"] if cfg.hybrid_r else blocks
    if isinstance(cfg, llfx.HiRA):
        return entries(lambda i, j: w[i, j] * p["B"][i].dot(p["A"][:, j]))
    raise AssertionError(name)


@every_config
def test_outputs_gradients_and_merged_weights_are_those_of_the_formula(name: str) -> None:
    model, x = single(), sample(3, 5, D_IN)
    gm, wrapped = (randomised(how(model, CONFIGS[name])) for how in (llfx.rewrite, llfx.wrap))
    p = {key: tensor.clone().requires_grad_() for key, tensor in tensors(gm, "fc").items()}
    weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
    weight = weight + update(name, weight, p)
    assert (weight - model.fc.weight).abs().max() > 0.1, "the adapter does nothing"
    expected = F.linear(x, weight, bias)
    (expected * sample(*expected.shape, seed=7)).sum().backward()
    for adapted in (gm, wrapped):
        grads = gradients(adapted, adapted(x))
        assert grads.keys() == {f"fc.lora_{key}" for key in p}
        for key, tensor in p.items():
            close(grads[f"fc.lora_{key}"], grad_of(tensor))
        close(adapted(x), expected)
        close(adapted(x[0, 0]), expected[0, 0])
    merged = llfx.merge(gm)
    close(merged.get_parameter("fc.weight").detach(), weight.detach())
    close(merged.get_parameter("fc.bias").detach(), bias)


@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
@pytest.mark.parametrize("dtype", broad_after(1, slow_after(2, [F64, torch.float32, BF16])), ids=str)
@every_config
def test_start_is_the_identity_exactly(name: str, dtype: torch.dtype, how: Any) -> None:
    model, x = single(dtype=dtype), sample(5, 3, D_IN, dtype=dtype)
    assert torch.equal(how(model, CONFIGS[name])(x), model(x))


@pytest.mark.broad
@every_config
def test_nothing_is_dead_after_two_steps(name: str) -> None:
    gm, x = llfx.rewrite(single(), CONFIGS[name]), sample(5, 3, D_IN)
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=1e-3)
    for _ in range(2):
        gradients(gm, gm(x))
        optimizer.step()
    for parameter, grad in gradients(gm, gm(x)).items():
        assert (grad != 0).all(), parameter


@pytest.mark.broad
@every_config
def test_a_bfloat16_base_and_autocast_keep_the_dtype_of_the_output(name: str) -> None:
    half, full = single(dtype=BF16), single(dtype=torch.float32)
    x, expected = sample(3, 5, D_IN), randomised(llfx.rewrite(single(), CONFIGS[name]))(sample(3, 5, D_IN)).detach()
    gm = randomised(llfx.rewrite(half, CONFIGS[name]))
    assert {tensor.dtype for tensor in llfx.adapter_state_dict(gm).values()} == {torch.float32}
    with torch.autocast("cpu", BF16):
        outputs = [randomised(llfx.rewrite(full, CONFIGS[name]))(x.float())]
    for y in (*outputs, gm(x.to(BF16))):
        assert y.dtype == BF16
        assert (y - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("r", broad_after(2, [1, 2, 3, 4]))
def test_loha_has_the_squared_rank_and_forms_no_weight_where_factors_are_cheaper(r: int) -> None:
    model = single()
    gm = randomised(llfx.rewrite(model, llfx.LoHa(r=r, **FC)))
    change = llfx.merge(gm).get_parameter("fc.weight") - model.fc.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == r**2
    multiplied = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    products = [tuple(n.meta["val"].shape) for n in multiplied]
    assert ((D_OUT, D_IN) in products) == (r == 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    broad_after(
        3,
        [
            ({"r": 3}, {"W1": (4, 3), "W2": (6, 6)}),
            ({"r": 2}, {"W1": (4, 3), "A2": (2, 6), "B2": (6, 2)}),
            ({"r": 2, "decompose_both": True}, {"W1": (4, 3), "A2": (2, 6), "B2": (6, 2)}),
            ({"r": 1, "decompose_both": True}, {"A1": (1, 3), "B1": (4, 1), "A2": (1, 6), "B2": (6, 1)}),
            ({"r": 8, "decompose_factor": 2}, {"W1": (2, 2), "W2": (12, 9)}),
            ({"r": 1, "decompose_factor": 1}, {"W1": (1, 1), "A2": (1, 18), "B2": (24, 1)}),
            ({"r": 8, "decompose_factor": 8}, {"W1": (8, 3), "W2": (3, 6)}),
        ],
        several=True,
    ),
)
def test_lokr_has_full_factors_from_half_their_larger_side_on(fields: Any, expected: Any) -> None:
    p = tensors(llfx.rewrite(single(), llfx.LoKr(**fields, **FC)), "fc")
    assert {name: tuple(tensor.shape) for name, tensor in p.items()} == expected


def test_lokr_factors_widths_as_peft_does() -> None:
    for wanted in (-1, *range(1, 13)):
        for width in range(1, 200):
            assert _factors(width, wanted) == factorization(width, wanted)


@pytest.mark.parametrize("r", [8, 100])
def test_lokr_draws_its_start_as_peft_does(r: int) -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(900, 1600)))
    kwargs: dict[str, Any] = {"r": r, "decompose_both": True}
    torch.manual_seed(0)
    ours = tensors(llfx.rewrite(model, llfx.LoKr(**kwargs, **FC)), "fc")
    reference = peft.get_peft_model(model, peft.LoKrConfig(target_modules=["fc"], **kwargs))
    theirs = {name.split(".")[-2]: tensor for name, tensor in reference.named_parameters() if "lokr" in name}
    assert len(ours) == len(theirs) == (4 if r == 8 else 2)
    for name, tensor in ours.items():
        key = f"lokr_w{name[1]}" + {"A": "_b", "B": "_a", "W": ""}[name[0]]
        assert tensor.shape == theirs[key].shape
        assert tensor.abs().max().item() == pytest.approx(theirs[key].abs().max().item(), rel=0.02)
        assert tensor.float().std().item() == pytest.approx(theirs[key].float().std().item(), rel=0.1)


@pytest.mark.parametrize("factor", [0, -2])
def test_lokr_refuses_a_factor_that_is_none(factor: int) -> None:
    with pytest.raises(llfx.ConfigError, match="decompose_factor must be positive, or -1"):
        llfx.LoKr(decompose_factor=factor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 19}, "r=19 is larger than site 'fc' allows .24 x 18.; use r <= 18"),
        ({"r": 4, "mode": "mini", "mini_r": 5}, "mini_r=5 does not divide the output of site 'fc' .24 x 18."),
        ({"r": 9, "mode": "bat"}, "r=9 does not divide site 'fc' .24 x 18."),
        ({"r": 8, "mode": "bat"}, "r=8 does not divide site 'fc' .24 x 18."),
        ({"mini_r": 0}, "mini_r must be a positive integer, got 0"),
        ({"mode": True}, "mode must be one of"),
    ],
)
def test_miss_refuses_what_does_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.rewrite(single(), llfx.MiSS(**fields, **FC))


def test_miss_takes_a_rank_above_the_number_of_outputs() -> None:
    gm = randomised(llfx.rewrite(single(D_OUT, 6), llfx.MiSS(r=8, **FC)))
    assert gm(sample(3, D_OUT)).shape == (3, 6)


@pytest.mark.parametrize(
    "cfg",
    broad_after(
        2,
        [
            llfx.MiSS(r=6, dropout=0.25, **FC),
            llfx.MiSS(r=6, mode="mini", dropout=0.25, **FC),
            llfx.MiSS(r=6, mode="bat", dropout=0.25, **FC),
            llfx.GraLoRA(r=4, dropout=0.25, **FC),
            llfx.GraLoRA(r=4, hybrid_r=2, dropout=0.25, **FC),
            llfx.HiRA(r=4, dropout=0.25, **FC),
        ],
    ),
    ids=str,
)
def test_dropout_drops_elements_of_the_input_of_the_branch(cfg: llfx.Variant) -> None:
    model, x = single(), sample(3, 5, D_IN)
    gm = randomised(llfx.rewrite(model, cfg))
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.25)
    expected = model(x) + gm(dropped) - model(dropped)
    assert (expected - gm(x)).abs().max() > 0.1
    torch.manual_seed(0)
    close(gm.train()(x), expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gralora_has_k_times_the_rank_for_the_parameters_of_lora(k: int) -> None:
    model = single()
    gm = randomised(llfx.rewrite(model, llfx.GraLoRA(r=6, k=k, **FC)))
    change = llfx.merge(gm).get_parameter("fc.weight") - model.fc.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == min(6 * k, D_IN)
    assert sum(parameter.numel() for parameter in llfx.adapter_parameters(gm)) == 6 * (D_IN + D_OUT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 3}, "r=3 must be a multiple of k=2"),
        ({"r": 4, "rank_pattern": {"fc": 3}}, "r=3 must be a multiple of k=2"),
        ({"r": 5, "k": 5}, "k=5 does not divide site 'fc' .24 x 18. into equal blocks"),
        ({"r": 4, "k": 4}, "k=4 does not divide site 'fc' .24 x 18. into equal blocks"),
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"hybrid_r": -1}, "hybrid_r must not be negative, got -1"),
    ],
)
def test_gralora_refuses_what_does_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.rewrite(single(), llfx.GraLoRA(**fields, **FC))


def test_hira_multiplies_the_rank_of_the_weight_and_leaves_its_zeros() -> None:
    model = single()
    weight = sample(D_OUT, 3, seed=1) @ sample(3, D_IN, seed=2)
    weight[4] = 0
    model.fc.weight.data = weight
    gm = randomised(llfx.rewrite(model, llfx.HiRA(r=4, **FC)))
    change = llfx.merge(gm).get_parameter("fc.weight") - weight
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 3 * 4
    assert torch.equal(change[4], torch.zeros_like(change[4]))
