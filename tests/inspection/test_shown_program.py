"""`program`: what runs, as a graph that is read, stepped through and drawn, and that computes the same."""

from __future__ import annotations

import copy
import linecache
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.execution.execution import Execution
from lora_lite_fx.execution.optimize import run_as
from lora_lite_fx.passes import OPTIMIZATIONS, Program
from tests.passes.test_leave_out_inputs import INPUTS, Masked
from tests.support.conformance import close, gradients, output, randomise
from tests.support.low_rank_llama import LOW_RANK, llama, tokens
from tests.support.models import Attention, GatedMLP, ids
from tests.support.programs import PAIR, X, adapted, in_calls
from tests.support.selection import broad_after, slow_after

PROGRAMS: tuple[Program, ...] = ("plain", "training", "checkpointed", "inference", "exported")
VARIANTS = [
    llfx.LoRA(r=2, alpha=4.0, dropout=0.3, target_names=(".",)),
    llfx.HRA(r=2, target_names=(".",)),
    llfx.DoRA(r=2, target_names=(".",)),
]


def close_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert len(ours) > 4
    for name, gradient in ours.items():
        close(gradient, expected[name], 1e-9, name)


@pytest.mark.parametrize("cfg", broad_after(1, slow_after(2, VARIANTS)), ids=lambda cfg: type(cfg).__name__)
@pytest.mark.parametrize("name", broad_after(2, PROGRAMS))
def test_a_program_computes_what_the_model_computes(cfg: llfx.Variant, name: Program) -> None:
    gm = run_as(adapted(cfg, blocks=PAIR), Execution(checkpoint_layers=name == "checkpointed"))
    program = llfx.program(gm, name)
    gm.train(program.training)
    for args in (X, (ids(3, 7),)):
        if name == "inference":
            with torch.no_grad(), llfx.frozen(gm):
                close(output(program, args), output(gm, args), 1e-9, "output")
            continue
        torch.manual_seed(0)
        y, ours = gradients(program, args)
        torch.manual_seed(0)
        expected_y, expected = gradients(gm, args)
        close(y, expected_y, 1e-9, "output")
        close_gradients(ours, expected)
        torch.manual_seed(0)
        close(fx.Interpreter(program).run(*args), expected_y, 1e-9, "output of an interpreter")


def test_it_shows_the_optimized_graph_with_kept_values_before_its_inputs() -> None:
    gm = adapted(llfx.DoRA(r=2, target_names=(".",)), blocks=PAIR).eval()
    program = llfx.program(gm)
    norms = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linalg_vector_norm.default)
    first = next(node for node in program.graph.nodes if node.op == "placeholder")
    assert norms
    assert all(node < first for node in norms)
    assert torch.ops.aten.linalg_vector_norm.default not in in_calls(program)
    text = str(gm.graph)
    assert str(llfx.program(gm, "plain").graph) == text
    assert str(gm.graph) == text
    assert [each.name for each in program.meta["report"].passes] == [
        each.name for each in OPTIMIZATIONS.of("inference")
    ]
    assert str(program.meta["report"]).startswith("passes of the inference program\n  leave_out_mask")


def test_it_has_the_parameters_and_nothing_else_of_the_model() -> None:
    gm = adapted(llfx.DoRA(r=2, target_names=(".",)), blocks=PAIR).train()
    program = llfx.program(gm)
    parameters = dict(gm.named_parameters())
    assert len(list(program.parameters())) == len(parameters)
    assert all(parameters[name] is parameter for name, parameter in program.named_parameters())
    assert gm.training
    assert not program.training
    before = output(gm, X)
    product = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    with program.graph.inserting_after(product):
        negated = program.graph.call_function(torch.neg, (product,))
    product.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
    program.recompile()
    assert not torch.allclose(output(program, X), before)
    assert torch.equal(output(gm, X), before)


def test_it_is_read_stepped_through_and_copied() -> None:
    gm = adapted(llfx.LoRA(r=2, target_names=(".",)), blocks=PAIR).eval()
    program = llfx.program(gm)
    assert "blocks_1_down_lora_A = " in program.code
    readable = program.print_readable(print_output=False)
    assert re.search(r'blocks_1_down_lora_A: "f64\[2, \d+\]" = ', readable)
    assert re.search(r"File: .*/variants/lora.py:\d+ in forward, code: ", readable)
    code = vars(type(program))["forward"].__wrapped__.__code__
    assert linecache.getline(code.co_filename, code.co_firstlineno).startswith("def forward(self, ids)")
    twin = copy.deepcopy(program)
    assert torch.equal(output(twin, X), output(program, X))
    assert str(twin.meta["report"]) == str(program.meta["report"])


def test_it_is_drawn() -> None:
    pytest.importorskip("pydot")
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    program = llfx.program(adapted(llfx.LoRA(r=2, target_names=(".",)), blocks=PAIR))
    assert "blocks_1_down_lora_A" in FxGraphDrawer(program, "program").get_dot_graph().to_string()


def test_a_call_that_leaves_arguments_out_has_a_program_of_its_own() -> None:
    gm: Any = llfx.rewrite(Masked(), llfx.LoRA(r=2, target_names=("fc",)), dict(INPUTS)).eval()
    randomise(gm, 1)
    without: tuple[str, ...]
    for without in ((), ("labels",), ("labels", "mask"), ("mask",)):
        call = {name: value for name, value in INPUTS.items() if name not in without}
        program: Any = llfx.program(gm, "training", without=without)
        expected = gm(**call)
        interpreted = fx.Interpreter(program).run(*(call.get(name) for name in ("x", "mask", "labels")))
        for result in (program(**call), interpreted):
            assert result.keys() == expected.keys()
            for name, value in result.items():
                close(value, expected[name], 1e-6, name)
    with pytest.raises(llfx.CallError) as caught:
        program(INPUTS["x"])
    assert str(caught.value) == (
        "This program is that of calls without mask, and this call leaves out mask, labels. The way out:"
        " llfx.program(graph, ..., without=('mask', 'labels'))."
    )
    with pytest.raises(llfx.CallError) as caught:
        llfx.program(gm)(INPUTS["x"])
    assert str(caught.value) == (
        "This program is that of calls with all arguments, and this call leaves out mask, labels. The way out:"
        " llfx.program(graph, ..., without=('mask', 'labels'))."
    )
    with pytest.raises(llfx.CallError) as caught:
        llfx.program(gm, without="label")
    assert str(caught.value) == (
        "label is not an argument that this graph has. The graph of Masked was captured for calls with x, mask, labels."
    )


@pytest.mark.slow
def test_an_adapted_model_shows_the_graph_of_its_first_call() -> None:
    model: Any = llfx.adapt(llama()[0], LOW_RANK["LoRA"]).eval()
    randomise(model, 1)
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B = nn.Parameter(2 * layer.lora_B.detach())
    program = llfx.program(model)
    assert program.get_parameter("model.layers.0.self_attn.q_proj.lora_B") is layer.lora_B
    expected = model(**tokens(2, 5)).logits
    (graph,) = model._graphs._graphs
    leaves = model._graphs._call(model, tokens(2, 5)).leaves
    assert graph.gm is model.adapted_graph()
    close(program(**leaves)["result_logits"], expected, 1e-9, "logits")


class Normed(nn.Module):
    """Modules that behave differently in training, which symbolic tracing leaves as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(self.fc(x)))
        return y


def test_modules_of_a_symbolic_graph_keep_their_mode_and_share_their_tensors() -> None:
    gm = llfx.rewrite(Normed(), llfx.LoRA(r=2, target_names=("fc",))).train()
    randomise(gm, 1)
    assert gm.graph.find_nodes(op="call_module")
    gm.get_submodule("norm").weight.requires_grad_(True)
    program = llfx.program(gm)
    assert all(module.training for module in gm.modules())
    assert not any(module.training for module in program.modules())
    assert program.get_parameter("norm.weight") is gm.get_parameter("norm.weight")
    assert program.get_buffer("norm.running_mean") is gm.get_buffer("norm.running_mean")
    x = torch.randn(3, 4)
    with torch.no_grad(), llfx.frozen(gm.eval()):
        torch.testing.assert_close(program(x), gm(x))


def test_a_loaded_graph_and_the_graph_of_an_adapted_model_have_programs(tmp_path: Path) -> None:
    gm = adapted(llfx.LoRA(r=2, target_names=(".",)), blocks=(Attention, GatedMLP)).eval()
    llfx.save(gm, tmp_path / "adapter.safetensors")
    loaded = llfx.load(llfx.remove(gm), tmp_path / "adapter.safetensors").eval()
    with torch.no_grad():
        close(output(llfx.program(loaded), X), output(gm, X), 1e-9, "output")


WRAPPED = llfx.wrap(nn.Sequential(nn.Linear(2, 2)), llfx.LoRA(r=1, target_names=("0",)))
MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    (
        nn.Linear(2, 2),
        {},
        "program shows what a graph runs that rewrite, load, capture or adapt returned, not a Linear. The way out:"
        " program(capture(model)), or program(rewrite(model, LoRA(r=8))).",
    ),
    (
        WRAPPED,
        {},
        "program shows what a graph runs that rewrite, load, capture or adapt returned, not a Sequential. What wrap"
        " returns runs its modules as they are. The way out: rewrite in place of wrap.",
    ),
    (
        fx.symbolic_trace(nn.Linear(2, 2)),
        {},
        "program shows what a graph runs that rewrite, load, capture or adapt returned, not a Linear. The way out:"
        " program(optimize(graph)).",
    ),
    (
        llfx.capture(nn.Linear(2, 2)),
        {"name": "infer"},
        "There is no program 'infer'; the programs are plain, training, checkpointed, inference, exported.",
    ),
    (
        llfx.capture(nn.Linear(2, 2)),
        {"without": ("labels",)},
        "This graph takes all its inputs in every call; without=('labels',) leaves some out.",
    ),
]


@pytest.mark.parametrize(
    ("model", "options", "message"), MISTAKES, ids=["model", "wrapped", "graph", "name", "without"]
)
def test_mistakes(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(llfx.AdapterError) as caught:
        llfx.program(model, **options)
    assert str(caught.value) == message
