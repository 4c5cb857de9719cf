"""`bake` makes constants of what depends on parameters alone, and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.hand_over.bake import is_baked
from tests.support.captured import captured
from tests.support.conformance import calibration, randomise, small
from tests.support.models import GatedMLP, ids, net
from tests.support.selection import broad_unless, by_tier, is_distinct, slow_unless

EXAMPLE = ids(2, 5)


def small_net() -> nn.Module:
    return net(GatedMLP)


def wide_net() -> nn.Module:
    """Return a model whose weights are much larger than adapters of rank 2."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)).eval()


def adapted(cfg: Any, seed: int = 1) -> Any:
    """Return a graph whose adapters have random values."""
    _, graph = captured(small_net, inputs=(EXAMPLE,))
    gm: Any = llfx.rewrite(graph, cfg, calibration=calibration(cfg, None, (EXAMPLE,)))
    randomise(gm, seed)
    return gm


def constants(gm: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gm.named_buffers() if is_baked(name)}


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize("cls", by_tier(llfx.registry().values()))
def test_each_variant_computes_the_same(cls: type[llfx.Variant]) -> None:
    gm = adapted(small(cls))
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    for whole_updates in (False, True):
        baked = llfx.bake(gm, whole_updates=whole_updates)
        with torch.no_grad():
            for shape in ((2, 5), (1, 1), (3, 9)):
                close(baked(ids(*shape)), gm.eval()(ids(*shape)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    again = llfx.bake(baked)  # there is nothing left to do
    assert constants(again).keys() == constants(baked).keys()


@pytest.mark.parametrize(
    "cls", broad_unless(lambda cls: cls is llfx.DoRA, slow_unless(is_distinct, llfx.registry().values()))
)
def test_whole_updates_agree_with_merge(cls: type[llfx.Variant]) -> None:
    gm = adapted(small(cls))
    try:
        merged = llfx.merge(gm)
    except llfx.AdapterError:  # such as a nonlinear adapter, which is not a weight
        return
    with torch.no_grad():
        close(llfx.bake(gm, whole_updates=True)(ids(3, 4)), merged(ids(3, 4)))


SIZES = {"r": 2, "block_size": 8, "n_frequency": 16, "num_weights": 16}
TABLE = Path(__file__).parents[2] / "docs" / "hand_over" / "bake.md"
SHOWN = ("LoRA", "DoRA", "HRA", "OFT", "PiSSA", "IA3", "LoHa", "LoKr", "RandLoRA", "SHiRA", "FourierFT", "WaveFT")


def table() -> list[str]:
    """Return the rows of the table of the docs: what is constant by default, and what of `whole_updates=True`."""
    lines = []
    for name in SHOWN:
        _, graph = captured(wide_net, inputs=(torch.ones(2, 64),))
        cfg = small(llfx.registry()[name], 2 if name != "OFT" else 8, target_names="0")
        gm: Any = llfx.rewrite(graph, cfg, calibration=calibration(cfg, None, (torch.ones(2, 64),)))
        randomise(gm, 0)
        cells = [name, f"{sum(tensor.numel() for tensor in llfx.adapter_state_dict(gm).values()):,}"]
        for whole_updates in (False, True):
            baked = llfx.bake(gm, whole_updates=whole_updates)
            with torch.no_grad():
                x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
                torch.testing.assert_close(baked(x), gm(x), atol=1e-4, rtol=1e-4)
            kept = constants(baked).values()
            state, own = baked.state_dict(keep_vars=True), llfx.adapter_state_dict(gm)
            left = sum(tensor.numel() for name, tensor in state.items() if name in own)
            cells.append(" + ".join(f"{tuple(tensor.shape)}" for tensor in kept) or "nothing")
            cells.append(f"{sum(tensor.numel() for tensor in kept) + left:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@pytest.mark.broad
def test_the_table_of_the_docs_is_true() -> None:
    """To write it anew: `python -m tests.hand_over.test_bake`."""
    rows = re.findall(r"^\| [A-Z].*\|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if row.count("|") == 7 and row.split(" | ")[0].strip("| ") in SHOWN] == table()


def test_updates_as_large_as_the_weight_are_left_by_default() -> None:
    _, graph = captured(wide_net, inputs=(torch.ones(2, 64),))
    gm: Any = llfx.rewrite(graph, llfx.SHiRA(r=2, target_names="0"))
    randomise(gm, 0)
    assert all(tensor.numel() < 64 * 48 for tensor in constants(llfx.bake(gm)).values())
    (update,) = constants(llfx.bake(gm, whole_updates=True)).values()
    assert update.shape == (48, 64)
    with torch.no_grad():
        x = torch.randn(3, 64)
        close(llfx.bake(gm, whole_updates=True)(x), gm(x))


# What is not constant.


class Moving(nn.Module):
    """Its calls change a buffer, on which the weight of its product depends."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y: Tensor = nn.functional.linear(x, self.lin.weight, self.count) + self.lin(x)
        return y


class Cast(nn.Module):
    """Computes its product in a region with autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.lin(x)
        return y.float()


def test_buffers_that_calls_write_to_are_not_constant() -> None:
    gm: Any = llfx.rewrite(Moving(), llfx.DoRA(r=2, target_names="lin"), (torch.randn(2, 4),))
    randomise(gm, 0)
    baked = llfx.bake(gm)
    x = torch.randn(3, 4)
    with torch.no_grad():
        results = [baked(x) for _ in range(3)]
    close(results[1] - results[0], torch.ones(3, 4))
    close(results[2] - results[1], torch.ones(3, 4))


def test_a_written_weight_is_not_folded() -> None:
    """Norms of DoRA depend on the weight. A graph that writes to it computes them in each call."""
    gm: Any = llfx.rewrite(nn.Sequential(nn.Linear(4, 4)), llfx.DoRA(r=2, target_names="0"), (torch.randn(2, 4),))
    randomise(gm, 0)
    assert constants(llfx.bake(gm))
    graph = gm.flat_graph
    weight = next(node for node in graph.find_nodes(op="get_attr") if node.target == "0.weight")
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.aten.mul_.Scalar, (weight, 2.0))
    norms = llfx.bake(gm).graph.find_nodes(op="call_function", target=torch.ops.aten.linalg_vector_norm.default)
    assert [str(norm.args[0].target) for norm in norms] == ["0.weight"]


def test_random_numbers_are_not_constant() -> None:
    gm: Any = llfx.rewrite(nn.Sequential(nn.Linear(4, 4)), llfx.LoRA(r=2, target_names="0"), (torch.randn(2, 4),))
    randomise(gm, 0)
    graph = gm.flat_graph
    add = next(node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    with graph.inserting_before(graph.output_node()):
        noise = graph.call_function(torch.ops.aten.rand.default, ([4],))
        noise.meta = {"custom": add.meta["custom"], "val": torch.empty(4, device="meta")}
        noisy = graph.call_function(torch.ops.aten.add.Tensor, (add, noise))
        noisy.meta = dict(add.meta)
    add.replace_all_uses_with(noisy, delete_user_cb=lambda user: user is not noisy)
    baked = llfx.bake(gm)
    assert len(baked.graph.find_nodes(op="call_function", target=torch.ops.aten.rand.default)) == 1
    x = torch.randn(2, 4)
    assert not torch.equal(baked(x), baked(x))


def test_values_of_inputs_are_not_constant() -> None:
    gm: Any = llfx.rewrite(
        nn.Sequential(nn.Linear(4, 4)), llfx.Bank(llfx.LoRA(r=2, target_names="0"), slots=3), (torch.randn(2, 4),)
    )
    randomise(gm, 0)
    baked: Any = llfx.bake(gm)
    x = torch.randn(2, 4)
    with torch.no_grad():
        for slots in (torch.tensor([0, 2]), torch.tensor([1, 0])):
            close(baked(x, adapter_ids=slots), gm(x, adapter_ids=slots))


def test_regions_with_autocast_stay() -> None:
    for cfg in (llfx.DoRA(r=2, target_names="lin"), llfx.OFT(block_size=4, target_names="lin")):
        gm: Any = llfx.rewrite(Cast().eval(), cfg, (torch.randn(2, 8),))
        randomise(gm, 0)
        x = torch.randn(3, 8)
        with torch.no_grad():
            torch.testing.assert_close(llfx.bake(gm)(x), gm.eval()(x), atol=0, rtol=0)


def test_switches_are_constants() -> None:
    gm = adapted(llfx.DoRA(r=2, target_names="."))
    with llfx.scaled(gm, 0.5), torch.no_grad():
        expected = gm(EXAMPLE)
        baked = llfx.bake(gm)
    close(baked(EXAMPLE), expected)
    with llfx.active(gm, []):
        without = llfx.bake(gm)
    assert not constants(without)
    close(without(EXAMPLE), llfx.remove(gm)(EXAMPLE))
    assert not dict(baked.named_parameters()).keys() & set(llfx.adapter_state_dict(gm)) - set(
        dict(gm.named_parameters())
    )


def test_constants_have_names_in_the_modules_of_their_sites() -> None:
    names = constants(llfx.bake(adapted(llfx.DoRA(r=2, target_names="gate"))))
    assert names
    assert all(name.startswith("blocks.0.gate.baked_") for name in names)


if __name__ == "__main__":
    print("\n".join(table()))
