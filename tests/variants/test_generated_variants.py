"""Random compositions of what variants are made of: the graph is the eager wrapper, and merge is right or refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx import FrozenLinear, ParamSpec, Variant
from lora_lite_fx.sites.site import Site
from tests.support.conformance import (
    check_file,
    check_merge,
    check_remove,
    check_rewrite_equals_wrap,
    close,
    output,
    randomise,
    rewrite_and_wrap,
)
from tests.support.models import Case, cases, ids
from tests.support.own_variants import registered
from tests.support.selection import broad_after

RANK, HEADS = 2, 2
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One thing that a variant does.

    Args:
        tensors: the shapes of its tensors for sizes `d_in`, `d_out`, by name.
        compute: its result, of the input, the value so far (the input or the output), the frozen linear, and `p`.
        affine: whether it is affine in the value and in the input.
    """

    tensors: Callable[[int, int], Tensors]
    compute: Callable[[Tensor, Tensor, FrozenLinear, Any], Tensor]
    affine: bool = True


def _turned(value: Tensor, r: Tensor) -> Tensor:
    return torch.einsum("...hi,hij->...hj", value.unflatten(-1, (HEADS, -1)), r).flatten(-2)


def _branch(x: Tensor, a: Tensor, b: Tensor, inside: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    return F.linear(inside(F.linear(x, a)), b)


def _number(site: Site) -> int:
    return 1 + (site.layer or 0) + len(site.roles)


def _factors(a: str, b: str) -> Callable[[int, int], Tensors]:
    return lambda d_in, d_out: {a: (RANK, d_in), b: (d_out, RANK)}


BEFORE: dict[str, Step] = {
    "scale the input": Step(lambda i, o: {"lora_g": (i,)}, lambda x, z, base, p: z * p.lora_g),
    "turn the input": Step(
        lambda i, o: {"lora_Q": (HEADS, i // HEADS, i // HEADS)}, lambda x, z, base, p: _turned(z, p.lora_Q)
    ),
    "add to the input": Step(
        lambda i, o: {"lora_U": (RANK, i), "lora_V": (i, RANK)},
        lambda x, z, base, p: z + _branch(x, p.lora_U, p.lora_V),
    ),
    "drop": Step(lambda i, o: {"lora_c": ()}, lambda x, z, base, p: p.lora_c * F.dropout(z, 0.3, base.training)),
    "squash the input": Step(lambda i, o: {"lora_q": (i,)}, lambda x, z, base, p: z + torch.tanh(z * p.lora_q), False),
}
AFTER: dict[str, Step] = {
    "low rank": Step(_factors("lora_A", "lora_B"), lambda x, y, base, p: y + 0.5 * _branch(x, p.lora_A, p.lora_B)),
    "scale the output": Step(lambda i, o: {"lora_h": (o,)}, lambda x, y, base, p: y * p.lora_h),
    "turn the output": Step(
        lambda i, o: {"lora_R": (HEADS, o // HEADS, o // HEADS)}, lambda x, y, base, p: _turned(y, p.lora_R)
    ),
    "shared": Step(lambda i, o: {"lora_shared_s": (1,)}, lambda x, y, base, p: y * (1 + p.lora_shared_s)),
    "by name": Step(
        lambda i, o: {"lora_n": (o,)}, lambda x, y, base, p: y + sum(base.site.name.encode()) % 7 * p.lora_n
    ),
    "by layer and role": Step(lambda i, o: {"lora_l": (o,)}, lambda x, y, base, p: y + _number(base.site) * p.lora_l),
    "of the weight": Step(
        lambda i, o: {"lora_w": (o, i)}, lambda x, y, base, p: y + F.linear(x, base.weight * p.lora_w)
    ),
    "by mode": Step(
        lambda i, o: {"lora_m": (o,)}, lambda x, y, base, p: y + (2.0 if base.training else 0.5) * p.lora_m
    ),
    "bottleneck": Step(
        _factors("lora_D", "lora_E"), lambda x, y, base, p: y + _branch(x, p.lora_D, p.lora_E, F.gelu), False
    ),
    "gate": Step(
        _factors("lora_F", "lora_G"), lambda x, y, base, p: y * (1 + _branch(x, p.lora_F, p.lora_G, torch.tanh)), False
    ),
    "gate by the output": Step(
        lambda i, o: {"lora_o": (o,)}, lambda x, y, base, p: y * torch.sigmoid(y * p.lora_o), False
    ),
}


@dataclass(frozen=True, kw_only=True)
class Generated(Variant):
    """Does `before` with the input, calls the frozen linear, and does `after` with the output, in order."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shapes: Tensors = {}
        for step in self._steps():
            shapes |= step.tensors(site.d_in, site.d_out)
        return {name: ParamSpec(shape, "ones") for name, shape in shapes.items()}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        z = x
        for name in self.before:
            z = BEFORE[name].compute(x, z, base, p)
        y = base(z)
        for name in self.after:
            y = AFTER[name].compute(x, y, base, p)
        return y

    def _steps(self) -> list[Step]:
        return [*(BEFORE[name] for name in self.before), *(AFTER[name] for name in self.after)]

    @property
    def is_affine(self) -> bool:
        """Whether all its steps are."""
        return all(step.affine for step in self._steps())


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with registered(Generated):
        yield


def _some(steps: dict[str, Step]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(list(steps)), max_size=3, unique=True).map(tuple)


generated = st.builds(Generated, before=_some(BEFORE), after=_some(AFTER), target_names=st.just((".",))).filter(
    lambda cfg: cfg.before or cfg.after
)
shapes = st.tuples(st.integers(2, 4), st.integers(1, 7))


def _check(cfgs: list[Generated], case: Case, other: tuple[Tensor, ...]) -> None:
    model = case.build()
    base = llfx.capture(model, case.example_inputs)
    gm, wrapped = rewrite_and_wrap(base, cfgs)
    # On a copy, since it trains, which changes what batch norm keeps.
    check_rewrite_equals_wrap(model, copy.deepcopy(gm), wrapped, other, case.tolerance, case.seed)
    randomise(gm, case.seed)
    check_remove(gm, base, model)
    check_file(gm, base, other)
    if all(cfg.is_affine for cfg in cfgs):
        check_merge(gm, base, other, 1e-8 if case.dtype == torch.float64 else 1e-3)
        return
    with pytest.raises(llfx.AdapterError, match=r"^Generated at '[\w.]+' cannot be merged, because it is not affine"):
        close(output(llfx.merge(gm).eval(), other), output(gm.eval(), other), 0, "merged")


profile = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.broad
@settings(profile, max_examples=4)
@given(cfg=generated, case=cases, shape=shapes)
def test_a_generated_variant_is_right_or_refused(cfg: Generated, case: Case, shape: tuple[int, int]) -> None:
    _check([cfg], case, (ids(*shape, seed=case.seed),))


@pytest.mark.broad
@settings(profile, max_examples=2)
@given(cfgs=st.lists(generated, min_size=2, max_size=2), case=cases, shape=shapes)
def test_generated_variants_around_each_other_are_right_or_refused(
    cfgs: list[Generated], case: Case, shape: tuple[int, int]
) -> None:
    _check(cfgs, case, (ids(*shape, seed=case.seed),))


@pytest.mark.parametrize("name", [*broad_after(4, BEFORE), *broad_after(4, AFTER)])
def test_each_step_alone_is_affine_if_it_says_so(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 12)).double().eval()
    cfg = Generated(before=(name,), target_names=".") if name in BEFORE else Generated(after=(name,), target_names=".")
    gm = llfx.rewrite(model, cfg)
    randomise(gm, 1)
    x = torch.randn(3, 8, dtype=torch.float64)
    if cfg.is_affine:
        close(llfx.merge(gm)(x), gm(x).detach(), 1e-9, name)
    else:
        with pytest.raises(llfx.AdapterError, match="not affine"):
            llfx.merge(gm)
