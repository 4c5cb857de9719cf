"""`nn.MultiheadAttention` without example inputs: its projections are sites, and it computes the same with any mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.sites.test_attention_modules import CASES
from tests.support.conformance import check_file, check_merge, check_remove, close, output, randomise
from tests.support.selection import broad_after, slow_after

D = 8
SYMBOLIC = [name for name in CASES if name != "encoder layer"]  # whose own forward looks at shapes


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, slow_after(3, SYMBOLIC)))
def test_projections_are_the_sites_that_export_finds(name: str) -> None:
    case = CASES[name]
    model = case.model.double()
    base = llfx.capture(model)
    table = llfx.inspect(base)
    assert {row.name: set(row.roles) - {"reader", "writer", "inner"} for row in table} == case.sites
    assert not table.left_out
    for training in (True, False):
        expected = output(model.train(training), case.inputs, 3)
        close(output(base.train(training), case.inputs, 3), expected.detach(), 1e-12, f"training={training}")
    configs = [llfx.DoRA(r=2, target_names=(".",)), llfx.IA3(target_roles=("attention",))]
    gm, exported = llfx.rewrite(base, configs), llfx.rewrite(model, configs, tuple(x[:2] for x in case.inputs))
    randomise(gm, 0)
    randomise(exported, 0)
    close(output(gm.eval(), case.inputs), output(exported.eval(), case.inputs), 1e-10, "exported")
    check_merge(gm, base, case.inputs, 1e-9)
    check_remove(gm, base, model)
    check_file(gm, base, case.inputs)


class Masked(nn.Module):
    def __init__(self, batch_first: bool, need_weights: bool, average: bool, causal: bool) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.options: dict[str, Any] = {
            "need_weights": need_weights,
            "average_attn_weights": average,
            "is_causal": causal,
        }

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        y, weights = self.att(x, x, x, attn_mask=mask, key_padding_mask=padding, **self.options)
        return (y, weights) if self.options["need_weights"] else y


MASK = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
BY_HEAD = torch.randn(6, 4, 4, dtype=torch.float64)
CALLS: list[tuple[str, bool, Any, Any]] = [
    ("no mask", True, None, None),
    ("a causal mask", True, MASK, None),
    ("padding", True, None, PADDING),
    ("both", True, MASK, PADDING),
    ("a mask of numbers for each head", True, BY_HEAD, None),
    ("a mask of numbers for each head, and padding", True, BY_HEAD, PADDING.double()),
    ("no batch", False, None, None),
    ("no batch, both", False, MASK, PADDING[1]),
    ("no batch, a mask for each head", False, BY_HEAD[:2], None),
]


@pytest.mark.parametrize(("batch_first", "need_weights"), list(itertools.product((True, False), repeat=2)))
def test_masks_layouts_and_weights_are_those_of_the_module(batch_first: bool, need_weights: bool) -> None:
    for average, causal in ((True, False), (False, True)):
        model = Masked(batch_first, need_weights, average, causal).double()
        base = llfx.capture(model)
        for what, batched, mask, padding in CALLS:
            if causal and mask is None:
                continue
            x = torch.randn(3, 4, D, dtype=torch.float64) if batched else torch.randn(4, D, dtype=torch.float64)
            x = x if batch_first or not batched else x.transpose(0, 1).contiguous()
            expected, actual = model(x, mask, padding), base(x, mask, padding)
            for got, wanted in zip(actual, expected, strict=True) if need_weights else ((actual, expected),):
                close(got.detach(), wanted.detach(), 1e-12, what)


def test_a_causal_hint_without_a_mask_is_an_error_as_in_the_module() -> None:
    base = llfx.capture(Masked(True, False, True, True))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        base(torch.randn(2, 4, D), None, None)


def test_default_roles_reach_all_of_a_vision_transformer_without_example_inputs() -> None:
    class Block(nn.Module):
        """A block of torchvision's ViT."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            z: Tensor = self.mlp(self.norm2(x))
            return x + z

    gm = llfx.rewrite(nn.Sequential(Block(), Block()), llfx.LoRA(r=2))
    names = {row.name for row in llfx.inspect(gm) if row.adapters}
    assert names == {
        f"{i}.{name}" for i in "01" for name in ("attention.in_proj", "attention.out_proj", "mlp.0", "mlp.2")
    }
