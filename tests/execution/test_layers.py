"""Check that programs call layers as modules at their own paths: calls alone, shared code, sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lora_lite_fx as llfx
from tests.support.conformance import close
from tests.support.llama_by_front_end import FRONT_ENDS, front_ends, logits, made
from tests.support.models import tiny_llama
from tests.support.selection import broad_after

VARIANTS = [llfx.LoRA(r=2), llfx.DoRA(r=2), llfx.HRA(r=2)]
variants = pytest.mark.parametrize("cfg", broad_after(1, VARIANTS), ids=lambda cfg: type(cfg).__name__)


def test_a_layer_of_a_graph_runs_alone() -> None:
    model, wrapper = made("rewrite", llfx.DoRA(r=2))
    layer = model.model.layers[1]
    with pytest.raises(llfx.AdapterError, match=r"A layer does, as graph\.model\.layers"):
        layer(torch.zeros(1))
    inputs: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args))
    outputs: list[Any] = []
    wrapper.model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    logits(model), logits(wrapper)
    close(layer(*inputs[0]), outputs[0], 1e-9, "output of the layer")


@pytest.mark.broad
def test_a_layer_that_was_replaced_by_another_module_is_an_error() -> None:
    for front_end in FRONT_ENDS:
        model, _ = made(front_end, llfx.LoRA(r=2))
        logits(model)
        model.model.layers[1] = nn.Identity()
        if front_end == "adapt":  # captures the model as it is now, which does not run
            with pytest.raises(llfx.CaptureError, match="Identity"):
                logits(model)
            continue
        with pytest.raises(llfx.AdapterError) as error:
            logits(model)
        assert str(error.value) == (
            "'model.layers.1' is a Identity since the graph was captured. The graph reads the tensors of modules by"
            " name, and does not run their code. The way out: replace the tensors alone; or replace the module in the"
            " model, and capture that again."
        )


@pytest.mark.broad
def test_a_tied_parameter_that_is_replaced_under_one_name_is_an_error() -> None:
    base = transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=1, vocab_size=40, tie_word_embeddings=True))
    for front_end in FRONT_ENDS.values():
        model = front_end(base, llfx.LoRA(r=2))
        logits(model)
        other = nn.Parameter(model.model.embed_tokens.weight.detach() * 2, requires_grad=False)
        model.lm_head.weight = other
        with pytest.raises(llfx.AdapterError, match=r"lm_head\.weight were one parameter"):
            logits(model)
        model.model.embed_tokens.weight = other
        logits(model)


@pytest.mark.broad
@variants
def test_equal_layers_have_one_function(cfg: llfx.Variant) -> None:
    model, _ = made("rewrite", cfg, layers=5)
    logits(model)
    (program,) = model.derived.programs.values()
    functions = [piece.rest for piece in program.pieces]
    # The first layer differs: its input needs no gradient, so there is nothing to compute again in the backward pass.
    assert len(functions) == 5
    assert len(set(functions)) <= 2
    assert len(set(functions[1:])) == 1


@pytest.mark.broad
@pytest.mark.parametrize("layers", broad_after(1, [3, 5]))
def test_layers_that_are_compiled_one_by_one_share_graphs(layers: int) -> None:
    torch.compiler.reset()
    model, wrapper = made("rewrite", llfx.DoRA(r=2), layers)
    counter = CompileCounter()
    logits(model)
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    close(logits(model), logits(wrapper), 1e-9, "logits")
    torch.compiler.reset()
    assert counter.frame_count == 2


# Sharding.


@front_ends
@variants
def test_fully_shard_on_layers_and_root_trains_the_same(front_end: str, cfg: llfx.Variant) -> None:
    model, wrapper = made(front_end, cfg)
    expected = dict(
        zip(
            llfx.adapter_state_dict(wrapper),
            torch.autograd.grad(logits(wrapper).square().sum(), llfx.adapter_parameters(wrapper)),
            strict=False,
        )
    )
    logits(model)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        logits(model).square().sum().backward()
        gradients = {
            name: parameter.grad.full_tensor()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
    finally:
        dist.destroy_process_group()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name], 1e-9, name)
