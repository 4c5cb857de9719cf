"""Check the tensors that a user's variant asks for: their names, their specs, and those that sites share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import lora_lite_fx as llfx
from lora_lite_fx.sites.site import Site
from tests.support.refusals import WAYS, Mine, Net, X, refusal

Spec = llfx.ParamSpec

HIDES = "and the module of the site has something of that name, which the tensor would hide. Choose another name"
STARTS = "It is one of 'zeros', 'ones', 'kaiming', a number, or a function that fills a tensor in place."


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ({"bias": Spec((8,))}, f"calls a tensor 'bias', {HIDES}, such as 'lora_bias'."),
        ({"weight": Spec((8,))}, f"calls a tensor 'weight', {HIDES}, such as 'lora_weight'."),
        ({"scale": Spec((8,))}, f"calls a tensor 'scale', {HIDES}, such as 'lora_scale'."),
        ({"training": Spec((8,))}, f"calls a tensor 'training', {HIDES}, such as 'lora_training'."),
        ({"forward": Spec((8,))}, f"calls a tensor 'forward', {HIDES}, such as 'lora_forward'."),
        ({"placements": Spec((8,))}, f"calls a tensor 'placements', {HIDES}, such as 'lora_placements'."),
        (
            {"a b": Spec((8,))},
            "calls a tensor 'a b', and forward could not read p.a b: a name must be a Python identifier.",
        ),
        (
            {"lambda": Spec((8,))},
            "calls a tensor 'lambda', and forward could not read p.lambda: a name must be a Python identifier.",
        ),
        (None, 'must return a dict such as {"lora_A": ParamSpec((4, 8))}, not None.'),
        ([Spec((8,))], 'must return a dict such as {"lora_A": ParamSpec((4, 8))}, not [<ParamSpec>].'),
        ({"lora_A": (2, 4)}, "must map names to ParamSpec, and gives (2, 4) for 'lora_A'."),
    ],
)
def test_tensors_that_cannot_be(way: Any, specs: Any, expected: str) -> None:
    class Named(Mine):
        def params(self, site: Site) -> Any:
            return specs

    assert refusal(way, Named) == f"Named.params at 'fc' (d_in=4, d_out=8) {expected}"


@pytest.mark.parametrize("way", WAYS)
def test_a_spec_that_cannot_be_is_named_with_its_place_and_line(way: Any) -> None:
    class Kaimin(Mine):
        def params(self, site: Site) -> Mapping[str, Spec]:
            return {"lora_A": Spec((2, site.d_in), init="kaimin")}

    assert refusal(way, Kaimin) == (
        "Kaimin.params at 'fc' (d_in=4, d_out=8): ParamSpec: unknown init 'kaimin', did you mean 'kaiming'?"
        f' {STARTS} Line N of test_contract_of_params.py: return {{"lora_A": Spec((2, site.d_in), init="kaimin")}}.'
    )


@pytest.mark.parametrize("way", WAYS)
def test_shared_tensors_that_differ_by_site_name_two_sites(way: Any) -> None:
    class OneGate(Mine):
        def params(self, site: Site) -> Mapping[str, Spec]:
            return {"lora_shared_g": Spec((site.d_out,))}

    assert refusal(way, OneGate, ".*") == (
        "OneGate.params: 'lora_shared_g' is one tensor for all sites, and must be the same at each. It is"
        " ParamSpec(shape=(8,), init='zeros', trainable=True, dtype=None) at 'fc' (d_in=4, d_out=8), and"
        " ParamSpec(shape=(6,), init='zeros', trainable=True, dtype=None) at 'head' (d_in=8, d_out=6). Give it the"
        " largest size and let each site use a part of it, or choose sites of one size."
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_gets_the_number_of_another_is_refused(way: Any) -> None:
    class Second(Mine):
        def params(self, site: Site) -> Mapping[str, Spec]:
            return {**super().params(site), "lora_A_2": Spec((1,))}

    with pytest.raises(llfx.ConfigError) as caught:
        way(Net(), [Second(target_names="fc"), llfx.LoRA(r=2, target_names="fc")], (X,))
    assert str(caught.value) == (
        "LoRA.params at 'fc' (d_in=4, d_out=8) calls a tensor 'lora_A', and the module of the site has 'lora_A_2'"
        " already. Choose another name."
    )
