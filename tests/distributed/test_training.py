"""Training in two processes is training in one: losses, gradients, and adapters after some steps of an optimizer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.distributed.training import BASES, BROAD, CASES, EVERYDAY, in_one_process, train_all
from tests.support.conformance import close
from tests.support.ranks import RankFailed, on_ranks
from tests.support.selection import broad_unless, slow_unless

# What is float64 is equal but for rounding; fused losses and quantized bases are computed in float32. In bfloat16 the
# wrapper rounds in another order, and a gradient that is not averaged would be off by more than half.
TOLERANCES = {
    "llama": 1e-9,
    "albert": 1e-9,
    "gpt2": 1e-9,
    "gpt2, dropout": 1e-9,
    "llama, dropout": 1e-9,
    "tied": 1e-5,
    "torchao int8": 1e-5,
    "nf4": 1e-5,
    "int8": 1e-5,
    "bfloat16": 0.1,
}
PARALLEL = {"llama": 1e-4, "llama, dropout": 1e-4, "tied": 1e-4, "bfloat16": 0.3}
"""Sums over processes are summed in another order, and each part is rounded. Of bfloat16, the gradients of the wrapper
and of processes are equally far from those in float64."""


@functools.cache
def trained(names: tuple[str, ...]) -> list[dict[str, Any]] | str:
    """Return what each process found in these cases, or why they failed.

    All cases of a tier share two processes, because to start processes costs more than a case.
    """
    try:
        return on_ranks(train_all, 2, names)
    except RankFailed as error:
        return str(error)


TIERS = (EVERYDAY, BROAD, tuple(name for name in CASES if name not in EVERYDAY + BROAD))
NAMES = broad_unless(EVERYDAY.__contains__, slow_unless((EVERYDAY + BROAD).__contains__, CASES))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one(name: str) -> None:
    case = CASES[name]
    is_parallel = case.engine == "parallel"
    expected = in_one_process(case, 1 if is_parallel else 2)
    tolerance = max(TOLERANCES[case.base], PARALLEL.get(case.base, 0) if is_parallel else 0)
    results = trained(next(names for names in TIERS if name in names))
    assert not isinstance(results, str), results
    for rank, found in enumerate(results):
        losses = torch.tensor([found[name]["losses"], expected["losses"][0 if is_parallel else rank]])
        close(losses[0], losses[1], max(tolerance, 1e-6), "losses")
        for what in ("gradients", "after"):
            assert found[name][what].keys() == expected[what].keys()
            for tensor, value in found[name][what].items():
                close(value, expected[what][tensor], tolerance, f"{what}: {tensor}")


def test_every_base_has_a_case() -> None:
    assert {case.base for case in CASES.values()} == BASES.keys()
