"""Variants that rotate: their matrices written out a second time, entry by entry, and their traps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.selection import broad_after, slow_after
from tests.variants.test_low_rank import BF16, F64, close, gradients, randomised, ready, sample, tensors

D_IN, D_OUT = 16, 24
Adapted = tuple[Tensor, Tensor]


def single(dtype: torch.dtype = F64) -> Any:
    return ready(nn.Sequential(OrderedDict(fc=nn.Linear(D_IN, D_OUT))), dtype)


# The formulas: the weight and bias that a variant makes of `w` and `b`.


def road(cfg: Any, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Adapted:
    rotation, half = torch.zeros(D_OUT, D_OUT, dtype=F64), cfg.group_size // 2
    theta, alpha = p["road_theta"], p["road_alpha"]
    for start in range(0, D_OUT, cfg.group_size):
        for u in range(start, start + half):
            v = u + half
            # Where the angle and the scale of each entry stand: of (u, u), (u, v), (v, u), (v, v).
            at = {
                "road_1": [start // 2 + u - start] * 4,
                "road_2": [u, u, v, v],
                "road_4": [start + u, start + u + cfg.group_size, start + v + cfg.group_size, start + v],
            }[cfg.kind]
            rotation[u, u] = alpha[at[0]] * theta[at[0]].cos()
            rotation[u, v] = -alpha[at[1]] * theta[at[1]].sin()
            rotation[v, u] = alpha[at[2]] * theta[at[2]].sin()
            rotation[v, v] = alpha[at[3]] * theta[at[3]].cos()
    return rotation @ w, rotation @ b


def oft(cfg: Any, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Adapted:
    size = cfg.block_size
    one = torch.eye(size, dtype=F64)
    blocks = []
    for upper in p["oft_R"]:
        q, values = torch.zeros(size, size, dtype=F64), iter(upper)
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(values)
                q[j, i] = -q[i, j]
        series = one - 2 * q + 2 * q @ q - 2 * q @ q @ q + q @ q @ q @ q
        blocks.append(series if cfg.use_cayley_neumann else torch.linalg.inv(one - q) @ (one + q))
    return w @ torch.block_diag(*blocks), b


def orthogonal_hra(cfg: Any, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Adapted:
    basis: list[Tensor] = []
    for vector in p["U"]:
        for earlier in basis:
            vector = vector - vector.dot(earlier) * earlier
        basis.append(vector / vector.norm())
        w = w - 2 * torch.outer(w @ basis[-1], basis[-1])
    return w, b


def boft(cfg: Any, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Adapted:
    size, one = cfg.block_size, torch.eye(cfg.block_size, dtype=F64)
    half = size // 2
    for i, factor in enumerate(p["boft_R"]):
        # Half blocks that have all bits of their number but bit i in common are a group.
        groups: dict[int, list[int]] = {}
        for number in range(D_IN // half):
            group = number >> (i + 1) << i | number & (1 << i) - 1
            groups.setdefault(group, []).extend(range(number * half, (number + 1) * half))
        butterfly = torch.zeros(D_IN, D_IN, dtype=F64)
        for group, members in groups.items():
            q = (factor[group] - factor[group].t()) / 2
            turn = torch.linalg.inv(one - q) @ (one + q)
            for j, row in enumerate(members):
                for k, column in enumerate(members):
                    butterfly[row, column] = turn[j, k]
        w = w @ butterfly
    return torch.diag(p["boft_s"]) @ w, b


def c3a(cfg: Any, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Adapted:
    kernels, size = p["c3a_kernel"], cfg.block_size
    circulant = torch.zeros(D_OUT, D_IN, dtype=F64)
    for o in range(D_OUT):
        for i in range(D_IN):
            circulant[o, i] = kernels[o // size, i // size, (i - o) % size]
    return w + circulant / D_IN, b


CASES: dict[str, tuple[llfx.Variant, Callable[..., Adapted]]] = {
    "RoAd 1": (llfx.RoAd(kind="road_1", group_size=8, target_names=("fc",)), road),
    "RoAd 2": (llfx.RoAd(kind="road_2", group_size=4, target_names=("fc",)), road),
    "RoAd 4": (llfx.RoAd(kind="road_4", group_size=12, target_names=("fc",)), road),
    "OFT": (llfx.OFT(block_size=8, use_cayley_neumann=False, target_names=("fc",)), oft),
    "OFT by Neumann series": (llfx.OFT(block_size=4, target_names=("fc",)), oft),
    "BOFT": (llfx.BOFT(target_names=("fc",)), boft),
    "BOFT of 3 factors": (llfx.BOFT(block_size=4, butterfly_factors=3, target_names=("fc",)), boft),
    "C3A": (llfx.C3A(block_size=8, init_weights="zeros", target_names=("fc",)), c3a),
    "C3A of small blocks": (llfx.C3A(block_size=2, init_weights="zeros", target_names=("fc",)), c3a),
    "HRA orthogonal": (llfx.HRA(r=5, orthogonal=True, target_names=("fc",)), orthogonal_hra),
}
some_cases = pytest.mark.parametrize("name", broad_after(3, CASES))


# All of them.


@pytest.mark.parametrize("example_inputs", broad_after(1, [None, (sample(2, 4, D_IN),)]), ids=["symbolic", "exported"])
@some_cases
def test_rewrite_wrap_and_merge_compute_the_formula(name: str, example_inputs: Any) -> None:
    cfg, formula = CASES[name]
    model, x = single(), sample(3, 5, D_IN)
    gm = randomised(llfx.rewrite(model, cfg, example_inputs))
    weight, bias = formula(cfg, model.fc.weight.detach(), model.fc.bias.detach(), tensors(gm, "fc"))
    expected = F.linear(x, weight, bias)
    assert (expected - model(x)).abs().max() > 0.05, "the adapter does nothing"
    merged = llfx.merge(gm)
    for adapted in (gm, merged, randomised(llfx.wrap(model, cfg))):
        close(adapted(x), expected)
    close(merged.get_parameter("fc.weight").detach(), weight)
    close(merged.get_parameter("fc.bias").detach(), bias)


STARTS_ELSEWHERE = ("HRA orthogonal",)


@pytest.mark.parametrize("dtype", broad_after(1, slow_after(2, [F64, torch.float32, BF16])), ids=str)
@pytest.mark.parametrize("name", broad_after(4, [name for name in CASES if name not in STARTS_ELSEWHERE]))
def test_start_is_the_identity_exactly(name: str, dtype: torch.dtype) -> None:
    model, x = single(dtype), sample(5, 3, D_IN, dtype=dtype)
    assert torch.equal(llfx.rewrite(model, CASES[name][0])(x), model(x))


@pytest.mark.broad
@some_cases
def test_on_a_bfloat16_base_and_under_autocast_only_the_linear_is_in_half_precision(name: str) -> None:
    cfg, x = CASES[name][0], sample(64, D_IN)
    exact = randomised(llfx.rewrite(single(), cfg))
    expected = exact(x).detach()
    half = randomised(llfx.rewrite(single(BF16), cfg))
    assert {tensor.dtype for tensor in llfx.adapter_state_dict(half).values()} == {torch.float32}
    y = half(x.to(BF16))
    gradients(half, y)
    single_precision = randomised(llfx.rewrite(single(torch.float32), cfg))
    with torch.autocast("cpu", BF16):
        # Behind another linear, which the graph was not captured for, the input is in half precision.
        under_autocast = [single_precision(x.float()), single_precision(x.to(BF16))]
    for actual in (y, *under_autocast):
        assert actual.dtype == BF16
        assert (actual - expected).norm() < 0.02 * expected.norm()


@some_cases
def test_exported_and_compiled_graphs_take_other_shapes(name: str) -> None:
    gm = randomised(llfx.rewrite(single(), CASES[name][0], (sample(2, 4, D_IN),)))
    x = sample(5, 3, D_IN)
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(gm, (sample(2, 4, D_IN),), dynamic_shapes=dims)
    close(program.module()(x), gm(x))
    compiled: Any = torch.compile(gm, fullgraph=True, backend="aot_eager", dynamic=True)
    close(compiled(x), gm(x))


# Their traps.


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (llfx.RoAd(), "group_size=64 does not divide the 24 outputs"),
        (llfx.RoAd(group_size=16), "group_size=16 does not divide the 24 outputs"),
        (llfx.OFT(), "block_size=32 does not divide the 16 inputs"),
        (llfx.OFT(block_size=12), "block_size=12 does not divide the 16 inputs"),
        (llfx.C3A(), "block_size=256 does not divide both sides .* use 8 or a divisor"),
        (llfx.C3A(block_size=16), "block_size=16 does not divide both sides .* use 8 or a divisor"),
        (llfx.BOFT(block_size=6), "block_size=6 does not divide the 16 inputs"),
        (llfx.BOFT(block_size=8, butterfly_factors=3), "is 32, which does not divide the 16 inputs"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_a_site_are_refused(cfg: Any, words: str) -> None:
    for how in (llfx.rewrite, llfx.wrap):
        with pytest.raises(llfx.ConfigError, match=words):
            how(single(), type(cfg)(**{**vars(cfg), "target_names": ("fc",)}))


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (llfx.RoAd, {"group_size": 0}),
        (llfx.RoAd, {"group_size": 3}),
        (llfx.RoAd, {"group_size": -2}),
        (llfx.RoAd, {"kind": "road_3"}),
        (llfx.OFT, {"block_size": 0}),
        (llfx.OFT, {"block_size": 1}),
        (llfx.OFT, {"use_cayley_neumann": 5}),
        (llfx.BOFT, {"block_size": 1}),
        (llfx.BOFT, {"block_size": 3, "butterfly_factors": 2}),
        (llfx.BOFT, {"butterfly_factors": 0}),
        (llfx.C3A, {"block_size": 0}),
        (llfx.C3A, {"init_weights": True}),
    ],
    ids=str,
)
def test_impossible_fields_are_refused(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(llfx.ConfigError, match=next(iter(fields))):
        cls(**fields)


def test_road_1_turns_pairs_by_their_angle_and_the_bias_with_them() -> None:
    model = single()
    gm = llfx.rewrite(model, llfx.RoAd(group_size=D_OUT, target_names=("fc",)))
    with torch.no_grad():
        gm.get_parameter("fc.lora_road_theta").fill_(torch.pi / 2)
    u, v = model.fc.bias.detach().chunk(2)
    close(gm(torch.zeros(D_IN, dtype=F64)).detach(), torch.cat((-v, u)))


def rotation(gm: Any) -> Tensor:
    """The `R` of `W R`."""
    inverse: Tensor = torch.linalg.pinv(single().fc.weight.detach())
    r: Tensor = inverse @ llfx.merge(gm).get_parameter("fc.weight").detach()
    return r


@pytest.mark.broad
def test_oft_is_orthogonal_with_cayley_and_with_the_series_only_near_the_start() -> None:
    one = torch.eye(D_IN, dtype=F64)
    for neumann, scale, error in ((False, 1.0, 1e-10), (True, 1.0, None), (True, 1e-2, 1e-3)):
        cfg = llfx.OFT(block_size=4, use_cayley_neumann=neumann, target_names=("fc",))
        gm = randomised(llfx.rewrite(single(), cfg))
        gm.get_parameter("fc.lora_oft_R").data.mul_(scale)
        r = rotation(gm)
        assert (r - one).abs().max() > 0.01, "it hardly turns"
        off = (r @ r.t() - one).abs().max()
        assert off > 0.1 if error is None else off < error


def test_oft_turns_the_other_way_with_the_series() -> None:
    turned = []
    for neumann in (False, True):
        cfg = llfx.OFT(block_size=4, use_cayley_neumann=neumann, target_names=("fc",))
        gm = randomised(llfx.rewrite(single(), cfg))
        gm.get_parameter("fc.lora_oft_R").data.mul_(1e-2)
        turned.append(rotation(gm))
    close(turned[0], turned[1].t(), 1e-4)
    assert (turned[0] - turned[1]).abs().max() > 0.05


def test_orthogonal_hra_reflects_the_span_of_its_vectors_from_the_start_on() -> None:
    gm = llfx.rewrite(single(), CASES["HRA orthogonal"][0])
    u = gm.get_parameter("fc.lora_U")
    assert torch.linalg.matrix_rank(u) == 5, "no vector repeats another"
    r = rotation(gm)
    close(torch.linalg.eigvalsh(r), torch.tensor([-1.0] * 5 + [1.0] * (D_IN - 5), dtype=F64))
    close(u @ r.t(), -u)
    mixed = (torch.randn(5, 5, dtype=F64) @ u).detach()
    u.data.copy_(mixed)
    close(rotation(gm), r, 1e-8)


def test_orthogonal_hra_gets_a_gradient_for_every_element_from_the_start() -> None:
    gm = llfx.rewrite(single(), CASES["HRA orthogonal"][0])
    (grad,) = gradients(gm, gm(sample(7, D_IN))).values()
    assert (grad != 0).all()


@pytest.mark.broad
def test_boft_connects_twice_as_many_inputs_with_each_factor_and_is_orthogonal() -> None:
    one = torch.eye(D_IN, dtype=F64)
    for factors, connected in ((1, 4), (2, 8), (3, 16)):
        gm = randomised(llfx.rewrite(single(), llfx.BOFT(butterfly_factors=factors, target_names=("fc",))))
        gm.get_parameter("fc.lora_boft_s").data.fill_(1)
        r = rotation(gm)
        close(r @ r.t(), one)
        blocks = torch.block_diag(*[torch.ones(connected, connected)] * (D_IN // connected)).bool()
        assert ((r.abs() > 1e-9) == blocks).all()


def test_boft_of_one_factor_takes_blocks_of_odd_size() -> None:
    model = ready(nn.Sequential(OrderedDict(fc=nn.Linear(9, 4))))
    gm = randomised(llfx.rewrite(model, llfx.BOFT(block_size=3, target_names=("fc",))))
    x = sample(2, 9)
    close(gm(x), llfx.merge(gm)(x))


def test_boft_does_not_scale_the_bias() -> None:
    gm = randomised(llfx.rewrite(single(), llfx.BOFT(target_names=("fc",))))
    close(gm(torch.zeros(2, D_IN, dtype=F64)), single().fc.bias.expand(2, -1), 1e-14)


@pytest.mark.parametrize("size", broad_after(1, [1, 3, 5, 15]))
def test_c3a_takes_blocks_of_odd_size(size: int) -> None:
    model, x = ready(nn.Sequential(OrderedDict(fc=nn.Linear(30, 15)))), sample(4, 30)
    gm = randomised(llfx.rewrite(model, llfx.C3A(block_size=size, target_names=("fc",))))
    kernels = gm.get_parameter("fc.lora_c3a_kernel").detach()
    blocks = [[torch.stack([kernel.roll(j) for j in range(size)]) for kernel in row] for row in kernels]
    circulant = torch.cat([torch.cat(row, 1) for row in blocks])
    close(gm(x), model(x) + x @ circulant.t() / 30)


@pytest.mark.broad
def test_c3a_starts_near_the_identity_unless_at_zero_where_no_gradient_is_lost() -> None:
    model, x = single(), sample(5, D_IN)
    starts: Any = (("xavier_uniform", 1e-3, 0.1), ("kaiming_uniform", 1e-3, 0.1), ("gaussian", 1e-2, 1.0))
    for init, low, high in starts:
        torch.manual_seed(0)
        gm = llfx.rewrite(model, llfx.C3A(block_size=4, init_weights=init, target_names=("fc",)))
        assert low < (gm(x) - model(x)).norm() / model(x).norm() < high
    gm = llfx.rewrite(model, llfx.C3A(block_size=4, init_weights="zeros", target_names=("fc",)))
    (grad,) = gradients(gm, gm(x)).values()
    assert (grad != 0).all()
