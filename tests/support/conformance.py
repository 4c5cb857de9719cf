"""What every variant must satisfy. Runs over the registry: a new variant is covered without another line."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import Pipeline

Config = llfx.Variant | Sequence[llfx.Variant]
IN_EACH_BLOCK = "(in|gate|fc|q|qkv|mix|one|head)$"
"""Matches a site of each block in models.py, and mostly not all of them: they get another rank than the others."""


def configs(cls: type[llfx.Variant], **fixed: Any) -> st.SearchStrategy[llfx.Variant]:
    """Return random configs of a variant: rank, scale, and its own flags, choices, sizes and dropout."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "r": st.sampled_from([2, 4]),
        "alpha": st.sampled_from([1.0, 2.0, 6.0]),
        "rank_pattern": st.sampled_from([(), {".": 2}, {IN_EACH_BLOCK: 4}]),
        "dropout": st.sampled_from([0.0, 0.3]),
    }
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if kinds[field.name] is bool:
            drawn[field.name] = st.booleans()
        elif get_origin(kinds[field.name]) is Literal:
            drawn[field.name] = st.sampled_from(get_args(kinds[field.name]))
        elif field.name.endswith("_size"):
            drawn[field.name] = st.sampled_from([2, 4])
    names = {field.name for field in dataclasses.fields(cls)}
    drawn = {name: strategy for name, strategy in drawn.items() if name in names}
    return st.builds(_built, st.just(cls), **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


def _built(cls: type[llfx.Variant], **fields: Any) -> llfx.Variant:
    """Return the config; combinations that the variant refuses, at a site too, are not drawn."""
    try:
        cfg = cls(**fields)
        cfg.for_site("blocks.0.lin")
    except llfx.ConfigError:
        reject()
    return cfg


def small(cls: type[llfx.Variant], size: int = 4, **fields: Any) -> llfx.Variant:
    """Return a config that fits small models: the rank, blocks and groups that it has are of that size.

    An `alpha` among `fields` is for the variants that have one.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    sizes = {name: size for name in names if name == "r" or name.endswith("_size")}
    return cls(**sizes | {name: value for name, value in fields.items() if name in names or name != "alpha"})


def randomise(model: nn.Module, seed: int) -> None:
    """Give every adapter tensor random values, frozen ones included: start values hide too much."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (0.25 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + 0.1).to(tensor.dtype)
        for name, tensor in llfx.adapter_state_dict(model).items()
        if tensor.is_floating_point()
    }
    llfx.load_adapter_state_dict(model, {**llfx.adapter_state_dict(model), **state})


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Assert equality relative to the largest value."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    error = _distance(actual, expected)
    assert error <= tolerance, f"{what}: off by {error:.2e}"


def calibration(cfg: Config, example_inputs: Any, args: tuple[Any, ...]) -> Any:
    """Return calibration data, if a variant of `cfg` starts from data."""
    variants = [cfg] if isinstance(cfg, llfx.Variant) else cfg
    if any(type(variant).observer is not llfx.Variant.observer for variant in variants):
        return [args] if example_inputs is None else [example_inputs, args]
    return None


def rewrite_and_wrap(graph: fx.GraphModule, cfg: Config, data: Any = None) -> tuple[fx.GraphModule, nn.Module]:
    """Return a model adapted by `rewrite` and by `wrap`.

    `graph` is the captured model, because capturing takes most of a test's time. It refers to the model weakly, so
    the caller must hold the model.
    """
    return llfx.rewrite(graph, cfg, calibration=data), llfx.wrap(graph, cfg, calibration=data)


def output(model: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    result = model(*args)
    return result if isinstance(result, Tensor) else result.logits


def gradients(model: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradient of a fixed random functional of it, for every parameter that has one."""
    model.zero_grad()
    y = output(model, args)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * direction.to(y.dtype)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that nothing observable of `model` changes: values, storage, flags, modes, hooks, gradients."""
    before = observe(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert observe(model) == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def observe(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    seen: list[Any] = [
        (name, type(module), module.training, [list(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]
    return seen + [
        (name, p.requires_grad, p.data_ptr(), p.grad is None)
        for name, p in model.named_parameters(remove_duplicate=False)
    ]


# The properties.


def check_rewrite_equals_wrap(
    model: nn.Module, gm: fx.GraphModule, wrapped: nn.Module, args: tuple[Any, ...], tolerance: float, seed: int
) -> None:
    """Check that outputs and adapter gradients, plain and optimized, are the wrapper's in both modes."""
    with unchanged(model):
        assert type(wrapped) is type(model)
        assert list(llfx.adapter_state_dict(gm)) == list(llfx.adapter_state_dict(wrapped))
        randomise(gm, seed)
        randomise(wrapped, seed)
        trainable = {name for name, p in gm.named_parameters() if p.requires_grad}
        assert {id(p) for p in llfx.adapter_parameters(gm)} == {id(p) for p in gm.parameters() if p.requires_grad}
        plain = llfx.optimize(copy.deepcopy(gm), Pipeline(()))
        for training in (True, False):
            expected_y, expected = gradients(wrapped.train(training), args)
            # Optimized, sums are rounded in another order, which may do as much as a last bit of the adapters does.
            with _nudged(wrapped):
                nudged_y, nudged = gradients(wrapped, args)
            mode = "train" if training else "eval"
            for graph, factor in ((plain, 0), (gm, 20)):
                y, grads = gradients(graph.train(training), args)
                close(y, expected_y, max(tolerance, factor * _distance(nudged_y, expected_y)), f"{mode} output")
                assert grads.keys() == expected.keys() == trainable, "base gradients, or missing adapter gradients"
                for name, grad in grads.items():
                    allowed = max(tolerance, factor * _distance(nudged[name], expected[name]))
                    close(grad, expected[name], allowed, f"{mode} gradient of {name}")


@contextmanager
def _nudged(model: nn.Module) -> Iterator[None]:
    """Change the last bit of the adapters for a while; statistics that the model keeps are restored with them."""
    adapters = llfx.adapter_state_dict(model)
    before = {tensor: tensor.clone() for tensor in [*adapters.values(), *model.buffers()]}
    for tensor in adapters.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.nextafter(tensor, tensor.new_tensor(math.inf)))
    yield
    with torch.no_grad():
        for tensor, was in before.items():
            tensor.copy_(was)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return (actual - expected).abs().max().item() / expected.abs().max().clamp_min(1).item()


def check_merge(gm: fx.GraphModule, base: fx.GraphModule, args: tuple[Any, ...], tolerance: float) -> None:
    """Check that the merged graph computes the adapted one, and is the base graph node for node.

    Ties that it must undo, and a bias that it must add, get names of their own.
    """
    merged = llfx.merge(gm)
    close(output(merged.eval(), args), output(gm.eval(), args), tolerance, "merged output")
    assert [n.target for n in merged.graph.nodes if n.op != "get_attr"] == [
        n.target for n in base.graph.nodes if n.op != "get_attr"
    ]
    if merged.state_dict().keys() == base.state_dict().keys():
        assert str(merged.graph) == str(base.graph)
    assert not any(p.requires_grad for p in merged.parameters())


def check_remove(gm: fx.GraphModule, base: fx.GraphModule, model: nn.Module) -> None:
    """Check that removal gives the base graph node for node, over the model's own weights."""
    removed = llfx.remove(gm)
    assert str(removed.graph) == str(base.graph)
    assert removed.state_dict().keys() == base.state_dict().keys()
    for name, parameter in removed.named_parameters():
        own = model.get_parameter(name)
        assert parameter.data_ptr() == own.data_ptr(), f"{name} is a copy"
        assert not parameter.requires_grad


def check_file(gm: fx.GraphModule, base: fx.GraphModule, args: tuple[Any, ...]) -> None:
    """Check that a file brings back every tensor and the output bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        llfx.save(gm, path)
        loaded = llfx.load(base, path)
    state, expected = llfx.adapter_state_dict(loaded), llfx.adapter_state_dict(gm)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(output(loaded.eval(), args), output(gm.eval(), args))


def check_export(gm: fx.GraphModule, traced: tuple[Any, ...], args: tuple[Any, ...], tolerance: float) -> None:
    """Check that `torch.export`, saved and loaded, computes the same at another shape, and loses its adapters."""
    dynamic = tuple([torch.export.Dim.AUTO] * arg.dim() for arg in traced)
    program = torch.export.export(gm.eval(), traced, dynamic_shapes=dynamic)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    close(output(loaded, args), output(gm, args), tolerance, "exported output")
    assert list(llfx.adapter_state_dict(loaded)) == list(llfx.adapter_state_dict(gm))
    close(
        output(llfx.remove(loaded), args),
        output(llfx.remove(gm), args),
        tolerance,
        "output after removal from the file",
    )


def check_conformance(cfg: Config, case: Any, other: tuple[Any, ...]) -> None:
    """Check all of the above on one random model."""
    model = case.build()
    traced = case.example_inputs
    with unchanged(model):
        base = llfx.capture(model, traced)
        data = calibration(cfg, traced, other)
        gm, wrapped = rewrite_and_wrap(base, cfg, data)
        # On a copy, since it trains, which changes what batch norm keeps.
        check_rewrite_equals_wrap(model, copy.deepcopy(gm), wrapped, other, case.tolerance, case.seed)
        randomise(gm, case.seed)
        check_merge(gm, base, other, 1e-9 if case.dtype == torch.float64 else 1e-4)
        check_remove(gm, base, model)
        check_file(gm, base, other)
        if case.exported:
            check_export(gm, traced, other, case.tolerance)
