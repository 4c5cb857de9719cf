"""The mask of attention: what is left out of it means the same, for all masks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lora_lite_fx.ops import attention_mask
from lora_lite_fx.ops.attention_mask import MaskOfSizes, as_numbers, needed_mask

CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
SEEN = torch.ones(4, 4, dtype=torch.bool)


def but(mask: Tensor, *place: int) -> Tensor:
    """Return the mask with one value changed."""
    mask = mask.clone()
    mask[place] = ~mask[place]
    return mask


@pytest.mark.parametrize(
    ("mask", "needed"),
    [
        pytest.param(SEEN, (None, False), id="all seen"),
        pytest.param(CAUSAL, (None, True), id="causal"),
        pytest.param(CAUSAL.expand(2, 1, 4, 4), (None, True), id="causal in a batch"),
        pytest.param(torch.ones(2, 1, 1, 7, dtype=torch.bool), (None, False), id="one query of a cache"),
        pytest.param(torch.ones(3, 5, dtype=torch.bool), (None, False), id="other lengths, all seen"),
        pytest.param(torch.ones(1, 1, dtype=torch.bool), (None, False), id="one token"),
    ],
)
def test_a_mask_that_says_nothing_is_left_out(mask: Tensor, needed: tuple[Tensor | None, bool]) -> None:
    assert needed_mask(mask) == needed


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.stack((CAUSAL, but(CAUSAL, 3, 0))), id="padding in one row of the batch"),
        pytest.param(CAUSAL & torch.tensor([False, True, True, True]), id="padding on the left"),
        pytest.param(but(CAUSAL, 2, 0), id="a hidden key in between"),
        pytest.param(but(CAUSAL, 1, 3), id="a later key that is seen"),
        pytest.param(but(SEEN, 1, 2), id="a hidden key among seen ones"),
        pytest.param(torch.stack((CAUSAL, SEEN)), id="causal and seen"),
        pytest.param(torch.ones(3, 5, dtype=torch.bool).tril(2), id="a causal mask behind a cache"),
        pytest.param(torch.ones(5, 3, dtype=torch.bool).tril(), id="more queries than keys"),
        pytest.param(~SEEN, id="nothing seen"),
        pytest.param(but(SEEN[:1], 0, 1), id="one query, and a hidden key"),
        pytest.param(torch.stack((SEEN[:1], but(SEEN[:1], 0, 0))), id="one query, and padding in one row"),
        pytest.param(SEEN[:0], id="no queries"),
        pytest.param(SEEN.to("meta"), id="no values"),
    ],
)
def test_every_other_mask_stays(mask: Tensor) -> None:
    kept, causal = needed_mask(mask)
    assert kept is mask
    assert causal is False


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16), st.sampled_from([0.5, 0.9, 1.0]))
def test_attention_computes_the_same(batch: int, queries: int, keys: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) < share
    if seed % 2:
        mask &= torch.ones(queries, keys, dtype=torch.bool).tril()
    mask |= ~mask.any(-1, keepdim=True)  # attention of a query that sees nothing is not defined
    q, k, v = (torch.randn(batch, 2, n, 3, generator=generator, dtype=torch.float64) for n in (queries, keys, keys))
    kept, causal = needed_mask(mask)
    with mock.patch.object(attention_mask, "reading_waits", return_value=True):
        assert needed_mask(mask) == (kept, causal)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    for needed in (kept, as_numbers(kept, q.dtype)):
        actual = F.scaled_dot_product_attention(q, k, v, needed, is_causal=causal)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def attend(mask: Tensor) -> Tensor:
    q = torch.ones(1, 1, 4, 3)
    kept, causal = needed_mask(mask)
    return F.scaled_dot_product_attention(q, q, q, kept, is_causal=causal)


def test_a_trace_records_no_answer() -> None:
    traced = make_fx(attend)(SEEN)
    for mask in (SEEN, CAUSAL, but(SEEN, 1, 2)):
        assert torch.equal(traced(mask), attend(mask))
    assert any(node.op == "placeholder" and node.users for node in traced.graph.nodes)
    with FakeTensorMode() as mode:
        assert needed_mask(mode.from_tensor(SEEN))[1] is False
    kept = torch.vmap(lambda mask: needed_mask(mask)[0])(SEEN[None])
    assert kept is not None
    assert torch.equal(kept, SEEN[None])


def test_a_mask_of_sizes_is_looked_at_once_for_each_of_them() -> None:
    of_sizes = MaskOfSizes()
    assert of_sizes(CAUSAL, 4, 4) == (None, True)
    assert of_sizes(CAUSAL[:, :2], 4, 2)[0] is not None
    with mock.patch.object(attention_mask, "needed_mask", side_effect=AssertionError):
        assert of_sizes(CAUSAL, 4, 4) == (None, True)
        mask, causal = of_sizes(CAUSAL[:, :2], 4, 2)
        with pytest.raises(AssertionError):
            of_sizes(SEEN, 4, 1)
    assert (mask is None, causal) == (False, False)
