"""Check variants that start from data: the observed statistics, and the start values of EVA and AntiPaSTO."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config
from lora_lite_fx.sites.site import Site
from tests.support.conformance import unchanged
from tests.support.models import tiny_t5
from tests.support.own_variants import registered

WIDTH, F64 = 12, torch.float64


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 5))
    return layers.double()


def data(*sizes: int, seed: int = 1) -> list[tuple[Tensor]]:
    """Return batches whose directions have different variances, and whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDTH + 1, dtype=F64)
    return [(torch.randn(size, 3, WIDTH, generator=generator, dtype=F64) * scale + 2.0,) for size in sizes]


def inputs_of(net: nn.Module, name: str, batches: list[tuple[Tensor]]) -> Tensor:
    """Return all inputs of a module, which a hook on the user's model records."""
    inputs: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            net(*batch)
    hook.remove()
    return torch.cat(inputs)


def same_lines(a: Tensor, b: Tensor) -> None:
    """Assert that the rows of `a` and `b` are equal up to sign."""
    assert torch.allclose((a * b).sum(1).abs(), torch.ones(len(a), dtype=a.dtype), atol=1e-9)


EVA = llfx.EVA(r=3, target_names=(".",))


def test_eva_starts_at_the_right_singular_vectors_of_each_sites_inputs() -> None:
    net, batches = model(), data(5, 2, 9)
    with unchanged(net):
        gm = llfx.rewrite(net, EVA, calibration=batches)
    for name in ("0", "2", "4"):
        expected = torch.linalg.svd(inputs_of(net, name, batches)).Vh[:3]
        same_lines(gm.get_parameter(f"{name}.lora_A").detach(), expected)
        assert not gm.get_parameter(f"{name}.lora_B").any()
        assert gm.get_parameter(f"{name}.lora_A").requires_grad, "A is trained, the data only starts it"


def test_centered_eva_starts_at_the_principal_components_as_peft_does() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    net, batches = model(), data(40)
    gm = llfx.rewrite(net, llfx.EVA(r=3, center=True, target_names=("0",)), calibration=batches)
    pca: Any = IncrementalPCA(n_components=3)
    pca.partial_fit(inputs_of(net, "0", batches))
    same_lines(gm.get_parameter("0.lora_A").detach(), pca.components_.double())


def test_the_start_does_not_depend_on_how_the_data_is_batched() -> None:
    (whole,) = data(16)
    parts = [(part,) for part in whole[0].split(3)]
    a, b = (llfx.rewrite(model(), EVA, calibration=batches) for batches in ([whole], parts))
    for name, tensor in llfx.adapter_state_dict(a).items():
        assert torch.allclose(tensor, llfx.adapter_state_dict(b)[name], atol=1e-9), name


def test_the_same_data_gives_the_same_bits() -> None:
    a, b = (llfx.adapter_state_dict(llfx.rewrite(model(), EVA, calibration=data(4, 4))) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_are_read_one_by_one_and_none_is_kept() -> None:
    """Check that the loop holds at most the last batch."""
    seen: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor]]:
        for size in range(3, 8):
            (x,) = data(size)[0]
            assert not any(earlier() is not None for earlier in seen[:-1])
            seen.append(weakref.ref(x))
            yield (x,)
            del x

    llfx.rewrite(model(), EVA, calibration=batches())
    assert len(seen) == 5


def test_the_size_of_a_statistic_does_not_depend_on_the_data() -> None:
    for cfg in (EVA, llfx.AntiPaSTO(r=4)):
        site = Site("0", WIDTH, 20)
        observe: Any = cfg.observer(site, model().get_parameter("0.weight").detach())
        sizes = {observe(torch.randn(tokens, WIDTH, dtype=F64)).shape for tokens in (1, 50, 500)}
        assert len(sizes) == 1


@pytest.mark.broad
def test_loading_needs_no_calibration_data(tmp_path: Any) -> None:
    for cfg in (EVA, llfx.EVA(r=3, rho=2.0, target_names=(".",)), llfx.AntiPaSTO(r=4, target_names=("0", "2"))):
        gm = llfx.rewrite(model(), cfg, calibration=data(8))
        llfx.save(gm, tmp_path / "adapter")
        loaded = llfx.load(model(), tmp_path / "adapter")
        (x,) = data(2, seed=3)[0]
        assert torch.equal(loaded(x), gm(x))


# Ranks.


def ranks_of(gm: fx.GraphModule) -> dict[str, int]:
    """Return the rank of each adapted site."""
    configs: dict[str, Any] = {placement.site: placement.local for _, placed in by_config(gm) for placement in placed}
    return {site: cfg.r for site, cfg in configs.items()}


def test_redistributed_ranks_follow_the_largest_shares_of_variance() -> None:
    net, batches = model(), data(30)
    gm = llfx.rewrite(net, llfx.EVA(r=3, alpha=9.0, rho=2.0, target_names=(".",)), calibration=batches)
    competing = []
    for name in ("0", "2", "4"):
        values = torch.linalg.svdvals(inputs_of(net, name, batches)).square()
        limit = min(6, *net.get_parameter(f"{name}.weight").shape)
        competing += [(share.item(), name) for share in (values / values.sum())[:limit]]
    winners = [name for _, name in sorted(competing, reverse=True)[:9]]
    ranks = {name: winners.count(name) for name in dict.fromkeys(winners)}
    assert len(set(ranks.values())) > 1, "the case must redistribute"
    ((variant, _),) = by_config(gm)
    assert ranks_of(gm) == ranks
    for name, rank in ranks.items():
        assert gm.get_parameter(f"{name}.lora_A").shape[0] == rank
        local: Any = variant.for_site(name)
        assert local.alpha / rank == pytest.approx(3.0), "the scale stays as it was"
    (x,) = data(2, seed=3)[0]
    assert torch.equal(gm(x), net(x))


@pytest.mark.broad
def test_a_site_that_wins_no_component_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, 20, dtype=F64), nn.Linear(20, 20, dtype=F64))
    with torch.no_grad():  # Put the inputs of the second on one line, so that all but one of its shares are zero.
        net.get_parameter("0.weight").copy_(torch.outer(torch.ones(20), torch.arange(1, WIDTH + 1)).double() * 1e3)
    direction = torch.zeros(WIDTH, dtype=F64)
    batches = [(torch.randn(30, WIDTH, dtype=F64) * 1e-3 + direction,)]
    gm = llfx.rewrite(net, llfx.EVA(r=1, rho=1.0, target_names=(".",)), calibration=batches)
    assert [row.parameters > 0 for row in llfx.inspect(gm)] == [True, True]
    gm = llfx.rewrite(net, llfx.EVA(r=1, rho=2.0, rank_pattern={"^0$": 2}, target_names=(".",)), calibration=batches)
    ranks = ranks_of(gm)
    assert sum(ranks.values()) == 3
    assert ranks["1"] == 1


# Padding.


def llama() -> fx.GraphModule:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return llfx.capture(LlamaForCausalLM(LlamaConfig(vocab_size=31, bos_token_id=1, eos_token_id=2, **shape)).eval())


@pytest.mark.broad
def test_padding_does_not_change_the_statistics() -> None:
    ids = torch.randint(3, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    cfg = llfx.EVA(r=2, target_roles=("query", "down"))
    base = llama()
    padded = llfx.rewrite(base, cfg, calibration=[{"input_ids": ids, "attention_mask": mask}])
    short = llfx.rewrite(base, cfg, calibration=[{"input_ids": ids[:, :6]}])
    full = llfx.rewrite(base, cfg, calibration=[{"input_ids": ids}])
    for name, tensor in llfx.adapter_state_dict(padded).items():
        if name.endswith("lora_A"):
            same_lines(
                tensor.double() / tensor.double().norm(dim=1, keepdim=True),
                llfx.adapter_state_dict(short)[name].double(),
            )
            assert not torch.allclose(tensor.abs(), llfx.adapter_state_dict(full)[name].abs(), atol=1e-3)


@pytest.mark.broad
def test_tokens_without_a_label_do_not_count_if_asked_for() -> None:
    ids = torch.randint(3, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[:, 8:], labels[:, 6:] = 0, -100
    base = llama()
    masked = llfx.EVA(r=2, center=True, use_label_mask=True, target_roles=("query", "down"))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    short = llfx.rewrite(base, masked, calibration=[{"input_ids": ids[:, :6]}])
    for cfg, same in ((masked, True), (dataclasses.replace(masked, use_label_mask=False), False)):
        gm = llfx.rewrite(base, cfg, calibration=[batch])
        for name, tensor in llfx.adapter_state_dict(gm).items():
            if name.endswith("lora_A"):
                expected = llfx.adapter_state_dict(short)[name]
                assert torch.allclose(tensor.abs(), expected.abs(), atol=1e-4) is same
    with pytest.raises(llfx.ConfigError, match="saw 0 tokens"):
        llfx.rewrite(base, masked, calibration=[{**batch, "labels": torch.full_like(ids, -100)}])


@pytest.mark.broad
def test_encoder_and_decoder_have_separate_padding() -> None:
    t5 = llfx.capture(T5ForConditionalGeneration(tiny_t5(vocab_size=31)).eval())
    ids = torch.randint(3, 31, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    cfg = llfx.EVA(r=2, target_names=(r"coder\.block\.0\.layer\.0\.SelfAttention\.q$",))
    starts = [
        llfx.adapter_state_dict(
            llfx.rewrite(t5, cfg, calibration=[{"input_ids": ids, "attention_mask": m, "labels": ids}])
        )
        for m in (mask, torch.ones_like(ids))
    ]
    moved = {
        name.split(".")[0]: not torch.allclose(starts[0][name].abs(), starts[1][name].abs(), atol=1e-4)
        for name in starts[0]
        if name.endswith("lora_A")
    }
    assert moved == {"encoder": True, "decoder": False}


# Observers that know their batch.


@dataclass(frozen=True, kw_only=True)
class Steer(llfx.Variant):
    """`y = W x + c v`, v the difference of the mean last inputs of even and odd batches, mapped by W."""

    seen: ClassVar[list[llfx.Batch]] = []

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        v = llfx.ParamSpec((site.d_out,), trainable=False)
        return {"lora_v": v, "lora_shared_c": llfx.ParamSpec((), init=0.0, trainable=False)}

    def observer(self, site: Site, weight: Tensor) -> Any:
        def observe(x: Tensor, batch: llfx.Batch) -> Tensor:
            self.seen.append(batch)
            assert batch.mask is not None
            assert torch.equal(batch.inputs[batch.mask.bool()], x)
            last = batch.inputs[torch.arange(len(batch.inputs)), batch.mask.sum(1) - 1]
            return last.mean(0) * (1 if batch.index % 2 == 0 else -1)

        return observe

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: llfx.Statistic) -> None:
        p.lora_v.copy_(weight @ statistic.total)

    def forward(self, x: Tensor, base: Any, p: Any) -> Tensor:
        y: Tensor = base(x) + p.lora_shared_c * p.lora_v
        return y


@pytest.mark.broad
def test_an_observer_of_two_arguments_gets_the_batch_its_mask_and_the_call() -> None:
    base = llama()
    ids = torch.randint(3, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}]
    Steer.seen.clear()
    with registered(Steer):
        gm = llfx.rewrite(base, Steer(target_roles="down"), calibration=batches)
    first, second = Steer.seen
    assert (first.index, second.index) == (0, 1)
    assert first.arguments["input_ids"] is batches[0]["input_ids"]
    assert first.inputs.shape == second.inputs.shape == (2, 9, 24)
    assert first.mask is not None
    assert torch.equal(first.mask, mask[:2])
    ends = first.inputs[torch.arange(2), torch.tensor([8, 5])].mean(0) - second.inputs[:, -1].mean(0)
    weight = base.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert torch.allclose(gm.get_buffer("model.layers.0.mlp.down_proj.lora_v"), weight @ ends, atol=1e-6)


@pytest.mark.broad
def test_arguments_by_position_have_the_names_of_the_model() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Looks(llfx.EVA):
        def observer(self, site: Site, weight: Tensor) -> Any:
            def observe(x: Tensor, batch: llfx.Batch, center: bool = True) -> Any:
                assert batch.mask is None
                assert list(batch.arguments) == ["input"]
                assert batch.arguments["input"].shape[0] == batch.index + 1
                return eva(x)

            eva: Any = super().observer(site, weight)
            return observe

    with registered(Looks):
        gm = llfx.rewrite(model(), Looks(r=3, target_names="."), calibration=data(1, 2))
    for name, tensor in llfx.adapter_state_dict(llfx.rewrite(model(), EVA, calibration=data(1, 2))).items():
        assert torch.equal(tensor, llfx.adapter_state_dict(gm)[name])


# AntiPaSTO.


@pytest.mark.broad
def test_calibrated_antipasto_keeps_the_directions_that_are_large_in_weight_and_inputs() -> None:
    net, batches = model(), data(6, 3)
    gm = llfx.rewrite(net, llfx.AntiPaSTO(r=4, target_names=("0",)), calibration=batches)
    u, s, vh = torch.linalg.svd(net.get_parameter("0.weight").detach(), full_matrices=False)
    scores = s * (inputs_of(net, "0", batches) @ vh.t()).abs().mean(0)
    top = scores.argsort(descending=True)[:4].sort().values
    assert top.tolist() != [0, 1, 2, 3], "the case must differ from the largest singular values"
    assert torch.allclose(gm.get_buffer("0.lora_S"), s[top])
    same_lines(gm.get_buffer("0.lora_Vh"), vh[top])
    same_lines(gm.get_buffer("0.lora_U").t(), u.t()[top])


# Errors.


def test_eva_without_data_says_how_to_give_it() -> None:
    with pytest.raises(llfx.ConfigError, match="calibration=batches"):
        llfx.rewrite(model(), EVA)


def test_fewer_tokens_than_the_rank_are_refused() -> None:
    with pytest.raises(llfx.ConfigError, match="2 tokens of calibration data; r=3"):
        llfx.rewrite(model(), EVA, calibration=[(torch.randn(2, WIDTH, dtype=F64),)])


def test_data_that_no_variant_starts_from_is_refused() -> None:
    with pytest.raises(llfx.ConfigError, match="LoRA does not start from data"):
        llfx.rewrite(model(), llfx.LoRA(r=2, target_names=(".",)), calibration=data(2))


def test_no_batch_and_a_batch_that_does_not_fit_are_refused_and_change_nothing() -> None:
    net = model()
    with unchanged(net):
        with pytest.raises(llfx.ConfigError, match="holds no batch"):
            llfx.rewrite(net, EVA, calibration=[])
        with pytest.raises(llfx.CaptureError, match="batch 1 does not fit"):
            llfx.rewrite(net, EVA, calibration=[*data(2), (torch.randn(2, 5, dtype=F64),)])


def test_rho_below_one_is_refused() -> None:
    with pytest.raises(llfx.ConfigError, match="rho"):
        llfx.EVA(rho=0.5)


# Adapters on top of adapters.


def test_a_second_adapter_observes_the_inputs_that_the_first_one_makes() -> None:
    net, batches = model(), data(10)
    first = llfx.rewrite(net, llfx.LoRA(r=2, target_names=("0",)))
    with torch.no_grad():
        first.get_parameter("0.lora_B").normal_()
    both = llfx.rewrite(first, llfx.EVA(r=3, target_names=("2",)), calibration=batches)
    merged = llfx.merge(first)
    seen = torch.cat(
        [
            torch.tanh(
                torch.nn.functional.linear(
                    x.flatten(0, -2), merged.get_parameter("0.weight"), merged.get_parameter("0.bias")
                )
            )
            for (x,) in batches
        ]
    )
    same_lines(both.get_parameter("2.lora_A").detach(), torch.linalg.svd(seen).Vh[:3])
