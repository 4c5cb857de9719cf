"""`narrow_parameter_work`: OFT's sums and products are in float32, and in float64 under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite_fx as llfx
from lora_lite_fx.passes import PassReport
from tests.support.conformance import randomise
from tests.support.selection import broad_after


class Products(TorchDispatchMode):
    """Records the types of products of matrices in blocks, as OFT's parameter work has them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.bmm.default and result.shape == (4, 4, 4):
            self.dtypes.add(result.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class Double(llfx.Variant):
    """Scales the output, in double precision if `whole`; else the factor alone is computed in it."""

    double_for_autocast: ClassVar[bool] = True
    whole: bool = True

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_s": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y, factor = base(x), 1 + p.lora_s.double() * p.lora_s
        result: Tensor = (y.double() * factor).float() if self.whole else y * factor.float()
        return result


def adapted(base: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).to(base)
    gm = llfx.rewrite(model, llfx.OFT(block_size=4, target_names=(".",), **options), (torch.randn(3, 16, dtype=base),))
    randomise(gm, 0)
    return gm


def report(gm: Any) -> PassReport:
    reports = llfx.program(gm, "training").meta["report"].passes
    (found,) = [each for each in reports if each.name == "narrow_parameter_work"]
    return found  # type: ignore[no-any-return]


def gradients(model: Any, x: Tensor, parameters: Sequence[Tensor], autocast: bool) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    return y, *torch.autograd.grad(y.float().square().sum(), parameters)


@pytest.mark.parametrize("base", broad_after(1, [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_products_are_in_double_precision_under_autocast_alone(base: torch.dtype, autocast: bool) -> None:
    gm = adapted(base)
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    x = torch.randn(5, 16, dtype=base, requires_grad=True)
    parameters = [x, *llfx.adapter_parameters(gm)]
    ours, theirs = (gradients(model, x, parameters, autocast) for model in (gm, plain))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as seen:
        gm(x)
    assert seen.dtypes == {torch.float64 if autocast else torch.float32}


def test_nothing_is_saved_in_double_precision() -> None:
    gm, dtypes = adapted(), set()

    def pack(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gm(torch.randn(5, 16))
    assert dtypes == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_cayley_neumann": False}, "diagonal, ones_like, diag_embed, linalg_solve stay in float64"),
        ({"coft": True}, "detach, linalg_vector_norm, clamp_min, reciprocal stay in float64"),
    ],
    ids=str,
)
def test_what_may_enlarge_errors_stays(options: dict[str, Any], reason: str) -> None:
    found = report(adapted(**options))
    assert found.edits == 0
    assert [str(each) for each in found.declined] == [f"0: {reason}"]


class ForItself(Double):
    """Needs the double precision itself."""

    double_for_autocast = False


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        (Double(whole=True, target_names=(".",)), 0),
        (Double(whole=False, target_names=(".",)), 3),
        (ForItself(whole=False, target_names=(".",)), 0),
    ],
    ids=str,
)
def test_what_a_variant_needs_in_double_precision_stays(config: Double, edits: int) -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(16, 16)), config, (torch.randn(3, 16),))
    assert report(gm).edits == edits


def test_a_model_in_double_precision_stays() -> None:
    assert report(adapted(torch.float64)).edits == 0


@pytest.mark.parametrize("autocast", broad_after(1, [False, True]), ids=["", "autocast"])
def test_it_compiles(autocast: bool) -> None:
    gm = adapted()
    x = torch.randn(5, 16)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    ours, theirs = (gradients(model, x, llfx.adapter_parameters(gm), autocast) for model in (compiled, gm))
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
