"""Check an adapted graph against its wrapper, its base, its file and its export."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..adapters.state import adapter_state_dict
from ..capture.shared_copy import shared_copy
from ..formats.checkpoint import load, save
from ..rewriting.rewrite import merge, remove
from ..sites.computed import frozen_values
from .comparisons import close, distance, gradients, nudged, output, restored


def check_mode(
    gm: fx.GraphModule, wrapped: nn.Module, args: tuple[Any, ...], tolerance: float, training: bool, rounding: int = 0
) -> tuple[float, int]:
    """Check that output and adapter gradients are the wrapper's, in one mode.

    Args:
        gm: the graph.
        wrapped: the wrapper, with the same values of the adapters.
        args: positional arguments of a call.
        tolerance: how far results may be apart, as a multiple of the largest value.
        training: the mode.
        rounding: how many times the effect of the adapters' last bit is allowed too, because a graph that was optimized
            rounds sums in another order.

    Returns:
        How far they are apart, and the number of gradients.
    """
    with restored(gm, wrapped):
        y, actual = gradients(gm.train(training), args)
        expected_y, expected = gradients(wrapped.train(training), args)
    with nudged(wrapped):
        nudged_y, nudged_gradients = gradients(wrapped, args)
    mode = "training" if training else "evaluation"
    allowed = max(tolerance, rounding * distance(nudged_y, expected_y))
    error = close(y, expected_y, allowed, f"output in {mode}")
    assert actual.keys() == expected.keys(), (
        f"in {mode} these get a gradient in only one of graph and wrapper:"
        f" {', '.join(sorted(actual.keys() ^ expected.keys()))}"
    )
    for name, gradient in actual.items():
        allowed = max(tolerance, rounding * distance(nudged_gradients[name], expected[name]))
        error = max(error, close(gradient, expected[name], allowed, f"gradient of {name} in {mode}"))
    return error, len(actual)


def check_merge(gm: fx.GraphModule, base: fx.GraphModule, args: tuple[Any, ...], tolerance: float) -> float:
    """Check that the merged graph computes the adapted one, and is the base graph node for node.

    Ties that it must undo, and a bias that it must add, get names of their own.

    Returns:
        How far the output is off.
    """
    merged = merge(gm)
    error = close(output(merged.eval(), args), output(gm.eval(), args), tolerance, "merged output")
    assert _targets(merged) == _targets(base), "the merged graph has other nodes than the base"
    if _layouts(merged) == _layouts(base):
        assert str(merged.graph) == str(base.graph), "the merged graph is wired in another way than the base"
    trained = [name for name, parameter in merged.named_parameters() if parameter.requires_grad]
    assert not trained, f"{trained[0]} of the merged graph trains"
    return error


def check_remove(gm: fx.GraphModule, base: fx.GraphModule, model: nn.Module) -> None:
    """Check that removal gives the base graph node for node, over the model's own weights."""
    removed = remove(gm)
    assert str(removed.graph) == str(base.graph), "the graph without adapters is not the base"
    assert removed.state_dict().keys() == base.state_dict().keys(), "removal leaves tensors, or takes some of the base"
    own = shared_copy(model)  # in which the tensors of quantized weights have the names of the graph
    for name, parameter in removed.named_parameters():
        assert parameter.data_ptr() == own.get_parameter(name).data_ptr(), f"{name} is a copy"
        assert not parameter.requires_grad, f"{name} trains after removal"


def check_file(gm: fx.GraphModule, base: fx.GraphModule, args: tuple[Any, ...]) -> int:
    """Check that a file brings back every tensor and the output bit for bit.

    Returns:
        The size of the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(gm, path)
        size = path.stat().st_size
        loaded = load(base, path)
    _check_state(loaded, gm)
    actual, expected = output(loaded.eval(), args), output(gm.eval(), args)
    assert torch.equal(actual, expected), f"output after loading: off by {distance(actual, expected):.2e}"
    return size


def check_export(gm: fx.GraphModule, traced: tuple[Any, ...], args: tuple[Any, ...], tolerance: float) -> float:
    """Check that `torch.export`, saved and loaded, computes the same at another shape, and loses its adapters.

    Returns:
        How far the output is off.
    """
    dynamic = tuple([torch.export.Dim.AUTO] * arg.dim() for arg in traced)
    program = torch.export.export(gm.eval(), traced, dynamic_shapes=dynamic)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    error = close(output(loaded, args), output(gm, args), tolerance, "exported output")
    _check_state(loaded, gm)
    after = "output after removal from the file"
    close(output(remove(loaded), args), output(remove(gm), args), tolerance, after)
    return error


def _targets(gm: fx.GraphModule) -> list[object]:
    """Return the operations on data. Those that compute a weight, as of a quantized base, a merged graph may lack."""
    frozen = frozen_values(gm.graph)
    return [node.target for node in gm.graph.nodes if node not in frozen]


def _layouts(gm: fx.GraphModule) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in gm.state_dict().items()}


def _check_state(loaded: nn.Module, expected: nn.Module) -> None:
    state, saved = adapter_state_dict(loaded), adapter_state_dict(expected)
    assert list(state) == list(saved), f"tensors are missing or new: {', '.join(sorted(state.keys() ^ saved.keys()))}"
    for name, tensor in state.items():
        assert torch.equal(tensor, saved[name]), f"{name} {tuple(tensor.shape)} comes back with other values"
