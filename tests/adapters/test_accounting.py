"""Every recorded adapter is folded, listed or written, or its site is named in an error, after passes of others too."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import lora_lite_fx as llfx
from tests.support.captured import captured
from tests.support.conformance import close, output, randomise, small
from tests.support.models import Attention, SharedLinear, ids, net
from tests.support.selection import broad_after, slow_unless

aten = torch.ops.aten
VARIANTS = slow_unless(
    {llfx.LoRA, llfx.DoRA, llfx.HRA}.__contains__, (llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.OFT, llfx.HRA)
)


class Transposing(nn.Module):
    """Linears that decompositions write in three ways: `addmm`, and `bmm` without and with an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 12)
        self.plain = nn.Linear(12, 8, bias=False)
        self.biased = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x)).transpose(0, 1)
        y: Tensor = self.plain(h) + self.biased(h)
        return y.transpose(0, 1)


def transposing() -> nn.Module:
    return Transposing().double().eval()


EXAMPLE = (torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
OTHER = (torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)


def decomposed(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` exported at any batch and length, and decomposed to core operators."""
    program = torch.export.export(gm, EXAMPLE, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    result: fx.GraphModule = program.run_decompositions().module()
    return result


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, VARIANTS))
def test_decomposed_graphs_keep_all_adapters(cls: type[llfx.Variant], tmp_path: Path) -> None:
    model, base = captured(transposing, inputs=EXAMPLE)
    # The second adapter must stay around the first.
    cfg = [small(cls, target_names=(".",)), small(llfx.LoRA, target_names=("into", "biased"))]
    wrapped = llfx.wrap(base, cfg)
    gm = llfx.rewrite(base, cfg)
    randomise(gm, 1)
    randomise(wrapped, 1)
    core = decomposed(gm)
    assert {node.target for node in core.graph.nodes} >= {aten.bmm.default, aten.addmm.default}
    expected = output(wrapped, OTHER).detach()
    close(output(core, OTHER).detach(), expected, 1e-12, "decomposed")
    close(output(llfx.merge(core), OTHER).detach(), expected, 1e-12, "merged")
    assert [(row.name, row.adapters, row.d_in, row.d_out, row.parameters, row.bias) for row in llfx.inspect(core)] == [
        (row.name, row.adapters, row.d_in, row.d_out, row.parameters, row.bias) for row in llfx.inspect(gm)
    ]
    removed = llfx.remove(core)
    close(output(removed, OTHER), output(model, OTHER), 1e-12, "removed")
    assert removed.state_dict().keys() == base.state_dict().keys()
    llfx.save(core, tmp_path / "adapter.safetensors")
    loaded = llfx.load(base, tmp_path / "adapter.safetensors")
    close(output(loaded.eval(), OTHER).detach(), expected, 1e-12, "loaded")


@pytest.mark.broad
def test_a_further_adapter_goes_around_those_of_a_decomposed_graph() -> None:
    gm = llfx.rewrite(captured(transposing, inputs=EXAMPLE)[1], small(llfx.IA3, target_names=(".",)))
    core = decomposed(gm)
    outer = small(llfx.LoRA, target_names=(".",))
    further, reference = llfx.rewrite(core, outer), llfx.rewrite(gm, outer)
    randomise(further, 2)
    randomise(reference, 2)
    expected = output(reference, OTHER).detach()
    close(output(further, OTHER).detach(), expected, 1e-12, "with a further adapter")
    close(output(llfx.merge(further), OTHER).detach(), expected, 1e-12, "merged")


def test_decomposed_convolutions_are_sites() -> None:
    model = nn.Sequential(nn.Conv1d(8, 6, 3, padding=1, dilation=2)).double().eval()
    x = EXAMPLE[0].mT.contiguous()
    gm = llfx.rewrite(model, small(llfx.LoRA, target_kinds=("conv",), target_names=(".",)), (x,))
    randomise(gm, 1)
    core = torch.export.export(gm, (x,)).run_decompositions().module()
    assert aten.convolution.default in {node.target for node in core.graph.nodes}
    close(output(llfx.merge(core), (x,)), output(gm, (x,)).detach(), 1e-12, "merged")


# Passes of users. They are written as a user would write them.


def fuse(gm: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Compute the linears called `names`, which read one input, by one linear over a new parameter."""
    weights = {f"{name}.weight" for name in names}
    linears = [
        node
        for node in gm.graph.nodes
        if node.target is aten.linear.default and node.args[1].op == "get_attr" and node.args[1].target in weights
    ]
    for leaf, index in (("weight", 1), ("bias", 2)):
        parts = [gm.get_parameter(str(linear.args[index].target)) for linear in linears]
        gm.register_parameter(f"fused_{leaf}", nn.Parameter(torch.cat([part.detach() for part in parts])))
    with gm.graph.inserting_before(linears[0]):
        operands = (linears[0].args[0], gm.graph.get_attr("fused_weight"), gm.graph.get_attr("fused_bias"))
        fused = gm.graph.call_function(aten.linear.default, operands)
        sizes = [linear.meta["val"].shape[-1] for linear in linears]
        parts_of_output = gm.graph.call_function(aten.split_with_sizes.default, (fused, sizes, -1))
        for index, linear in enumerate(linears):
            part = gm.graph.call_function(operator.getitem, (parts_of_output, index))
            part.meta = {"val": linear.meta["val"]}
            linear.replace_all_uses_with(part)
            gm.graph.erase_node(linear)
    gm.recompile()


def quantize(gm: fx.GraphModule, linear: fx.Node) -> None:
    """Let `linear` read its weight fake-quantized."""
    weight: Any = linear.args[1]
    with gm.graph.inserting_before(linear):
        operands = (weight, 0.01, 0, -128, 127)
        rounded = gm.graph.call_function(aten.fake_quantize_per_tensor_affine.default, operands)
    rounded.meta = {"val": weight.meta["val"]} if "val" in weight.meta else {}
    linear.update_arg(1, rounded)
    gm.recompile()


def base_linears(gm: fx.GraphModule, weight: str) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.nodes
        if node.target is aten.linear.default and getattr(node.args[1], "target", None) == weight
    ]


def check_refused(gm: fx.GraphModule, site: str, tmp_path: Path) -> None:
    """Check that each function that needs all sites names `site`, and that no file is written."""
    for function in (
        llfx.merge,
        lambda model: llfx.save(model, tmp_path / "adapter.safetensors"),
        lambda model: llfx.save_peft(model, tmp_path / "peft"),
    ):
        with pytest.raises(llfx.AdapterError, match=rf"{site}'.*The way out: .*remove"):
            function(gm)
    assert not list(tmp_path.iterdir())
    row = next(row for row in llfx.inspect(gm) if row.adapters and row.name == site)
    assert row.kind == "not found"
    assert row.parameters > 0
    assert "is at" in row.reason


@pytest.mark.parametrize("cls", broad_after(1, VARIANTS))
def test_fused_linears_are_named_and_their_adapters_can_be_removed(cls: type[llfx.Variant], tmp_path: Path) -> None:
    model, graph = captured(net, Attention, inputs=(ids(2, 5),))
    gm = llfx.rewrite(graph, small(cls, target_names=("blocks",))).eval()
    randomise(gm, 1)
    inlet = cls in (llfx.OFT, llfx.HRA)
    if inlet:  # the three read different inputs, so that only the weight can be changed
        quantize(gm, base_linears(gm, "blocks.0.q.weight")[0])
    else:
        expected = output(gm, (ids(3, 4),)).detach()
        fuse(gm, ("blocks.0.q", "blocks.0.k", "blocks.0.v"))
        close(output(gm, (ids(3, 4),)).detach(), expected, 1e-5, "fused")
    check_refused(gm, "blocks.0.q", tmp_path)
    if not inlet:
        close(output(llfx.remove(gm), (ids(3, 4),)), output(model, (ids(3, 4),)), 1e-5, "removed")


def test_fake_quantized_weights_are_named(tmp_path: Path) -> None:
    gm = llfx.rewrite(captured(net, Attention, inputs=(ids(2, 5),))[1], llfx.LoRA(r=2, target_names=("blocks",))).eval()
    for name in ("q", "k", "v", "out"):
        quantize(gm, base_linears(gm, f"blocks.0.{name}.weight")[0])
    check_refused(gm, "blocks.0.q", tmp_path)
    with pytest.raises(llfx.AdapterError, match=r"4 of 4 are not found.*The others: blocks.0.k, blocks.0.v"):
        llfx.merge(gm)


def test_each_call_of_a_site_counts() -> None:
    gm = llfx.rewrite(captured(net, SharedLinear, inputs=(ids(2, 5),))[1], llfx.LoRA(r=2, target_names=("mix",))).eval()
    quantize(gm, base_linears(gm, "blocks.0.mix.weight")[1])
    with pytest.raises(
        llfx.AdapterError, match=r"blocks.0.mix'.* 1 times and records 2 insertions of LoRA, of which 1"
    ):
        llfx.merge(gm)
    with pytest.raises(llfx.AdapterError, match=r"blocks.0.mix. cannot get a further adapter"):
        llfx.rewrite(gm, llfx.IA3(target_names=("mix",)))


def test_a_call_without_its_adapter_is_not_merged() -> None:
    gm = llfx.rewrite(captured(net, SharedLinear, inputs=(ids(2, 5),))[1], llfx.LoRA(r=2, target_names=("mix",))).eval()
    first, _ = base_linears(gm, "blocks.0.mix.weight")
    adapted = next(node for node in gm.graph.nodes if node.target is aten.add.Tensor and first in node.args)
    adapted.replace_all_uses_with(first, delete_user_cb=lambda user: user is not adapted)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    with pytest.raises(
        llfx.AdapterError, match=r"blocks.0.mix'.* 2 times and records 1 insertions of LoRA, of which 1"
    ):
        llfx.merge(gm)


def test_an_adapter_that_is_read_in_the_middle_cannot_be_taken_out() -> None:
    gm = llfx.rewrite(captured(net, Attention, inputs=(ids(2, 5),))[1], llfx.LoRA(r=2, target_names=("q$",))).eval()
    narrow = base_linears(gm, "blocks.0.q.lora_A")[0]
    result: Any = gm.graph.output_node().args[0]
    gm.graph.output_node().args = ((*result, narrow),)
    with pytest.raises(
        llfx.AdapterError, match=r"LoRA at 'blocks.0.q' cannot be taken out .* output reads blocks_0_q_lora_A_linear"
    ):
        llfx.remove(gm)
