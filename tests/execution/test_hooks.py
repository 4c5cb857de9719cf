"""Check that hooks act on the model, its layers, and modules outside of layers; and that others are warned of."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.llama_by_front_end import FRONT_ENDS, front_ends, llama, logits, made
from tests.support.selection import broad_after


@pytest.mark.broad
@front_ends
def test_hooks_on_layers_see_what_the_layers_of_the_wrapper_return(front_end: str) -> None:
    model, wrapper = made(front_end, llfx.DoRA(r=2))
    seen: dict[Any, list[Tensor]] = {model: [], wrapper: []}
    for each, outputs in seen.items():
        for layer in each.model.layers:
            layer.register_forward_hook(
                lambda module, args, output, outputs=outputs: outputs.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            layer.register_forward_pre_hook(lambda module, args, outputs=outputs: outputs.append(args[0]))
        logits(each)
        with torch.no_grad():
            logits(each)
    assert len(seen[model]) == len(seen[wrapper]) == 12
    for ours, expected in zip(seen[model], seen[wrapper], strict=True):
        close(ours, expected, 1e-9, "hidden states")


@front_ends
def test_a_hook_that_changes_an_output_acts(front_end: str) -> None:
    model, wrapper = made(front_end, llfx.DoRA(r=2))
    before = logits(model).detach()
    for place in ("model.layers.1", "model.embed_tokens", "model.norm", "lm_head"):
        check_steering(model, wrapper, place, before)


def check_steering(model: Any, wrapper: Any, place: str, before: Tensor) -> None:
    handles = []
    for each in (model, wrapper):

        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

        handles.append(each.get_submodule(place).register_forward_hook(steer))
    with torch.no_grad():
        close(logits(model), logits(wrapper), 1e-9, "logits without gradients")
    ours, expected = logits(model), logits(wrapper)
    assert not torch.allclose(ours, before)
    close(ours, expected, 1e-9, "logits")
    gradients = [
        torch.autograd.grad(y.square().sum(), llfx.adapter_parameters(m))
        for y, m in ((ours, model), (expected, wrapper))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs, 1e-9, "gradient")
    for handle in handles:
        handle.remove()
    close(logits(model), before, 1e-12, "logits after the hook was taken away")


@pytest.mark.broad
@front_ends
def test_a_hook_that_changes_an_input_acts(front_end: str) -> None:
    """Hooks do not get what a layer gets besides: values that `frozen` keeps, and coefficients of adapters."""
    model, wrapper = made(front_end, llfx.DoRA(r=2))
    before = logits(model).detach()
    for each in (model, wrapper):
        each.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    close(logits(model), logits(wrapper), 1e-9, "logits")
    with torch.no_grad():
        expected = logits(wrapper)
        assert not torch.allclose(expected, before)
        close(logits(model), expected, 1e-9, "logits without gradients")
        with llfx.frozen(model):
            close(logits(model), expected, 1e-9, "logits in frozen")
    with llfx.scaled(model, 0.5), llfx.scaled(wrapper, 0.5):
        close(logits(model), logits(wrapper), 1e-9, "logits of a scaled adapter")
        with torch.no_grad(), llfx.frozen(model):
            close(logits(model), logits(wrapper), 1e-9, "logits of a scaled adapter in frozen")


@front_ends
def test_a_hook_with_keyword_arguments_acts_and_must_hand_them_on(front_end: str) -> None:
    model, wrapper = made(front_end, llfx.LoRA(r=2))
    handles = []
    for each in (model, wrapper):
        hook = each.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: ((1.5 * args[0], *args[1:]), kwargs), with_kwargs=True
        )
        handles.append(hook)
    with pytest.warns(UserWarning, match=r"'model\.layers\.1' takes keyword arguments, and does not get") as found:
        ours = logits(model)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
    close(ours, logits(wrapper), 1e-9, "logits")
    handles[0].remove()
    model.model.layers[1].register_forward_pre_hook(lambda module, args, kwargs: (args, {}), with_kwargs=True)
    for scope in (contextlib.nullcontext(), torch.no_grad()):
        with scope, pytest.raises(llfx.AdapterError, match=r"A hook on 'model\.layers\.1' took keyword arguments away"):
            logits(model)


@front_ends
def test_backward_hooks_on_layers_fire(front_end: str) -> None:
    model, _ = made(front_end, llfx.LoRA(r=2))
    fired: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda module, into, out, index=index: fired.append(index))
    logits(model).sum().backward()
    assert fired == [2, 1, 0]


@pytest.mark.broad
def test_noise_on_embeddings_acts_in_training() -> None:
    """NEFTune, as transformers' Trainer puts it on: a forward hook on the embedding that looks at its mode."""
    model, _ = made("adapt", llfx.LoRA(r=2))

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + torch.ones_like(output) if module.training else output

    before = logits(model).detach()
    model.get_input_embeddings().register_forward_hook(noise)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model.train()), before)


@front_ends
def test_a_hook_that_cannot_act_is_warned_of_once(front_end: str) -> None:
    model, _ = made(front_end, llfx.LoRA(r=2))
    before = logits(model).detach()

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        raise AssertionError("it acts after all")

    model.model.layers[1].self_attn.register_forward_hook(double)
    with pytest.warns(UserWarning, match="does not act") as found:
        logits(model)
    (warning,) = found
    assert str(warning.message) == (
        "A hook on 'model.layers.1.self_attn' does not act: test_a_hook_that_cannot_act_is_warned_of_once.<locals>."
        "double. The graph does not run that module as a module of its own. Hooks act on the model, on its layers, and"
        " on modules outside of layers that run once, as the embedding and the head."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model), before)


class DoublesInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


class ReturnsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.lin = DoublesInTraining(), nn.Linear(3, 3)
        self.layers = nn.ModuleList([DoublesInTraining()])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers[0](self.lin(self.part(x)))
        return result


@pytest.mark.parametrize("path", ["part", "layers.0"])
def test_a_hook_on_a_module_that_returns_its_input_in_evaluation_acts_in_training_and_warns(path: str) -> None:
    gm: Any = llfx.rewrite(ReturnsItsInput(), llfx.LoRA(r=2, target_names="lin"), (torch.randn(2, 3),))
    seen: list[bool] = []
    gm.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(module.training))
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match=f"A hook on '{path}' does not act in evaluation mode"):
        gm.eval()(x)
    assert seen == []
    gm.train()(x)
    assert seen == [True]


class Inner(nn.Module):
    """A module outside of layers, whose last computation alone is outside of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.tanh()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = Inner(), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.inner(x)))
        return result


@pytest.mark.broad
@pytest.mark.parametrize(
    ("model", "name"),
    [(Around, "norm"), (Around, "inner"), (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)), "0")],
    ids=["norm", "around layers", "norm as layer"],
)
def test_a_hook_on_a_module_that_runs_in_parts_is_warned_of(model: Any, name: str) -> None:
    x = torch.randn(3, 6)
    gm = llfx.rewrite(model().eval(), llfx.LoRA(r=2, target_names=(".",)), (x,))
    before = gm(x)
    gm.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match=f"A hook on '{name}' does not act"):
        assert torch.equal(gm(x), before)


class InAPart(nn.Module):
    """A net of a part that has a part, both outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = nn.Sequential()
        self.part.lin, self.part.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.part(x)
        return result


captures = pytest.mark.parametrize("exported", broad_after(1, [True, False]), ids=["exported", "traced"])


@captures
def test_a_hook_inside_a_module_with_a_hook_is_warned_of_and_acts_when_that_is_gone(exported: bool) -> None:
    x = torch.randn(3, 6)
    model: Any = InAPart()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (x,) if exported else None)
    gm.get_submodule("part.lin").register_forward_hook(lambda module, args, output: output * 2)
    with_inner, with_outer = x + (2 * model.part.lin(x)).tanh(), x + 3 * model.part(x)
    torch.testing.assert_close(gm(x), with_inner)
    outer = gm.get_submodule("part").register_forward_hook(lambda module, args, output: output * 3)
    with pytest.warns(UserWarning, match="A hook on 'part.lin' does not act.*a part of another one.*: 'part'") as found:
        torch.testing.assert_close(gm(x), with_outer)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gm(x), with_outer)
        outer.remove()
        torch.testing.assert_close(gm(x), with_inner)


@pytest.mark.parametrize("exported", [True, False], ids=["exported", "traced"])
def test_a_hook_on_a_module_outside_layers_does_not_see_the_coefficient_of_an_adapter(exported: bool) -> None:
    x = torch.randn(3, 6)
    gm = llfx.rewrite(InAPart(), llfx.LoRA(r=2, target_names=(".",)), (x,) if exported else None)
    seen: list[int] = []
    gm.get_submodule("part").register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    with llfx.scaled(gm, {"default": 0.5}):
        gm(x)
    assert seen == [1]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_an_input_is_not_recomputed_without_the_hook_that_changed_it(dropout: float) -> None:
    base, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6)), torch.randn(3, 6)
    cfg = llfx.LoRA(r=2, target_names=(".",), target_kinds="linear", dropout=dropout)
    gm, wrapper = llfx.rewrite(base, cfg, (x,)).train(), llfx.wrap(base, cfg, (x,)).train()
    randomise(gm, 1)
    llfx.load_adapter_state_dict(wrapper, llfx.adapter_state_dict(gm))
    gradients = []
    for each in (gm, wrapper):
        each.get_submodule("2").register_forward_hook(lambda module, args, output: output * 1.5)
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(each(x).square().sum(), llfx.adapter_parameters(each)))
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected, 1e-5, "gradient")


class Siblings(nn.Module):
    """Three linears outside of layers that read one input, as queries, keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.one(x) * self.two(x) + self.three(x)
        return result


def add_hook(module: nn.Module, kind: str) -> None:
    if kind == "output":
        module.register_forward_hook(lambda module, args, output: 1.5 * output + 1)
    else:
        module.register_forward_pre_hook(lambda module, args: (1.5 * args[0] + 1, *args[1:]))


@pytest.mark.parametrize("kind", ["output", "input"])
@pytest.mark.parametrize("name", broad_after(1, ["two", "one"]))
@pytest.mark.parametrize(
    ("bank", "exported"), [(False, True), (False, False), (True, True)], ids=["exported", "traced", "bank"]
)
def test_a_hook_on_one_of_siblings_sees_what_that_one_has_alone(
    name: str, kind: str, bank: bool, exported: bool
) -> None:
    base, x = Siblings().double(), torch.randn(3, 4, 6, dtype=torch.float64)
    lora = llfx.LoRA(r=2, target_names=(".",))
    cfg = llfx.Bank(lora, 3) if bank else lora
    gm, wrapper = llfx.rewrite(base, cfg, (x,) if exported else None), llfx.wrap(base, cfg, (x,))
    randomise(gm, 1)
    llfx.load_adapter_state_dict(wrapper, llfx.adapter_state_dict(gm))
    for each in (gm, wrapper):
        add_hook(each.get_submodule(name), kind)
    rows = {"adapter_ids": torch.tensor([2, 0, 1])} if bank else {}
    for grad, scope in ((True, contextlib.nullcontext), (False, contextlib.nullcontext), (False, llfx.frozen)):
        with torch.set_grad_enabled(grad), llfx.by_row(wrapper, *rows.values()) if bank else contextlib.nullcontext():
            expected = wrapper(x)
        with torch.set_grad_enabled(grad), scope(gm):
            close(gm(x, **rows), expected, 1e-9, "output")


def test_a_hook_that_computes_a_weight_of_a_graph_is_warned_of() -> None:
    model, _ = made("rewrite", llfx.LoRA(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.warns(UserWarning, match=r"A hook on 'model.layers.1.mlp.up_proj' does not act: WeightNorm"):
        logits(model)


@pytest.mark.parametrize("part", ["weight", "weight.0"])
def test_a_hook_and_a_forward_on_what_computes_a_weight_are_warned_of(part: str) -> None:
    model = InAPart()
    nn.utils.parametrizations.weight_norm(model.part.lin)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (torch.randn(3, 6),))
    module = gm.get_submodule(f"part.lin.parametrizations.{part}")
    module.forward = functools.partial(module.forward)
    with pytest.warns(
        UserWarning, match=f"forward was replaced on 'part.lin.parametrizations.{part}', and does not act"
    ):
        gm(torch.randn(3, 6))
    module.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match=f"A hook on 'part.lin.parametrizations.{part}' does not act"):
        gm(torch.randn(3, 6))


# Hooks that stand on the model when it is captured.


def counting(fired: list[str], name: str) -> Any:
    return lambda module, args, output: fired.append(name)


@pytest.mark.broad
def test_a_hook_on_the_captured_model_is_traced_with_a_warning() -> None:
    base = llama(2)
    base.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.warns(UserWarning, match=r"A hook on 'model.layers.1' was traced: .*<lambda>\. What it computes"):
        gm = llfx.rewrite(base, llfx.LoRA(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = llfx.wrap(base, llfx.LoRA(r=2))
    randomise(gm, 1)
    llfx.load_adapter_state_dict(wrapper, llfx.adapter_state_dict(gm))
    close(logits(gm), logits(wrapper), 1e-9, "logits")


@pytest.mark.broad
def test_a_backward_hook_on_the_captured_model_is_warned_of() -> None:
    base = llama(1)
    base.model.layers[0].register_full_backward_pre_hook(lambda module, grad: None)
    with pytest.warns(UserWarning, match=r"A backward hook on 'model.layers.0' does not act in the graph"):
        llfx.rewrite(base, llfx.LoRA(r=2))


@pytest.mark.broad
def test_hooks_on_the_adapted_model_are_those_of_the_user_and_fire_once() -> None:
    base = llama(2)
    fired: list[str] = []
    base.model.layers[1].register_forward_hook(counting(fired, "layer"))
    base.model.layers[1].mlp.register_forward_hook(counting(fired, "mlp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = llfx.adapt(base, llfx.LoRA(r=2))
    fired.clear()  # default inputs were made by a run of the model
    with pytest.warns(UserWarning, match=r"A hook on 'model.layers.1.mlp' does not act"):
        logits(model)
    assert fired == ["layer"]


@pytest.mark.broad
def test_weights_that_hooks_compute_are_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(3, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=("2",)), (x,))
    assert not [warning for warning in caught if "hook" in str(warning.message)]
    close(gm(x), model(x), 1e-6, "output")


def test_hooks_of_accelerate_are_refused() -> None:
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    base = llama(1)
    accelerate_hooks.add_hook_to_module(base.model.layers[0], accelerate_hooks.AlignDevicesHook())
    for front_end in FRONT_ENDS.values():
        with pytest.raises(
            llfx.CaptureError, match=r"A hook of accelerate stands on 'model.layers.0' \(AlignDevicesHook\)"
        ):
            front_end(base, llfx.LoRA(r=2))
