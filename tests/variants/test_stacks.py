"""Two variants at one site against their formulas: what the outer one reads is the linear that the inner one makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from lora_lite_fx.testing.comparisons import close, perturb
from tests.support.captured import captured
from tests.support.selection import broad_after, slow_unless
from tests.variants.formula_parts import Array, Given, affine
from tests.variants.numpy_formulas import FORMULAS
from tests.variants.test_formulas import AT, LINEAR, X, agree, given, linear

CONFIGS = {type(cfg).__name__: cfg for cfg in reversed(LINEAR)}
"""A config of each variant, the first of several."""
OUTER = [name for name in CONFIGS if name not in ("Full", "TrainableTokens")]
"""The variants that may be around another: the two replace the frozen tensors, and must be the innermost."""
READING: dict[str, llfx.Variant] = {
    **{name: CONFIGS[name] for name in ("DoRA", "BOFT", "GLoRA", "HiRA")},
    "MiSS": llfx.MiSS(mode="bat", r=4, **AT),
}
"""The variants whose formula has `W` or `b` by itself."""
BIAS = llfx.Full(weight=False, **AT)
PAIRS = [
    (BIAS, READING["DoRA"]),
    (BIAS, READING["BOFT"]),
    (BIAS, READING["GLoRA"]),
    (CONFIGS["OFT"], READING["HiRA"]),
    (CONFIGS["GLoRA"], READING["DoRA"]),
    (CONFIGS["Full"], READING["HiRA"]),
    (CONFIGS["LoRA"], READING["MiSS"]),
    (CONFIGS["IA3"], READING["DoRA"]),
]


def stack(*configs: llfx.Variant, names: tuple[str, ...] = ()) -> tuple[fx.GraphModule, nn.Module]:
    """Return the linear with a stack by `rewrite` and by `wrap`, with the same values."""
    model, graph = captured(linear, inputs=(X,))
    cfg: Any = dict(zip(names, configs, strict=True)) if names else list(configs)
    data = [(torch.cat([X, X.roll(1, 1)]),)] if any(isinstance(each, llfx.EVA) for each in configs) else None
    torch.manual_seed(0)
    gm, wrapped = llfx.rewrite(graph, cfg, calibration=data), llfx.wrap(graph, cfg, calibration=data)
    del model
    perturb(gm, 1)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    return gm, wrapped


def parts(gm: fx.GraphModule, inner: llfx.Variant, outer: llfx.Variant) -> tuple[Given, Given]:
    """Return what the formulas of a stack are computed of; the tensors of the outer adapter end in `_2`."""
    first = given(gm, X, inner)
    only = {name: value for name, value in vars(first.p).items() if not name.endswith("_2")}
    return replace(first, p=type(first.p)(**only)), given(gm, X, outer, "_2")


def composed(inner: Given, outer: Given) -> Array:
    """Return what the outer variant computes around the linear that the inner one makes."""
    formulas = [FORMULAS[type(each.cfg).__name__] for each in (inner, outer)]
    weight, bias = affine(formulas[0], inner)
    constants = outer.constants
    if inner.constants is not None and constants is not None:
        before, of_bias = affine(formulas[0], inner.constants)
        constants = replace(constants, W=before, b=of_bias)
    return formulas[1](replace(outer, W=weight, b=bias, constants=constants))


@pytest.mark.parametrize(("inner", "outer"), broad_after(2, PAIRS, several=True), ids=lambda cfg: type(cfg).__name__)
def test_a_stack_is_its_formula_in_outputs_gradients_merged_and_in_a_file(
    inner: llfx.Variant, outer: llfx.Variant, tmp_path: Path
) -> None:
    gm, wrapped = stack(inner, outer)
    known = parts(gm, inner, outer)
    expected = composed(*known)
    agree(gm(X), expected, "rewrite")
    agree(wrapped(X), expected, "wrap")
    agree(llfx.merge(gm)(X), expected, "merge")
    llfx.save(gm, tmp_path / "file")
    agree(llfx.load(captured(linear, inputs=(X,))[1], tmp_path / "file")(X), expected, "load")
    for each in (gm, wrapped):
        each.requires_grad_(True)
        each.train()
    slopes = _slopes(*known)
    for way, model in (("rewrite", gm), ("wrap", wrapped)):
        (model(X).cos()).sum().backward()
        for path, parameter in model.named_parameters():
            move = _move(parameter)
            slope = 0.0 if parameter.grad is None else float((parameter.grad * move).sum())
            name = path.rpartition(".")[2]
            assert slope == pytest.approx(slopes[name], rel=1e-5, abs=1e-6), f"{way}: gradient of {path}"


def _move(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(tensor.numel())
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def _slopes(inner: Given, outer: Given) -> dict[str, float]:
    """Return how fast the sum of the cosines grows if a tensor of a stack moves, by finite differences."""

    def total(first: Given, second: Given) -> float:
        return float(np.cos(composed(replace(first, constants=inner), replace(second, constants=outer))).sum())

    slopes: dict[str, float] = {}
    for key, name in (("W", "weight"), ("b", "bias")):
        value = getattr(inner, key)
        moves = _move(torch.from_numpy(value)).numpy()
        ends = [total(replace(inner, **{key: value + step * moves}), outer) for step in (1e-5, -1e-5)]
        slopes[name] = (ends[0] - ends[1]) / 2e-5
    for index, (part, suffix) in enumerate(((inner, ""), (outer, "_2"))):
        for key, value in vars(part.p).items():
            moves = _move(torch.from_numpy(value)).numpy()
            ends = []
            for step in (1e-5, -1e-5):
                moved = replace(part, p=type(part.p)(**{**vars(part.p), key: value + step * moves}))
                ends.append(total(*((moved, outer) if index == 0 else (inner, moved))))
            slopes[f"lora_{key}{suffix}"] = (ends[0] - ends[1]) / 2e-5
    return slopes


def agrees_with_formula(inner: llfx.Variant, outer: llfx.Variant) -> None:
    """Compare the outputs of a stack, by each way, with the formulas of the two one after the other."""
    gm, wrapped = stack(inner, outer)
    expected = composed(*parts(gm, inner, outer))
    who = f"[{type(inner).__name__}, {type(outer).__name__}]"
    agree(fx.Interpreter(gm).run(X), expected, f"{who} by rewrite")
    agree(wrapped(X), expected, f"{who} by wrap")
    agree(llfx.merge(gm)(X), expected, f"{who} merged")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless("DoRA".__eq__, READING))
def test_every_variant_inside_one_that_reads_the_weight(name: str) -> None:
    for inner in [*LINEAR, BIAS]:
        agrees_with_formula(inner, READING[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTER)
def test_all_pairs_of_variants(name: str) -> None:
    for inner in CONFIGS.values():
        agrees_with_formula(inner, CONFIGS[name])


def test_three_adapters_and_the_program_without_one_of_them() -> None:
    configs = CONFIGS["LoRA"], READING["HiRA"], READING["DoRA"]
    gm, wrapped = stack(*configs)
    close(gm(X), wrapped(X), 1e-12, "three")
    one = llfx.rewrite(captured(linear, inputs=(X,))[1], [configs[0], configs[2]])
    gm.eval()
    with llfx.frozen(gm):
        close(gm(X), wrapped(X), 1e-12, "frozen")
    assert llfx.remove(gm)(X).equal(captured(linear, inputs=(X,))[0](X))
    assert [node.target for node in llfx.merge(one).graph.nodes] == [
        node.target for node in llfx.remove(gm).graph.nodes
    ]


def test_adapters_of_other_names_are_left_out_and_a_replaced_bias_is_not() -> None:
    lora, dora = CONFIGS["LoRA"], READING["DoRA"]
    model, graph = captured(linear, inputs=(X,))
    for inner, counts in ((lora, False), (BIAS, True)):
        gm, wrapped = stack(inner, dora, names=("fr", "de"))
        first, second = (given(gm, X, cfg, f"_{name}") for cfg, name in ((inner, "fr"), (dora, "de")))
        weight, bias = affine(FORMULAS[type(inner).__name__], first)
        f = second
        scale = f.p.m / np.sqrt(((f.W + 1.5 * f.p.B @ f.p.A) ** 2).sum(1))
        expected = scale * (f.x @ weight.T + bias + 1.5 * f.x @ (f.p.B @ f.p.A).T - (bias if counts else f.b))
        expected += bias if counts else f.b
        for each, merged in ((gm, llfx.merge(gm)(X)), (wrapped, None)):
            agree(each(X), expected, "both")
            if merged is not None:
                agree(merged, expected, "merged")
            with llfx.active(each, "de"):
                agree(each(X), FORMULAS["DoRA"](second), "the outer alone")
            with llfx.active(each, "fr"):
                agree(each(X), FORMULAS[type(inner).__name__](first), "the inner alone")
        llfx.delete(gm, "fr")
        agree(gm(X), FORMULAS["DoRA"](second), "the inner deleted")
    del model, graph


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_replaced_bias_of_another_name_is_read_by_its_coefficient(as_tensor: bool) -> None:
    """Of `Full(weight=False)` and `DoRA` the bias is never scaled by the norms, whatever the coefficient."""
    gm, wrapped = stack(BIAS, READING["DoRA"], names=("fr", "de"))
    c = 0.25
    first, second = given(gm, X, BIAS, "_fr"), given(gm, X, READING["DoRA"], "_de")
    expected = FORMULAS["DoRA"](replace(second, b=(1 - c) * first.b + c * first.p.bias))
    for model in (gm, wrapped):
        with llfx.scaled(model, {"fr": torch.tensor(c, dtype=torch.float64) if as_tensor else c}):
            agree(model(X), expected, type(model).__name__)
            if model is gm:
                agree(llfx.merge(gm)(X), expected, "merged")
        rows = {"fr": torch.tensor([1.0, 0, 1, 0, 0], dtype=torch.float64)}
        with llfx.scaled(model, rows), pytest.raises(llfx.AdapterError, match=r"'fr' cannot act in some rows.*'de'"):
            model(X)
        with llfx.scaled(model, rows), llfx.active(model, "fr"):
            model(X)


def test_rows_of_a_batch_have_a_stack_a_part_of_it_or_the_base() -> None:
    gm, wrapped = stack(CONFIGS["LoRA"], READING["DoRA"])
    rows = torch.tensor([1.0, 0.0, -0.5, 1.0, 2.0], dtype=torch.float64)
    for model in (gm, wrapped):
        with llfx.scaled(model, {"default": rows}):
            y = model(X)
        for row, c in enumerate(rows.tolist()):
            with llfx.scaled(model, {"default": c}):
                close(y[row], model(X)[row], 1e-12, f"row {row}")
    base, whole = captured(linear, inputs=(X,))[0](X), gm(X)
    close(y[:2], torch.stack([whole[0], base[1]]), 1e-12, "the stack and the base")


@pytest.mark.parametrize("first", ["LoRA", "DoRA", "OFT"])
def test_an_adapter_around_a_trained_one_starts_as_the_identity(first: str) -> None:
    gm = llfx.rewrite(captured(linear, inputs=(X,))[1], CONFIGS[first])
    perturb(gm, 1)
    close(llfx.rewrite(gm, READING["DoRA"])(X), gm(X), 1e-12, "around it")
    close(llfx.rewrite(gm, {"other": READING["DoRA"]})(X), gm(X), 1e-12, "under another name")


def test_an_exported_stack_can_be_taken_apart(tmp_path: Path) -> None:
    gm, _ = stack(CONFIGS["LoRA"], READING["DoRA"])
    torch.export.save(torch.export.export(gm, (X,)), tmp_path / "stack.pt2")
    module: Any = torch.export.load(tmp_path / "stack.pt2").module()
    close(module(X), gm(X), 1e-12, "exported")
    close(llfx.remove(module)(X), captured(linear, inputs=(X,))[0](X), 1e-12, "removed")


@dataclass(frozen=True)
class Squares(llfx.Variant):
    """Adds a square, which no weight can, and does not say that it is not affine."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        z: Tensor = y + p.lora_g * y.square()
        return z


@pytest.mark.parametrize("way", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("inner", ["not affine", "not affine in its input", "a bank"])
def test_what_has_no_weight_is_refused_inside_one_that_reads_it(
    way: Callable[..., nn.Module], inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, "Squares", Squares)
    monkeypatch.setattr(Squares, "affine", inner != "not affine")
    model, graph = captured(linear, inputs=(X,))
    first: Any = Squares(**AT) if inner.startswith("not affine") else llfx.Bank(CONFIGS["LoRA"], slots=2)
    with pytest.raises(llfx.ConfigError, match=rf"HiRA reads the weight or bias of '0'.*{inner}.*The way out"):
        way(graph, [first, READING["HiRA"]])
    way(graph, [first, CONFIGS["LoRA"]])
    way(graph, [READING["HiRA"], first])
    way(graph, {"fr": first, "de": READING["HiRA"]})
    del model
