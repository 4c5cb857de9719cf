"""Check the optimizing passes: equal outputs and gradients from less work, and an unchanged graph."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

import lora_lite_fx as llfx
from lora_lite_fx.execution.adapted_graph_module import AdaptedGraphModule
from lora_lite_fx.execution.execution import Execution
from lora_lite_fx.execution.optimize import run_as
from lora_lite_fx.passes import OPTIMIZATIONS
from tests.support.conformance import (
    check_merge,
    check_remove,
    close,
    configs,
    gradients,
    innermost_first,
    output,
    randomise,
    representatives,
    small,
)
from tests.support.models import Attention, GatedMLP, ids
from tests.support.programs import MIXED, PAIR, PLAIN, X, adapted, base, counted, derived, edits, in_calls, pair
from tests.support.selection import broad_after, slow_after

aten = torch.ops.aten
NAMES = [graph_pass.name for graph_pass in OPTIMIZATIONS]
VARIANTS = list(representatives().values())


QUICKLY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def assert_computes_the_same(gm: fx.GraphModule, plain: fx.GraphModule, tolerance: float) -> None:
    """Compare outputs with and without gradients, and gradients, for two sets of parameters and two shapes."""
    for training, seed in ((True, 1), (False, 2)):
        randomise(gm, seed)
        gm.train(training), plain.train(training)
        for shape in ((2, 5), (3, 7)):
            with torch.no_grad():
                close(output(gm, (ids(*shape),)), output(plain, (ids(*shape),)), tolerance, "output without gradients")
            y, grads = gradients(gm, (ids(*shape),))
            grads = {name: grad.clone() for name, grad in grads.items()}
            expected_y, expected = gradients(plain, (ids(*shape),))
            close(y, expected_y, tolerance, "output")
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                close(grad, expected[name], tolerance, f"gradient of {name}")


# The same outputs and gradients.


@pytest.mark.broad
@pytest.mark.parametrize("cls", slow_after(1, VARIANTS), ids=lambda cls: cls.__name__)
@settings(QUICKLY, max_examples=1)
@given(data=st.data())
def test_every_variant_computes_the_same(cls: type[llfx.Variant], data: st.DataObject) -> None:
    check_any(data, [data.draw(configs(cls, target_names=(".",), exclude_names=("head",)))], PAIR)


@pytest.mark.broad
@settings(QUICKLY, max_examples=2)
@given(data=st.data())
def test_stacks_of_variants_compute_the_same(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.sampled_from(VARIANTS), min_size=2, max_size=3))
    check_any(data, [data.draw(configs(cls, target_names=(".",))) for cls in innermost_first(drawn)], MIXED)


def check_any(data: st.DataObject, cfg: list[llfx.Variant], blocks: tuple[type[nn.Module], ...]) -> None:
    exported, checkpoint_layers = data.draw(st.booleans()), data.draw(st.booleans())
    passes = OPTIMIZATIONS.without(*data.draw(st.sets(st.sampled_from(NAMES), max_size=len(NAMES) - 1)))
    original = adapted(cfg, exported=exported, blocks=blocks)
    text = str(original.graph)
    gm = run_as(original, Execution(passes, checkpoint_layers))
    assert_computes_the_same(gm, llfx.optimize(original, PLAIN), 1e-9)
    assert str(gm.graph) == text
    assert set(edits(derived(gm, passes), passes).values()) == {0}, "a second run finds something to do"
    check_remove(gm, *base(exported=exported, blocks=blocks)[:0:-1])


@pytest.mark.parametrize("name", broad_after(1, ["LoRA", "DoRA", "HRA", "OFT"]))
def test_merging_and_removing_restore_the_base_graph(name: str) -> None:
    _, model, graph = base(blocks=PAIR)
    gm = adapted(small(llfx.registry()[name], target_names=(".",)), blocks=PAIR)
    check_merge(gm, graph, (ids(3, 4),), 1e-9)
    check_remove(gm, graph, model)


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(1, ["LoRA", "DoRA", "DeLoRA", "HRA"]))
def test_passes_do_not_increase_errors_in_half_precision(name: str) -> None:
    cfg = small(llfx.registry()[name], alpha=6.0, target_names=(".",), dtype=torch.bfloat16)
    _, model, graph = base(dtype=torch.bfloat16, blocks=(GatedMLP, Attention))
    gm = llfx.rewrite(graph, cfg)
    exact = llfx.wrap(copy.deepcopy(model).double(), dataclasses.replace(cfg, dtype=None))
    squares: dict[str, list[Tensor]] = {"plain": [], "optimized": []}
    for seed in range(24):
        randomise(gm, seed)
        llfx.load_adapter_state_dict(exact, {n: t.double() for n, t in llfx.adapter_state_dict(gm).items()})
        args = (ids(4, 9, seed=seed),)
        with torch.no_grad():
            for kind, run in (("plain", llfx.optimize(gm, PLAIN)), ("optimized", gm)):
                squares[kind].append((output(run, args).double() - output(exact, args)).square().mean())
    plain, optimized = (torch.stack(values).mean().sqrt().item() for values in squares.values())
    assert 0 < optimized <= 1.05 * plain


# Less work.


PER_CALL = {
    # Expect four products with A (one for q, k, v, one for gate and up, one for out, one for down), seven with B.
    "LoRA": {aten.linear.default: 4 + 7, aten.mul.Tensor: 0, aten.add.Tensor: 7},
    "DoRA": {aten.linear.default: 4 + 7, aten.linalg_vector_norm.default: 0, aten.sqrt.default: 0},
    "DeLoRA": {aten.linear.default: 4 + 7, aten.mul.Tensor: 0, aten.div.Tensor: 0},
    "HRA": {aten.linear.default: 4 + 7, aten.linalg_solve_triangular.default: 0},
    "OFT": {aten.matmul.default: 0, aten.index_copy.default: 0},
    "VeRA": {aten.linear.default: 4 + 7, aten.slice.Tensor: 0},
}


@pytest.mark.parametrize("name", broad_after(2, PER_CALL))
def test_each_call_runs_few_operators(name: str) -> None:
    gm = adapted(small(llfx.registry()[name], size=2, exclude_names=("head",), target_names=(".",)), blocks=PAIR)
    counts = in_calls(derived(gm))
    assert {target: counts[target] for target in PER_CALL[name]} == PER_CALL[name]
    before = in_calls(gm)
    assert all(before[target] >= count for target, count in PER_CALL[name].items())
    assert before != counts


def test_a_copy_is_independent() -> None:
    gm, _ = pair(llfx.HRA)
    with torch.no_grad():
        expected = output(gm, X)
        twin = copy.deepcopy(gm)
        assert torch.equal(output(twin, X), expected)
        randomise(twin, 9)
        assert torch.equal(output(gm, X), expected)
        close(output(twin, X), output(llfx.optimize(twin, PLAIN), X), 1e-9, "output")
    assert in_calls(derived(twin)) == in_calls(derived(gm))


# Passes with autocast, transforms, threads, compilation and export.


@pytest.mark.parametrize("cls", broad_after(1, [llfx.DoRA, llfx.HRA, llfx.LoRA]))
def test_autocast_and_inference_mode_leave_nothing_behind(cls: type[llfx.Variant]) -> None:
    _, _, graph = base(dtype=torch.float32, blocks=PAIR)
    gm = llfx.rewrite(graph, small(cls, target_names=("blocks",)))
    randomise(gm, 1)
    plain = llfx.optimize(gm, PLAIN)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                close(output(gm, X), output(plain, X), 0.02, "output under autocast")
            y, grads = gradients(gm, X)
            grads = {name: grad.clone() for name, grad in grads.items()}
            close(y, (expected := gradients(plain, X))[0], 0.02, "output under autocast")
            assert grads.keys() == expected[1].keys()
        with torch.inference_mode():
            close(output(gm, X), output(plain, X), 1e-5, "output in inference mode")
        y, grads = gradients(gm, X)
        grads = {name: grad.clone() for name, grad in grads.items()}
        for name, grad in gradients(plain, X)[1].items():
            close(grads[name], grad, 1e-4, name)


@pytest.mark.parametrize("cls", broad_after(1, [llfx.DoRA, llfx.HRA, llfx.LoRA]))
def test_functional_calls_and_transforms_compute_the_same(cls: type[llfx.Variant]) -> None:
    gm, plain = pair(cls)
    with torch.no_grad():
        output(gm, X)
    parameters = {
        name: parameter.detach() * 0.9 for name, parameter in gm.named_parameters() if parameter.requires_grad
    }

    def loss(values: dict[str, Tensor], model: nn.Module) -> Any:
        return functional_call(model, values, X).square().mean()

    close(loss(parameters, gm), loss(parameters, plain), 1e-9, "loss")
    ours, expected = (torch.func.grad(loss)(parameters, model) for model in (gm, plain))
    for name in parameters:
        close(ours[name], expected[name], 1e-9, name)
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in parameters.items()}
    with torch.no_grad():
        ours, expected = (torch.func.vmap(functools.partial(loss, model=model))(stacked) for model in (gm, plain))
    close(ours, expected, 1e-9, "losses of two sets of parameters")
    close(output(gm, X), output(plain, X), 1e-9, "output after all this")


@pytest.mark.broad
def test_gradients_of_gradients_are_the_same() -> None:
    gm = adapted(llfx.DoRA(r=2, alpha=2.0, target_names=(".",)), blocks=(GatedMLP,))
    plain = llfx.optimize(gm, PLAIN)
    results = []
    for model in (gm, plain):
        parameters = llfx.adapter_parameters(model)
        first = torch.autograd.grad(output(model, X).square().mean(), parameters, create_graph=True)
        squares = torch.stack([grad.square().sum() for grad in first])
        results.append(torch.autograd.grad(squares.sum(), parameters, allow_unused=True))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, 1e-9, "second gradient")


def test_two_threads_do_not_disturb_each_other() -> None:
    gm, plain = pair(llfx.HRA)

    def generate(length: int) -> Tensor:
        with torch.no_grad():
            return torch.stack([output(gm, (ids(1, length),)).sum() for _ in range(20)])

    with ThreadPoolExecutor(2) as pool:
        for length, ours in zip((3, 6), pool.map(generate, (3, 6)), strict=True):
            close(ours, output(plain, (ids(1, length),)).sum().expand(20), 1e-9, "output")


@pytest.mark.broad
def test_a_compiled_model_is_one_graph_and_sees_changed_values() -> None:
    torch.compiler.reset()
    gm, plain = pair(llfx.DoRA)
    counter = CompileCounter()
    compiled = torch.compile(gm, fullgraph=True, backend=counter, dynamic=True)
    for seed in range(3):
        randomise(gm, seed)
        close(output(compiled, (ids(3, 4 + seed),)), output(plain, (ids(3, 4 + seed),)), 1e-9, "output")
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=0.1)
    output(compiled, X).square().sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    close(output(compiled, X), output(plain, X), 1e-9, "output after a compiled step")
    torch.compiler.reset()
    assert counter.frame_count == 1


@pytest.mark.broad
def test_an_exported_file_holds_the_plain_graph_and_can_be_optimized_again() -> None:
    gm, plain = pair(llfx.DoRA)
    dynamic = ([torch.export.Dim.AUTO] * 2,)
    programs = [torch.export.export(model, X, dynamic_shapes=dynamic) for model in (gm, plain)]
    targets = [[node.target for node in program.graph.nodes] for program in programs]
    assert targets[0] == targets[1]
    file = io.BytesIO()
    torch.export.save(programs[0], file)
    file.seek(0)
    again = llfx.optimize(torch.export.load(file))
    assert in_calls(derived(again)) == in_calls(derived(gm))
    args = (ids(3, 6),)
    with torch.no_grad(), llfx.frozen(again.eval()):
        close(output(again, args), output(plain.eval(), args), 1e-9, "output")
        assert counted(lambda: output(again, args))["linalg_vector_norm"] == 0
    assert str(llfx.remove(gm).graph) == str(base(blocks=PAIR)[2].graph)


def test_rewriting_and_removing_keep_the_choice_of_passes() -> None:
    gm = llfx.optimize(adapted(llfx.LoRA(r=2), blocks=PAIR), OPTIMIZATIONS.without("share_siblings"))
    for made in (llfx.rewrite(gm, llfx.IA3()), copy.deepcopy(gm), llfx.remove(gm)):
        assert isinstance(made, AdaptedGraphModule)
        assert made.execution is not None
        assert [graph_pass.name for graph_pass in made.execution.passes] == [n for n in NAMES if n != "share_siblings"]
    with pytest.raises(ValueError, match="share_sibling"):
        OPTIMIZATIONS.without("share_sibling")
    with pytest.raises(llfx.AdapterError, match="Linear"):
        llfx.optimize(nn.Linear(2, 2))  # type: ignore[arg-type]
