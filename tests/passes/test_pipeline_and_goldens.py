"""Passes and pipelines: the steps of the runner, and the text of a block before and after each variant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.errors import ConfigError
from lora_lite_fx.graph.provenance import INLET, OUTLET, insertions, recorded
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    GraphPass,
    InsertAdapter,
    MergeAdapters,
    PassError,
    Pipeline,
    RemoveAdapters,
)
from lora_lite_fx.passes.adapt import fragment
from lora_lite_fx.rewriting.base_graph import base_graph
from tests.support.conformance import calibration, check_rewrite_equals_wrap, small
from tests.support.models import Attention, GatedMLP, Net, ids


class Down(nn.Module):
    """The smallest block with a down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(torch.relu(self.fc(x)))


EXAMPLE = (torch.randn(2, 4),)
BASE = """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
linear_1 = linear(relu, proj_weight, proj_bias)
add = add(x, linear_1)
"""
# The nodes of the block with `proj` adapted, without placeholders and parameters.
GOLDEN = {
    llfx.LoRA(r=2, alpha=4, dropout=0.5): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
linear_1 = linear(relu, proj_weight, proj_bias)
dropout = dropout(relu, 0.5, training)
linear_2 = linear(dropout, proj_lora_a)
linear_3 = linear(linear_2, proj_lora_b)
mul = mul(linear_3, 2.0)
add_1 = add(linear_1, mul)
add = add(x, add_1)
""",
    llfx.PiSSA(r=2, alpha=4): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
linear_1 = linear(relu, proj_weight, proj_bias)
linear_2 = linear(relu, proj_lora_a0)
linear_3 = linear(linear_2, proj_lora_b0)
mul = mul(linear_3, 2.0)
linear_4 = linear(relu, proj_lora_a)
linear_5 = linear(linear_4, proj_lora_b)
mul_1 = mul(linear_5, 2.0)
sub = sub(mul_1, mul)
add_1 = add(linear_1, sub)
add = add(x, add_1)
""",
    llfx.DoRA(r=2, alpha=4): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
linear_1 = linear(relu, proj_weight, proj_bias)
linalg_vector_norm = linalg_vector_norm(proj_weight_1, 2, [1], dtype=torch.float32)
square = square(linalg_vector_norm)
linear_2 = linear(proj_weight_1, proj_lora_a)
mul = mul(linear_2, proj_lora_b)
sum_1 = sum(mul, [1])
linear_3 = linear(proj_lora_a, proj_lora_a)
linear_4 = linear(proj_lora_b, linear_3)
mul_1 = mul(linear_4, proj_lora_b)
sum_2 = sum(mul_1, [1])
mul_2 = mul(sum_1, 4.0)
add_1 = add(square, mul_2)
mul_3 = mul(sum_2, 4.0)
add_2 = add(add_1, mul_3)
clamp_min = clamp_min(add_2, 0)
sqrt = sqrt(clamp_min)
detach = detach(sqrt)
div = div(proj_lora_m, detach)
linear_5 = linear(relu, proj_lora_a)
linear_6 = linear(linear_5, proj_lora_b)
mul_4 = mul(linear_6, 2.0)
add_3 = add(linear_1, mul_4)
mul_5 = mul(div, add_3)
rsub = rsub(div, 1)
mul_6 = mul(rsub, proj_bias_1)
add_4 = add(mul_5, mul_6)
type_as = type_as(add_4, linear_1)
add = add(x, type_as)
""",
    llfx.DeLoRA(r=2): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
linear_1 = linear(relu, proj_weight, proj_bias)
linalg_vector_norm = linalg_vector_norm(proj_lora_a, 2, [1])
clamp_min = clamp_min(linalg_vector_norm, 0.0001)
linalg_vector_norm_1 = linalg_vector_norm(proj_lora_b, 2, [0])
clamp_min_1 = clamp_min(linalg_vector_norm_1, 0.0001)
mul = mul(clamp_min, 2)
mul_1 = mul(mul, clamp_min_1)
div = div(proj_lora_lambda, mul_1)
unsqueeze = unsqueeze(div, 1)
mul_2 = mul(unsqueeze, proj_lora_a)
mul_3 = mul(mul_2, proj_lora_wnorm)
linear_2 = linear(relu, mul_3)
linear_3 = linear(linear_2, proj_lora_b)
add_1 = add(linear_1, linear_3)
add = add(x, add_1)
""",
    llfx.HRA(r=2): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
to = to(proj_lora_u, torch.float64)
linalg_vector_norm = linalg_vector_norm(to, 2.0, [1], True)
clamp_min = clamp_min(linalg_vector_norm, 1e-12)
expand_as = expand_as(clamp_min, to)
div = div(to, expand_as)
linear_2 = linear(div, div)
triu = triu(linear_2)
diagonal = diagonal(linear_2)
div_1 = div(diagonal, 2)
diag_embed = diag_embed(div_1)
sub = sub(triu, diag_embed)
diagonal_1 = diagonal(sub, 0, -2, -1)
ones_like = ones_like(diagonal_1, pin_memory=False)
diag_embed_1 = diag_embed(ones_like)
linalg_solve_triangular = linalg_solve_triangular(sub, diag_embed_1, upper=True)
to_1 = to(div, torch.float32)
to_2 = to(linalg_solve_triangular, torch.float32)
linear_3 = linear(relu, to_1)
neg = neg(to_2)
linear_4 = linear(linear_3, neg)
t = t(to_1)
linear_5 = linear(linear_4, t)
add_1 = add(relu, linear_5)
type_as = type_as(add_1, relu)
linear_1 = linear(type_as, proj_weight, proj_bias)
add = add(x, linear_1)
""",
    llfx.IA3(): """
linear = linear(x, fc_weight, fc_bias)
relu = relu(linear)
mul = mul(relu, proj_lora_g)
type_as = type_as(mul, relu)
linear_1 = linear(type_as, proj_weight, proj_bias)
add = add(x, linear_1)
""",
}


def text(gm: fx.GraphModule) -> str:
    """One line for each operation: `name = op(arguments)`."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {node.target.__name__.split('.')[0]}({', '.join(arguments)})")
    return "\n".join(lines)


@pytest.mark.parametrize("variant", GOLDEN, ids=lambda variant: type(variant).__name__)
def test_the_graph_of_a_block_is_exactly_as_designed(variant: llfx.Variant) -> None:
    base = base_graph(Down(), EXAMPLE)
    assert text(base) == BASE.strip()
    targeted = type(variant)(**{**vars(variant), "target_names": ("proj",)})
    assert text(llfx.rewrite(Down(), targeted, EXAMPLE)) == GOLDEN[variant].strip()


FILES = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_graph_of_a_block_is_that_of_its_file(path: Path) -> None:
    cfg = small(llfx.registry()[path.stem], 2, alpha=4, target_names=("proj",))
    gm = llfx.rewrite(Down(), cfg, EXAMPLE, calibration=calibration(cfg, None, EXAMPLE))
    assert text(gm) == path.read_text(encoding="utf-8").strip()


def test_every_registered_variant_has_a_golden_graph() -> None:
    own = {name for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")}
    assert own == {type(variant).__name__ for variant in GOLDEN} | {path.stem for path in FILES}


def test_inserted_nodes_say_where_they_come_from_and_no_other_node_does() -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))], EXAMPLE)
    base_names = {node.name for node in base_graph(Down(), EXAMPLE).graph.nodes}
    for node in gm.graph.nodes:
        provenance = recorded(node)
        assert (provenance is None) == (node.name in base_names)
        if provenance is not None:
            assert provenance.site in ("fc", "proj")
            assert provenance.by == "insert_adapter"
            assert node.meta["nn_module_stack"]
    found = insertions(gm.graph)
    assert [(i.site, i.adapter, i.position, i.config["variant"]) for i in found] == [
        ("fc", 0, 0, "LoRA"),
        ("proj", 0, 0, "LoRA"),
        ("proj", 1, 1, "HRA"),
    ]
    assert (recorded(found[1].outlet).part, recorded(found[2].inlet).part) == (OUTLET, INLET)


def test_passes_make_no_edit_the_second_time() -> None:
    gm = base_graph(Net([GatedMLP], True, False), (ids(2, 5),))
    insert = Pipeline((InsertAdapter(llfx.LoRA(r=2), 0, ("blocks.0.up", "head")),))
    assert [report.edits for report in insert.run(gm)] == [2]
    before = str(gm.graph)
    assert [report.edits for report in insert.run(gm)] == [0]
    assert str(gm.graph) == before
    assert [report.edits for report in Pipeline((RemoveAdapters(), RemoveAdapters(), MergeAdapters())).run(gm)] == [
        2,
        0,
        0,
    ]


def test_reports_name_the_pass_and_its_time() -> None:
    (report,) = Pipeline((RemoveAdapters(),)).run(base_graph(Down(), EXAMPLE))
    assert (report.name, report.edits) == ("remove_adapters", 0)
    assert report.seconds >= 0


def test_a_pipeline_can_go_without_a_pass() -> None:
    pipeline = Pipeline((RemoveAdapters(), MergeAdapters()))
    assert [p.name for p in pipeline.without("remove_adapters")] == ["merge_adapters"]
    with pytest.raises(ValueError, match="No pass is named fuse"):
        pipeline.without("fuse")


@dataclass(frozen=True)
class Fail(GraphPass):
    """A pass that raises `error`."""

    error: Exception

    def run(self, gm: fx.GraphModule) -> int:
        raise self.error


def test_an_unexpected_failure_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError, match=r"KeyError in pass fail \(passes that ran before: remove_adapters\)"):
        Pipeline((RemoveAdapters(), Fail(KeyError("x")))).run(base_graph(Down(), EXAMPLE))


def test_a_refusal_keeps_its_class_and_notes_the_pass() -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline((Fail(ConfigError("no")),)).run(base_graph(Down(), EXAMPLE))
    assert "in pass fail" in caught.value.__notes__[0]


def test_graph_text_is_dumped_before_and_after_each_pass_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_LITE_FX_DUMP", str(tmp_path / "dump"))
    llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)(*EXAMPLE)  # the call derives what runs
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name.split("_", 1)[1] for f in files] == [
        f"{name}.{when}.txt"
        for name in (
            *("inline_regions", "drop_metadata_asserts", "inline_regions", "drop_metadata_asserts"),
            *("follow_mode", "insert_adapter"),
            *(each.name for each in OPTIMIZATIONS.of("training")),
        )
        for when in ("after", "before")
    ]
    after, before = (file.read_text() for file in files if "insert_adapter" in file.name)
    assert "lora_A" in after
    assert "lora_A" not in before


# Traces.


class Looking(llfx.LoRA):
    """A variant that looks at the roles of its site and at the mode."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        scale = 3.0 if "query" in base.site.roles else 1.0
        return super().forward(x, base, p) * scale + (0.5 if base.training else 0.25)


@pytest.mark.parametrize(
    ("cfg", "traces"),
    [
        (llfx.LoRA(r=2, target_roles=("attention",)), 1),
        (llfx.LoRA(r=2, target_roles=("attention",), dropout=0.3), 2),
        (Looking(r=2, target_roles=("attention",)), 2 * 4),
    ],
    ids=["neither", "mode", "both"],
)
def test_sites_of_one_size_share_a_trace_unless_the_variant_looks_at_the_site_or_the_mode(
    cfg: llfx.Variant, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, "Looking", Looking)
    made: list[fx.Graph] = []
    trace = fragment.trace
    monkeypatch.setattr(fragment, "trace", lambda *args: made.append(trace(*args)) or made[-1])
    model = Net([Attention], bias=True, tied=False).double().eval()
    gm = llfx.rewrite(model, cfg, (ids(2, 5),))
    assert len(made) == traces
    check_rewrite_equals_wrap(model, gm, llfx.wrap(model, cfg), (ids(3, 4),), 1e-10, seed=0)
