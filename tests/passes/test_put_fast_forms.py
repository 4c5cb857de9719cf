"""`put_fast_forms`: the operations of RoAd and OFT have their fast forms in training, the plain ones in inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite_fx as llfx
from lora_lite_fx.ops.rotated_blocks import RotatedBlocks
from lora_lite_fx.ops.rotated_pairs import rotated_pairs_at_once
from lora_lite_fx.ops.skew_rotations import neumann_rotations_in_float32
from tests.support.conformance import randomise
from tests.support.selection import broad_after

FAST = (RotatedBlocks(), rotated_pairs_at_once, neumann_rotations_in_float32)


class Siblings(nn.Module):
    """Two linears that read one input, which is a gate times a value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate(x).sigmoid() * self.gate(x)
        result: Tensor = self.one(inner).tanh() + self.two(inner)
        return result


def adapted(cfg: llfx.Variant, model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Siblings() if model is None else model
    width = next(model.parameters()).shape[1]
    gm = llfx.rewrite(model, cfg, (torch.randn(3, width, requires_grad=True),), **options)
    randomise(gm, 0)
    return gm


def oft(**options: Any) -> llfx.Variant:
    return llfx.OFT(block_size=4, target_names=("one", "two"), **options)


def road(**options: Any) -> llfx.Variant:
    return llfx.RoAd(group_size=8, target_names=("one", "two"), **options)


def fast_forms(gm: Any, program: Any) -> list[Any]:
    """Return the fast forms in a program, each once for each site."""
    targets = [node.target for node in llfx.program(gm, program).graph.nodes]
    return [target for target in targets if target in FAST or isinstance(target, RotatedBlocks)]


def assert_same_gradients(gm: Any, x: Tensor) -> None:
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    parameters = [x, *llfx.adapter_parameters(gm)]
    ours, theirs = (torch.autograd.grad(model(x).square().sum(), parameters) for model in (gm, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("cfg", "each"),
    broad_after(
        2,
        [
            (oft(), 2),
            (road(), 1),
            (oft(block_share=True), 2),
            (oft(use_cayley_neumann=False), 1),
            (oft(coft=True), 1),
            (road(kind="road_2"), 1),
            (road(kind="road_4"), 1),
        ],
        several=True,
    ),
    ids=str,
)
def test_each_site_has_its_fast_forms_in_training(cfg: llfx.Variant, each: int) -> None:
    gm = adapted(cfg)
    assert len(fast_forms(gm, "training")) == 2 * each
    assert fast_forms(gm, "inference") == []
    assert_same_gradients(gm, torch.randn(5, 8, requires_grad=True))


def test_blocks_of_another_type_are_rotated_in_it() -> None:
    gm = adapted(oft(dtype=torch.float64))
    assert sum(isinstance(each, RotatedBlocks) for each in fast_forms(gm, "training")) == 2
    assert_same_gradients(gm, torch.randn(5, 8, requires_grad=True))


def test_pairs_of_several_types_are_left_alone() -> None:
    gm = adapted(road(dtype=torch.float64))
    assert fast_forms(gm, "training") == []
    reports = llfx.program(gm, "training").meta["report"].passes
    (report,) = [each for each in reports if each.name == "put_fast_forms"]
    assert [declined.why for declined in report.declined] == ["its operands are of several types"] * 2


def test_a_graph_from_a_file_has_them_too(tmp_path: Any) -> None:
    gm = adapted(oft())
    torch.export.save(torch.export.export(gm, (torch.randn(3, 8),)), tmp_path / "oft.pt2")
    read = llfx.capture(torch.export.load(tmp_path / "oft.pt2"))
    assert len(fast_forms(llfx.rewrite(read, llfx.LoRA(target_names=("gate",))), "training")) == 4


def test_inputs_that_follow_from_saved_values_are_not_saved() -> None:
    layer = nn.ModuleDict({"norm": nn.RMSNorm(16), "one": nn.Linear(16, 16)})

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = layer, nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer["one"](self.layer["norm"](self.last(x)))
            return result

    torch.manual_seed(0)
    cfg = llfx.OFT(block_size=4, target_names=(".",))
    gm = llfx.rewrite(Normed(), cfg, (torch.randn(3, 16),))
    randomise(gm, 0)
    rotations = [each for each in fast_forms(gm, "training") if isinstance(each, RotatedBlocks)]
    assert [operation.recipe is None for operation in rotations] == [True, False]
    assert_same_gradients(gm, torch.randn(5, 16, requires_grad=True))


@pytest.mark.parametrize("cfg", [llfx.OFT(block_size=4, target_names="."), llfx.RoAd(group_size=8, target_names=".")])
def test_their_memory_can_be_planned(cfg: llfx.Variant) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)))
    gm = llfx.rewrite(model, cfg, (torch.randn(3, 16),), memory="balanced")
    randomise(gm, 0)
    x = torch.randn(5, 16, requires_grad=True)
    for _ in range(2):
        assert_same_gradients(gm, x)
    assert {plan.reason for plan in llfx.memory_plan(gm)} == {""}


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


def one_site(base: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).to(base)
    gm = llfx.rewrite(model, llfx.OFT(block_size=4, target_names=(".",), **options), (torch.randn(3, 16, dtype=base),))
    randomise(gm, 0)
    return gm


def gradients(model: Any, x: Tensor, parameters: Sequence[Tensor], autocast: bool) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    return y, *torch.autograd.grad(y.float().square().sum(), parameters)


@pytest.mark.parametrize("base", broad_after(1, [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_products_are_in_double_precision_under_autocast_alone(base: torch.dtype, autocast: bool) -> None:
    gm = one_site(base)
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    x = torch.randn(5, 16, dtype=base, requires_grad=True)
    parameters = [x, *llfx.adapter_parameters(gm)]
    ours, theirs = (gradients(model, x, parameters, autocast) for model in (gm, plain))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as seen:
        gm(x)
    assert seen.dtypes == {torch.float64 if autocast else torch.float32}


def saved_types(gm: Any) -> set[torch.dtype]:
    dtypes = set()

    def pack(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gm(torch.randn(5, 16))
    return dtypes


def test_nothing_is_saved_in_double_precision() -> None:
    assert saved_types(one_site()) == {torch.float32, torch.int64}


@pytest.mark.parametrize("options", [{"use_cayley_neumann": False}, {"coft": True}], ids=str)
def test_what_may_enlarge_errors_stays_in_double_precision(options: dict[str, Any]) -> None:
    assert torch.float64 in saved_types(one_site(**options))


@pytest.mark.parametrize("autocast", broad_after(1, [False, True]), ids=["", "autocast"])
def test_it_compiles(autocast: bool) -> None:
    gm = one_site()
    x = torch.randn(5, 16)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    ours, theirs = (gradients(model, x, llfx.adapter_parameters(gm), autocast) for model in (compiled, gm))
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
