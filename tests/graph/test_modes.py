"""The modes of modules, and the nodes of a graph that read them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lora_lite_fx.errors import CallError
from lora_lite_fx.graph.divided_dropout import let_dropouts_agree
from lora_lite_fx.graph.modes import (
    flag_name,
    held_modes,
    in_mode,
    let_modes_be_one,
    modes_of,
    one_mode,
    owner_of,
    read_flag,
    set_modes,
)
from lora_lite_fx.graph.tensors import register_tensor

MARK = "a mark of torch.export"


def two_parts() -> tuple[nn.Module, fx.Graph]:
    """Return a module and a graph with two dropouts that follow its parts, one of which reads its flag late."""
    root = nn.Module()
    root.one, root.two = nn.Module(), nn.Module()
    graph = fx.Graph()
    x = graph.placeholder("x")
    flag = read_flag(graph, "one")
    y = graph.call_function(torch.ops.aten.dropout.default, (x, 0.5, flag))
    late = graph.create_node("get_attr", flag_name("two"))
    graph.output(graph.call_function(torch.ops.aten.dropout.default, (y, 0.5, late)))
    return root, graph


def test_a_module_that_is_made_on_the_way_has_the_mode_of_the_one_around_it() -> None:
    root = nn.Module()
    root.part = nn.Module().eval()
    register_tensor(root, "part.inner.weight", torch.zeros(2))
    register_tensor(root, "other.weight", torch.zeros(2))
    assert modes_of(root) == {"": True, "part": False, "part.inner": False, "other": True}
    set_modes(root, {"": False, "part": True})
    assert modes_of(root) == {"": False, "part": True, "part.inner": True, "other": False}
    with in_mode(root, True):
        assert all(modes_of(root).values())
    assert modes_of(root)["other"] is False


class Frozen(nn.Module):
    """Keeps one part as it is, and puts another in training always."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.on = nn.Module(), nn.Module()

    def train(self, mode: bool = True) -> Frozen:
        self.training = mode
        self.on.train()
        return self


def test_parts_that_train_of_the_model_leaves_as_they_are_are_held() -> None:
    assert held_modes(nn.Sequential(nn.Dropout())) == {}
    model = nn.Sequential(Frozen())
    model[0].get_submodule("kept").eval()
    assert held_modes(model) == {True: ["0.kept"], False: ["0.on"]}
    model[0].get_submodule("kept").train()
    assert held_modes(model) == {True: [], False: ["0.kept", "0.on"]}


def test_a_node_that_torch_export_knows_no_module_of_is_in_that_of_its_reader() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    noise = graph.call_function(torch.rand_like, (x,))
    noise.meta["nn_module_stack"] = {MARK: (MARK, MARK)}
    y = graph.call_function(torch.add, (x, noise))
    y.meta["nn_module_stack"] = {"": ("", "Net"), "part": ("part", "Part")}
    unread = graph.call_function(torch.rand_like, (x,))
    unread.meta["nn_module_stack"] = {MARK: (MARK, MARK)}
    root = graph.call_function(torch.add, (y, 1))
    assert [owner_of(node) for node in (noise, y, unread, root)] == ["part", "part", "", ""]


@pytest.mark.parametrize("flags", [(True, True, True), (True, True, False), (False, False, False)])
def test_parts_have_one_mode_and_others_may_be_in_evaluation(flags: tuple[bool, ...]) -> None:
    assert one_mode(("a", "b"), ("c",), *flags) is flags[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((True, False, True), "a is in training mode and b in evaluation"),
        ((False, True, False), "b is in training mode and a in evaluation"),
        ((False, False, True), "c is in training mode and a in evaluation"),
    ],
)
def test_parts_in_other_modes_are_named(flags: tuple[bool, ...], named: str) -> None:
    with pytest.raises(CallError, match=f"{named}.*MC dropout.*drop_path_rate=0"):
        one_mode(("a", "b"), ("c",), *flags)


def test_a_graph_can_ask_for_one_mode_of_all() -> None:
    root, graph = two_parts()
    gm = fx.GraphModule(root, graph)
    let_modes_be_one(gm, ["", "one", "two", "third"])
    gm.graph.lint()
    for mode in (True, False):
        gm.train(mode)
        assert torch.equal(gm(torch.ones(100)), torch.ones(100)) is not mode
    gm.get_submodule("third").train()
    with pytest.raises(CallError, match="third is in training mode and the model itself in evaluation"):
        gm(torch.ones(2))


def test_processes_know_which_parts_drop() -> None:
    root, graph = two_parts()
    drawing, number = let_dropouts_agree(graph)
    assert isinstance(number, fx.Node)
    assert len(drawing) == 2
    graph.output_node().args = (number,)
    gm = fx.GraphModule(root, graph)
    gm.graph.lint()
    first_input = gm.graph.find_nodes(op="placeholder")[0]
    assert next(node for node in gm.graph.nodes if node.name == number.name) < first_input
    numbers = []
    for modes in ((False, False), (True, False), (False, True), (True, True)):
        set_modes(gm, {"": True, "one": modes[0], "two": modes[1]})
        numbers.append(gm(torch.ones(2)))
    assert numbers[0] == 0
    assert len(set(numbers)) == 4
