"""Run a function in several processes that talk by gloo, bounded in time, and clean up after them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# The server of this context imports these once; each rank is a fork of it, which costs no imports of its own.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lora_lite_fx",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "transformers.models.llama.modeling_llama",
        __name__,
    ]
)


class RankFailed(Exception):
    """A rank raised, died, or did not end in time."""


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 600.0) -> list[Any]:
    """Run `function(rank, *args)` on each rank of a gloo group of processes.

    Args:
        function: of a module, so that processes find it by name.
        world_size: the number of processes.
        args: for the function.
        seconds: after which all are killed.

    Returns:
        What each rank returned.

    Raises:
        RankFailed: a rank raised, died without a result, or took too long. No process is left then either.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            rendezvous = f"file://{folder}/rendezvous"
            process = _CONTEXT.Process(
                target=_run, args=(theirs, rendezvous, seconds, rank, world_size, function, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            return _results(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(2)  # of one that has returned; others wait for a rank that will not answer
                process.kill()
                process.join()


def _results(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"Ranks {sorted(waiting.values())} did not end in time.")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailed(f"Rank {rank} died.") from None
            if failure:
                raise RankFailed(f"Rank {rank} raised:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _end_with_the_parent() -> None:
    """Let this process not outlive the one that runs the tests, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(
    pipe: Connection,
    rendezvous: str,
    seconds: float,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _end_with_the_parent()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    failure, result = "", None
    try:
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=seconds),
        )
        result = function(rank, *args)
        dist.barrier()  # nobody leaves while another still reads
    except Exception:
        failure = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((failure, result)))  # by value: a rank may be gone before its result is read
    pipe.close()
    if not failure:
        dist.destroy_process_group()
