"""The cases of `benchmark.py`: frozen modules, the calls of them, and the same adapter in each implementation."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import finetune
import peft
import safetensors.torch
import torch
import transformers
from benchmark_report import disagreement
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_lite_fx as llfx
from lora_lite_fx.passes import Pipeline

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
        calls: the calls that can be measured: "forward", "decode", "train"; "train-2048" and "train-8192" are with as
            many tokens, and "train-masked" is without the labels of the first half.
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
    length = call.partition("-")[2]
    trained = int(length) if length.isdecimal() else TRAINED
    inputs, example = (
        {"inputs_embeds": _embedded(model, tokens(size)), "labels": tokens(size)} for size in ((1, trained), (3, 7))
    )
    if length == "masked":
        inputs["labels"][:, : trained // 2] = -100
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
    return finetune.load_base()


def _llama(
    layers: int = 6,
    width: int = 576,
    inner: int = 1536,
    heads: int = 9,
    vocabulary: int = 49152,
    cls: Any = transformers.LlamaForCausalLM,
) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
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


CAUSAL = ("forward", "decode", "train", "train-masked", "train-2048", "train-8192")
LAYER = ("forward", "train")
CASES = {
    "smollm2": Case(_smollm2, CAUSAL),
    "smollm2-6": Case(_llama, CAUSAL),
    # Leave out the head, because it takes half of a small model's time.
    "smollm2-6-body": Case(functools.partial(_llama, cls=transformers.LlamaModel), CAUSAL),
    "gpt2": Case(functools.partial(_gpt2, 12), CAUSAL[:4]),  # its texts have at most 1024 tokens
    "gpt2-6": Case(functools.partial(_gpt2, 6), CAUSAL[:4]),
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

# Adapters: each in all implementations.

VARIANTS = ("LoRA", "DoRA", "HRA", "DeLoRA", "IA3", "RoAd", "OFT")


def config(variant: str, rank: int, case: Case) -> llfx.Variant:
    """Return the config of a variant at its default roles, or at all linears of a layer, which have no roles."""
    targets: dict[str, Any] = {"target_names": (".",)} if case.tokens else {}
    return finetune.config(llfx.registry()[variant], rank, **targets)


@dataclass
class Arm:
    """An implementation, ready to be called.

    Args:
        name: its name on the command line.
        step: the call of the frozen module.
        run: the adapted module, or its compiled form.
        parameters: the trained parameters by name.
        named: renames tensors that have the names of `parameters` to the names of our graphs.
    """

    name: str
    step: Step
    run: Callable[..., Any]
    parameters: dict[str, nn.Parameter]
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def __call__(self) -> Any:
        """Run the step in the caller's mode and return its outputs; a training step leaves gradients."""
        if ":" in self.name:  # with CUDA graphs, the outputs of the last call are given up here
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.run(**self.step.inputs)
        if self.step.trains:
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.autograd.backward(outputs, [_direction(y.shape, y.dtype, y.device) for y in outputs])
        return outputs

    @property
    def inputs(self) -> list[Tensor]:
        """Return the inputs that have a gradient."""
        return [tensor for tensor in self.step.inputs.values() if isinstance(tensor, Tensor) and tensor.requires_grad]

    def renew(self) -> None:
        """Do the work between two training steps: drop gradients and mark parameters as changed; keep values."""
        if not self.step.trains:
            return
        with torch.no_grad():
            for tensor in (*self.parameters.values(), *self.inputs):
                tensor.grad = None
            for parameter in self.parameters.values():
                parameter.mul_(1)

    def results(self) -> dict[str, Tensor]:
        """Run the step; return its outputs and, of a training step, all gradients."""
        self.renew()
        with torch.set_grad_enabled(self.step.trains):
            outputs = pytree.tree_leaves(self())
        results = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
        if self.step.trains:
            results |= {
                f"input gradient {index}": x.grad.clone() for index, x in enumerate(self.inputs) if x.grad is not None
            }
            gradients = self.named({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
            results |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
            self.renew()
        return results


@functools.cache
def _direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient to start from at an output: one at a loss, else random."""
    if not shape:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
BASE = ("base", "base-again", "base-graph", "base-compiled")
ADAPTED = (
    "peft",
    "peft-compiled",
    "hooks",
    "ours-plain",
    "ours",
    "ours-compiled",
    "ours-frozen",
    "ours-frozen-compiled",
    "ours-adapt",
    "ours-fused",
    "ours-balanced",
    "merged",
)


class Arms:
    """The implementations of one adapter for one step. They share the frozen weights, and each is made when asked for.

    Args:
        step: the call of the frozen module.
        graph: the module's graph, from `capture`.
        cfg: the adapter; its values are random, and the same in all implementations.
    """

    def __init__(self, step: Step, graph: nn.Module, cfg: llfx.Variant) -> None:
        self.step, self.graph, self.cfg = step, graph, cfg
        self.ours = llfx.rewrite(graph, cfg)
        self._expected: dict[str, dict[str, Tensor]] = {}
        self._scopes = contextlib.ExitStack()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in llfx.adapter_parameters(self.ours):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.02)

    def make(self, name: str) -> Arm:
        """Make the arm of that name; after a compiled one's name, a mode of `torch.compile` may follow a colon.

        Raises:
            ConfigError: the variant or the module has no such implementation.
        """
        kind, _, mode = name.partition(":")
        if kind.endswith("-compiled"):
            arm = self.make(kind.removesuffix("-compiled"))
            return Arm(name, self.step, self.compile(arm, dynamic=False, mode=mode or None), arm.parameters, arm.named)
        if name == "peft":
            return self._peft()
        return self._arm(name, self._module(name))

    def _module(self, name: str) -> nn.Module:
        step = self.step
        if name in ("base", "base-again"):
            return step.module
        if name == "base-graph":
            return self.graph
        if name == "hooks":
            return self._filled(
                llfx.wrap(llfx.capture(step.module, step.example, dynamic_shapes=step.dynamic), self.cfg)
            )
        if name == "ours":
            return self.ours
        if name == "ours-frozen":
            if step.trains:
                raise llfx.ConfigError("nothing is kept in training")
            gm = llfx.optimize(self.ours)
            self._scopes.enter_context(llfx.frozen(gm))  # as inside generate
            return gm
        if name == "ours-fused":
            if not step.trains or "labels" not in step.inputs:
                raise llfx.ConfigError("only a training step with labels has a loss to fuse")
            return self._filled(llfx.rewrite(self.graph, self.cfg, fuse_loss=True))
        if name == "ours-balanced":
            if not step.trains:
                raise llfx.ConfigError("memory is planned for training steps")
            return self._filled(llfx.rewrite(self.graph, self.cfg, memory="balanced"))
        if name == "ours-plain":
            return llfx.optimize(self.ours, Pipeline(()))
        if name == "merged":
            merged: nn.Module = llfx.merge(self.ours)
            return merged
        if name == "ours-adapt":
            if isinstance(step.module, Linears):
                raise llfx.ConfigError("adapt takes only models of transformers")
            adapted: nn.Module = type(step.module)(llfx.adapt(step.module.model, self.cfg))
            return self._filled(adapted)
        raise ValueError(f"There is no arm {name!r}; there are {', '.join((*BASE, *ADAPTED))}.")

    def compile(self, arm: Arm, **options: Any) -> Callable[..., Any]:
        """Compile an arm. PEFT's may break the graph; for all others that is an error."""
        return torch.compile(arm.run, fullgraph=arm.name != "peft", **options)

    def disagreement(self, arm: Arm) -> str:
        """Say where an arm differs from the base or, if it is adapted, from our graph without optimizations."""
        expected = "base" if arm.name.startswith("base") else "ours-plain"
        if expected not in self._expected:
            self._expected[expected] = self.make(expected).results()
        tolerance = TOLERANCES[next(self.step.module.parameters()).dtype]
        return disagreement(arm.results(), self._expected[expected], tolerance, trained=arm.name != "merged")

    def _arm(self, name: str, module: nn.Module) -> Arm:
        parameters = {path: p for path, p in module.named_parameters() if p.requires_grad}
        return Arm(name, self.step, module.train(self.step.trains), parameters)

    def _filled(self, module: nn.Module) -> nn.Module:
        values = dict(self.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(values[name])
        return module

    def _peft(self) -> Arm:
        with tempfile.TemporaryDirectory() as folder:
            llfx.save_peft(self.ours, folder)
            settings = (Path(folder) / "adapter_config.json").read_bytes()
            memo = {id(tensor): tensor for tensor in (*self.step.module.parameters(), *self.step.module.buffers())}
            module = peft.PeftModel.from_pretrained(copy.deepcopy(self.step.module, memo), folder, is_trainable=True)

        def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            """Rename by way of files, because the library knows their names and layouts."""
            everything = {**module.state_dict(), **tensors}
            state = peft.get_peft_model_state_dict(module, everything, save_embedding_layers=False)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "adapter_config.json").write_bytes(settings)
                contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
                safetensors.torch.save_file(contiguous, Path(folder) / "adapter_model.safetensors")
                read = llfx.adapter_state_dict(llfx.load_peft(self.graph, folder))
            return {name: read[name] for name, parameter in self.ours.named_parameters() if parameter.requires_grad}

        return replace(self._arm("peft", module), named=named)


def capture(step: Step, cfg: llfx.Variant | None = None) -> tuple[nn.Module, float]:
    """Capture a step's module; return its graph, into which adapters are inserted quickly, and the seconds it took.

    Args:
        step: the call of the module.
        cfg: an adapter whose insertion counts too; without, one at all linears.
    """
    start = time.perf_counter()
    # Rewrite and remove the adapter again, because that leaves the captured base.
    any_adapter = llfx.LoRA(r=1, target_names=(".",)) if cfg is None else cfg
    rewritten = llfx.rewrite(step.module, any_adapter, step.example, dynamic_shapes=step.dynamic)
    seconds = time.perf_counter() - start
    return llfx.remove(rewritten), seconds
