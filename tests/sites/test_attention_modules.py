"""`nn.MultiheadAttention` and encoders made of it: parts of one weight as sites, both modes, the fast path."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.conformance import (
    check_export,
    check_file,
    check_merge,
    check_remove,
    close,
    gradients,
    output,
    randomise,
)
from tests.support.selection import broad_after, slow_after
from tests.support.untouched import untouched

D = 8
X, MEMORY = (torch.randn(3, n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (5, 4))


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.att = nn.MultiheadAttention(D, 2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Any:
        y, weights = self.att(x, x, x, need_weights=self.need_weights)
        return x + y + (weights.sum() if weights is not None else 0)


class CrossAttention(nn.Module):
    def __init__(self, same: bool, **options: int) -> None:
        super().__init__()
        self.same = same
        self.att = nn.MultiheadAttention(D, 2, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return x + self.att(x, memory, memory if self.same else memory * 2)[0]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and its sites with the roles to check."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    sites: dict[str, set[str]]


SELF = {"att.in_proj": {"query", "key", "value"}, "att.out_proj": {"output"}}
MLP = {"linear1": {"up"}, "linear2": {"down"}}
torch.manual_seed(0)
CASES = {
    "self": Case(SelfAttention(False), (X,), SELF),
    "self, with weights": Case(SelfAttention(True), (X,), SELF),
    "cross, keys are values": Case(
        CrossAttention(True),
        (X, MEMORY),
        {"att.in_proj.rows_0_8": {"query"}, "att.in_proj.rows_8_24": {"key", "value"}, "att.out_proj": {"output"}},
    ),
    "cross, keys are not values": Case(
        CrossAttention(False),
        (X, MEMORY),
        {
            "att.in_proj.rows_0_8": {"query"},
            "att.in_proj.rows_8_16": {"key"},
            "att.in_proj.rows_16_24": {"value"},
            "att.out_proj": {"output"},
        },
    ),
    "weights of their own": Case(
        CrossAttention(True, kdim=6, vdim=6),
        (X, MEMORY[..., :6].contiguous()),
        {"att.q_proj": {"query"}, "att.k_proj": {"key"}, "att.v_proj": {"value"}, "att.out_proj": {"output"}},
    ),
    "encoder layer": Case(
        nn.TransformerEncoderLayer(D, 2, 12, batch_first=True),
        (X,),
        {"self_attn.in_proj": {"query", "key", "value"}, "self_attn.out_proj": {"output"}, **MLP},
    ),
    "decoder layer": Case(
        nn.TransformerDecoderLayer(D, 2, 12, batch_first=True),
        (X, MEMORY),
        {
            "self_attn.in_proj": {"query", "key", "value"},
            "self_attn.out_proj": {"output"},
            "multihead_attn.in_proj.rows_0_8": {"query"},
            "multihead_attn.in_proj.rows_8_24": {"key", "value"},
            "multihead_attn.out_proj": {"output"},
            **MLP,
        },
    ),
}


@functools.cache
def base_of(name: str) -> tuple[nn.Module, fx.GraphModule]:
    case = CASES[name]
    model = case.model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # because torch starts biases at zero
    return model, llfx.capture(model, tuple(x[:2] for x in case.inputs))


@pytest.mark.parametrize("name", broad_after(2, CASES))
def test_the_graph_computes_the_module_in_both_modes(name: str) -> None:
    model, base = base_of(name)
    for training in (True, False):
        expected = output(model.train(training), CASES[name].inputs, 3)
        close(output(base.train(training), CASES[name].inputs, 3), expected.detach(), 1e-12, f"training={training}")


@pytest.mark.parametrize("name", broad_after(3, CASES))
def test_projections_of_attention_modules_are_sites_with_roles(name: str) -> None:
    rows = {row.name: set(row.roles) - {"reader", "writer", "inner"} for row in llfx.inspect(base_of(name)[1])}
    assert rows == CASES[name].sites


@pytest.mark.parametrize("name", broad_after(1, CASES))
def test_adapters_compute_the_same_as_merged_weights_in_the_module(name: str) -> None:
    model, base = base_of(name)
    inputs = CASES[name].inputs
    with untouched(model):
        gm = llfx.rewrite(base, [llfx.DoRA(r=2, target_names=(".",)), llfx.IA3()])
        randomise(gm, 0)
        merged = llfx.merge(gm)
    dense = copy.deepcopy(model)
    dense.load_state_dict(merged.state_dict())
    close(output(gm.eval(), inputs), output(dense.eval(), inputs), 1e-9, "dense")
    assert (output(gm, inputs) - output(model.eval(), inputs)).abs().max() > 0.1
    _, grads = gradients(gm.train(), inputs)
    assert grads.keys() == {name for name, p in gm.named_parameters() if p.requires_grad}
    check_remove(gm, base, model)
    if "cross" in name:
        check_merge(gm.eval(), base, inputs, 1e-9)
        check_file(gm, base, inputs)


@pytest.mark.broad
def test_a_part_of_a_weight_has_the_gradient_of_its_rows() -> None:
    """Check `dL/dB = s dL/dW A^T` at the rows of the keys, with `dL/dW` from the module itself."""
    model, base = base_of("cross, keys are not values")
    inputs = CASES["cross, keys are not values"].inputs
    gm = llfx.rewrite(base, llfx.LoRA(r=2, alpha=2, target_roles=("key",))).eval()
    _, grads = gradients(gm, inputs)  # before training, because the adapted model then computes the same as the module
    reference = copy.deepcopy(model).eval()
    _, dense = gradients(reference, inputs)
    a = llfx.adapter_state_dict(gm)["att.in_proj.rows_8_16.lora_A"]
    close(grads["att.in_proj.rows_8_16.lora_B"], dense["att.in_proj_weight"][8:16] @ a.t(), 1e-9, "gradient")


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(1, ["cross, keys are values", "self, with weights"]))
def test_adapted_attention_modules_are_exported_and_compiled(name: str) -> None:
    _, base = base_of(name)
    inputs = CASES[name].inputs
    gm = llfx.rewrite(base, llfx.LoRA(r=2, target_names=(".",)))
    randomise(gm, 0)
    check_export(gm, tuple(x[:2] for x in inputs), inputs, 1e-9)
    fast = torch.compile(gm.eval(), fullgraph=True, backend="aot_eager")
    close(output(fast, inputs), output(gm, inputs), 1e-9, "compiled")


@pytest.mark.broad
def test_wrap_refuses_projections_because_they_are_not_called_modules() -> None:
    model, _ = base_of("encoder layer")
    for name in ("in_proj", "out_proj"):
        with (
            untouched(model),
            pytest.raises(llfx.ConfigError, match=rf"'self_attn\.{name}' is not a module that is called"),
        ):
            llfx.wrap(model, llfx.LoRA(r=2, target_names=(name,)), (X[:2],))


@pytest.mark.broad
def test_the_fast_path_of_an_encoder_does_not_go_around_wrapped_linears() -> None:
    model, base = base_of("encoder layer")
    cfg = llfx.LoRA(r=2, target_roles=("mlp",))
    wrapped, gm = llfx.wrap(model.eval(), cfg, (X[:2],)), llfx.rewrite(base, cfg)
    randomise(wrapped, 0)
    randomise(gm, 0)
    with torch.no_grad():
        close(output(wrapped.eval(), (X,)), output(gm.eval(), (X,)), 1e-9, "without gradients")


def test_peft_files_refuse_variants_that_peft_does_not_have_there() -> None:
    _, base = base_of("self")
    assert llfx.to_peft_config(llfx.rewrite(base, llfx.LoRA(r=2, target_names=("in_proj",))))["target_modules"]
    gm = llfx.rewrite(base, llfx.DoRA(r=2, target_names=("in_proj",)))
    with pytest.raises(llfx.ConfigError, match=r"DoRA: at an attention module"):
        llfx.to_peft_config(gm)
