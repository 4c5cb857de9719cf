"""The properties of every variant, one function each.

A property takes a `Trial` and returns a detail for the report, such as how far results are apart. It raises `Skip`
where it does not apply, and anything else where the variant does not have it. Its name is that of the function, and the
first line of its docstring is what the report says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..adapters.registry import registry
from ..adapters.state import adapter_parameters, adapter_state_dict
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError
from ..execution.frozen import frozen
from ..rewriting.adapted_linear import AdaptedLinear
from ..rewriting.verify import verify
from ..storage.dequantized import DequantizedLinear
from ..variants.lora import LoRA
from .comparisons import TOLERANCES, close, distance, gradients, output
from .graphs import check_export, check_file, check_merge, check_mode, check_remove
from .trial import Skip, Trial

SHAPES = ((5,), (2, 3), (2, 2, 3))


def inserted(trial: Trial) -> str:
    """Is inserted, with all that trains among the adapters' parameters, and nothing else."""
    gm = trial.started
    tensors, trained = adapter_state_dict(gm), adapter_parameters(gm)
    training = [name for name, parameter in gm.named_parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(gm.get_parameter(name)) for name in training}, (
        f"these train and are not the adapters': {', '.join(name for name in training if name not in tensors)}"
    )
    frozen_count = len(tensors) - len(trained)
    return f"{sum(map(torch.numel, trained)):,} parameters in {len(trained)} tensors, and {frozen_count} frozen tensors"


def start(trial: Trial) -> str:
    """Starts as the identity."""
    if trial.start is None:
        raise Skip("start=None says that it starts elsewhere")
    tolerance = max(trial.start, trial.allowed())
    error = close(output(trial.started, trial.inputs), output(trial.base, trial.inputs), tolerance, "output")
    return _off(error)


def seed(trial: Trial) -> str:
    """Starts from the same bits with the same seed of torch."""
    first, again = adapter_state_dict(trial.started), adapter_state_dict(trial.rewrite(trial.variants))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), (
            f"{name} {tuple(tensor.shape)} starts from other values; draw random numbers with torch"
        )
    return ""


def result(trial: Trial) -> str:
    """Returns from `forward` what the frozen linear would in shape and dtype, for inputs of any rank."""
    return _at_all_sites(trial, _check_result)


def positions(trial: Trial) -> str:
    """Treats each position by itself, which is what acting on the last dimension means."""
    return _at_all_sites(trial, _check_positions)


def repeats(trial: Trial) -> str:
    """Computes the same bits in each call, in evaluation."""
    model = trial.wrapped.eval()
    first, again = (output(model, trial.inputs, seed=seed) for seed in (0, 1))
    assert torch.equal(first, again), f"two calls are {distance(again, first):.2e} of the largest value apart"
    return ""


def evaluation(trial: Trial) -> str:
    """Computes in evaluation what `wrap` computes, with its gradients."""
    return _compare(trial, trial.plain, training=False)


def training(trial: Trial) -> str:
    """Computes in training what `wrap` computes, with its gradients."""
    return _compare(trial, trial.plain, training=True)


def passes(trial: Trial) -> str:
    """Computes the same when its graph is optimized."""
    detail = _compare(trial, trial.adapted, training=True, rounding=20)
    _compare(trial, trial.adapted, training=False, rounding=20)
    gm, inputs, tolerance = trial.adapted.eval(), trial.inputs, 20 * trial.allowed()
    with torch.no_grad():
        expected = output(trial.plain.eval(), inputs)
        close(output(gm, inputs), expected, tolerance, "output without gradient")
        with frozen(gm):
            close(output(gm, inputs), expected, tolerance, "output inside frozen")
    return detail


def reached(trial: Trial) -> str:
    """Passes a gradient to each tensor that trains."""
    gm = copy.deepcopy(trial.started).train()
    _, reached = gradients(gm, trial.inputs)
    names = [name for name, parameter in gm.named_parameters() if parameter.requires_grad]
    if not names:
        raise Skip("nothing trains")
    lacking = [name for name in names if name not in reached]
    assert not lacking, f"{len(lacking)} of {len(names)} tensors that train get no gradient: {', '.join(lacking[:3])}"
    bad = [name for name, gradient in reached.items() if not torch.isfinite(gradient).all()]
    assert not bad, f"{', '.join(bad[:3])}: NaN or infinite"
    return f"{len(names)} tensors"


def merges(trial: Trial) -> str:
    """Merges into the weights, node for node the base; or is refused because it is not affine in x."""
    # Merging rounds the weight, and adds up in another order.
    tolerance = max(1e-9, 10 * trial.allowed())
    bend, where = _bend(trial)
    try:
        return _off(check_merge(trial.adapted, trial.base, trial.inputs, tolerance))
    except AdapterError as error:
        if bend > tolerance:
            raise Skip(f"it is not affine in x, off by {bend:.2e} at {where}, and merge refuses it") from error
        raise
    except AssertionError as failure:
        if bend > tolerance:
            raise AssertionError(f"{failure}; forward is not affine in x, off by {bend:.2e} at {where}") from failure
        raise


def removed(trial: Trial) -> str:
    """Is removed without a trace: node for node the base, over the model's own weights."""
    check_remove(trial.adapted, trial.base, trial.model)
    return ""


def file(trial: Trial) -> str:
    """Comes back from a file, every tensor and the output bit for bit."""
    for variant in trial.variants:
        name = type(variant).__name__
        if registry().get(name) is not type(variant):
            raise Skip(f"{name} is not registered: write @register above the class")
    return f"{check_file(trial.adapted, trial.base, trial.inputs):,} bytes"


def export(trial: Trial) -> str:
    """Comes back from a `.pt2` file, and computes the same at another shape."""
    if trial.example_inputs is None:
        raise Skip("the model is traced without example inputs")
    return _off(check_export(trial.adapted, trial.example_inputs, trial.inputs, trial.allowed()))


def bfloat16(trial: Trial) -> str:
    """Works on a bfloat16 model, where its tensors are float32, and is as exact as that dtype."""
    if any(variant.dtype is not None for variant in trial.variants):
        raise Skip("its config sets dtype")
    if any(isinstance(module, DequantizedLinear) for module in shared_copy(trial.model).modules()):
        raise Skip("the base is quantized, and not of another dtype for being cast")
    half, exact = trial.in_dtype(torch.bfloat16), trial.in_dtype(torch.float64)
    values = adapter_state_dict(half.adapted)
    wide = [name for name, tensor in values.items() if tensor.is_floating_point() and tensor.dtype != torch.float32]
    assert not wide, f"{wide[0]} is {values[wide[0]].dtype}"
    expected = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in values.items()}
    reference = dict(exact.sites_of(exact.wrap(exact.variants, expected)))

    def check_result(half: Trial, module: AdaptedLinear) -> float:
        _check_result(half, module)
        x = half.vectors(module, 2, 3)
        twin = reference[module.site.name].eval()
        return close(module(x).double(), twin(x.double()), TOLERANCES[torch.bfloat16], "result")

    detail = _at_all_sites(half, check_result)
    y = output(half.adapted.train(), trial.inputs)
    close(y.detach(), output(half.wrapped.train(), trial.inputs).detach(), TOLERANCES[torch.bfloat16], "output")
    if y.requires_grad:
        y.float().sum().backward()
    return detail


def stacks(trial: Trial) -> str:
    """Computes what `wrap` computes with a LoRA around it."""
    if len(trial.variants) > 1:
        raise Skip("it is a stack already")
    both = [*trial.variants, LoRA(r=2, target_names=(".",))]
    gm = trial.moved(trial.rewrite(both)).eval()
    wrapped = trial.wrap(both, adapter_state_dict(gm)).eval()
    return _off(close(output(gm, trial.inputs), output(wrapped, trial.inputs), 20 * trial.allowed(), "output"))


def model(trial: Trial) -> str:
    """Leaves the user's model as it was, also its weights and modes."""
    changes = trial.changes()
    assert not changes, changes
    return ""


PROPERTIES: tuple[Callable[[Trial], str], ...] = (
    inserted,
    start,
    seed,
    result,
    positions,
    repeats,
    evaluation,
    training,
    passes,
    reached,
    merges,
    removed,
    file,
    export,
    bfloat16,
    stacks,
    model,
)

ON_ONE_MODEL = (seed, file, bfloat16, stacks)
"""Those that do not depend on how the model was captured, and take long."""


# What several of them do.


def _off(error: float) -> str:
    return f"off by {error:.1e}"


def _compare(trial: Trial, gm: fx.GraphModule, training: bool, rounding: int = 0) -> str:
    """Compare a graph with the wrapper in one mode; a failure names the first module at which they differ."""
    try:
        error, count = check_mode(gm, trial.wrapped, trial.inputs, trial.allowed(), training, rounding)
    except AssertionError as failure:
        raise AssertionError(f"{failure}{_first_module(trial, gm, training)}") from failure
    return f"{_off(error)}, {count} gradients"


def _first_module(trial: Trial, gm: fx.GraphModule, training: bool) -> str:
    """Say at which module a graph and the wrapper part, if that can be told."""
    try:
        table = verify(gm, trial.model, trial.inputs)
    except Exception:
        return ""
    mode = "training" if training else "evaluation"
    first = next((row for row in table if not row.ok and row.mode == mode and not row.is_result), None)
    return "" if first is None else f"; the first module to differ is {first.module}, by {first.relative:.1e}"


def _at_all_sites(trial: Trial, check: Callable[[Trial, AdaptedLinear], float]) -> str:
    """Run a check on the `forward` of each site, in evaluation."""
    worst, count = 0.0, 0
    for name, module in trial.sites_of(trial.wrapped):
        try:
            worst = max(worst, check(trial, module.eval()))
        except AssertionError as failure:
            raise AssertionError(f"at {name}, {module.site.d_in} to {module.site.d_out}: {failure}") from failure
        count += 1
    if not count:
        raise Skip("it adapts no plain linear")
    return f"{count} sites" + (f", {_off(worst)}" if worst else "")


@torch.no_grad()
def _check_result(trial: Trial, module: AdaptedLinear) -> float:
    for shape in SHAPES:
        x = trial.vectors(module, *shape)
        y, expected = module(x), module.base(x)
        assert isinstance(y, Tensor), f"forward returns {type(y).__name__}"
        assert y.shape == expected.shape, f"{tuple(x.shape)} gives {tuple(y.shape)} instead of {tuple(expected.shape)}"
        assert y.dtype == expected.dtype, f"{x.dtype} gives {y.dtype} instead of {expected.dtype}"
    return 0.0


@torch.no_grad()
def _check_positions(trial: Trial, module: AdaptedLinear) -> float:
    x = trial.vectors(module, 2, 3)
    together = module(x)
    apart = torch.stack([torch.stack([module(row[None])[0] for row in rows]) for rows in x])
    return close(together, apart, trial.allowed(), "positions together and one by one")


@torch.no_grad()
def _bend(trial: Trial) -> tuple[float, str]:
    """Return how far the adapted sites are from affine, `f(u) + f(v) - f(u + v) - f(0) = 0`, and at which site most."""
    worst, where = 0.0, ""
    for name, module in trial.sites_of(trial.wrapped):
        module.eval()
        u, v = (trial.vectors(module, 8, seed=seed) for seed in (1, 2))
        both = module(u + v)
        error = distance(module(u) + module(v) - module(torch.zeros_like(u)), both)
        if error > worst:
            worst, where = error, name
    return worst, where
