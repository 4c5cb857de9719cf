"""torch.compile makes few kernels more of an adapted layer than of a frozen one, for a CUDA device that is absent."""

from __future__ import annotations

import re

import pytest
import torch

from tests.devices.kernels import TABLE, VARIANTS, code_of, kernels_in

if torch.version.cuda is None:
    pytest.skip("this build of torch knows no CUDA device", allow_module_level=True)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: its tensors have values"),
    pytest.mark.broad,
]

SITES = 7


def test_lora_adds_two_products_a_site_and_few_kernels() -> None:
    frozen, adapted = code_of(""), code_of("LoRA")
    assert all("@triton.jit" in code for code in (*frozen, *adapted))
    (triton, products), (more_triton, more_products) = kernels_in(frozen[0]), kernels_in(adapted[0])
    assert products < more_products <= products + 2 * SITES  # those that read one input share a product
    assert triton <= more_triton <= triton + SITES
    of_step, of_adapted_step = (sum(kernels_in(codes[1])) for codes in (frozen, adapted))
    # Two products, and two for each of their gradients. What stands between them is fused; torch 2.12 fuses less of it.
    assert of_step < of_adapted_step <= of_step + 7 * SITES


def test_the_table_has_all_variants() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert re.findall(r"^\| (\w+) \|", "\n".join(lines), re.M) == ["frozen", *VARIANTS]
