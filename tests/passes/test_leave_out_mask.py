"""`leave_out_mask`: attention gets no mask in calls where the mask hides nothing, or only what comes later."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

import lora_lite_fx as llfx
from lora_lite_fx.passes import OPTIMIZATIONS
from tests.support.conformance import randomise
from tests.support.low_rank_llama import LOW_RANK, llama, tokens
from tests.support.releases import since
from tests.support.selection import broad_after, slow_after

ONES = torch.ones(3, 5, dtype=torch.long)
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


class Seen(TorchFunctionMode):
    """Record whether each call of attention got a mask, and whether it was causal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((mask is not None, kwargs.get("is_causal", False)))
        return func(*args, **kwargs)


@functools.cache
def captured() -> fx.GraphModule:
    return llfx.capture(llama()[0], {**tokens(3, 5), "attention_mask": LEFT})


@since("transformers", "5.24", "No region without gradients stands between the mask and the layers")
@pytest.mark.parametrize("checkpoint_layers", broad_after(1, [False, True]))
@pytest.mark.parametrize(
    ("mask", "seen"),
    broad_after(
        2,
        slow_after(
            3,
            [(None, (False, True)), (LEFT, (True, False)), (ONES, (False, True)), (RIGHT, (True, False))],
            several=True,
        ),
        several=True,
    ),
    ids=["none", "left", "ones", "right"],
)
def test_each_call_goes_by_its_own_mask(mask: Tensor | None, seen: tuple[bool, bool], checkpoint_layers: bool) -> None:
    gm = llfx.rewrite(captured(), LOW_RANK["LoRA"], checkpoint_layers=checkpoint_layers)
    wrapped = llfx.wrap(captured(), LOW_RANK["LoRA"])
    randomise(gm, 1)
    randomise(wrapped, 1)
    call = tokens(3, 5) if mask is None else {**tokens(3, 5), "attention_mask": mask}
    results = []
    for module in (gm, wrapped, llfx.optimize(gm, OPTIMIZATIONS.without("leave_out_mask"))):
        module.train()
        module.zero_grad()
        with Seen() as attention:
            output = module(**call).logits
        output.double().pow(2).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads, attention.calls))
    (y, grads, calls), (expected_y, expected, _), (plain_y, _, plain_calls) = results
    assert calls == [seen] * 2
    assert plain_calls == [(True, False)] * 2
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, plain_y, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@since("transformers", "5.20", "A mask that hides nothing from one token is made in a form that the pass knows")
@pytest.mark.broad
def test_one_token_of_a_cache_needs_no_mask() -> None:
    chat = llfx.adapt(llama()[0], LOW_RANK["DoRA"])

    def answer() -> None:
        chat.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=3, do_sample=False)

    answer()  # the model itself is run for calls of new kinds
    with Seen() as attention:
        answer()
    assert {call[0] for call in attention.calls} == {False}
