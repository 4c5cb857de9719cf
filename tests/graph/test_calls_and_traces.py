"""Threads run graphs at once, and trace alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lora_lite_fx.graph.calls_and_traces import calling, tracing

WAIT = 0.2  # long enough for a thread that does not wait to be done


def thread(target: Callable[[], object]) -> threading.Thread:
    started = threading.Thread(target=target, daemon=True)
    started.start()
    return started


def test_calls_run_at_once() -> None:
    together = threading.Barrier(3)

    def call() -> None:
        with calling():
            together.wait(10)

    threads = [thread(call) for _ in range(3)]
    for each in threads:
        each.join(10)
    assert not together.broken


def test_a_trace_waits_for_calls_and_calls_wait_for_it() -> None:
    order: list[str] = []
    traced = threading.Event()

    def trace() -> None:
        with tracing(), tracing():  # traces may be nested
            order.append("trace")
            traced.wait(10)
            order.append("traced")

    def call() -> None:
        with calling():
            order.append("late call")

    with calling():
        tracer = thread(trace)
        late = thread(call)
        tracer.join(WAIT)
        assert order == []
        with calling():  # a call inside a call does not wait
            order.append("call")
    late.join(WAIT)
    assert order == ["call", "trace"]
    traced.set()
    tracer.join(10)
    late.join(10)
    assert order == ["call", "trace", "traced", "late call"]


def test_calls_that_come_to_trace_do_not_wait_for_each_other() -> None:
    together = threading.Barrier(4)
    inside: list[int] = []
    most: list[int] = []

    def call() -> None:
        with calling():
            together.wait(10)
            with tracing(), calling():  # a trace runs the graph it makes
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [thread(call) for _ in range(4)]
    for each in threads:
        each.join(10)
    assert most == [1] * 4
