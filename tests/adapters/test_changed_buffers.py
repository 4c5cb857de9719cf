"""Buffers that training changes besides the adapters: whose they are, what has the base's, and what warns of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.changed_buffers import moved_buffers
from lora_lite_fx.formats.gathered import held_by
from tests.support.statistics import LORA, X, counted, graph, silent, trained
from tests.support.untouched import untouched


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_buffers(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = buffers(one), buffers(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The base's.


def test_remove_gives_the_bases_own_and_the_rest_keeps_what_training_made() -> None:
    base, of_base = graph()
    gm = trained(llfx.rewrite(of_base, LORA))
    with untouched(base, of_base), silent():
        removed, merged, as_lora = llfx.remove(gm), llfx.merge(gm), llfx.to_lora(gm)[0]
        assert same_buffers(removed, of_base)
        expected = gm(X)
        assert not torch.allclose(removed(X), expected, atol=0.1)
        for kept in (merged, as_lora, copy.deepcopy(gm), llfx.optimize(gm)):
            assert torch.allclose(kept(X), expected, atol=1e-6)
        removed.train()(X)
        assert not same_buffers(removed, of_base)
    assert torch.equal(removed.eval().get_parameter("fc.weight"), base.fc.weight)


def rewritten_again(gm: Any) -> Any:
    return llfx.rewrite(gm, {"again": llfx.IA3(target_names=("fc",))})


def added(gm: Any) -> Any:
    llfx.add(gm, {"other": LORA, "third": LORA})
    llfx.delete(gm, "third")
    return gm


def moved_and_back(gm: Any) -> Any:
    return gm.double().float()


LATER: list[Callable[[Any], Any]] = [rewritten_again, added, copy.deepcopy, llfx.optimize, moved_and_back]


@pytest.mark.parametrize("change", LATER)
def test_what_is_made_of_an_adapted_graph_knows_the_bases(change: Callable[[Any], Any], tmp_path: Path) -> None:
    base, gm = graph()
    model = change(trained(llfx.rewrite(gm, LORA)))
    assert torch.allclose(llfx.remove(model)(X), base(X), atol=1e-6)
    llfx.save(model, tmp_path / "adapter.safetensors")
    assert torch.allclose(llfx.load(gm, tmp_path / "adapter.safetensors")(X), model(X), atol=1e-6)


def test_a_graph_without_adapters_is_a_base_as_it_is() -> None:
    _, gm = graph()
    gm.train()(3 * X)
    adapted = trained(llfx.rewrite(gm.eval(), LORA))
    assert same_buffers(llfx.remove(adapted), gm)


class Counter(nn.Module):
    """Counts its calls, in both modes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x)
        return y * self.calls


def test_a_count_of_calls_is_saved(tmp_path: Path) -> None:
    x, base = torch.randn(4, 3), Counter().eval()
    gm = llfx.rewrite(base, LORA, (x,))
    for _ in range(3):
        gm(x)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    again = llfx.load(base, tmp_path / "adapter.safetensors", (x,))
    assert again.get_buffer("calls") == gm.get_buffer("calls") == 3
    assert base.calls == llfx.remove(gm).get_buffer("calls") == 0
    assert torch.equal(again(x[:2]), gm(x[:2]))
    assert torch.equal(llfx.remove(gm)(x), base(x))


# Warnings.


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in record if __file__ in each.filename or "buffer" in str(each.message)]


def test_a_model_in_training_is_warned_of_once() -> None:
    _, gm = graph()
    gm.train()
    messages = warned(lambda: llfx.rewrite(gm, [LORA, llfx.IA3(target_names=("fc",))]))
    assert len(messages) == 1
    assert "change the buffers norm.num_batches_tracked, norm.running_mean and 1 more besides" in messages[0]
    adapted = llfx.rewrite(gm, LORA)
    assert len(warned(lambda: llfx.wrap(counted().train(), LORA, (X,)))) == 1
    with silent():
        llfx.rewrite(adapted, {"more": LORA})
        llfx.add(adapted, {"other": LORA})
        llfx.rewrite(gm.eval(), LORA)


def test_loading_into_a_model_in_training_is_warned_of_once(tmp_path: Path) -> None:
    _, gm = graph()
    adapted = llfx.rewrite(gm, LORA)
    llfx.save(adapted, tmp_path / "adapter.safetensors")
    llfx.save_peft(adapted, tmp_path / "peft")
    with silent():
        llfx.load(gm, tmp_path / "adapter.safetensors")
    gm.train()
    assert len(warned(lambda: llfx.load(gm, tmp_path / "adapter.safetensors"))) == 1
    assert len(warned(lambda: llfx.load_peft(gm, tmp_path / "peft"))) == 1
    adapted.train()
    with silent():
        llfx.load(adapted, tmp_path / "adapter.safetensors", name="again")


def by_state_dict(model: Any, _: Path) -> None:
    llfx.adapter_state_dict(model)


def to_state_dict(model: Any, _: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = llfx.adapter_state_dict(model)
    llfx.load_adapter_state_dict(model, state)


def to_peft(model: Any, folder: Path) -> None:
    llfx.save_peft(model, folder)


def to_lora_lite(model: Any, folder: Path) -> None:
    llfx.save_lora_lite(model, folder / "adapter.safetensors")


def to_diffusers(model: Any, folder: Path) -> None:
    llfx.save_diffusers(model, folder, component="unet")


def without(model: Any, _: Path) -> None:
    with llfx.active(model, None):
        assert not torch.equal(model(X), llfx.remove(model)(X))


LOSSES: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "adapter_state_dict": (by_state_dict, "adapter_state_dict returns the tensors of adapters only"),
    "load_adapter_state_dict": (to_state_dict, "load_adapter_state_dict writes to the tensors of adapters only"),
    "save_peft": (to_peft, "save_peft writes adapters only"),
    "save_lora_lite": (to_lora_lite, "save_lora_lite writes adapters only"),
    "save_diffusers": (to_diffusers, "save_diffusers writes adapters only"),
    "active": (without, "Without its adapters the model is not the base"),
}


@pytest.mark.parametrize(("lose", "message"), LOSSES.values(), ids=LOSSES)
def test_what_lacks_the_changed_buffers_names_them(
    lose: Callable[[Any, Path], None], message: str, tmp_path: Path
) -> None:
    gm = trained(llfx.rewrite(graph()[1], LORA))
    messages = warned(lambda: lose(gm, tmp_path))
    assert len(messages) == 1, messages
    assert messages[0].startswith(message)
    assert "training has changed the buffers norm.num_batches_tracked, norm.running_mean and 1 more" in messages[0]


def test_a_wrapped_model_warns_as_a_graph_does() -> None:
    base, gm = graph()
    model = trained(llfx.wrap(gm, LORA))
    assert base.norm.num_batches_tracked == 0
    assert len(warned(lambda: llfx.adapter_state_dict(model))) == 1


# Several adapters have one value of each.


def other_file(folder: Path, seed: int) -> Path:
    file = folder / f"{seed}.safetensors"
    llfx.save(trained(llfx.rewrite(graph()[1], LORA), seed=seed), file)
    return file


@pytest.mark.parametrize("how", [{"name": "more"}, {"stack": True}], ids=["beside", "around"])
def test_an_adapter_of_other_statistics_is_not_put_beside_one(how: dict[str, Any], tmp_path: Path) -> None:
    first, second = (other_file(tmp_path, seed) for seed in (1, 2))
    _, gm = graph()
    loaded = llfx.load(gm, first)
    with untouched(loaded), pytest.raises(llfx.CheckpointError, match=r"2\.safetensors: .* other values of the buffer"):
        llfx.load(loaded, second, **how)
    both = llfx.load(loaded, first, **how)  # the same statistics
    assert same_buffers(both, loaded)
    with pytest.raises(llfx.CheckpointError, match="other values of the buffer"):
        llfx.load(llfx.rewrite(gm, LORA), first, **how)


def test_an_adapter_of_the_bases_statistics_beside_changed_ones_is_warned_of(tmp_path: Path) -> None:
    _, gm = graph()
    llfx.save(llfx.rewrite(gm, LORA), tmp_path / "plain.safetensors")
    loaded = llfx.load(gm, other_file(tmp_path, 1))
    (message,) = warned(lambda: llfx.load(loaded, tmp_path / "plain.safetensors", name="plain"))
    assert "was made for the base's values of the buffers norm.num_batches_tracked" in message


def test_adapters_that_were_trained_in_one_model_come_back_together(tmp_path: Path) -> None:
    _, gm = graph()
    model = trained(llfx.rewrite(gm, {"fr": LORA, "de": LORA}))
    llfx.save(model, tmp_path / "both.safetensors")
    for name in ("fr", "de"):
        llfx.save(model, tmp_path / name, adapter=name)
    both = llfx.load(gm, tmp_path / "both.safetensors")
    one = llfx.load(llfx.load(gm, tmp_path / "fr"), tmp_path / "de")
    llfx.active(one)
    assert torch.equal(both(X), model(X))
    assert torch.equal(one(X), model(X))


def test_slots_of_a_bank_have_the_statistics_of_the_model(tmp_path: Path) -> None:
    base, gm = graph()
    ids = torch.zeros(4, dtype=torch.int64)
    bank = llfx.rewrite(gm, llfx.Bank(LORA, slots=2))
    for load in (llfx.load_slot, lambda bank, slot, file: llfx.put_slot(bank, slot, llfx.load(gm, file))):
        with untouched(bank), pytest.raises((llfx.AdapterError), match="other values of the buffers"):
            load(bank, 0, other_file(tmp_path, 1))
    with llfx.by_row(bank, ids):
        bank.train()(3 * X)
        expected = bank.eval()(X)
    llfx.save_slot(bank, 0, tmp_path / "slot.safetensors")
    assert torch.allclose(llfx.load(gm, tmp_path / "slot.safetensors")(X), expected, atol=1e-6)
    with silent():
        llfx.load_slot(bank, 1, tmp_path / "slot.safetensors")
    assert base.norm.num_batches_tracked == 0


def test_swap_refuses_an_adapter_of_other_statistics(tmp_path: Path) -> None:
    gm = llfx.rewrite(graph()[1], LORA)
    with untouched(gm), pytest.raises(llfx.AdapterError, match=r"The source of swap: .* other values of the buffers"):
        llfx.swap(gm, llfx.load(graph()[1], other_file(tmp_path, 1)))


# Stages, and graphs of others.


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_stages_of_a_pipeline_give_the_statistics_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4)
    gm = llfx.rewrite(Stack().eval(), llfx.LoRA(r=2, target_names="."), (x,)).train()
    gm(x)
    stages = llfx.split(gm, 2)
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.is_initialized", lambda: True)
        patched.setattr("torch.distributed.get_world_size", lambda: 2)
        given: list[Any] = []
        for stage in stages:  # as two processes that gather what both give
            patched.setattr("torch.distributed.all_gather_object", lambda found, own: given.append(own))
            with pytest.raises(TypeError):  # nothing was gathered
                held_by(stage, None)
        patched.setattr("torch.distributed.all_gather_object", lambda found, own: found.__setitem__(slice(2), given))
        held = held_by(stages[0], None)
    assert held.buffers.keys() == moved_buffers(gm).keys()
    assert len(held.buffers) == 6


def test_a_graph_from_a_file_keeps_its_buffers_and_says_so(tmp_path: Path) -> None:
    base, gm = graph()
    model = trained(llfx.rewrite(gm, LORA))
    exported = torch.export.export(model, (X,)).module()
    for adapted in (exported, llfx.optimize(exported), llfx.rewrite(exported, {"more": LORA})):
        llfx.save(adapted, tmp_path / "adapter.safetensors", adapter="default")
        with silent():
            again = llfx.load(gm, tmp_path / "adapter.safetensors")
        assert torch.equal(again(X), model(X))
        (message,) = warned(lambda: llfx.remove(adapted))  # noqa: B023
        assert message.startswith("remove leaves the buffers norm.num_batches_tracked, norm.running_mean and 2 more as")
        assert not torch.allclose(llfx.remove(adapted)(X), base(X), atol=1e-3)


def test_verify_compares_with_the_statistics_of_the_graph() -> None:
    base, gm = graph()
    assert llfx.verify(trained(llfx.rewrite(gm, LORA)), base, (X,)).ok
