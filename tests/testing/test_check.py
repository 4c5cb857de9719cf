"""`check` finds planted faults, says them in words and numbers, and passes what is right."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import registry
from lora_lite_fx.passes import GraphPass
from lora_lite_fx.passes.optimize.leave_out_dropout import LeaveOutDropout
from lora_lite_fx.sites.site import Site
from lora_lite_fx.testing import Report, check
from lora_lite_fx.testing.models import GatedMLP, Net, ResidualMLP, ids
from lora_lite_fx.testing.properties import PROPERTIES
from tests.support.selection import broad_after, slow_after

INPUTS = (ids(3, 4),)
NAMES = [has.__name__ for has in PROPERTIES]
SLOW = ("stacks",)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net((GatedMLP, ResidualMLP, ResidualMLP), True, False).double().eval()


def quick(cfg: Any, **options: Any) -> Report:
    """Check on one small model, without what takes longest."""
    return check(cfg, model(), None, INPUTS, **{"skip": SLOW, **options})


def failures(cfg: Any, **options: Any) -> dict[str, str]:
    """Return the details of what fails, by property."""
    with pytest.raises(AssertionError) as caught:
        quick(cfg, **options)
    lines = re.findall(r"^  FAILED   (\w+) +[^:]*: (.*)$", str(caught.value), re.MULTILINE)
    assert lines, str(caught.value)
    return dict(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(llfx.Variant):
    """Right. Each subclass breaks one rule."""

    target_names: Any = (".",)

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return (y * (1 + p.lora_g)).to(y.dtype)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the variants of this file for one test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    classes: list[type[llfx.Variant]] = [Gate, *Gate.__subclasses__()]
    for cls in classes:
        if cls is not Unregistered:
            registry._REGISTRY[cls.__name__] = cls


class StartsElsewhere(Gate):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,), init=0.01)}


class PythonRandom(Gate):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_g.fill_(1e-7 * random.random())


class OneColumn(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x) * (1 + p.lora_g)
        return y.mean(-1, keepdim=True) if x.dim() == 2 else y


class WritesToInput(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x) * (1 + p.lora_g)
        x.mul_(1.0625)
        return y


class WritesToItsTensor(Gate):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_n": llfx.ParamSpec((1,), trainable=False)}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        p.lora_n.add_(0.01)
        y: Tensor = base(x)
        return y * (1 + p.lora_g * p.lora_n)


class MixesPositions(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y + p.lora_g * y.mean(-2, keepdim=True)


class Noisy(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y + p.lora_g * torch.randn_like(y)


class OtherWhenTraced(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * (1 if type(x) is Tensor else 2))


class OtherWhenTracedInTraining(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * (2 if base.training and type(x) is not Tensor else 1))


class BurnsIn(Gate):
    """The trace has the value that the counter had."""

    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * next(self.calls))


class WrongInTraining(Gate):
    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * (next(self.calls) if base.training else 1))


class DeadParameter(Gate):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_dead": llfx.ParamSpec((site.d_out,))}


class LosesGradient(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g.detach())


class NotFinite(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (p.lora_g / p.lora_g)


class HidesTheBias(Gate):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"bias": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y + p.bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangesItsConfig(Gate):
    gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gain", self.gain * 2)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * self.gain)


class KeepsATensorElsewhere(Gate):
    kept: ClassVar[dict[str, Tensor]] = {}

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        self.kept[site.name] = torch.randn(site.d_out, dtype=weight.dtype)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_g * self.kept[base.site.name])


class CoarseOnBfloat16(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + (p.lora_g.round() if y.dtype == torch.bfloat16 else p.lora_g))


class TakesTheNextName(Gate):
    """A second adapter at the site calls its tensor so too."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_A_2": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return y * (1 + p.lora_A_2)


class WritesTheWeight(Gate):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        weight.mul_(1.5)


class WritesThroughNumpy(Gate):
    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        weight.detach().numpy()[:] *= 1.5


class Crashes(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        return base(x) * p.lora_gate  # there is none


class Unregistered(Gate):
    pass


# Each fault, the property that it breaks, and words of the message. A fault that insertion refuses already shows there.
FAULTS: list[tuple[type[Gate], str, str]] = [
    (StartsElsewhere, "start", r"output: off by \d\.\d+e-02 of the largest value at \(3, 4, 20\), allowed 1e-05"),
    (PythonRandom, "seed", r"blocks\.0\.down\.lora_g \(8,\) starts from other values; draw random numbers with torch"),
    (WritesToInput, "inserted", r"WritesToInput\.forward at 'blocks\.0\.gate' .* writes to x in place \(mul_\)"),
    (WritesToItsTensor, "inserted", r"writes to p\.lora_n in place \(add_\)"),
    (MixesPositions, "positions", r"at blocks\.0\.gate, 8 to 12: positions together and one by one: off by"),
    (Noisy, "repeats", r"two calls are \d\.\d+e-01 of the largest value apart"),
    (
        OtherWhenTraced,
        "evaluation",
        r"output in evaluation: off by .*; the first module to differ is blocks\.0\.gate, by",
    ),
    (OtherWhenTracedInTraining, "training", r"output in training: off by .* at \(3, 4, 20\), allowed 1e-10"),
    (BurnsIn, "inserted", r"does not compute the same at each call"),
    (WrongInTraining, "inserted", r"does not compute the same at each call"),
    (DeadParameter, "reached", r"8 of 16 tensors that train get no gradient: blocks\.0\.gate\.lora_dead, "),
    (LosesGradient, "reached", r"8 of 8 tensors that train get no gradient: blocks\.0\.gate\.lora_g, "),
    (NotFinite, "start", r"output: 240 of 240 values are NaN or infinite"),
    (HidesTheBias, "inserted", r"calls a tensor 'bias', and the module of the site has something of that name"),
    (ChangesItsConfig, "file", "output after loading: off by"),
    (ChangesItsConfig, "merges", "merged output: off by"),
    (KeepsATensorElsewhere, "inserted", r"KeyError.*\(.*test_check\.py:\d+: return y"),
    (CoarseOnBfloat16, "bfloat16", r"off by"),
    (TakesTheNextName, "stacks", r"the module of the site has 'lora_A_2' already"),
    (WritesTheWeight, "inserted", r"WritesTheWeight\.init at 'blocks\.0\.gate' .* writes to weight in place \(mul_\)"),
    (WritesThroughNumpy, "model", r"has other values than before, by up to"),
    (Crashes, "inserted", r"AttributeError.*test_check\.py:\d+: return base\(x\) \* p\.lora_gate"),
]


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    broad_after(1, slow_after(6, FAULTS, several=True), several=True),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found(cls: type[Gate], name: str, message: str) -> None:
    failed = failures(cls(), skip=())
    assert name in failed, failed
    assert re.search(message, failed[name]), failed[name]


@pytest.mark.broad
def test_all_faults_are_told_at_once_and_in_the_order_of_the_properties() -> None:
    failed = failures(WritesThroughNumpy(), skip=())
    assert list(failed)[-1] == "model"
    assert list(failed) == [name for name in NAMES if name in failed]


@pytest.mark.broad
def test_a_result_that_differs_by_the_rank_of_the_input_is_found() -> None:
    message = r"FAILED   result .*: at blocks\.0\.gate, 8 to 12: \(5, 8\) gives \(5, 1\) instead of \(5, 12\)"
    with pytest.raises(AssertionError, match=message):
        check(OneColumn(), model(), INPUTS, skip=[name for name in NAMES if name != "result"])


@pytest.mark.broad
def test_a_wrong_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: GraphPass, gm: fx.GraphModule) -> int:
        products = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        for product in products:
            product.target = torch.ops.aten.add.Tensor
        return len(products)

    monkeypatch.setattr(LeaveOutDropout, "run", run)
    failed = failures(Gate(), skip=("stacks", "export"))
    assert "passes" in failed
    assert {"evaluation", "training"}.isdisjoint(failed), "the graph itself is right"
    assert re.search(r"^output inside frozen: off by \d\.\d+e.*, allowed 2e-09$", failed["passes"]), failed["passes"]


@pytest.mark.broad
def test_an_export_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.export.load

    def changed(file: Any) -> Any:
        module = load(file).module()
        for tensor in llfx.adapter_state_dict(module).values():
            tensor.add_(0.1)
        return SimpleNamespace(module=lambda: module)

    monkeypatch.setattr(torch.export, "load", changed)
    with pytest.raises(AssertionError, match=r"FAILED   export .*: exported output: off by .*, allowed 1e-10"):
        check(Gate(), model(), INPUTS, skip=[name for name in NAMES if name != "export"])


# What is right.


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneGateForAll(Gate):
    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_shared_g": llfx.ParamSpec((1,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return (y * (1 + p.lora_shared_g)).to(y.dtype)


class Steering(Gate):
    """Nothing trains."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_v": llfx.ParamSpec((site.d_out,), nn.init.normal_, trainable=False)}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return (y + 0.01 * p.lora_v).to(y.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(llfx.WithDropout, llfx.WithRank, Gate):
    """Low rank, written plainly."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {
            "lora_A": llfx.ParamSpec((self.r, site.d_in), "kaiming"),
            "lora_B": llfx.ParamSpec((site.d_out, self.r)),
        }

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        dropped = nn.functional.dropout(x, self.dropout, base.training).to(p.lora_A.dtype)
        return y + (dropped @ p.lora_A.T @ p.lora_B.T).to(y.dtype)


class MeanOfInputs(Gate):
    """Starts from data."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_m": llfx.ParamSpec((site.d_in,), trainable=False)}

    def observer(self, site: Site, weight: Tensor) -> Any:
        return lambda x: x.sum(0)

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Any) -> None:
        p.lora_m.copy_(statistic.total / statistic.tokens)

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        along = (x.to(p.lora_m.dtype) * p.lora_m).sum(-1, keepdim=True)
        return y + (along * p.lora_g).to(y.dtype)


@pytest.mark.parametrize(
    ("cfg", "options", "skipped"),
    broad_after(
        1,
        slow_after(
            3,
            [
                (Gate(), {}, {}),
                (OneGateForAll(), {}, {}),
                (
                    Steering(),
                    {"start": None},
                    {"start": "start=None says that it starts elsewhere", "reached": "nothing trains"},
                ),
                (Plain(r=2, dropout=0.3), {}, {}),
                (MeanOfInputs(), {}, {}),
                (Gate(dtype=torch.float32), {}, {"bfloat16": "its config sets dtype"}),
                ([Gate(), llfx.LoRA(r=2, target_names="up")], {"skip": ()}, {"stacks": "it is a stack already"}),
                (
                    Unregistered(),
                    {},
                    {"file": "Unregistered is not registered: write @register above the class"},
                ),
            ],
            several=True,
        ),
        several=True,
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, llfx.Variant) else None,
)
def test_a_right_variant_passes_and_what_is_skipped_says_why(cfg: Any, options: Any, skipped: dict[str, str]) -> None:
    report = quick(cfg, **options)
    assert report.ok
    left_out = options.get("skip", SLOW)
    assert [result.name for result in report] == [name for name in NAMES if name not in left_out]
    skipped = {"export": "the model is traced without example inputs", **skipped}
    assert {result.name: result.detail for result in report if result.outcome == "skipped"} == skipped


class ReadsX(Gate):
    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Any:
        y: Tensor = base(x)
        return (y * (1 + p.lora_g * torch.tanh(y))).to(y.dtype)


@pytest.mark.broad
def test_a_variant_that_is_not_affine_passes_if_merge_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gm: fx.GraphModule) -> fx.GraphModule:
        raise llfx.ConfigError("it is not affine")

    monkeypatch.setattr("lora_lite_fx.testing.graphs.merge", refuse)
    merges = quick(ReadsX())["merges"]
    assert merges.outcome == "skipped"
    assert re.search(r"^it is not affine in x, off by \d\.\d+e-0[12] at blocks.*, and merge refuses it$", merges.detail)
    assert failures(Gate())["merges"].startswith("it is not affine ("), "of a variant that is affine it is a failure"


@pytest.mark.broad
def test_a_variant_that_is_not_affine_and_is_merged_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite_fx.testing.graphs.merge", llfx.remove)  # a merge that gets it wrong in silence
    message = failures(ReadsX())["merges"]
    assert re.search(r"merged output: off by .*; forward is not affine in x, off by \d\.\d+e-0[12] at blocks", message)


@pytest.mark.broad
def test_without_a_model_both_kinds_of_capture_are_checked() -> None:
    before = torch.get_rng_state()
    report = check(llfx.LoRA(r=4, dropout=0.1, target_names="not_there"))
    assert torch.equal(torch.get_rng_state(), before)
    assert [result.outcome for result in report] == ["passed"] * len(NAMES)
    assert "target_names=('not_there',)" in report.variant
    lines = str(report).splitlines()
    assert re.match(r"LoRA\(.*\): 17 passed in \d+\.\d s$", lines[0])
    assert re.match(r"  passed   start       Starts as the identity: off by 0\.0e\+00$", lines[2])


def test_a_config_that_fits_no_layer_says_which_widths_there_are() -> None:
    with pytest.raises(AssertionError) as caught:
        check(llfx.MiSS(r=4000))
    assert "nothing else: on the exported model of widths 64 and 128: MiSS: r=4000 is larger than" in str(caught.value)
    assert "start       Starts as the identity: because rewrite failed before" in str(caught.value)


def test_mistakes_in_the_call_are_named() -> None:
    with pytest.raises(ValueError, match=r"^No property is named merge; the properties are inserted, start, seed, "):
        check(Gate(), skip=("merge",))
    with pytest.raises(ValueError, match=r"^Inputs go with a model: check\(variant, model, example_inputs\)\.$"):
        check(Gate(), inputs=INPUTS)
    with pytest.raises(ValueError, match=r"^A model is checked on inputs: check\(variant, model, example_inputs\)\.$"):
        check(Gate(), model())
    with pytest.raises(llfx.ConfigError, match=r"not the class Gate\. Pass an instance: Gate\(\)\."):
        check(Gate)  # type: ignore[arg-type]
