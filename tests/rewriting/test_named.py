"""Adapters by name: added, deleted, saved and loaded, in any order, against eager wrappers of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant
from tests.adapters.test_switches import fill
from tests.support.captured import captured
from tests.support.models import Chain, GatedMLP, double_net, ids

EVERYWHERE: Any = {"target_names": (".",)}
CONFIGS: list[Variant | list[Variant]] = [
    llfx.LoRA(r=2, **EVERYWHERE),
    llfx.IA3(target_names=("gate|one",)),
    [llfx.DoRA(r=2, **EVERYWHERE), llfx.HRA(r=2, target_names=("up|two|head",))],
    llfx.VeRA(r=2, **EVERYWHERE),
]
SWAPPED: list[Variant] = [
    llfx.LoRA(r=1, alpha=5, **EVERYWHERE),
    llfx.LoRA(r=2, target_names=("gate|head",)),
    llfx.PiSSA(r=1, target_names=("up|two",)),
    llfx.LoRA(r=2, rank_pattern={"one": 1}, target_names=("one|two|down",)),
]
"""What is swapped into an adapter of the first config."""
X = ids(3, 4)
EXAMPLE = (ids(2, 5),)


class Twin:
    """What the adapters of a graph are to be: for each name an eager wrapper of its own, over the same base."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.by_name: dict[str, nn.Module] = {}

    def add(self, name: str, cfg: Any, gm: nn.Module) -> None:
        self.by_name[name] = llfx.wrap(self.base, cfg)
        self.copy_from(gm, name)

    def copy_from(self, gm: nn.Module, name: str) -> None:
        """Take over the values that an adapter has in the graph; its tensors are in the same order."""
        twin = self.by_name[name]
        values = [t for key, t in llfx.adapter_state_dict(gm).items() if key.endswith(f"_{name}")]
        llfx.load_adapter_state_dict(twin, dict(zip(llfx.adapter_state_dict(twin), values, strict=True)))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "delete", "active", "scale", "train", "save", "load", "copy", "swap"]),
        st.integers(0, 3),
    ),
    min_size=3,
    max_size=8,
)


@pytest.mark.broad
@settings(max_examples=5, deadline=None)
@given(operations=OPERATIONS)
def test_any_sequence_of_operations_equals_separate_wrappers(
    operations: list[tuple[str, int]], tmp_path_factory: Any
) -> None:
    folder: Path = tmp_path_factory.mktemp("adapters")
    base, graph = captured(double_net, GatedMLP, Chain, inputs=EXAMPLE)
    gm: Any = llfx.rewrite(graph, {"a0": CONFIGS[0]})
    fill(gm)
    twin = Twin(graph)
    twin.add("a0", CONFIGS[0], gm)
    acting, scale, made, saved, saved_is_room = "a0", 1.0, 1, "", False
    rooms = {"a0"}  # the adapters into which others can be swapped
    for operation, which in operations:
        names = list(twin.by_name)
        name = names[which % len(names)]
        if operation == "add":
            new, made = f"a{made}", made + 1
            llfx.add(gm, {new: CONFIGS[which]})
            twin.add(new, CONFIGS[which], gm)
            rooms |= {new} if which == 0 else set()
        elif operation == "delete" and len(names) > 1 and name != acting:
            llfx.delete(gm, name)
            del twin.by_name[name]
        elif operation == "active":
            llfx.active(gm, name)
            llfx.scaled(gm, 1.0)
            acting, scale = name, 1.0
        elif operation == "scale":
            scale = (-1.0, 0.5, 0.0, 2.0)[which]
            llfx.scaled(gm, scale, acting)
        elif operation == "train":
            for model in (gm, twin.by_name[acting]):
                optimizer = torch.optim.SGD(llfx.adapter_parameters(model), lr=1e-3)
                with llfx.scaled(model, 1.0):
                    model(X).tanh().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        elif operation == "save":
            saved, saved_is_room = name, name in rooms
            llfx.save(gm, folder / "file", adapter=name)
            (folder / "twin").unlink(missing_ok=True)
            llfx.save(twin.by_name[name], folder / "twin")
        elif operation == "load" and saved:
            new, made = f"a{made}", made + 1
            gm = llfx.load(gm, folder / "file", name=new)
            alone = llfx.load(graph, folder / "twin")
            twin.by_name[new] = alone
            rooms |= {new} if saved_is_room else set()
        elif operation == "copy":
            gm = llfx.capture(gm)
        elif operation == "swap" and name in rooms:
            source = llfx.rewrite(graph, SWAPPED[which])
            fill(source, seed=which)
            llfx.swap(gm, source, name)
            with llfx.active(gm, name), llfx.scaled(gm, 1.0):
                torch.testing.assert_close(gm(X), source(X))
            twin.copy_from(gm, name)
        wrapped = twin.by_name[acting]
        with llfx.scaled(wrapped, scale):
            torch.testing.assert_close(gm(X), wrapped(X))
    for name, wrapped in twin.by_name.items():
        with llfx.active(gm, name), llfx.scaled(gm, 1.0):
            torch.testing.assert_close(gm(X), wrapped(X))
    removed = llfx.remove(gm)
    assert torch.equal(removed(X), base(X))


def named(*names: str) -> tuple[Any, nn.Module]:
    base, graph = captured(double_net, GatedMLP, inputs=EXAMPLE)
    gm = llfx.rewrite(graph, {name: CONFIGS[i] for i, name in enumerate(names)})
    fill(gm)
    return gm, base


def test_names_are_in_parameters_tables_and_messages() -> None:
    gm, _ = named("fr", "de")
    assert any(name.endswith("lora_A_fr") for name, _ in gm.named_parameters())
    assert [row.name for row in llfx.adapters(gm)] == ["fr", "de"]
    with llfx.active(gm, "de"):
        assert [row.acts for row in llfx.adapters(gm)] == [False, True]
        assert "does not act" in repr(gm)
    assert "fr: LoRA" in repr(gm)
    assert "fr: LoRA" in str(llfx.inspect(gm))


def test_an_added_adapter_leaves_parameters_optimizer_and_results_as_they_are() -> None:
    gm, _ = named("fr")
    before, parameters = gm(X), list(gm.parameters())
    llfx.add(gm, {"it": llfx.LoRA(r=3, **EVERYWHERE)})
    fill(gm, seed=1)
    assert {id(p) for p in parameters} <= {id(p) for p in gm.parameters()}
    with llfx.active(gm, "it"):
        assert not torch.equal(gm(X), before)
    gm(X).sum().backward()
    grads = {name: p.grad for name, p in gm.named_parameters() if p.requires_grad}
    assert all((grad is None) == name.endswith("_it") for name, grad in grads.items())


def test_a_call_that_fails_changes_nothing() -> None:
    gm, _ = named("fr", "de")
    before = str(gm.graph), str(llfx.adapters(gm)), gm(X)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: llfx.add(gm, {"fr": llfx.LoRA()}), "an adapter 'fr' already; it has fr, de"),
        (lambda: llfx.add(gm, {"it": llfx.LoRA(target_names=("nothing",))}), "no site"),
        (lambda: llfx.add(gm, {"it": llfx.Full(**EVERYWHERE)}), "put it first"),
        (lambda: llfx.add(gm, {"1": llfx.LoRA()}), "does not begin with a digit"),
        (lambda: llfx.add(gm, llfx.LoRA()), "takes adapters by name"),  # type: ignore[arg-type]
        (lambda: llfx.add(gm, {}), "an empty dict"),
        (lambda: llfx.delete(gm, "it"), "no adapter 'it'"),
        (lambda: llfx.delete(gm, ["fr", "de"]), "No adapter would be left"),
        (lambda: llfx.rewrite(gm, {"fr": llfx.LoRA()}), "an adapter 'fr' already"),
        (lambda: llfx.save_lora_lite(gm, "file"), "adapter='fr' writes one"),
        (lambda: llfx.save(gm, "file", adapter="it"), "no adapter 'it'"),
        (lambda: llfx.reconfigure(gm, "it", alpha=3), "no adapter 'it'"),
    ]
    for call, message in calls:
        with pytest.raises(llfx.AdapterError, match=message):
            call()
    assert (str(gm.graph), str(llfx.adapters(gm))) == before[:2]
    assert torch.equal(gm(X), before[2])


def test_deleting_what_acts_warns_and_leaves_the_base() -> None:
    gm, base = named("fr", "de")
    llfx.active(gm, "fr")
    with pytest.warns(UserWarning, match="none acts now"):
        llfx.delete(gm, "fr")
    assert torch.equal(gm(X), base(X))
    assert not any("_fr" in name for name in gm.state_dict())


@pytest.mark.broad
def test_a_file_of_several_adapters_is_read_whole_or_under_another_name(tmp_path: Path) -> None:
    gm, base = named("fr", "de")
    llfx.save(gm, tmp_path / "both")
    both = llfx.load(base, tmp_path / "both", EXAMPLE)
    assert [row.name for row in llfx.adapters(both)] == ["fr", "de"]
    torch.testing.assert_close(both(X), gm(X))
    with pytest.raises(llfx.ConfigError, match="the adapters 'fr', 'de', and name='it' names one"):
        llfx.load(base, tmp_path / "both", EXAMPLE, name="it")
    with pytest.raises(llfx.ConfigError, match="an adapter 'fr' already"):
        llfx.load(both, tmp_path / "both")
    llfx.save(gm, tmp_path / "one", adapter="de")
    first = (tmp_path / "one").read_bytes()
    alone = llfx.load(base, tmp_path / "one", EXAMPLE)
    llfx.save(alone, tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == first


def test_wrapped_models_save_and_delete_by_name(tmp_path: Path) -> None:
    gm, base = named("fr", "de")
    wrapped = llfx.wrap(base, {"fr": CONFIGS[0], "de": CONFIGS[1]}, EXAMPLE)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    llfx.save(wrapped, tmp_path / "fr", adapter="fr")
    llfx.delete(wrapped, "de")
    with llfx.active(gm, "fr"):
        torch.testing.assert_close(wrapped(X), gm(X))
        torch.testing.assert_close(llfx.load(base, tmp_path / "fr", EXAMPLE)(X), gm(X))
    with pytest.raises(llfx.AdapterError, match="all adapters at once"):
        llfx.add(wrapped, {"it": llfx.LoRA()})


def test_an_adapter_is_reconfigured_by_its_name() -> None:
    gm, base = named("fr", "de")
    llfx.active(gm, "fr")
    other = llfx.reconfigure(gm, "fr", alpha=32)
    wrapped = llfx.wrap(base, llfx.LoRA(r=2, alpha=32, **EVERYWHERE), EXAMPLE)
    values = [t for key, t in llfx.adapter_state_dict(gm).items() if key.endswith("_fr")]
    llfx.load_adapter_state_dict(wrapped, dict(zip(llfx.adapter_state_dict(wrapped), values, strict=True)))
    torch.testing.assert_close(other(X), wrapped(X))


@pytest.mark.broad
def test_several_adapters_in_one_directory_are_those_that_peft_reads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    from tests.support.models import tiny_llama

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny_llama()).eval()
    gm = llfx.rewrite(model, {"default": llfx.LoRA(r=2), "fr": llfx.LoRA(r=3, alpha=8), "de": llfx.IA3()})
    fill(gm)
    llfx.save_peft(gm, tmp_path)
    prompt = torch.randint(1, 20, (2, 5))
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM(tiny_llama()).eval(), tmp_path)
    theirs.load_adapter(tmp_path / "fr", "fr")
    for name in ("default", "fr"):
        theirs.set_adapter(name)
        with llfx.active(gm, name):
            torch.testing.assert_close(gm(input_ids=prompt).logits, theirs(prompt).logits)
    folder = tmp_path / "peft"
    theirs.save_pretrained(folder)
    ours = llfx.load_peft(model, folder)
    ours = llfx.load_peft(ours, folder, subfolder="fr", name="fr")
    for name in ("default", "fr"):
        with llfx.active(gm, name), llfx.active(ours, name):
            torch.testing.assert_close(gm(input_ids=prompt).logits, ours(input_ids=prompt).logits)
