"""Check transforms of `torch.func`, forward-mode AD and `torch.jit.trace` against the eager wrapper, by variant."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import lora_lite_fx as llfx
from tests.support.conformance import calibration, close, randomise, representatives, small
from tests.support.selection import broad_after

WIDTH = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape  # asks for sizes, for which vmap has no rule in the operator of exports
        heads = torch.tanh(self.up(x)).view(batch, length, 2, width // 2).flip(2).reshape(batch, length, width)
        result: Tensor = x + self.down(heads * torch.sigmoid(self.gate(x)))
        return result


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = drawn(3, 5, WIDTH)


@functools.cache
def graph_and_wrapper(variant: str) -> tuple[nn.Module, nn.Module]:
    """Return the rewritten graph and the eager wrapper, with the same random adapters, in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).double()
    cfg: Any = small(llfx.registry()[variant], size=2, target_names=(".",))
    batches = calibration(cfg, (X,), (drawn(4, 5, WIDTH, seed=1),))
    gm = llfx.rewrite(model, cfg, (X,), calibration=batches)
    randomise(gm, 1)
    wrapper = llfx.wrap(model, cfg, (X,), calibration=batches)
    llfx.load_adapter_state_dict(wrapper, llfx.adapter_state_dict(gm))
    return gm.eval(), wrapper.eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    result: Tensor = functional_call(model, parameters, (x,)).square().mean()
    return result


def gradient_of_inputs(model: nn.Module) -> Any:
    return torch.func.grad(lambda x: model(x).square().mean())(X)


def gradient_of_parameters(model: nn.Module) -> Any:
    return torch.func.grad(lambda parameters: loss(model, parameters, X))(trained(model))


def vjp(model: nn.Module) -> Any:
    output, pull_back, *_ = torch.func.vjp(model, X)
    return output, pull_back(torch.ones_like(output))


def jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (X,), (drawn(*X.shape, seed=2),))


def jvp_of_parameters(model: nn.Module) -> Any:
    parameters = trained(model)
    tangents = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
    return torch.func.jvp(lambda values: loss(model, values, X), (parameters,), (tangents,))


def jacrev(model: nn.Module) -> Any:
    return torch.func.jacrev(lambda x: model(x).sum((0, 1)))(X[:1, :2])


def vmap_over_inputs(model: nn.Module) -> Any:
    return torch.func.vmap(model)(torch.stack([X, 2 * X]))


def vmap_over_parameters(model: nn.Module) -> Any:
    stacked = {name: torch.stack([tensor, 0.5 * tensor]) for name, tensor in trained(model).items()}
    return torch.func.vmap(lambda parameters: loss(model, parameters, X))(stacked)


def gradients_by_example(model: nn.Module) -> Any:
    gradient = torch.func.grad(lambda parameters, x: loss(model, parameters, x[None]))
    return torch.func.vmap(gradient, in_dims=(None, 0))(trained(model), X)


def forward_mode(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        parameters = {name: forward_ad.make_dual(t, torch.ones_like(t)) for name, t in trained(model).items()}
        return tuple(forward_ad.unpack_dual(loss(model, parameters, X)))


def batched_gradients(model: nn.Module) -> Any:
    output = model(X).square().mean((0, 1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(output, parameters, torch.eye(WIDTH).double(), is_grads_batched=True)


def gradients_of_gradients(model: nn.Module) -> Any:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = X.clone().requires_grad_()
    first = torch.autograd.grad(model(x).square().mean(), [x, *parameters], create_graph=True)
    return torch.autograd.grad(torch.stack([each.square().sum() for each in first]).sum(), [x, *parameters])


def jit_trace(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, (X,), check_trace=False)
        return traced(drawn(*X.shape, seed=4))


TRANSFORMS: list[Callable[[nn.Module], Any]] = [
    gradient_of_inputs,
    gradient_of_parameters,
    vjp,
    jvp,
    jvp_of_parameters,
    jacrev,
    vmap_over_inputs,
    vmap_over_parameters,
    gradients_by_example,
    forward_mode,
    batched_gradients,
    gradients_of_gradients,
    jit_trace,
]


@pytest.mark.parametrize("variant", broad_after(1, representatives()))
def test_transforms_give_what_the_wrapper_gives(variant: str) -> None:
    gm, wrapper = graph_and_wrapper(variant)
    failures = {}
    for transform in TRANSFORMS:
        try:
            expected = transform(wrapper)
        except Exception as error:
            expected = error
        try:
            ours = transform(gm)
            if isinstance(expected, Exception):
                continue  # the wrapper cannot, torch lacks a rule; there is nothing to compare with
            flat, flat_expected = (dict(enumerate(torch.utils._pytree.tree_leaves(y))) for y in (ours, expected))
            names_agree = not isinstance(ours, dict) or ours.keys() == expected.keys()
            assert names_agree
            for index, value in flat.items():
                close(value.detach(), flat_expected[index].detach(), 1e-8, f"{transform.__name__} {index}")
        except Exception as error:
            if not isinstance(expected, Exception):
                failures[transform.__name__] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not failures


def test_flops_of_an_optimized_graph_are_those_of_the_plain_one_or_fewer() -> None:
    gm, wrapper = graph_and_wrapper("LoRA")
    counts = []
    for model in (gm, wrapper):
        with FlopCounterMode(display=False) as counter:
            model(X).sum().backward()
        counts.append(counter.get_total_flops())
    # Nothing is hidden: each of the six sites multiplies by W (8 x 8), A and B, forward and backward.
    assert counts[0] == counts[1]
