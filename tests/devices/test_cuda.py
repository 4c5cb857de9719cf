"""On a CUDA device a step computes what it computes on the CPU, and waits for nothing: `python -m pytest -m cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lora_lite_fx as llfx
from tests.devices.fake_cuda import FROM_DATA, captured, config, tokens
from tests.support.conformance import randomise

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

VARIANTS = [name for name in llfx.registry() if name not in FROM_DATA]
TOLERANCE = 1e-3
"""Of each result, relative to the largest value: products are summed in another order."""


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error to wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_both(name: str, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, Tensor]]:
    """Return a graph with an adapter on the CPU, the same on the device, and inputs on the CPU."""
    gm = llfx.rewrite(captured(torch.float32, **options)[0], config(name))
    randomise(gm, 1)
    inputs = tokens()
    del inputs["attention_mask"]
    return gm, llfx.optimize(gm).cuda(), inputs


def to_cuda(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_cuda
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max().clamp_min(1e-3))
    )


def gradients(gm: fx.GraphModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    gm.zero_grad()
    gm.train()(**inputs).loss.backward()
    return {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"fuse_loss": True}, {"checkpoint_layers": True}], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_computes_the_same_and_waits_for_nothing(name: str, options: dict[str, Any]) -> None:
    gm, on_device, inputs = on_both(name, **options)
    expected, there = gradients(gm, inputs), to_cuda(inputs)
    gradients(on_device, there)  # derives the program
    with no_waiting():
        actual = gradients(on_device, there)
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        assert_close(actual[path], gradient)


@pytest.mark.parametrize("name", VARIANTS)
def test_inference_in_frozen_computes_the_same_and_waits_for_nothing(name: str) -> None:
    gm, on_device, inputs = on_both(name)
    there = to_cuda(inputs)
    with torch.no_grad():
        expected = gm.eval()(**inputs).logits
        with llfx.frozen(on_device.eval()):
            on_device(**there)
            with no_waiting():
                actual = on_device(**there).logits
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT"])
def test_merged_exported_and_saved_it_computes_the_same(name: str, tmp_path: Path) -> None:
    gm, on_device, inputs = on_both(name)
    there = to_cuda(inputs)
    with torch.no_grad():
        expected = gm.eval()(**inputs).logits
        assert_close(llfx.merge(on_device.eval())(**there).logits, expected)
        exported = torch.export.export(on_device, (), there, strict=False)
        assert_close(exported.module()(**there).logits, expected)
        llfx.save(on_device, tmp_path / "adapter.safetensors")
        loaded = llfx.load(captured(torch.float32)[0], tmp_path / "adapter.safetensors").eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_a_step_is_recorded_as_a_cuda_graph() -> None:
    _, on_device, inputs = on_both("LoRA")
    there = to_cuda(inputs)
    with torch.no_grad(), llfx.frozen(on_device.eval()):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # a capture is not on the usual stream, and comes after a call
            expected = on_device(**there).logits
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = on_device(**there).logits
        graph.replay()
    torch.testing.assert_close(actual, expected)
