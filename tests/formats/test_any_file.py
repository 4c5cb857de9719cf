"""Slots of a bank and files: what `load_slot` reads, refuses and does not do, and threads that use other slots."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, fx

import lora_lite_fx as llfx
from tests.adapters.test_bank import EVERYWHERE, banked, inputs, stack
from tests.adapters.test_switches import fill
from tests.support.conformance import close
from tests.support.models import GatedMLP, ResidualMLP
from tests.support.selection import broad_after

LORA = llfx.LoRA(r=4, alpha=3.0, **EVERYWHERE)


def of_slot(gm: Any, slot: int) -> Any:
    return gm(inputs(3, 4), adapter_ids=torch.full((3,), slot))


def values(gm: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(gm).items()}


def adapted(cfg: Any, seed: int = 3) -> Any:
    gm = llfx.rewrite(stack(ResidualMLP)[1], cfg)
    fill(gm, seed=seed)
    return gm


@contextmanager
def no_graph_is_made() -> Iterator[None]:
    """Let it be an error if a graph is captured, copied or recompiled."""

    def made(*_: Any, **__: Any) -> Any:
        raise AssertionError("a graph was made")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("recompile", "__init__", "__deepcopy__"):
            patch.setattr(fx.GraphModule, name, made)
        patch.setattr(torch.export, "export", made)
        yield


CONFIGS = {
    "the bank's": LORA,
    "a smaller rank at one site": llfx.LoRA(r=2, target_names=("fc_in",)),
    "PiSSA": llfx.PiSSA(r=2, **EVERYWHERE),
    "two names": {"fr": llfx.LoRA(r=2, **EVERYWHERE), "de": llfx.LoRA(r=1, **EVERYWHERE)},
    "two of the bank's rank": {"fr": LORA, "de": llfx.LoRA(r=4, alpha=3.0, **EVERYWHERE)},
}


WAYS = [(name, "save") for name in CONFIGS] + [(name, "peft") for name, cfg in CONFIGS.items() if type(cfg) is not dict]


@pytest.mark.parametrize(("name", "way"), broad_after(2, WAYS, several=True))
def test_a_file_is_loaded_without_a_graph(name: str, way: str, tmp_path: Path) -> None:
    cfg: Any = CONFIGS[name]
    gm, _ = banked(llfx.LoRA(r=8, alpha=5.0, **EVERYWHERE) if isinstance(cfg, dict) else LORA)
    source, path = adapted(cfg), tmp_path / "adapter"
    (llfx.save if way == "save" else llfx.save_peft)(source, path)
    before = values(gm)
    with no_graph_is_made():
        llfx.load_slot(gm, 1, path)
    close(of_slot(gm, 1), source(inputs(3, 4)), 1e-9 if way == "save" else 1e-5, name)
    for key, value in values(gm).items():
        assert torch.equal(value[[0, 2]], before[key][[0, 2]])


def test_a_path_at_which_nothing_is_says_so(tmp_path: Path) -> None:
    gm, _ = banked(LORA)
    for name, message in (("fr.safetensors", "is not a file: nothing is there"), ("fr", "nothing is there, neither a")):
        with pytest.raises(llfx.CheckpointError, match=message):
            llfx.load_slot(gm, 1, tmp_path / name)


@pytest.mark.broad
def test_a_slot_is_saved_without_a_graph_as_the_adapter_alone(tmp_path: Path) -> None:
    for cfg in (LORA, llfx.DoRA(r=2, **EVERYWHERE)):
        gm, _ = banked(cfg)
        llfx.save(llfx.take_slot(gm, 1), tmp_path / "alone")
        with no_graph_is_made():
            llfx.save_slot(gm, 1, tmp_path / "slot")
            llfx.load_slot(gm, 2, tmp_path / "slot")
        assert (tmp_path / "slot").read_bytes() == (tmp_path / "alone").read_bytes()
        for value in values(gm).values():
            assert torch.equal(value[2], value[1])


def test_an_adapter_that_is_not_two_factors_takes_a_graph(tmp_path: Path) -> None:
    gm, _ = banked(llfx.LoRA(r=8, alpha=3.0, **EVERYWHERE))
    source = adapted(llfx.DoRA(r=2, target_names=("fc_out",)))
    llfx.save(source, tmp_path / "adapter")
    llfx.load_slot(gm, 1, tmp_path / "adapter")
    close(of_slot(gm, 1), source(inputs(3, 4)), 1e-9, "DoRA")


def test_an_adapter_that_is_scaled_or_is_two_is_not_put_as_it_is_stored() -> None:
    gm, _ = banked(LORA)
    source = adapted(LORA)
    with llfx.scaled(source, 0.5):
        llfx.put_slot(gm, 1, source)
        close(of_slot(gm, 1), source(inputs(3, 4)), 1e-9, "half of it")
    both = adapted({"fr": llfx.LoRA(r=4, alpha=3.0, **EVERYWHERE), "de": LORA})
    before = values(gm)
    with pytest.raises(llfx.ConfigError, match="has the rank 8 at"):
        llfx.put_slot(gm, 1, both)
    assert all(torch.equal(value, before[name]) for name, value in values(gm).items())


# The base.


def changed(gm: Any, how: str) -> None:
    weight = gm.fc_in.weight
    if how == "another":
        gm.fc_in.weight = torch.nn.Parameter(-weight.detach(), requires_grad=False)
    elif how == "new data":
        weight.data = -weight.data
    elif how == "data":
        weight.data.neg_()
    else:
        with torch.no_grad():
            weight.copy_(weight.flip(0))  # the sum of all bits stays


@pytest.mark.broad
@pytest.mark.parametrize("how", broad_after(2, ["in place", "data", "new data", "another"]))
def test_other_weights_of_the_base_are_noticed_though_the_former_were_hashed(how: str, tmp_path: Path) -> None:
    model = ResidualMLP(True).double().eval()
    gm: Any = llfx.rewrite(model, llfx.Bank(LORA, slots=2), (inputs(3, 4),))
    pissa: Any = llfx.rewrite(model, llfx.Bank(llfx.PiSSA(r=2, **EVERYWHERE), slots=2), (inputs(3, 4),))
    for bank, file in ((gm, "lora"), (pissa, "pissa")):
        llfx.save_slot(bank, 0, tmp_path / file)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llfx.load_slot(bank, 1, tmp_path / file)
    changed(gm, how)
    if how in ("another", "new data"):  # else both have the tensor that was written to
        changed(pissa, how)
    with pytest.warns(UserWarning, match=r"was made for other weights than the model's, at 1 of 2 sites \(fc_in"):
        llfx.load_slot(gm, 1, tmp_path / "lora")
    before = values(pissa)
    with pytest.raises(llfx.CheckpointError, match="it means nothing on these"):
        llfx.load_slot(pissa, 1, tmp_path / "pissa")
    assert all(torch.equal(value, before[name]) for name, value in values(pissa).items())


# Files that do not fit.


def damaged(path: Path) -> None:
    data = bytearray((path / "adapter").read_bytes())
    data[-1] ^= 1
    (path / "adapter").write_bytes(data)


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, path / "adapter")


def not_finite(path: Path) -> None:
    source = adapted(LORA)
    with torch.no_grad():
        llfx.adapter_parameters(source)[0][0] = float("nan")
    llfx.save(source, path / "adapter", allow_nonfinite=True)


def of_another_model(path: Path) -> None:
    llfx.save(llfx.rewrite(stack(GatedMLP)[1], LORA), path / "adapter")


def two_halves(path: Path) -> None:
    for name in ("one", "adapter"):
        llfx.save_peft(adapted(llfx.LoRA(r=2 + len(name), **EVERYWHERE)), path / name)
    shutil.copy(path / "one/adapter_config.json", path / "adapter/adapter_config.json")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda path: None, "adapter"),
    "damaged": (damaged, "is corrupt"),
    "foreign": (foreign, "was not written by lora_lite_fx.save"),
    "not finite": (not_finite, "hold NaN or infinity"),
    "another model": (of_another_model, "that the model does not have"),
    "two halves": (two_halves, "was not saved with this adapter_config.json"),
}


@pytest.mark.parametrize("name", broad_after(2, MISTAKES))
def test_a_file_is_refused_in_the_words_of_load_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, message = MISTAKES[name]
    gm, _ = banked(LORA)
    if name not in ("nothing there", "two halves"):
        llfx.save(adapted(LORA), tmp_path / "adapter")
    make(tmp_path)
    before = values(gm)
    with pytest.raises(llfx.CheckpointError, match=message) as of_slot_error:
        llfx.load_slot(gm, 1, tmp_path / "adapter")
    read = llfx.load if (tmp_path / "adapter").is_file() else llfx.load_peft
    with pytest.raises(llfx.CheckpointError) as of_load:
        read(stack(ResidualMLP)[1], tmp_path / "adapter")
    assert str(of_slot_error.value) == str(of_load.value)
    assert all(torch.equal(value, before[key]) for key, value in values(gm).items())


@pytest.mark.broad
def test_adapters_that_have_no_place_in_the_bank_are_refused(tmp_path: Path) -> None:
    gm, _ = banked(llfx.LoRA(r=2, target_names=("fc_in",)))
    ia3, _ = banked(llfx.IA3(**EVERYWHERE))
    for bank, cfg, error, message in (
        (gm, llfx.LoRA(r=6, target_names=("fc_in",)), llfx.ConfigError, "has the rank 6 at .* room for 2"),
        (gm, llfx.LoRA(r=2, **EVERYWHERE), llfx.ConfigError, "The source adapts '0.fc_out', at which"),
        (gm, llfx.Bank(LORA, slots=2), llfx.AdapterError, "A sum of adapters takes one adapter"),
        (gm, llfx.LoRA(r=2, bias=True, target_names=("fc_in",)), llfx.AdapterError, "changes the bias too"),
        (ia3, LORA, llfx.ConfigError, "an adapter of the bank's config, or a bank of LoRA"),
    ):
        llfx.save(adapted(cfg), tmp_path / "adapter")
        before = values(bank)
        with pytest.raises(error, match=message):
            llfx.load_slot(bank, 1, tmp_path / "adapter")
        assert all(torch.equal(value, before[name]) for name, value in values(bank).items())


# Threads.


def test_no_call_reads_a_part_of_two_adapters_if_a_free_slot_is_loaded_and_then_used(tmp_path: Path) -> None:
    """Replace an adapter many times while threads use it: each result is that of one of its two states."""
    gm, _ = banked(LORA)
    gm.eval()
    files = [tmp_path / str(state) for state in range(2)]
    expected = []
    for state, file in enumerate(files):
        source = adapted(LORA, seed=7 + state)
        llfx.save(source, file)
        expected.append(source.eval()(inputs(3, 4)))
    llfx.load_slot(gm, 0, files[0])
    current, users, lock = 0, {0: 0, 1: 0}, threading.Condition()
    results: list[Tensor] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(40):
                with lock:
                    slot = current
                    users[slot] += 1
                with torch.no_grad():
                    y = of_slot(gm, slot)
                with lock:
                    users[slot] -= 1
                    lock.notify_all()
                results.append(y)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(1, 12):
        free = 1 - current
        with lock:
            while users[free]:
                assert lock.wait(60)
        llfx.load_slot(gm, free, files[turn % 2])
        with lock:
            current = free
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(results) == 120
    for y in results:
        assert any(torch.allclose(y, state, atol=1e-9) for state in expected)
