"""Count what torch.compile compiles; the fixture `count_from_zero` in tests/execution begins anew."""

from __future__ import annotations

from torch._dynamo.utils import counters


def graphs() -> int:
    """Return how many graphs were compiled since the counters were cleared."""
    return int(counters["stats"]["unique_graphs"])
