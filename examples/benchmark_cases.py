"""The cases of `benchmark.py`: frozen modules, and the calls of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from finetune_model import load_base
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PREFILL, CACHED, TRAINED = 512, 128, 256
"""The numbers of tokens: of a forward pass, in the cache of a decoding step, and of a training step."""
AUTO = torch.export.Dim.AUTO

# Frozen modules.


class Forward(nn.Module):
    """A forward pass over the first tokens. It returns the logits of the last one alone if the model can do that."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        last = {"logits_to_keep": 1} if is_causal(self.model) and has_head(self.model) else {}
        logits: Tensor = self.model(input_ids=input_ids, **no_cache(self.model), **last)[0]
        return logits


class Decode(nn.Module):
    """A decoding step. It returns logits and the new cache, and keeps the old cache so that calls can be repeated."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Any:
        past = transformers.DynamicCache(cache)
        logits = self.model(input_ids=input_ids, past_key_values=past, use_cache=True)[0]
        return logits, keys_and_values(past)


class Train(nn.Module):
    """A training step's forward pass. It returns the loss, or the output of a model without a head.

    It starts from embeddings and takes their gradient too, because then the frozen base has a backward pass.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, labels: Tensor) -> Tensor:
        labelled = {"labels": labels} if has_head(self.model) else {}
        loss_or_output: Tensor = self.model(inputs_embeds=inputs_embeds, **no_cache(self.model), **labelled)[0]
        return loss_or_output


class Linears(nn.Module):
    """Several linears that read one input."""

    def __init__(self, width: int, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


def keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and the values in a cache of transformers, by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def is_causal(model: Any) -> bool:
    """Return whether the model decodes token by token."""
    return not isinstance(model, transformers.BertPreTrainedModel)


def no_cache(model: Any) -> dict[str, bool]:
    """Return the argument that keeps a decoder from returning a cache; other models have none."""
    return {"use_cache": False} if is_causal(model) else {}


def has_head(model: Any) -> bool:
    """Return whether the model computes logits and a loss."""
    return model.get_output_embeddings() is not None


# Cases.


@dataclass(frozen=True)
class Step:
    """A call of a frozen module.

    Args:
        module: the module to capture and adapt; none of its parameters requires grad.
        inputs: the arguments of the call, by name.
        example: arguments to capture with; the sizes of their dynamic dimensions differ, and none is one.
        dynamic: the dynamic dimensions of `example`, as `torch.export` takes them.
        trains: whether the backward pass is part of the step. Inputs that have a gradient require grad.
    """

    module: nn.Module
    inputs: dict[str, Any]
    example: dict[str, Any]
    dynamic: Any
    trains: bool


@dataclass(frozen=True)
class Case:
    """A model or a layer.

    Args:
        build: builds the module, with random weights unless it has pretrained ones.
        calls: the calls that can be measured: "forward", "decode", "train"; "train-2x512", "train-2048" and
            "train-8192" are with as many tokens, and "train-masked" is without the labels of the first half.
        tokens: the number of tokens in a layer's input; None for a model.
    """

    build: Callable[[], nn.Module]
    calls: tuple[str, ...]
    tokens: int | None = None

    def module(self, device: str, dtype: torch.dtype) -> nn.Module:
        """Build the frozen module, with the same weights each time."""
        torch.manual_seed(0)
        return self.build().to(device, dtype).requires_grad_(False)

    def step(self, module: nn.Module, call: str, device: str, dtype: torch.dtype) -> Step:
        """Return the step that `call` means for this module."""
        trains = call.startswith("train")
        module.train(trains)
        step = _of_a_layer(module, call, self.tokens) if self.tokens else _of_a_model(module, call)
        inputs, example = (pytree.tree_map(_like(device, dtype), values) for values in (step.inputs, step.example))
        for tensor in inputs.values():
            if trains and tensor.is_floating_point():
                tensor.requires_grad_()
        return Step(step.module, inputs, example, step.dynamic, step.trains)


def _like(device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def shape_of(call: str) -> tuple[int, int]:
    """Return the rows and the tokens in each of a training step: those in its name, or the usual ones."""
    rows, _, length = call.partition("-")[2].rpartition("x")
    return int(rows or 1), int(length) if length.isdecimal() else TRAINED


def tokens_of(call: str) -> int:
    """Return how many tokens a call of a model computes."""
    return {"forward": PREFILL, "decode": 1}.get(call) or math.prod(shape_of(call))


def _of_a_layer(module: nn.Module, call: str, tokens: int) -> Step:
    width = next(module.parameters()).shape[1]
    inputs, example = ({"x": torch.randn(1, length, width)} for length in (tokens, 7))
    return Step(
        module, inputs, {"x": example["x"].repeat(3, 1, 1)}, {"x": {0: AUTO, 1: AUTO}}, call.startswith("train")
    )


def _of_a_model(model: Any, call: str) -> Step:
    tokens = functools.partial(torch.randint, model.config.vocab_size)
    inputs: dict[str, Any]
    example: dict[str, Any]
    if call == "forward":
        inputs, example = ({"input_ids": tokens(size)} for size in ((1, PREFILL), (3, 7)))
        return Step(Forward(model), inputs, example, {"input_ids": {0: AUTO, 1: AUTO}}, False)
    if call == "decode":
        inputs, example = (
            {"input_ids": tokens((batch, new)), "cache": _cache(model, batch, old)}
            for batch, new, old in ((1, 1, CACHED), (3, 2, 7))
        )
        of_cache = [({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO})] * model.config.num_hidden_layers
        return Step(Decode(model), inputs, example, {"input_ids": {0: AUTO, 1: AUTO}, "cache": of_cache}, False)
    rows, length = shape_of(call)
    inputs, example = (
        {"inputs_embeds": _embedded(model, tokens(size)), "labels": tokens(size)} for size in ((rows, length), (3, 7))
    )
    if call == "train-masked":
        inputs["labels"][:, : length // 2] = -100
    return Step(Train(model), inputs, example, {name: {0: AUTO, 1: AUTO} for name in inputs}, True)


@torch.no_grad()
def _embedded(model: Any, ids: Tensor) -> Tensor:
    embedded: Tensor = model.get_input_embeddings()(ids.to(model.device))
    return embedded


@torch.no_grad()
def _cache(model: Any, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    return keys_and_values(model(input_ids=ids, use_cache=True).past_key_values)


def _smollm2() -> nn.Module:
    return load_base()


def _llama(
    layers: int = 6,
    width: int = 576,
    inner: int = 1536,
    heads: int = 9,
    of_keys: int | None = None,
    vocabulary: int = 49152,
    cls: Any = transformers.LlamaForCausalLM,
) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=of_keys or heads // 3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: nn.Module = cls(config)
    return model


def _gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(n_layer=layers, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def _bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config)


CAUSAL = ("forward", "decode", "train", "train-masked", "train-2x512", "train-2048", "train-8192")
LAYER = ("forward", "train")
CASES = {
    "smollm2": Case(_smollm2, CAUSAL),
    "smollm2-4": Case(functools.partial(_llama, 4), CAUSAL),
    "smollm2-6": Case(_llama, CAUSAL),
    "llama-1b": Case(functools.partial(_llama, 16, 2048, 8192, 32, 8, 128256), (*CAUSAL, "train-8x2048")),
    # Leave out the head, because it takes half of a small model's time.
    "smollm2-4-body": Case(functools.partial(_llama, 4, cls=transformers.LlamaModel), CAUSAL),
    "smollm2-6-body": Case(functools.partial(_llama, cls=transformers.LlamaModel), CAUSAL),
    "gpt2": Case(functools.partial(_gpt2, 12), CAUSAL[:5]),  # its texts have at most 1024 tokens
    "gpt2-6": Case(functools.partial(_gpt2, 6), CAUSAL[:5]),
    "bert": Case(functools.partial(_bert, 12), LAYER),
    "bert-6": Case(functools.partial(_bert, 6), LAYER),
    **{
        f"{kind}-{width}-T{tokens}": Case(functools.partial(Linears, width, names), LAYER, tokens)
        for kind, names in {"linear": ("linear",), "qkv": ("q", "k", "v")}.items()
        for width in (576, 1024, 2048)
        for tokens in (1, 16, 512)
    },
    **{
        f"layers-{layers}": Case(functools.partial(_llama, layers, 192, 384, 3, vocabulary=64), CAUSAL)
        for layers in (2, 8, 30, 80)
    },
    "tiny": Case(functools.partial(_llama, 1, width=192, inner=128, heads=3, vocabulary=64), CAUSAL),
    "tiny-qkv": Case(functools.partial(Linears, 64, ("q", "k", "v")), LAYER, 4),
}
