"""`Pipeline(..., check=inputs)`: the first pass that changes what the graph computes is named, with how far off."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import OPTIMIZATIONS, GraphPass, LeaveOutDropout, PassError, Pipeline
from tests.passes.test_leave_out_inputs import INPUTS, Masked
from tests.passes.test_pipeline import Down, Returns
from tests.support.captured import captured
from tests.support.conformance import randomise, unchanged
from tests.support.models import ids
from tests.support.programs import MIXED, adapted
from tests.support.selection import broad_after

aten = torch.ops.aten
X = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)


def graph(dropout: float = 0.0) -> fx.GraphModule:
    """Return the graph of a layer with a trained adapter at each of its two sites."""
    _, base = captured(Down, inputs=(torch.ones(2, 4),))
    gm = llfx.rewrite(base, llfx.LoRA(r=2, alpha=4.0, dropout=dropout))
    randomise(gm, 1)
    return gm


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    node: fx.Node
    (node,) = [node for node in gm.graph.nodes if node.name == name]
    return node


def after(gm: fx.GraphModule, name: str, target: Any, *args: Any, like: bool = True) -> fx.Node:
    """Put a call of `target` on the node of that name between it and its readers."""
    node = named(gm, name)
    with gm.graph.inserting_after(node):
        call = gm.graph.call_function(target, (node, *args))
    call.meta = dict(node.meta) if like else {}
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call


@dataclass(frozen=True)
class Negate(GraphPass):
    """Negates what goes into the activation."""

    def run(self, gm: fx.GraphModule) -> int:
        relu = named(gm, "relu")
        with gm.graph.inserting_before(relu):
            negated = gm.graph.call_function(aten.neg.default, relu.args)
        relu.args = (negated,)
        return 1


@dataclass(frozen=True)
class Round(GraphPass):
    """Changes the result by less than the rounding of float32 may."""

    def run(self, gm: fx.GraphModule) -> int:
        after(gm, "add", aten.mul.Tensor, 1 + 1e-6)
        return 1


@dataclass(frozen=True)
class Detach(GraphPass):
    """Leaves the results, and takes the gradient of a matrix away."""

    def run(self, gm: fx.GraphModule) -> int:
        after(gm, "fc_lora_A", aten.detach.default)
        return 1


@dataclass(frozen=True)
class DropDropout(GraphPass):
    """Leaves dropout out in all programs; in evaluation mode nothing changes."""

    def run(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.find_nodes(op="call_function", target=aten.dropout.default):
            node.replace_all_uses_with(node.args[0])
        return 1


@dataclass(frozen=True)
class Transpose(GraphPass):
    """Leaves a graph that raises."""

    def run(self, gm: fx.GraphModule) -> int:
        after(gm, "fc_lora_B", aten.t.default)
        return 1


@dataclass(frozen=True)
class ReturnNothing(GraphPass):
    """Lets the graph return None."""

    def run(self, gm: fx.GraphModule) -> int:
        gm.graph.output_node().args = ((None,),)
        return 1


@dataclass(frozen=True)
class Cast(GraphPass):
    """Lets the graph return another dtype."""

    def run(self, gm: fx.GraphModule) -> int:
        after(gm, "add", aten.to.dtype, torch.float64)
        return 1


@dataclass(frozen=True)
class Record(GraphPass):
    """Records a value that is not that of the node."""

    change: Callable[[Tensor], Any]

    def run(self, gm: fx.GraphModule) -> int:
        node = named(gm, "fc_lora_A_linear")
        node.meta["val"] = self.change(node.meta["val"])
        return 1


WRONG: dict[str, tuple[GraphPass, str]] = {
    "maths": (
        Negate(),
        r"Pass negate changes what the graph computes: the result in evaluation mode differs by 1\.5,"
        r" 1 of its largest value\. Rounding explains 0\.000\d+\.",
    ),
    "gradient": (
        Detach(),
        r"Pass detach changes what the graph computes: the gradient of fc\.lora_A in evaluation mode differs by [\d.]+,"
        r" 1 of its largest value\. Rounding explains [\de.-]+\.",
    ),
    "None": (
        ReturnNothing(),
        r"Pass return_nothing changes what the graph computes: the result in evaluation mode was"
        r" \(3, 4\) float32, and is missing now\.",
    ),
    "dtype": (
        Cast(),
        r"Pass cast changes what the graph computes: the result in evaluation mode was \(3, 4\) float32, and"
        r" is \(3, 4\) float64 now\.",
    ),
    "error": (Transpose(), r"Pass transpose leaves a graph that raises: RuntimeError: (mm: )?mat1 and mat2 shapes .*"),
    "recorded size": (
        Record(lambda value: value.new_empty(value.shape[0], 3)),
        r'Pass record leaves a wrong meta\["val"\] on fc_lora_A_linear: \(s\d+, 3\) float32, where a run has \(3, 2\)'
        r" float32\.",
    ),
    "recorded dynamic size": (
        Record(lambda value: value.new_empty(value.shape[0] + 1, 2)),
        r'Pass record leaves a wrong meta\["val"\] on fc_lora_A_linear: \(s\d+ \+ 1, 2\) float32, where a run has'
        r" \(3, 2\) float32\.",
    ),
    "recorded dtype": (
        Record(lambda value: value.double()),
        r'Pass record leaves a wrong meta\["val"\] on fc_lora_A_linear: \(s\d+, 2\) float64, where a run has \(3, 2\)'
        r" float32\.",
    ),
    "recorded tuple": (
        Record(lambda value: (value, value)),
        r'Pass record leaves a wrong meta\["val"\] on fc_lora_A_linear: \[\(s\d+, 2\) float32, \(s\d+, 2\) float32\],'
        r" where a run has \(3, 2\) float32\.",
    ),
}


@pytest.mark.broad
@pytest.mark.parametrize("mistake", broad_after(3, WRONG))
def test_the_first_wrong_pass_is_named_with_how_far_off(mistake: str) -> None:
    wrong, message = WRONG[mistake]
    gm = graph().eval()
    with pytest.raises(PassError) as caught:
        Pipeline((Returns(0), Round(), wrong, Negate()), check=X).run(gm)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    assert caught.value.__notes__ == [f"in pass {wrong.name} (passes that ran before: returns, round)"]
    assert [each.edits for each in Pipeline((Returns(0), Round()), check=X).run(graph())] == [0, 1]


@pytest.mark.parametrize("mistake", broad_after(1, ["maths", "gradient", "recorded size"]))
def test_optimize_runs_and_checks_the_passes_at_once(mistake: str) -> None:
    wrong, message = WRONG[mistake]
    passes = Pipeline(OPTIMIZATIONS.passes, check=X).before("share_siblings", wrong)
    with pytest.raises(PassError) as caught:
        llfx.optimize(graph(), passes)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    llfx.optimize(graph(), Pipeline(passes.passes))  # without a check nothing runs yet


def test_what_holds_in_evaluation_alone_is_found_in_the_training_program() -> None:
    gm = graph(dropout=0.5)
    with pytest.raises(PassError, match=r"^Pass drop_dropout changes .* the result in training mode differs by"):
        llfx.optimize(gm, Pipeline((DropDropout(),), check=X))
    llfx.optimize(gm, Pipeline((LeaveOutDropout(),), check=X))  # which only runs for inference
    Pipeline((DropDropout(),), check=X).run(gm, "inference")


class Counting(nn.Module):
    """Counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.fc(x)
        return y


@dataclass(frozen=True)
class StopCounting(GraphPass):
    """Takes a write out."""

    def run(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.find_nodes(op="call_function", target=aten.add_.Tensor):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        return 1


def test_a_check_sees_buffers_and_changes_nothing_of_the_model() -> None:
    gm = llfx.rewrite(Counting(), llfx.LoRA(r=2, target_names=("fc",)), X)
    randomise(gm, 1)
    with pytest.raises(PassError) as caught:
        llfx.optimize(gm, Pipeline((StopCounting(),), check=X))
    assert str(caught.value) == (
        "Pass stop_counting changes what the graph computes: the buffer calls in evaluation mode differs by 1, 1 of its"
        " largest value. Rounding explains 0.0001."
    )
    state = torch.get_rng_state()
    inputs = (X[0].clone().requires_grad_(),)
    with unchanged(gm):
        llfx.optimize(gm, Pipeline(OPTIMIZATIONS.passes, check=inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs[0].grad is None
    assert all(parameter.grad is None for parameter in gm.parameters())


@pytest.mark.broad
@pytest.mark.parametrize("cfg", [llfx.LoRA(r=2, dropout=0.3, target_names=(".",)), llfx.HRA(r=2, target_names=(".",))])
def test_the_passes_of_this_package_are_right(cfg: llfx.Variant) -> None:
    optimized: Any = llfx.optimize(adapted(cfg, blocks=MIXED), Pipeline(OPTIMIZATIONS.passes, check=(ids(2, 5),)))
    assert {key.kind for key in optimized.derived.programs} == {"training", "inference"}


def test_the_inputs_may_leave_arguments_out() -> None:
    gm = llfx.rewrite(Masked(), llfx.LoRA(r=2, target_names=("fc",)), copy.copy(INPUTS))
    randomise(gm, 1)
    optimized: Any = llfx.optimize(gm, Pipeline((Returns(0),), check={"x": INPUTS["x"]}))
    programs = {(key.kind, key.left_out) for key in optimized.derived.programs}
    assert programs == {(kind, ("mask", "labels")) for kind in ("training", "inference")}
    for check, result in (({"x": INPUTS["x"]}, "0"), ((INPUTS["x"],), "0"), (INPUTS, "logits")):
        with pytest.raises(
            PassError, match=f"^Pass negate_head changes what the graph computes: the result {result} in"
        ):
            llfx.optimize(gm, Pipeline((NegateHead(),), check=check))


@dataclass(frozen=True)
class NegateHead(GraphPass):
    """Negates the logits."""

    def run(self, gm: fx.GraphModule) -> int:
        after(gm, "fc_add", aten.neg.default)
        return 1


def test_mistakes_in_the_inputs() -> None:
    with pytest.raises(llfx.CaptureError) as caught:
        Pipeline((), check=X[0])  # type: ignore[arg-type]
    assert str(caught.value).startswith(
        "check must be a tuple of positional or a dict of keyword arguments, not Tensor"
    )
    with pytest.raises(llfx.CallError) as wrong:
        llfx.optimize(graph(), Pipeline((Negate(),), check=(torch.randn(3, 5),)))
    assert str(wrong.value).startswith("check: the graph raises on these inputs before any pass: ")
    with pytest.raises(llfx.CaptureError) as empty:
        llfx.optimize(graph(), Pipeline((Negate(),), check=(torch.randn(3, 4, device="meta"),)))
    assert str(empty.value) == "check: the graph or the inputs have no data, so there is nothing to compare."
