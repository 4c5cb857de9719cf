"""A low-rank branch that is written plainly gets the program of the same branch written with the package's helper."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.graph.insertion import is_inserted
from lora_lite_fx.passes import OPTIMIZATIONS, Program
from tests.support.conformance import randomise
from tests.support.low_rank_llama import llama, tokens
from tests.support.programs import derived
from tests.support.saved import saved_bytes
from tests.support.selection import broad_after, slow_after

Forward = Callable[[Any, Tensor, llfx.FrozenLinear, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Written(llfx.WithDropout, llfx.WithScale, llfx.WithRank):
    """LoRA, with a `forward` that a test gives."""

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_A": llfx.ParamSpec((self.r, site.d_in)), "lora_B": llfx.ParamSpec((site.d_out, self.r))}


SPELLINGS: dict[str, Forward] = {
    "matmul": lambda v, x, base, p: base(x) + (v.drop(x, base) @ p.lora_A.T) @ p.lora_B.T * v.scale,
    "from the left": lambda v, x, base, p: v.scale * (v.drop(x, base) @ p.lora_A.T @ p.lora_B.T) + base(x),
    "linear": lambda v, x, base, p: base(x) + v.scale * F.linear(F.linear(v.drop(x, base), p.lora_A), p.lora_B),
    "scaled input": lambda v, x, base, p: base(x) + (v.drop(x, base) * v.scale) @ p.lora_A.mT @ p.lora_B.t(),
    "scaled middle": lambda v, x, base, p: base(x) + F.linear(F.linear(v.drop(x, base), p.lora_A) * v.scale, p.lora_B),
    "two scales": lambda v, x, base, p: base(x) + (int(v.alpha) * v.drop(x, base) @ p.lora_A.T / v.r) @ p.lora_B.T,
    "einsum": lambda v, x, base, p: (
        base(x)
        + torch.einsum("...r,or->...o", torch.einsum("bsd,rd->bsr", v.drop(x, base), p.lora_A), p.lora_B) * v.scale
    ),
    "transpose": lambda v, x, base, p: torch.add(
        base(x), v.drop(x, base) @ p.lora_A.transpose(-1, -2) @ p.lora_B.permute(1, 0), alpha=v.scale
    ),
    "cast": lambda v, x, base, p: (
        base(x) + v.scale * (v.drop(x, base).to(p.lora_A.dtype) @ p.lora_A.T @ p.lora_B.T)
    ).to(base.weight.dtype),
}


def written(spelling: str, **fields: Any) -> llfx.Variant:
    """Return a config of a variant whose `forward` is spelled so."""
    return variant(SPELLINGS[spelling])(**fields)


def variant(forward: Forward) -> type[Written]:
    """Return a variant that is registered until the test ends."""
    return llfx.register(dataclass(frozen=True, kw_only=True)(type("Spelled", (Written,), {"forward": forward})))


@pytest.fixture(autouse=True)
def _own_registry() -> Any:
    from lora_lite_fx.adapters.registry import _REGISTRY

    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def rewritten(cfg: llfx.Variant, dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    gm = llfx.rewrite(llama(dtype)[1], cfg)
    randomise(gm, 1)
    return gm


def operators(gm: fx.GraphModule, program: Program) -> Counter[str]:
    """Count the operators of the program that the adapters brought into the graph, and those of the base."""
    run = derived(gm, OPTIMIZATIONS.of(program))
    return Counter(f"{'+' if is_inserted(n) else ''}{n.target}" for n in run.graph.nodes if n.op == "call_function")


FIELDS: dict[str, Any] = {"r": 2, "alpha": 6.0, "target_names": ("_proj$",)}


@dataclass(frozen=True)
class Observed:
    """What a graph runs, keeps and returns."""

    operators: dict[str, Counter[str]]
    saved: int
    logits: Tensor
    gradients: tuple[Tensor, ...]


def observe(cfg: llfx.Variant, dtype: torch.dtype = torch.float64) -> Observed:
    gm = rewritten(cfg, dtype).eval()
    logits = gm(**tokens(2, 5)).logits
    gradients = torch.autograd.grad(logits.square().sum(), llfx.adapter_parameters(gm))
    programs: tuple[Program, ...] = ("training", "inference")
    saved = saved_bytes(lambda: gm.train()(**tokens(2, 5)).logits.sum())
    return Observed({name: operators(gm, name) for name in programs}, saved, logits, gradients)


@functools.cache
def of_the_helper(**fields: Any) -> Observed:
    return observe(llfx.LoRA(**fields, **FIELDS))


@pytest.mark.parametrize("spelling", broad_after(1, slow_after(4, SPELLINGS)))
def test_a_plain_spelling_gets_the_program_of_the_helper(spelling: str) -> None:
    fields = {"dropout": 0.3} if spelling in ("matmul", "scaled input") else {}
    ours, theirs = of_the_helper(**fields), observe(written(spelling, **fields, **FIELDS))
    assert theirs.operators == ours.operators
    assert theirs.saved == ours.saved
    assert torch.allclose(theirs.logits, ours.logits, rtol=1e-12, atol=1e-12)
    for a, b in zip(theirs.gradients, ours.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


LINEAR, MUL = torch.ops.aten.linear.default, torch.ops.aten.mul.Tensor


def inserted(forward: Forward, dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
    """Return the operations of an adapter of one linear, with their arguments as text."""
    net = nn.Sequential(nn.Linear(6, 4, dtype=dtype))
    gm = llfx.rewrite(net, variant(forward)(r=2, target_names=("0",), dtype=dtype), (torch.randn(3, 6, dtype=dtype),))
    nodes = [node for node in gm.graph.nodes if is_inserted(node) and node.op == "call_function"]
    return [(node.target, *map(str, node.args)) for node in nodes]


def test_a_scale_stays_where_half_precision_could_overflow() -> None:
    def forward(v: Any, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return base(x) + (x / 512) @ p.lora_A.T @ p.lora_B.T

    assert [op for op, *_ in inserted(forward)] == [LINEAR, LINEAR, MUL, torch.ops.aten.add.Tensor]
    half = [op for op, *_ in inserted(forward, torch.float16)]
    assert half == [torch.ops.aten.div.Tensor, LINEAR, LINEAR, torch.ops.aten.add.Tensor]


def test_a_scaled_value_that_is_read_twice_stays() -> None:
    def forward(v: Any, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        t = 2 * (x @ p.lora_A.T)
        return base(x) + t.tanh() @ p.lora_B.T + t @ p.lora_B.T

    assert [args for op, *args in inserted(forward) if op is MUL] == [["_0_lora_A_linear", "2.0"]], "as it was"


def test_a_matrix_that_is_stored_the_other_way_round_is_transposed_once() -> None:
    def forward(v: Any, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return base(x) + (x @ p.lora_A.mT) @ p.lora_B.t().transpose(0, 1).T

    assert torch.ops.aten.t.default not in [op for op, *_ in inserted(forward)]

    def forward_transposed(v: Any, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return base(x) + x @ (p.lora_B @ p.lora_A).T + x.square() @ base.weight.T @ p.lora_B @ p.lora_B.T

    operations = [op for op, *_ in inserted(forward_transposed)]
    assert operations.count(torch.ops.aten.matmul.default) == 1, "that of two matrices forms a matrix"
    assert operations.count(torch.ops.aten.t.default) == 1


def test_products_with_more_than_a_matrix_stay_as_they_are() -> None:
    def forward(v: Any, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        blocks = torch.einsum("bnk,nkr->bnr", x.unflatten(-1, (2, 3)), p.lora_A.view(2, 3, 2)).sum(-2)
        return base(x) + blocks @ p.lora_B.T

    assert torch.ops.aten.einsum.default in [op for op, *_ in inserted(forward)]
