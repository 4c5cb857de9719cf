"""Run what the command `export` has written in its runtime, and compare it with torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..adapters.placement import adapter_names
from ..adapters.state import adapter_state_dict
from ..errors import AdapterError
from ..formats.peft.directory import load_peft
from .distance_from_torch import allowed, difference
from .exported_program import served
from .served_graph import ServedGraph
from .targets import adapter_beside

_ROWS, _TOKENS = 2, 9


@dataclass(frozen=True)
class Written:
    """What was written, and of what.

    Args:
        to: the target.
        out: the file or folder.
        gm: the graph with the adapter.
        source: the model of the graph; None for a graph from a file.
        outputs: the outputs that were asked for; None for all.
        cache: whether a step with a cache was written.
        name: of the program for ExecuTorch.
    """

    to: str
    out: Path
    gm: fx.GraphModule
    source: Any
    outputs: tuple[str, ...] | None
    cache: bool
    name: str


@torch.no_grad()
def compared(written: Written) -> str:
    """Return a sentence on what was compared with what.

    Raises:
        AdapterError: the outputs differ.
    """
    if written.to == "gguf":
        return _tensors_read_back(written)
    reader, package = _READERS[written.to]
    if importlib.util.find_spec(package) is None:
        return f"not compared, because {package} is not installed"
    graph = served(written.gm, None, written.outputs, written.cache, False, "export")
    batch = _batch(graph, written)
    expected = graph.gm(**batch)
    error = difference(reader(written, graph, batch), expected)
    if error > allowed(expected):
        raise AdapterError(
            f"{written.out} was written, and its outputs differ from torch's by {error:.1e} of the largest: do not use"
            " it."
        )
    where = " of the files read back here" if reader is _read_back else ""
    return f"{', '.join(graph.outputs)}{where} equal torch's to {error:.1e} on {_described(batch)}"


def _batch(graph: ServedGraph, written: Written) -> dict[str, Tensor]:
    """Return random inputs: other sizes than those of the example for text, the same for images and steps."""
    generator = torch.Generator().manual_seed(0)
    config = getattr(written.source, "config", None)
    text = None if config is None else config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or 2
    batch = {}
    for name, example in graph.inputs.items():
        is_text = example.dim() == 2 and not example.is_floating_point() and not written.cache
        shape = (_ROWS, _TOKENS) if is_text else tuple(example.shape)
        if example.is_floating_point():
            batch[name] = torch.randn(shape, generator=generator).to(example)
        elif name.endswith("input_ids"):
            batch[name] = torch.randint(vocabulary, shape, generator=generator).to(example)
        else:
            batch[name] = torch.ones(shape).to(example) if is_text else example.clone()
    return batch


def _described(batch: Mapping[str, Tensor]) -> str:
    ids = batch.get("input_ids")
    if ids is None:
        return f"a batch of {' x '.join(map(str, next(iter(batch.values())).shape))}"
    past = [tensor.shape[2] for name, tensor in batch.items() if name.startswith("past_")]
    after = f" after {past[0]} in the cache" if past else ""
    return f"a batch of {ids.shape[0]} x {ids.shape[1]} tokens{after}"


def _in_torch(written: Written, _: ServedGraph, batch: dict[str, Tensor]) -> Any:
    return torch.export.load(written.out).module()(**batch)


def _in_aoti(written: Written, _: ServedGraph, batch: dict[str, Tensor]) -> Any:
    return importlib.import_module(f"{__package__}.swappable").Swappable(written.out)(**batch)


def _in_onnx(written: Written, graph: ServedGraph, batch: dict[str, Tensor]) -> Any:
    ort: Any = importlib.import_module("onnxruntime")
    silent = ort.SessionOptions()
    silent.log_severity_level = 3  # else it warns of each optional input
    session = ort.InferenceSession(str(written.out), silent, providers=["CPUExecutionProvider"])
    options, adapter = ort.RunOptions(), None
    if adapter_names(written.gm) and adapter_beside(written.out).exists():
        adapter = ort.LoraAdapter()  # has to be held while the session runs, or it acts no more
        adapter.Load(str(adapter_beside(written.out)))
        options.add_active_adapter(adapter)
    inputs = [entry.name for entry in session.get_inputs()]
    values = dict(zip(inputs, (tensor.numpy() for tensor in batch.values()), strict=False))
    results = session.run(None, values, options)
    del adapter
    return [torch.from_numpy(result) for result in results]


def _in_executorch(written: Written, _: ServedGraph, batch: dict[str, Tensor]) -> Any:
    runtime: Any = importlib.import_module("executorch.runtime")
    path = str(written.out / f"{written.name}.pte")
    program = runtime.Runtime.get().load_program(path, data_path=str(written.out / "base.ptd"))
    return list(program.load_method("forward").execute(tuple(batch.values())))


def _read_back(written: Written, graph: ServedGraph, batch: dict[str, Tensor]) -> Any:
    gm = load_peft(written.source, written.out)
    return served(gm, None, graph.outputs, False, False, "export").gm(**batch)


def _merged(written: Written, graph: ServedGraph, batch: dict[str, Tensor]) -> Any:
    loaded = type(written.source).from_pretrained(written.out).eval()(**batch)
    return [loaded[name] for name in graph.outputs]


_READERS: dict[str, tuple[Any, str]] = {
    "pt2": (_in_torch, "torch"),
    "aoti": (_in_aoti, "torch"),
    "onnx": (_in_onnx, "onnxruntime"),
    "executorch": (_in_executorch, "executorch"),
    "vllm": (_read_back, "torch"),
    "sglang": (_read_back, "torch"),
    "openvino": (_read_back, "torch"),
    "merged": (_merged, "transformers"),
}
"""By target, what runs its files, and the package that this needs."""


def _tensors_read_back(written: Written) -> str:
    gguf: Any = importlib.import_module("gguf")
    tensors = gguf.GGUFReader(written.out).tensors
    numbers = sum(int(tensor.n_elements) for tensor in tensors)
    trained = sum(tensor.numel() for tensor in adapter_state_dict(written.gm).values())
    return (
        f"{len(tensors)} tensors with {numbers:,} numbers read back, of an adapter with {trained:,};"
        " outputs not compared, because that takes the GGUF file of the base"
    )
