"""`nn.Transformer` and modules with an `nn.LSTM`: adapted as the eager wrapper, and what is not a site is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.selection import broad_after, slow_after


class Recurrent(nn.Module):
    """Projects the states of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.proj = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.proj(states)  # type: ignore[no-any-return]


def require_equal(gm: nn.Module, wrapped: nn.Module, *inputs: Tensor) -> None:
    """Compare outputs and the gradients of the adapters."""
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    gradients = []
    for model in (gm, wrapped):
        model(*inputs).square().sum().backward()
        parameters = dict(model.named_parameters())
        gradients.append({name: parameters[name].grad for name in llfx.adapter_state_dict(gm)})
    torch.testing.assert_close(gm(*inputs), wrapped(*inputs))
    torch.testing.assert_close(*gradients)


@pytest.mark.broad
@pytest.mark.parametrize("exported", broad_after(1, [True, False]))
def test_the_projections_beside_a_recurrent_layer_are_adapted(exported: bool) -> None:
    model, cfg = Recurrent(), llfx.LoRA(r=2, target_names="proj")
    inputs = (torch.randn(2, 5, 4),) if exported else None
    gm, wrapped = llfx.rewrite(model, cfg, inputs), llfx.wrap(model, cfg, inputs)
    require_equal(gm, wrapped, torch.randn(3, 5, 4))


@pytest.mark.broad
@pytest.mark.parametrize("exported", slow_after(1, [True, False]))
def test_a_recurrent_layer_itself_is_not_a_site_and_is_named(exported: bool) -> None:
    inputs = (torch.randn(2, 5, 4),) if exported else None
    with pytest.raises(llfx.SelectionError, match=r"lstm"):
        llfx.rewrite(Recurrent(), llfx.LoRA(r=2, target_names="lstm"), inputs)
    assert "lstm" in str(llfx.inspect(Recurrent(), inputs))


@pytest.mark.broad
def test_a_transformer_of_torch_equals_the_wrapper() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    cfg = llfx.LoRA(r=2, target_names=("linear1", "linear2"))
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    gm, wrapped = llfx.rewrite(model, cfg, inputs), llfx.wrap(model, cfg, inputs)
    require_equal(gm, wrapped, torch.randn(3, 6, 8), torch.randn(3, 7, 8))
    attention = {site.name for site in llfx.inspect(gm) if "query" in site.roles}
    assert attention == {
        "encoder.layers.0.self_attn.in_proj",
        "decoder.layers.0.self_attn.in_proj",
        "decoder.layers.0.multihead_attn.in_proj.rows_0_8",  # its keys and values come from the encoder
    }
