"""Sites of every kind: embeddings, convolutions and experts, with every variant."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config, site_weight
from lora_lite_fx.sites.finding import find_sites
from lora_lite_fx.sites.kinds.expert_values import PerExpert
from tests.support.conformance import (
    calibration,
    check_export,
    check_file,
    check_merge,
    check_remove,
    close,
    for_any_linear,
    gradients,
    output,
    randomise,
    small,
    unchanged,
)
from tests.support.own_variants import registered
from tests.support.plain_variants import PlainLoRA
from tests.support.selection import broad_after, by_tier

VARIANTS = list(for_any_linear().values())
E, WIDTH, INNER, NUMBER = 3, 8, 12, 20


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Any:
    """Multiply tokens sorted by expert, each with the matrix of its expert."""
    return torch.ops.lora_lite_fx_tests.grouped_mm(x, weight, ends)


@torch.library.custom_op("lora_lite_fx_tests::grouped_mm", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([x[a:b] @ w for (a, b), w in zip(pairwise([0, *ends.tolist()]), weight, strict=True)])


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    parts = list(pairwise([0, *ends.tolist()]))
    return (
        torch.cat([grad[a:b] @ w.t() for (a, b), w in zip(parts, weight, strict=True)]),
        torch.stack([x[a:b].t() @ grad[a:b] for a, b in parts]),
        None,
    )


_grouped.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUMBER, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, INNER)

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.embed(ids)))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, WIDTH, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class Conv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, WIDTH, (2, 3), dilation=2, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class Batched(nn.Module):
    """Experts with biases, and a batch for each. One weight is stored as the operator takes it, one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, WIDTH, INNER) / 3)
        self.up_bias = nn.Parameter(torch.randn(E, INNER))
        self.down = nn.Parameter(torch.randn(E, WIDTH, INNER) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.bmm(x, self.up) + self.up_bias[:, None])
        return torch.matmul(h, self.down.transpose(-1, -2))


class Grouped(nn.Module):
    """Experts of sorted tokens. One expert gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, WIDTH, INNER) / 3)
        self.down = nn.Parameter(torch.randn(E, WIDTH, INNER) / 3)

    def forward(self, x: Tensor) -> Any:
        ends = (torch.tensor([1, 1, 2], dtype=torch.int32, device=x.device) * (x.shape[0] // 2)).to(torch.int32)
        return grouped(torch.tanh(grouped(x, self.up, ends)), self.down.transpose(-1, -2), ends)


def _ids(*shape: int) -> Tensor:
    return torch.randint(NUMBER, shape, generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model with sites of a kind, inputs to capture it with, and others."""

    kind: str
    model: Callable[[], nn.Module]
    traced: Tensor
    other: Tensor


CASES = {
    "embedding": Kind("embedding", Embedding, _ids(2, 5), _ids(3, 7)),
    "conv1d": Kind("conv", Conv1d, _noise(2, 4, 9), _noise(3, 4, 12)),
    "conv2d": Kind("conv", Conv2d, _noise(2, 2, 6, 7), _noise(3, 2, 5, 8)),
    "batched experts": Kind("experts", Batched, _noise(E, 4, WIDTH), _noise(E, 6, WIDTH)),
    "grouped experts": Kind("experts", Grouped, _noise(6, WIDTH), _noise(10, WIDTH)),
}
REFUSED = {
    # List variants that rotate, shift or sum parts of their input, because these need the input as a tensor.
    "embedding": {"BOFT", "C3A", "EVA", "GraLoRA", "HRA", "LoKr", "MiSS", "OFT"},
    "conv": {"C3A", "EVA", "GraLoRA", "MiSS"},  # the others turn or sum the weight there
    # List variants that call tensor functions without a rule for experts.
    "experts": {
        "AntiPaSTO",
        "AntiPaSTOAblate",
        "AntiPaSTODPLR",
        "AntiPaSTOGain",
        "BOFT",
        "C3A",
        "EVA",
        "FourierFT",
        "Full",
        "GraLoRA",
        "HRA",
        "LoKr",
        "MiSS",
        "OFT",
        "PSOFT",
        "RoAd",
        "SHiRA",
        "VBLoRA",
        "WaveFT",
    },
}


@functools.cache
def model_and_base(case: str) -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = CASES[case].model().double().eval()
    return model, llfx.capture(model, (CASES[case].traced,))


def config(cls: type[llfx.Variant], kind: str, **fields: Any) -> llfx.Variant:
    return small(cls, 4, target_kinds=(kind,), **fields)


def dense(gm: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Return a copy of the model with merged weights, each computed by the variant on a plain linear."""
    copied = copy.deepcopy(model)
    as_linear: dict[str, Any] = {"target_kinds": ("linear",), "target_names": (".",)}
    cfgs = [dataclasses.replace(variant, **as_linear) for variant, _ in by_config(gm)]
    adapted_sites = {placement.site for _, placed in by_config(gm) for placement in placed}
    for site in find_sites(gm):
        if site.name not in adapted_sites:
            continue
        weight = site_weight(gm, site)
        linear = nn.Linear(site.d_in, site.d_out, bias=site.bias is not None, dtype=weight.dtype)
        if site.bias is not None:
            linear.bias.data.copy_(gm.get_parameter(site.bias))
        adapted = llfx.wrap(nn.Sequential(linear), cfgs).eval()
        state = llfx.adapter_state_dict(gm)
        matrices = []
        for expert, expert_weight in enumerate(weight if site.experts else weight[None]):
            linear.weight.data.copy_(expert_weight)  # in place, because the wrapper shares the weight
            values = {}
            for name in llfx.adapter_state_dict(adapted):
                shared = name.startswith("lora_shared")
                value = state[name if shared else name.replace("0.", f"{site.name}.", 1)]
                value = site.kind.matrix(value) if name.endswith(".lora_weight") else value
                values[name] = value[expert] if site.experts and not shared else value
            llfx.load_adapter_state_dict(adapted, values)
            zero, eye = torch.zeros(1, site.d_in).double(), torch.eye(site.d_in).double()
            with torch.no_grad():
                bias = adapted(zero).squeeze(0)
                matrices.append((adapted(eye) - bias).t())
        stored = copied.get_parameter(site.weight)
        matrix = torch.stack(matrices) if site.experts else matrices[0]
        if site.kind.name == "embedding" or (site.experts and site.weight == "up"):
            matrix = matrix.transpose(-1, -2)
        stored.data.copy_(matrix.reshape(stored.shape))
        if site.bias is not None:
            copied.get_parameter(site.bias).data.copy_(bias)
    return copied


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cls", broad_after(2, by_tier(VARIANTS)), ids=lambda cls: cls.__name__)
def test_every_variant_is_right_on_every_kind_or_refused(cls: type[llfx.Variant], case: str) -> None:
    kind = CASES[case]
    model, base = model_and_base(case)
    cfg = config(cls, kind.kind)
    with unchanged(model):
        data = calibration(cfg, (kind.traced,), (kind.other,)) if cls is llfx.EVA else None
        if cls.__name__ in REFUSED[kind.kind]:
            with pytest.raises(llfx.ConfigError, match=r"an embedding|a convolution|a stack of experts"):
                llfx.rewrite(base, cfg, calibration=data)
            return
        gm = llfx.rewrite(base, cfg)
    randomise(gm, 1)
    if not (cls is llfx.LoKr and kind.kind == "conv"):  # its factors there are those of channels; PEFT's are compared
        close(output(gm, (kind.other,)), output(dense(gm, model), (kind.other,)), 1e-9, "dense")
    check_merge(gm, base, (kind.other,), 1e-9)
    check_remove(gm, base, model)
    _, grads = gradients(gm, (kind.other,))
    assert {name for name, p in gm.named_parameters() if p.requires_grad} == set(grads)


@pytest.mark.parametrize("case", broad_after(2, ["embedding", "conv1d", "conv2d"]))
@pytest.mark.parametrize(
    "cls", broad_after(1, [llfx.LoRA, llfx.DoRA, llfx.PiSSA, llfx.VeRA]), ids=lambda cls: cls.__name__
)
def test_the_rewritten_graph_equals_the_eager_wrapper(cls: type[llfx.Variant], case: str) -> None:
    kind = CASES[case]
    model, base = model_and_base(case)
    cfg = [config(cls, kind.kind, dropout=0.4), config(llfx.LoRA, kind.kind, bias=True), config(llfx.IA3, kind.kind)]
    with unchanged(model):
        gm, wrapped = llfx.rewrite(base, cfg), llfx.wrap(model, cfg, (kind.traced,))
        close(output(gm, (kind.other,)), output(model, (kind.other,)), 1e-9, "start")
        randomise(gm, 1)
        randomise(wrapped, 1)
        for training in (True, False):
            y, grads = gradients(gm.train(training), (kind.other,))
            expected_y, expected = gradients(wrapped.train(training), (kind.other,))
            close(y, expected_y, 1e-9, "output")
            assert grads.keys() == expected.keys() == {n for n, p in gm.named_parameters() if p.requires_grad}
            for name, grad in grads.items():
                close(grad, expected[name], 1e-9, name)


@pytest.mark.broad
@pytest.mark.parametrize("case", broad_after(2, CASES))
def test_stacks_are_saved_exported_and_removed(case: str) -> None:
    kind = CASES[case]
    model, base = model_and_base(case)
    gm = llfx.rewrite(base, [config(llfx.LoRA, kind.kind), config(llfx.IA3, kind.kind)])
    randomise(gm, 2)
    close(output(gm, (kind.other,)), output(dense(gm, model), (kind.other,)), 1e-9, "dense")
    check_remove(gm, base, model)
    check_file(gm, base, (kind.other,))
    check_export(gm, (kind.traced,), (kind.other,), 1e-9)
    if case == "grouped experts":  # because experts of this kind need the most tracing
        fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
        close(output(fast, (kind.other,)), output(gm, (kind.other,)), 1e-9, "compiled")


@pytest.mark.parametrize("case", broad_after(2, ["embedding", "conv1d", "conv2d", "batched experts"]))
def test_symbolic_tracing_finds_the_same_sites(case: str) -> None:
    kind = CASES[case]
    model, base = model_and_base(case)
    cfg = config(llfx.LoRA, kind.kind)
    traced, exported = llfx.rewrite(model, cfg), llfx.rewrite(base, cfg)
    randomise(traced, 1)
    randomise(exported, 1)
    close(output(traced, (kind.other,)), output(exported, (kind.other,)), 1e-9, "output")
    close(output(llfx.merge(traced), (kind.other,)), output(exported, (kind.other,)), 1e-9, "merged")


@pytest.mark.parametrize("case", ["batched experts", "grouped experts"])
def test_experts_have_an_adapter_each_with_a_start_of_its_own(case: str) -> None:
    model, base = model_and_base(case)
    gm = llfx.rewrite(base, config(llfx.PiSSA, "experts", dropout=0.5))
    (row, _) = llfx.inspect(gm)
    assert (row.name, row.kind, row.experts, row.d_in, row.d_out) == ("sites.up", "experts", E, WIDTH, INNER)
    state = llfx.adapter_state_dict(gm)
    for expert in range(E):
        top = state["sites.up.lora_B"][expert] @ state["sites.up.lora_A"][expert] * 4  # alpha / r
        u, s, vh = torch.linalg.svd(model.up[expert].t().detach())
        close(top, u[:, :4] * s[:4] @ vh[:4], 1e-9, f"start of expert {expert}")
    close(output(gm.eval(), (CASES[case].other,)), output(model, (CASES[case].other,)), 0.0, "start")
    drawn = llfx.adapter_state_dict(llfx.rewrite(base, config(llfx.LoRA, "experts")))["sites.up.lora_A"]
    assert not torch.equal(drawn[0], drawn[1])
    # Check dropout: two draws differ in training, and evaluation draws nothing.
    randomise(gm, 1)
    x = CASES[case].other
    assert not torch.equal(output(gm.train(), (x,), 0), output(gm, (x,), 1))
    assert torch.equal(output(gm.eval(), (x,), 0), output(gm, (x,), 1))


FUNCTIONS_OF_MATRICES: dict[str, Callable[[Any], Any]] = {
    "norm of an order": lambda m: m.norm(1, dim=0),
    "vector_norm of an order": lambda m: torch.linalg.vector_norm(m, 1, dim=1),
    "sum": lambda m: m.sum(0),
    "linear": lambda m: F.linear(m, m[:2]),
    "matmul with a vector": lambda m: m @ torch.arange(3.0).double(),
    "row by row": lambda m: m * m.sum(1)[:, None] + m[0],
    "subtraction from a number": lambda m: 1 - m.t(),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_MATRICES)
def test_functions_of_a_tensor_for_each_expert_give_the_result_for_each(name: str) -> None:
    function, matrices = FUNCTIONS_OF_MATRICES[name], _noise(E, 3, 3)  # square, so that no wrong dimension shows
    close(
        function(PerExpert(matrices, "")).value, torch.stack([function(matrix) for matrix in matrices]), 1e-12, "values"
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m: m @ m[0],
        lambda m: F.linear(m, m[0]),
        lambda m: m.norm(1, 0),
        lambda m: m.sum(),
        lambda m: m.sum((0, 1)),
        lambda m: m.sum(0, True),
        lambda m: torch.add(m[0], other=m),
        lambda m: _noise(3, 3)[m],
        lambda m: m.exp(),
        lambda m: m.real,
    ],
)
def test_functions_without_a_rule_for_experts_are_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(
        llfx.ConfigError, match=r"which is a stack of experts: .* is not known of values that belong to"
    ):
        function(PerExpert(_noise(E, 3, 3), "LoRA cannot adapt 'up', which is a stack of experts"))


def test_an_expert_trains_on_its_own_tokens_only() -> None:
    _, base = model_and_base("grouped experts")
    gm = llfx.rewrite(base, config(llfx.DoRA, "experts"))
    randomise(gm, 1)
    _, grads = gradients(gm, (CASES["grouped experts"].other,))
    for name, grad in grads.items():
        assert [bool(grad_of_expert.abs().sum() > 0) for grad_of_expert in grad] == [True, False, True], name


def test_an_adapter_that_adds_a_bias_to_experts_is_not_merged() -> None:
    _, base = model_and_base("batched experts")
    gm = llfx.rewrite(base, config(llfx.LoRA, "experts", bias=True))
    randomise(gm, 1)
    with pytest.raises(llfx.AdapterError, match=r"'sites\.up' is a stack of experts without biases"):
        llfx.merge(gm)


@pytest.mark.parametrize("case", ["embedding", "conv2d"])
def test_a_merged_site_gets_a_bias_if_its_adapter_adds_one(case: str) -> None:
    kind = CASES[case]
    _, base = model_and_base(case)
    gm = llfx.rewrite(base, config(llfx.LoRA, kind.kind, bias=True))
    randomise(gm, 1)
    close(output(llfx.merge(gm), (kind.other,)), output(gm, (kind.other,)), 1e-9, "merged")


def test_a_dropped_id_is_a_row_of_zeros_scaled_as_dropout_scales() -> None:
    model, base = model_and_base("embedding")
    gm = llfx.rewrite(base, config(llfx.LoRA, "embedding", dropout=0.5)).train()
    randomise(gm, 1)
    state = llfx.adapter_state_dict(gm)
    ids = _ids(50, 4)
    torch.manual_seed(3)
    kept = torch.dropout(torch.ones(50, 4, dtype=torch.float64), 0.5, True)
    rows = (state["embed.lora_B"] @ state["embed.lora_A"] * 4).t()[ids]
    expected = model.head(torch.tanh(model.embed(ids) + kept[..., None] * rows))
    close(output(gm, (ids,), 3), expected.detach(), 1e-9, "output")


class OneModuleSeveralWeights(nn.Module):
    """Functional linears over parameters whose names do not end in "weight"."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(INNER, WIDTH)), nn.Parameter(torch.randn(WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.first)), self.second)


@pytest.mark.broad
def test_one_module_with_several_weights_has_a_site_for_each() -> None:
    model = nn.Sequential(OneModuleSeveralWeights()).double()
    x = _noise(4, WIDTH)
    base = llfx.capture(model, (x[:2],))
    gm = llfx.rewrite(base, llfx.DoRA(r=2, target_names=(".",)))
    assert [row.name for row in llfx.inspect(gm)] == ["0.sites.first", "0.sites.second"]
    randomise(gm, 1)
    close(output(gm, (x,)), output(dense(gm, model), (x,)), 1e-9, "dense")
    check_merge(gm, base, (x,), 1e-9)
    check_remove(gm, base, model)
    check_file(gm, base, (x,))
    check_export(gm, (x[:2],), (x,), 1e-9)


@pytest.mark.parametrize("case", broad_after(2, CASES))
def test_products_written_with_matmul_are_those_of_linear_at_every_kind(case: str) -> None:
    model, base = model_and_base(case)
    with registered(PlainLoRA):
        fields: dict[str, Any] = {"r": 2, "target_kinds": (CASES[case].kind,)}
        graphs = [llfx.rewrite(base, cls(**fields)) for cls in (llfx.LoRA, PlainLoRA)]
        for gm in graphs:
            randomise(gm, 1)
        x = CASES[case].other
        close(graphs[1](x), graphs[0](x), 1e-12, "outputs")
        if CASES[case].kind != "experts":
            wrapped = llfx.wrap(model, PlainLoRA(**fields), (CASES[case].traced,))
            llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(graphs[1]))
            close(wrapped(x), graphs[1](x), 1e-12, "outputs of the wrapper")


@pytest.mark.parametrize("case", broad_after(1, ["embedding", "conv1d", "batched experts"]))
def test_a_plain_forward_is_right_at_every_kind_in_half_precision(case: str) -> None:
    model = CASES[case].model().bfloat16()
    traced = CASES[case].traced
    x = traced.bfloat16() if traced.is_floating_point() else traced
    with registered(PlainLoRA):
        fields: dict[str, Any] = {"r": 2, "target_kinds": (CASES[case].kind,)}
        graphs = [llfx.rewrite(model, cls(**fields), (x,)) for cls in (llfx.LoRA, PlainLoRA)]
        for gm in graphs:
            randomise(gm, 1)
        assert torch.equal(graphs[1](x), graphs[0](x))
