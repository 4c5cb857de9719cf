"""What a step of a divided model sends, counted, is what traffic.md says by formulas; and memory falls as it says."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite_fx as llfx
from tests.distributed.training import Case, base_of, batch, graph_of, make
from tests.support.ranks import on_ranks

TRAFFIC = Path(__file__).parents[2] / "docs/several_processes/traffic.md"
LORA = Case(llfx.LoRA(r=2))
PARALLEL = {
    "llama": Case(llfx.LoRA(r=2), engine="parallel"),
    "gpt2": Case(llfx.LoRA(r=2), base="gpt2", engine="parallel"),
    "checkpointed": Case(llfx.LoRA(r=2), engine="parallel", settings={"checkpoint_layers": True}),
}
CASES = {"rewrite": LORA, "adapt": Case(llfx.LoRA(r=2), "adapt"), "nf4": Case(llfx.LoRA(r=2), base="nf4")}


WIDTH = 32
_OF_PARTS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
"""The collectives that DTensors call, which torch names without c10d's underscores."""


class Traffic(TorchDispatchMode):
    """Counts collectives by name and by shape, and the bytes of the whole tensors that they gather or reduce."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # which makes calls on parts, that come here again
        if func.namespace == "c10d" or func.overloadpacket.__name__ in _OF_PARTS:
            name = func.overloadpacket.__name__
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls[name] += 1
            self.bytes[name] += max(tensor.nbytes for tensor in tensors)
            self.sizes[tuple(max(tensors, key=Tensor.numel).shape)] += 1
        return func(*args, **(kwargs or {}))


def _padded_bytes(parameter: nn.Parameter, processes: int) -> int:
    """Return the bytes of a parameter whose rows are padded to a multiple of the processes."""
    rows = len(parameter)
    return parameter.nbytes // rows * math.ceil(rows / processes) * processes


def sizes_of(model: Any, processes: int) -> dict[str, dict[str, int]]:
    """Return the bytes of all parameters and of those that train, by layer; of what is outside of layers under ""."""
    sizes: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else ""
        of_layer = sizes.setdefault(layer, {"all": 0, "trained": 0})
        if parameter.dim():
            of_layer["all"] += _padded_bytes(parameter, processes)
            of_layer["trained"] += _padded_bytes(parameter, processes) if parameter.requires_grad else 0
    return sizes


def _live_parameter_bytes(model: Any) -> int:
    """Return the bytes of the parameters that this process has now, in parts or whole."""
    tensors = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def measure(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = make(case)
        sizes = sizes_of(model, 2)
        frozen = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        llfx.shard(model)
        model(**batch(case, 0, rank)).loss.backward()  # sets fully_shard up
        peaks: list[int] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_, model=model, peaks=peaks: peaks.append(_live_parameter_bytes(model)))
        with Traffic() as traffic:
            model(**batch(case, 0, rank)).loss.backward()
        base_of.cache_clear()
        graph_of.cache_clear()
        gc.collect()
        found[name] = {
            "sizes": sizes,
            "calls": dict(traffic.calls),
            "bytes": dict(traffic.bytes),
            "peak": max(peaks),
            "whole weight is freed": frozen() is None,
        }
    return found


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return on_ranks(measure, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_gathers_layers_twice_and_reduces_adapters_alone(name: str, measured: list[dict[str, Any]]) -> None:
    for found in measured:
        sizes, calls, sent = (found[name][key] for key in ("sizes", "calls", "bytes"))
        layers = [size for layer, size in sizes.items() if layer]
        assert calls == {"_allgather_base_": 2 * len(layers) + 1, "_reduce_scatter_base_": len(layers)}
        assert sent["_allgather_base_"] == 2 * sum(size["all"] for size in layers) + sizes[""]["all"]
        assert sent["_reduce_scatter_base_"] == sum(size["trained"] for size in layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_process_has_its_part_and_one_layer(name: str, measured: list[dict[str, Any]]) -> None:
    for found in measured:
        sizes = found[name]["sizes"]
        parts = sum(size["all"] for size in sizes.values()) / 2
        layer = max(size["all"] for key, size in sizes.items() if key)
        assert found[name]["peak"] <= parts + layer + sizes[""]["all"]
        assert found[name]["whole weight is freed"]


def measure_parallel(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in PARALLEL.items():
        gm = llfx.parallelize(make(case))
        with Traffic() as traffic:
            loss = gm(**batch(case, 0, 0)).loss
        with Traffic() as backward:
            loss.backward()
        found[name] = traffic, backward
    return {name: [(dict(each.calls), dict(each.sizes)) for each in pair] for name, pair in found.items()}


@pytest.fixture(scope="module")
def measured_parallel() -> list[dict[str, Any]]:
    return on_ranks(measure_parallel, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [("llama", 0), ("checkpointed", 1)])
def test_tensor_parallelism_sums_activations_and_whole_adapters_alone(
    name: str, again: int, measured_parallel: list[dict[str, Any]]
) -> None:
    layers, rank = 2, 2
    hidden = (2, 7, WIDTH)
    for found in measured_parallel:
        (forward, summed), (backward, gradients) = found[name]
        assert forward == {"all_reduce": 2 * layers, "allreduce_": 1}  # the second compares the inputs
        assert summed == {hidden: 2 * layers, (2,): 1}
        # Nothing trains before the first layer, so its first input needs no gradient.
        passed_back = 2 * layers - 1 + again * layers
        assert backward == {"all_reduce": passed_back + 7 * layers}
        assert gradients == {hidden: passed_back, (rank, WIDTH): 5 * layers, (WIDTH, rank): 2 * layers}


@pytest.mark.slow
def test_queries_keys_and_values_of_one_projection_are_gathered_once_in_a_layer(
    measured_parallel: list[dict[str, Any]],
) -> None:
    for found in measured_parallel:
        calls, sizes = found["gpt2"][0]
        assert calls == {"all_reduce": 4, "all_gather_into_tensor": 2, "allreduce_": 1}
        assert sizes == {(2, 7, 16): 4, (2, 7, 24): 2, (2,): 1}  # a process sends its half of 48


def test_the_figures_at_70b_follow_from_the_formulas() -> None:
    width, inner, values, vocabulary, layers, rank = 8192, 28672, 1024, 128256, 80, 16
    in_layer = 2 * width * width + 2 * width * values + 3 * width * inner + 2 * width
    outside = 2 * vocabulary * width + width
    adapters = 4 * layers * rank * (4 * width + 2 * (width + values) + 3 * (width + inner))
    layer, root = 2 * in_layer, 2 * outside
    per_token = 4 * (layers * in_layer + outside)
    for processes, bandwidth, column in ((8, 450e9, 1), (512, 50e9, 2)):
        kept = (layers * layer + root) / processes
        received = (2 * layers * layer + root) * (processes - 1) / processes
        gradients = adapters * (processes - 1) / processes
        figures = [kept / 1e9, (kept + 2 * layer + root) / 1e9, 4 * adapters / processes / 1e9, received / 1e9]
        figures += [received / bandwidth, received / bandwidth * 400e12 / per_token, gradients / 1e9]
        _require(figures, columns=4, column=column)
    processes, tokens = 8, 4096
    sums = 4 * layers * tokens * 2 * width
    ring = 2 * (processes - 1) / processes
    of_adapters = 4 * layers * rank * 7 * width
    sharded = (2 * layers * layer + root) * (processes - 1) / processes
    figures = [(layers * layer / processes + root) / 1e9, ring * sums / 1e9, ring * sums / 450e9]
    figures += [tokens * per_token / processes / 400e12, ring * of_adapters / 1e9]
    figures += [sharded / (ring * sums / tokens) / processes]
    _require(figures, columns=2, column=1)


def _require(figures: list[float], columns: int, column: int) -> None:
    """Require that a column of the table with this many columns in traffic.md has these figures."""
    lines = TRAFFIC.read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.count("|") == columns + 1]
    written = [row[column].split()[0].strip(",").replace(",", "") for row in rows[2:]]
    assert len(written) == len(figures)
    for text, figure in zip(written, figures, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(figure, abs=0.5001 * 10**-digits if digits else 0.01 * figure), text
