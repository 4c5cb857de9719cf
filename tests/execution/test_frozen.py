"""Check `frozen`: parameter work runs in every call outside the scope, and once inside it; writes inside are errors."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, output, randomise
from tests.support.models import ids, tiny_llama
from tests.support.programs import PLAIN, Count, X, counted, pair
from tests.support.selection import broad_after, slow_after

PARAMETER_WORK = [
    (llfx.DoRA, "linalg_vector_norm"),
    (llfx.HRA, "linalg_solve_triangular"),
    (llfx.OFT, "index_copy"),
]


def decode(gm: nn.Module, lengths: Any = range(1, 5)) -> None:
    with torch.no_grad():
        for length in lengths:
            output(gm, (ids(1, length),))


@pytest.mark.parametrize(("cls", "work"), broad_after(1, PARAMETER_WORK, several=True))
def test_every_call_outside_the_scope_does_its_parameter_work(cls: type[llfx.Variant], work: str) -> None:
    gm = pair(cls)[0].eval()
    once = counted(lambda: decode(gm, [1]))[work]
    assert once > 0
    assert counted(lambda: decode(gm))[work] == 4 * once
    assert counted(lambda: output(gm.train(), X))[work] == counted(lambda: output(gm, X))[work] == once


@pytest.mark.parametrize(("cls", "work"), PARAMETER_WORK)
def test_calls_inside_the_scope_do_it_once(cls: type[llfx.Variant], work: str) -> None:
    gm, plain = pair(cls)
    gm.eval(), plain.eval()
    once = counted(lambda: decode(gm, [1]))[work]

    def scope() -> None:
        with llfx.frozen(gm):
            decode(gm)
            with llfx.frozen(gm):
                decode(gm)
            decode(gm)

    for seed in range(2):
        randomise(gm, seed)
        assert counted(scope)[work] == once
        with llfx.frozen(gm), torch.no_grad():
            for shape in ((1, 3), (3, 7)):
                close(output(gm, (ids(*shape),)), output(plain, (ids(*shape),)), 1e-9, "output")
    assert counted(lambda: decode(gm))[work] == 4 * once
    with torch.no_grad():
        close(output(gm, X), output(plain, X), 1e-9, "output after the scope")


@pytest.mark.parametrize("cls", [llfx.LoRA, llfx.DoRA])
def test_calls_inside_the_scope_with_gradients_or_in_training_keep_nothing(cls: type[llfx.Variant]) -> None:
    gm, plain = pair(cls)
    gm.eval(), plain.eval()
    with llfx.frozen(gm):
        decode(gm)
        for model in (gm, plain):
            output(model, X).square().mean().backward()
        gradients = [p.grad for p in llfx.adapter_parameters(gm)]
        assert all(grad is not None for grad in gradients)
        with torch.no_grad():
            close(output(gm.train(), X), output(plain.train(), X), 1e-9, "output in training mode")
            close(output(gm.eval(), X), output(plain.eval(), X), 1e-9, "output")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                close(output(gm, X), output(plain, X), 0.05, "output under autocast")


def in_place(gm: nn.Module) -> None:
    with torch.no_grad():
        llfx.adapter_parameters(gm)[0].mul_(0.9)


def the_frozen_weight(gm: nn.Module) -> None:
    with torch.no_grad():
        next(p for p in gm.parameters() if not p.requires_grad).mul_(0.9)


def load(gm: nn.Module) -> None:
    llfx.load_adapter_state_dict(gm, {name: tensor * 0.9 for name, tensor in llfx.adapter_state_dict(gm).items()})


def in_scope(gm: nn.Module, *actions: Callable[[nn.Module], Any]) -> None:
    with llfx.frozen(gm):
        for action in actions:
            action(gm)


WRITES = [in_place, the_frozen_weight, load]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_call_after_a_write_inside_the_scope_is_an_error(write: Callable[[nn.Module], None]) -> None:
    gm, plain = pair(llfx.DoRA)
    gm.eval(), plain.eval()
    with pytest.raises(llfx.AdapterError, match=r"inside llfx\.frozen"):
        in_scope(gm, decode, write, decode)
    with torch.no_grad():
        close(output(gm, X), output(plain, X), 1e-9, "output after the scope")


def replaced(gm: nn.Module) -> None:
    name = next(name for name, p in gm.named_parameters() if p.requires_grad)
    path, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(path), leaf, nn.Parameter(gm.get_parameter(name).detach() * 0.9))


def assigned(gm: nn.Module) -> None:
    parameters = llfx.adapter_parameters(gm)
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(vector * 0.9, parameters)  # which counts no versions


@pytest.mark.parametrize("write", [*WRITES, replaced, assigned], ids=lambda write: write.__name__)
def test_the_end_of_the_scope_notices_a_write(write: Callable[[nn.Module], None]) -> None:
    gm = pair(llfx.DoRA)[0].eval()
    with pytest.raises(llfx.AdapterError, match=r"inside llfx\.frozen"):
        in_scope(gm, decode, write)


def test_a_step_of_an_optimizer_and_load_state_dict_are_errors_at_once() -> None:
    gm = pair(llfx.DoRA)[0].eval()
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=0.1)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    before = copy.deepcopy(llfx.adapter_state_dict(gm))
    with llfx.frozen(gm):
        output(gm, X).sum().backward()
        other.step()
        with pytest.raises(llfx.AdapterError, match=r"SGD.step\(\) was called .* inside llfx\.frozen"):
            optimizer.step()
        with pytest.raises(llfx.AdapterError, match=r"load_state_dict was called inside llfx\.frozen"):
            gm.load_state_dict(gm.state_dict())
    for name, tensor in llfx.adapter_state_dict(gm).items():
        assert torch.equal(tensor, before[name])
    optimizer.step()
    gm.load_state_dict(gm.state_dict())


def test_moving_the_model_inside_the_scope_is_an_error() -> None:
    gm = pair(llfx.DoRA)[0].eval()
    with llfx.frozen(gm):
        decode(gm)
        with pytest.raises(llfx.AdapterError, match=r"inside llfx\.frozen"):
            gm.to(torch.float32)
        decode(gm)


def test_an_error_inside_the_scope_ends_it() -> None:
    gm, plain = pair(llfx.HRA)
    gm.eval(), plain.eval()
    with pytest.raises(ZeroDivisionError):
        in_scope(gm, decode, lambda _: 1 / 0)
    randomise(gm, 5)
    with torch.no_grad():
        close(output(gm, X), output(plain, X), 1e-9, "output after the scope")


def test_a_copy_made_inside_the_scope_is_outside_of_it() -> None:
    gm = pair(llfx.HRA)[0].eval()
    with llfx.frozen(gm):
        decode(gm)
        twin = copy.deepcopy(gm)
        randomise(twin, 5)
        with torch.no_grad():
            close(output(twin, X), output(llfx.optimize(twin, PLAIN), X), 1e-9, "output of the copy")


def test_scopes_of_several_threads_are_one() -> None:
    gm, plain = pair(llfx.HRA)
    gm.eval(), plain.eval()
    with torch.no_grad():
        expected = output(plain, X)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(10):
                with torch.no_grad(), llfx.frozen(gm):
                    close(output(gm, X), expected, 1e-9, "output")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not gm.keeps_values


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "LoRA"], ids=["without adapters", "a string"])
def test_other_objects_are_refused(model: Any) -> None:
    with pytest.raises(llfx.AdapterError, match="frozen takes a model with adapters"), llfx.frozen(model):
        pass


# Adapted models.


@functools.cache
def chat(cfg: llfx.Variant) -> Any:
    torch.manual_seed(0)
    model = llfx.adapt(transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=1, vocab_size=40)), cfg)
    randomise(model, 1)
    return model.eval()


@pytest.mark.broad
@pytest.mark.parametrize(("cls", "work"), broad_after(1, PARAMETER_WORK[:2], several=True))
def test_generate_opens_the_scope_itself(cls: Any, work: str) -> None:
    model = chat(cls(r=2))
    prompt = ids(2, 5)

    def generate() -> None:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
        )

    with Count() as alone, torch.no_grad():
        model(prompt)
    generate()
    once = alone.calls[work]
    assert once > 0
    assert counted(generate)[work] == once
    with llfx.frozen(model):
        generate()
        assert counted(generate)[work] == 0
    assert counted(generate)[work] == once


@pytest.mark.broad
def test_generate_sees_what_changed_since_the_last_one() -> None:
    model = chat(llfx.DoRA(r=2))
    prompt = ids(2, 5)
    kwargs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for seed in range(3):
        randomise(model, seed)
        expected = llfx.merge(model).generate(prompt, **kwargs)
        assert torch.equal(model.generate(prompt, **kwargs), expected)


# Compiled.


@pytest.mark.broad
@pytest.mark.parametrize(("cls", "work"), slow_after(1, PARAMETER_WORK, several=True))
def test_compiled_calls_inside_the_scope_do_no_parameter_work(cls: type[llfx.Variant], work: str) -> None:
    gm, plain = pair(cls)
    gm.eval(), plain.eval()
    targets: list[list[Any]] = []

    def count(graph: fx.GraphModule, inputs: Any) -> Any:
        targets.append([str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(gm, backend=count, fullgraph=True, dynamic=True)
    for seed in (1, 2):
        randomise(gm, seed)
        with llfx.frozen(gm), torch.no_grad():
            for shape in ((3, 5), (4, 7)):
                close(output(compiled, (ids(*shape),)), output(plain, (ids(*shape),)), 1e-9, "output")
    assert len(targets) == 1
    assert not [target for target in targets[0] if work in target]
    randomise(gm, 3)
    with torch.no_grad():
        args = (ids(3, 6),)
        close(output(compiled, args), output(plain, args), 1e-9, "output outside the scope")
    torch.compiler.reset()
