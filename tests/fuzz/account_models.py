"""The models of the account, how each path adapts them, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import lora_lite_fx as llfx
from tests.fuzz import asking
from tests.fuzz.modules import Net
from tests.fuzz.oracle import FORMULAS, gradients_of
from tests.support.models import tiny_llama
from tests.support.process import default_dtype, deterministic

LORA = FORMULAS["LoRA"][0]

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
}
"""What a process says while something runs."""


@dataclass(frozen=True)
class Ask:
    """A call of a model.

    Args:
        context: a key of `CONTEXTS`.
        keywords: whether the argument that may be left out is given.
        times: how often, of which the last result counts.
    """

    context: str = ""
    keywords: tuple[tuple[str, Any], ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Subject:
    """A net of blocks, see `blocks.py`.

    Args:
        blocks: their names.
        single: whether it is in float32.
        within: the context in which it is adapted.
    """

    blocks: tuple[str, ...] = ("MLP", "BatchNorm")
    single: bool = False
    within: str = ""

    def build(self, path: str) -> Any:
        """Return the model that a path adapts, the same each time."""
        return Net(self.blocks, self.single).build(hugging_face=path == "adapt")

    @property
    def example(self) -> dict[str, Any]:
        """The example inputs."""
        return {"x": Net(self.blocks, self.single).inputs(2)}

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the inputs of a call."""
        return {"x": Net(self.blocks, self.single).inputs(3, seed=1).to(dtype)}

    def fields(self, output: Any) -> dict[str, Tensor]:
        """Return the tensors of an output that count."""
        return _fields(output)

    @property
    def tolerance(self) -> float:
        """How far results may be apart."""
        return 0.05 if "Autocast" in self.blocks else 1e-4 if self.single else 1e-9


@dataclass(frozen=True)
class Scaled(Subject):
    """A net with an argument that may be left out."""

    blocks: tuple[str, ...] = ("MLP",)

    def build(self, path: str) -> Any:
        kinds = (asking.Scaled, asking.ScaledHuggingFace)
        return Net(self.blocks, self.single).build(hugging_face=path == "adapt", kinds=kinds)


@dataclass(frozen=True)
class Llama(Subject):
    """A model of transformers.

    Args:
        tied: whether its head has the weight of the embedding.
    """

    tied: bool = False

    def build(self, path: str) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = tiny_llama(hidden_size=16, intermediate_size=16, vocab_size=32, tie_word_embeddings=self.tied)
            return transformers.LlamaForCausalLM(config).double().eval()

    @property
    def example(self) -> dict[str, Any]:
        return {"input_ids": torch.arange(3, 15).reshape(2, 6)}

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"input_ids": torch.arange(3, 27).reshape(3, 8)}


@dataclass(frozen=True)
class TypesOfCaches(Llama):
    """A model of transformers in float32, of which the types of the caches count that a call returns."""

    def build(self, path: str) -> Any:
        return super().build(path).float()

    def fields(self, output: Any) -> dict[str, Tensor]:
        layers = output.past_key_values.layers
        return {f"{name} {i}": getattr(each, name)[:0] for i, each in enumerate(layers) for name in ("keys", "values")}


def adapted(path: str, subject: Subject, model: Any) -> Any:
    """Return the model as this path adapts it."""
    with CONTEXTS[subject.within]():
        if path == "backend":
            return llfx.backend(LORA, inner="eager").adapt(model, **subject.example)
        adapt: Any = {"adapt": llfx.adapt, "wrap": llfx.wrap}.get(path, llfx.rewrite)
        return adapt(model, LORA, None if path == "traced" else subject.example)


def result_of(model: Any, path: str, subject: Subject, ask: Ask, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a call of a model gives: its tensors, and the gradients of `tensors`.

    Args:
        model: an adapted model, or the oracle's.
        path: of the model; empty for the oracle's.
        subject: what it is.
        ask: how it is called.
        tensors: by name, those that may have a gradient.
    """
    call = torch.compile(model, backend=llfx.backend(inner="eager")) if path == "backend" else model
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    arguments = {**subject.inputs(dtype), **dict(ask.keywords)}
    with CONTEXTS[ask.context]():
        for _ in range(ask.times):
            torch.manual_seed(0)
            output = call(**arguments)
    fields = {"output": output} if isinstance(output, Tensor) else subject.fields(output)
    main = next(iter(fields.values()))
    gradients = gradients_of(main, tensors)
    return {**{name: field.detach() for name, field in fields.items()}, **gradients}


def _fields(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output, by the name of its class and their places."""
    values = output if isinstance(output, tuple) else [value for value in output.values() if value is not None]
    tensors: dict[str, Tensor] = {}
    for i, value in enumerate(values):
        parts = value if isinstance(value, (tuple, list)) else [value] if isinstance(value, Tensor) else []
        tensors |= {f"{type(output).__name__} {i}.{j}": part for j, part in enumerate(parts)}
    return tensors
