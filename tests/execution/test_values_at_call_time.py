"""A frozen tensor of a variant is a value to set between calls: a steering coefficient, read when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_lite_fx as llfx
from tests.support.models import one_layer_llama
from tests.support.own_variants import registered
from tests.support.selection import broad_after


@dataclass(frozen=True, kw_only=True)
class Steered(llfx.Variant):
    """`y = W x + b + c v`, v by site, c of the caller's, for all sites."""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {
            "lora_v": llfx.ParamSpec((site.d_out,), init=lambda v: v.copy_(torch.linspace(-1, 1, len(v)))),
            "lora_shared_c": llfx.ParamSpec((), trainable=False),
        }

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x) + p.lora_shared_c * p.lora_v


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(Steered):
        yield


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype)


def expected(c: float) -> Tensor:
    hidden = net()[0](X) + c * torch.linspace(-1, 1, 6)
    y: Tensor = net()[1](hidden) + c * torch.linspace(-1, 1, 4)
    return y


@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
def test_eager_calls_read_the_value_of_now(how: Any) -> None:
    model = how(net(), Steered(target_names="."), (X,)).eval()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_v", "1.lora_v"]
    assert torch.equal(model(X), net()(X))
    for c in (2.0, -0.5):
        model.lora_shared_c.fill_(c)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(model(X), expected(c), atol=1e-6)


def test_a_compiled_model_is_not_compiled_again() -> None:
    gm = llfx.rewrite(net(), Steered(target_names="."), (X,)).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(gm, backend=counter, fullgraph=True)
    for c in (2.0, -0.5, 3.0):
        llfx.adapter_state_dict(gm)["lora_shared_c"].fill_(c)
        assert torch.allclose(compiled(X), expected(c), atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.broad
def test_generate_reads_the_value_of_each_call_and_captures_nothing_anew() -> None:
    model = one_layer_llama().eval()
    chat = llfx.adapt(model, Steered(target_names="down_proj|lm_head"))
    ids = torch.arange(6).view(1, 6)

    def generated() -> tuple[Tensor, ...]:
        result = chat.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits: tuple[Tensor, ...] = result.logits
        return logits

    plain = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(generated(), plain.logits, strict=True))
    captures = chat._graphs.captures
    steered: dict[float, tuple[Tensor, ...]] = {}
    for c in (2.0, -1.0, 2.0):
        chat.lora_shared_c.fill_(c)
        logits = generated()
        if c in steered:
            assert all(torch.equal(a, b) for a, b in zip(logits, steered[c], strict=True))
        steered[c] = logits
        assert torch.allclose(logits[0], chat(ids).logits[:, -1], atol=1e-5)
    assert not torch.allclose(steered[2.0][0], steered[-1.0][0])
    assert chat._graphs.captures <= captures + 1, "a call without a cache may have a graph of its own"


@torch.no_grad()
def test_inside_frozen_a_change_is_an_error() -> None:
    gm: Any = llfx.rewrite(net(), Steered(target_names="."), (X,)).eval()
    with llfx.frozen(gm):
        gm(X)
        gm.lora_shared_c.fill_(2.0)
        with pytest.raises(llfx.AdapterError, match=r"was written to inside llfx\.frozen"):
            gm(X)
    gm.lora_shared_c.fill_(-0.5)
    assert torch.allclose(gm(X), expected(-0.5), atol=1e-6)
    with llfx.frozen(gm):
        assert torch.allclose(gm(X), expected(-0.5), atol=1e-6)
