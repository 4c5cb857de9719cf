"""What the tests start their processes with: one that dies, hangs or raises ends them all, with the reason."""

from __future__ import annotations

import os
import threading

import pytest
import torch.distributed as dist

from tests.support.ranks import RankFailed, on_ranks


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("wrong on purpose")
    dist.barrier()


def hangs(rank: int) -> None:
    if rank == 0:
        threading.Event().wait()


def ranks_of_all(rank: int) -> list[int]:
    ranks: list[int] = [0, 0]
    dist.all_gather_object(ranks, rank)
    return ranks


@pytest.mark.broad
@pytest.mark.parametrize(("function", "seconds", "reason"), [(dies, 60, "Rank 1 died"), (raises, 60, "on purpose")])
def test_a_rank_that_fails_ends_the_others(function: object, seconds: float, reason: str) -> None:
    assert callable(function)
    with pytest.raises(RankFailed, match=reason):
        on_ranks(function, 2, seconds=seconds)


@pytest.mark.broad
def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(RankFailed, match="did not end in time"):
        on_ranks(hangs, 2, seconds=3)


@pytest.mark.broad
def test_results_come_by_rank() -> None:
    assert on_ranks(ranks_of_all, 2) == [[0, 1], [0, 1]]
