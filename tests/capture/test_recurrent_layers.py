"""A recurrent layer fixes the length of its example: a warning and the error of a call of another length say so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx

X = torch.randn(2, 5, 8)
FIXED = "torch.export records 'layer', a recurrent layer, for the 5 steps of its example"


class Recurrent(nn.Module):
    """A recurrent layer before a linear."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], batch_first: bool) -> None:
        super().__init__()
        self.layer, self.head = kind(8, 8, batch_first=batch_first), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x)[0])
        return y


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_length_that_becomes_fixed_is_told_once_and_in_the_error(
    kind: type[nn.GRU | nn.LSTM], batch_first: bool
) -> None:
    def shaped(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = llfx.capture(Recurrent(kind, batch_first), (shaped(X),))
    (warning,) = caught
    assert str(warning.message).startswith(f"{FIXED}: the graph takes no other length. The way out: pad")
    assert gm(shaped(torch.randn(3, 5, 8))).numel() == 3 * 5 * 4
    with pytest.raises(
        llfx.CallError, match=f"== 5, as in its example inputs.*{FIXED}; a capture without example_inputs"
    ):
        gm(shaped(torch.randn(2, 6, 8)))


def test_without_example_inputs_the_length_stays_open() -> None:
    model = Recurrent(nn.GRU, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = llfx.capture(model)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(gm(x), model(x))
