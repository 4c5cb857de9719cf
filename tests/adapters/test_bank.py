"""Banks: each row of a batch is computed by the adapter of its slot, as one eager wrapper for each slot computes it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_lite_fx as llfx
from lora_lite_fx.ops.bank_products import BankProducts
from lora_lite_fx.passes import Pipeline
from tests.adapters.test_switches import fill
from tests.support.conformance import close, small
from tests.support.models import GatedMLP, ResidualMLP
from tests.support.selection import broad_after, slow_unless

SLOTS = 3
EVERYWHERE: dict[str, Any] = {"target_names": (".",)}
BANKED = (
    *("AdaLoRA", "AntiPaSTOArrow", "DeLoRA", "DoRA", "HiRA", "IA3", "LoHa", "LoRA", "LoRAXS", "OLoRA", "PiSSA"),
    *("RandLoRA", "TinyLoRA", "VeRA"),
)
"""The variants that can be banks, besides `EVA`, which starts from data."""


def inputs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 8, dtype=torch.float64, generator=generator)


@functools.cache
def stack(*blocks: Any, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4)) -> Any:
    """Return blocks one after the other, without dropout, and their graph."""
    torch.manual_seed(0)
    model = nn.Sequential(*(block(True) for block in blocks)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, llfx.capture(model, (inputs(*shape).to(dtype),))


def banked(cfg: Any, *blocks: Any, **which: Any) -> tuple[Any, nn.Module]:
    """Return a graph with a bank whose slots differ, and the model."""
    model, graph = stack(*(blocks or (ResidualMLP,)), **which)
    gm = llfx.rewrite(graph, llfx.Bank(cfg, slots=SLOTS))
    fill(gm)
    return gm, model


def wrapper_of(gm: Any, cfg: Any, slot: int, blocks: Any) -> nn.Module:
    """Return an eager wrapper with the values of one slot."""
    wrapped = llfx.wrap(stack(blocks)[1], cfg)
    own = llfx.adapter_state_dict(wrapped)
    values = llfx.adapter_state_dict(gm)
    llfx.load_adapter_state_dict(
        wrapped, {name: values[name] if "shared" in name else values[name][slot] for name in own}
    )
    return wrapped.train(gm.training)


def check_against_wrappers(run: Any, gm: Any, cfg: Any, ids: Tensor, x: Tensor, blocks: Any = ResidualMLP) -> None:
    """Check output and gradients of a call against one wrapper for each slot."""
    x = x.clone().requires_grad_()
    y = run(x, adapter_ids=ids)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for parameter in gm.parameters():
        parameter.grad = None
    (y * weights).sum().backward()
    assert x.grad is not None
    for slot in range(SLOTS):
        rows = ids == slot
        wrapped = wrapper_of(gm, cfg, slot, blocks)
        own = x.detach()[rows].requires_grad_()
        if rows.any():
            expected = wrapped(own)
            close(y[rows], expected, 1e-9, f"the output of slot {slot}")
            (expected * weights[rows]).sum().backward()
            assert own.grad is not None
            close(x.grad[rows], own.grad, 1e-9, f"the gradient of the input of slot {slot}")
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                of_bank = gm.get_parameter(name).grad
                if parameter.grad is None:
                    assert of_bank is None or not of_bank[slot].any(), name
                else:
                    assert of_bank is not None
                    close(of_bank[slot], parameter.grad, 1e-8, name)
    assert torch.equal(y[ids < 0], stack(blocks)[0](x.detach())[ids < 0])


@pytest.mark.parametrize("name", slow_unless({"LoRA", "DoRA", "IA3"}.__contains__, BANKED))
def test_rows_are_computed_by_the_wrappers_of_their_slots(name: str) -> None:
    cfg = small(llfx.registry()[name], 2, alpha=3.0, **EVERYWHERE)
    gm, _ = banked(cfg)
    ids = torch.tensor([2, -1, 0, 2, 2])
    check_against_wrappers(gm, gm, cfg, ids, inputs(5, 3))
    check_against_wrappers(llfx.optimize(gm, Pipeline(())), gm, cfg, ids, inputs(5, 3))
    wrapped = llfx.wrap(stack(ResidualMLP)[1], llfx.Bank(cfg, slots=SLOTS))
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    with llfx.by_row(wrapped, ids):
        close(wrapped(inputs(5, 3)), gm.eval()(inputs(5, 3), adapter_ids=ids), 1e-9, "the wrapper of the bank")


@pytest.mark.broad
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_ids_and_several_configs(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["LoRA", "DoRA", "IA3", "DeLoRA"]), min_size=1, max_size=2, unique=True))
    assume("DoRA" not in names[1:])  # it reads the weight of the linear, and a bank below it makes one for each row
    cfg = [small(llfx.registry()[name], 2, alpha=3.0, **EVERYWHERE) for name in names]
    blocks = data.draw(st.sampled_from([ResidualMLP, GatedMLP]))
    gm, _ = banked(cfg, blocks)
    for _ in range(2):
        ids = torch.tensor(data.draw(st.lists(st.integers(-1, SLOTS - 1), min_size=2, max_size=6)))
        check_against_wrappers(gm, gm, cfg, ids, inputs(len(ids), data.draw(st.integers(2, 5))), blocks)


def test_slots_that_start_from_data_start_as_one_adapter_does() -> None:
    cfg = llfx.EVA(r=2, **EVERYWHERE)
    model, graph = stack(ResidualMLP)
    data = [(inputs(4, 5, seed=1),)]
    gm: Any = llfx.rewrite(graph, llfx.Bank(cfg, slots=SLOTS), calibration=data)
    alone = llfx.adapter_state_dict(llfx.rewrite(graph, cfg, calibration=data))
    own = llfx.adapter_state_dict(gm)
    for name, value in alone.items():
        assert all(torch.equal(own[name][slot], value) for slot in range(SLOTS)), name
    fill(gm)
    before = {name: value.clone() for name, value in own.items()}
    ids, x = torch.tensor([2, -1, 0]), inputs(3, 4)
    y = gm(x, adapter_ids=ids)
    for row, slot in enumerate(ids.tolist()):
        of_slot = model if slot < 0 else llfx.take_slot(gm, slot)
        close(y[row], of_slot(x[[row, row]])[0], 1e-12, f"row {row}")
    with pytest.raises(llfx.ConfigError, match="EVA starts from data, which reset_slot has not"):
        llfx.reset_slot(gm, 0)
    assert all(torch.equal(own[name], value) for name, value in before.items())


@pytest.mark.broad
def test_other_dimensions_before_the_last() -> None:
    for shape, example in (((5,), (3,)), ((5, 2, 3), (3, 2, 4))):
        gm, model = banked(llfx.LoRA(r=2, **EVERYWHERE), shape=example)
        ids = torch.tensor([0, 1, -1, 2, 2])
        x = inputs(*shape)
        y = gm(x, adapter_ids=ids)
        for row, slot in enumerate(ids.tolist()):
            alone = model if slot < 0 else llfx.take_slot(gm, slot)
            close(y[row], alone(x[[row, row]])[0], 1e-12, f"row {row}")


def test_a_slot_that_diverged_does_not_reach_other_rows() -> None:
    gm, model = banked(llfx.LoRA(r=2, **EVERYWHERE))
    x = inputs(3, 4)
    expected = gm(x, adapter_ids=torch.tensor([1, -1, 2]))
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter[0] = float("nan")
    ids = torch.tensor([1, -1, 2])
    assert torch.equal(gm(x, adapter_ids=ids), expected)
    assert torch.equal(gm(x, adapter_ids=ids)[1], model(x)[1])
    with llfx.frozen(gm.eval()), llfx.by_row(gm, ids), torch.no_grad():
        close(gm(x), expected, 1e-12, "in frozen")
    gm(x, adapter_ids=ids).sum().backward()
    for parameter in llfx.adapter_parameters(gm):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_kept_factors_are_those_of_the_rows_of_now() -> None:
    gm, _ = banked(llfx.DoRA(r=2, **EVERYWHERE))
    gm.eval()
    x = inputs(3, 4)
    batches = [torch.tensor(ids) for ids in ([0, 1, 2], [2, 2, -1], [0, 1, 2])]
    expected = [gm(x, adapter_ids=ids) for ids in batches]
    with llfx.frozen(gm), torch.no_grad():
        for ids, y in zip(batches, expected, strict=True):
            close(gm(x, adapter_ids=ids), y, 1e-12, "ids of the call")
            with llfx.by_row(gm, ids):
                close(gm(x), y, 1e-12, "ids of the scope")
                close(gm(x), y, 1e-12, "kept")
                close(gm(x, adapter_ids=batches[1]), expected[1], 1e-12, "ids of the call inside the scope")
        mutable = batches[0].clone()
        with llfx.by_row(gm, mutable):
            gm(x)
            mutable.fill_(1)
            with pytest.raises(llfx.AdapterError, match="was written to inside"):
                gm(x)


@pytest.mark.parametrize(
    ("rows", "tokens", "is_sorted", "dtype"),
    broad_after(
        2,
        [
            (5, 4, False, torch.float32),
            (13, 2, True, torch.bfloat16),
            (13, 2, True, torch.float32),
            (40, 1, True, torch.float32),
            (40, 9, False, torch.float32),
        ],
        several=True,
    ),
)
def test_many_rows_of_few_tokens_are_sorted_by_slot(
    rows: int, tokens: int, is_sorted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    by_slot = BankProducts._sorted

    def counted(self: BankProducts, x: Tensor, a: Tensor, ids: Tensor, *fields: Any) -> Any:
        calls.append(len(ids))
        return by_slot(self, x, a, ids, *fields)

    monkeypatch.setattr(BankProducts, "_sorted", counted)
    gm, model = banked(llfx.LoRA(r=4, **EVERYWHERE), dtype=dtype)
    gm.eval()
    for seed in range(2):
        ids = torch.randint(-1, SLOTS, (rows,), generator=torch.Generator().manual_seed(seed))
        x = inputs(rows, tokens, seed=seed).to(dtype)
        expected = gm(x, adapter_ids=ids)
        with llfx.frozen(gm), llfx.by_row(gm, ids), torch.no_grad():
            y = gm(x)
        assert y.dtype is dtype
        close(y, expected, 1e-5 if dtype is torch.float32 else 1e-2, "kept")
        assert torch.equal(y[ids < 0], model(x)[ids < 0])
    assert bool(calls) == is_sorted


@pytest.mark.broad
def test_changing_ids_compiles_nothing() -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    torch._dynamo.reset()
    counters.clear()
    fast: Any = torch.compile(gm, backend="eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 5):
        for seed in range(4):
            ids = torch.randint(-1, SLOTS, (rows,), generator=torch.Generator().manual_seed(seed))
            x = inputs(rows, 4, seed=seed)
            close(fast(x, adapter_ids=ids), gm(x, adapter_ids=ids), 1e-12, "compiled")
    assert counters["stats"]["unique_graphs"] == 1


def test_export_has_the_ids_as_an_input() -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    x, ids = inputs(3, 4), torch.tensor([2, -1, 0])
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"input": {0: rows}, "adapter_ids": {0: rows}}
    exported = torch.export.export(gm, (x,), {"adapter_ids": ids}, dynamic_shapes=shapes, strict=False)
    assert "adapter_ids" in exported.graph_signature.user_inputs
    module: Any = exported.module()
    other, others = inputs(5, 4, seed=1), torch.tensor([0, 0, 1, -1, 2])
    close(module(other, adapter_ids=others), gm(other, adapter_ids=others), 1e-12, "exported")
    again: Any = llfx.optimize(exported)
    close(again(other, adapter_ids=others), gm(other, adapter_ids=others), 1e-12, "the graph of the export")


def test_switches_copies_and_further_adapters() -> None:
    gm, model = banked(llfx.LoRA(r=2, **EVERYWHERE))
    x, ids = inputs(3, 4), torch.tensor([2, -1, 0])
    y = gm(x, adapter_ids=ids)
    assert torch.equal(copy.deepcopy(gm)(x, adapter_ids=ids), y)
    with llfx.active(gm, []):
        assert torch.equal(gm(x), model(x))
    with llfx.scaled(gm, 0.0):
        assert torch.equal(gm(x, adapter_ids=ids), model(x))
    with llfx.scaled(gm, 1.0):
        assert torch.equal(gm(x, adapter_ids=ids), y)
    further: Any = llfx.rewrite(gm, {"more": llfx.LoRA(r=1, **EVERYWHERE)})
    assert torch.equal(further(x, adapter_ids=ids), y)
    fill(further, seed=5)
    assert not torch.equal(further(x, adapter_ids=ids)[1], y[1])
    plain = llfx.remove(gm)
    assert torch.equal(plain(x), model(x))
    assert str(plain.graph) == str(stack(ResidualMLP)[1].graph)
    program: Any = llfx.program(gm, "inference")
    close(program(x, adapter_ids=ids), y, 1e-12, "the program")
    llfx.add(gm, {"beside": llfx.IA3(**EVERYWHERE)})
    assert torch.equal(gm(x, adapter_ids=ids), y)
    llfx.delete(gm, "default")
    assert torch.equal(gm(x), model(x))


def test_checkpointed_layers_and_half_precision() -> None:
    cfg = llfx.LoRA(r=2, **EVERYWHERE)
    x, ids = inputs(3, 4), torch.tensor([2, -1, 0])
    plain, model = banked(cfg)
    kept: Any = llfx.rewrite(model, llfx.Bank(cfg, slots=SLOTS), (x,), checkpoint_layers=True)
    llfx.load_adapter_state_dict(kept, llfx.adapter_state_dict(plain))
    for gm in (plain.train(), kept.train()):
        gm(x, adapter_ids=ids).square().sum().backward()
    for one, other in zip(llfx.adapter_parameters(plain), llfx.adapter_parameters(kept), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        close(one.grad, other.grad, 1e-12, "the gradient")
    half, _ = banked(cfg, dtype=torch.bfloat16)
    assert half(x.bfloat16(), adapter_ids=ids).dtype == torch.bfloat16
    one_slot = llfx.take_slot(half, 2)
    close(half(x.bfloat16(), adapter_ids=ids)[0], one_slot(x.bfloat16())[0], 1e-2, "in half precision")
