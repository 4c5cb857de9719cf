"""The number by which processes compare their inputs depends on all that makes two inputs different."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_lite_fx.graph.divided_calls import hash_of

TENSORS = (
    torch.tensor([[1, 2], [3, 4]]),
    torch.tensor([[2, 1], [3, 4]]),  # in another order
    torch.tensor([[3, 4], [1, 2]]),
    torch.tensor([[1, 2, 3, 4]]),  # in another shape
    torch.tensor([1, 2, 3, 4]),
    torch.tensor([[1, 2], [3, 5]]),
    torch.zeros(2, 2, dtype=torch.long),
    torch.zeros(2, 3, dtype=torch.long),
    torch.ones(2, 2, dtype=torch.bool),
    torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    torch.tensor([[1.0, 2.0], [3.0, 4.0 + 1e-6]]),
    torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16),
    torch.tensor([[1.0, 2.0], [3.0, 4.0j]]),
    torch.zeros(0, 2),
    torch.tensor(1.5),
)


def test_tensors_that_differ_have_other_numbers() -> None:
    numbers = [int(hash_of(tensor)) for tensor in TENSORS]
    assert len({*numbers}) == len(TENSORS)
    assert all(0 <= number < 2**62 for number in numbers)


@given(st.lists(st.integers(0, 50_000), min_size=2, max_size=40), st.data())
def test_one_other_token_gives_another_number(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[place] = data.draw(st.integers(0, 50_000).filter(lambda token: token != tokens[place]))
    assert hash_of(torch.tensor(tokens)) != hash_of(torch.tensor(other))


@pytest.mark.parametrize("tensor", TENSORS, ids=str)
def test_the_layout_in_memory_does_not_matter(tensor: Tensor) -> None:
    assert hash_of(tensor.t().contiguous().t()) == hash_of(tensor)
