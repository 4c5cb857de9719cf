"""Names of sites: all different, also where one weight is read in two orientations or belongs to the root."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from tests.support.conformance import check_remove, close, output, randomise, small
from tests.support.selection import broad_after, slow_after

VARIANTS = (llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.OFT, llfx.HRA)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.t())


class ThereAndBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.w.t()


class Apart(nn.Module):
    """Computes what the two others compute, with a module for each of their sites."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    result = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    result.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    return result


MODELS: dict[str, tuple[type[TiedAutoencoder | ThereAndBack], tuple[str, str]]] = {
    "enc": (TiedAutoencoder, ("enc", "enc.sites.transposed")),
    "w": (ThereAndBack, ("sites.w.transposed", "sites.w")),
}


@pytest.mark.parametrize("exported", broad_after(1, [False, True]), ids=["symbolic", "exported"])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("cls", broad_after(1, slow_after(3, VARIANTS)))
def test_one_weight_in_two_orientations_is_two_sites(
    cls: type[llfx.Variant], model_name: str, exported: bool, tmp_path: Path
) -> None:
    kind, names = MODELS[model_name]
    model = kind().double().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    graph = llfx.capture(model, (torch.randn(2, 8, dtype=torch.float64),) if exported else None)
    cfg = small(cls, target_names=(".",))
    gm = llfx.rewrite(graph, cfg)
    assert [(row.name, row.d_in, row.d_out) for row in llfx.inspect(gm)] == [(names[0], 8, 12), (names[1], 12, 8)]
    randomise(gm, 1)
    weight = model.enc.weight if isinstance(model, TiedAutoencoder) else model.w.mT
    bias = model.enc.bias.detach() if isinstance(model, TiedAutoencoder) else None
    apart = Apart(linear(weight.detach(), bias), linear(weight.detach().T.contiguous(), None))
    wrapped = llfx.wrap(apart.eval(), cfg)
    state = llfx.adapter_state_dict(gm)
    llfx.load_adapter_state_dict(
        wrapped,
        {
            f"{ours}.{key.removeprefix(f'{theirs}.')}": tensor
            for theirs, ours in zip(names, ("first", "second"), strict=True)
            for key, tensor in state.items()
            if key.rpartition(".")[0] == theirs
        },
    )
    expected = output(wrapped, (x,)).detach()
    close(output(gm, (x,)).detach(), expected, 1e-12, "rewritten")
    close(output(llfx.merge(gm), (x,)), expected, 1e-12, "merged")
    assert torch.equal(output(llfx.remove(gm), (x,)), output(graph, (x,)))
    llfx.save(gm, tmp_path / "adapter.safetensors")
    close(output(llfx.load(graph, tmp_path / "adapter.safetensors"), (x,)).detach(), expected, 1e-12, "loaded")
    with pytest.raises(llfx.ConfigError, match=r"not a module of its own"):
        llfx.save_peft(gm, tmp_path / "peft")
    with pytest.raises(llfx.ConfigError, match=r"cannot be wrapped eagerly"):
        llfx.wrap(model, cfg, (x,))


@pytest.mark.parametrize("exported", broad_after(1, [False, True]), ids=["symbolic", "exported"])
@pytest.mark.parametrize("cls", broad_after(2, VARIANTS))
def test_a_weight_at_the_root_is_a_site(cls: type[llfx.Variant], exported: bool, tmp_path: Path) -> None:
    model = nn.Linear(8, 12).double().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    graph = llfx.capture(model, (torch.randn(2, 8, dtype=torch.float64),) if exported else None)
    cfg = small(cls, target_names=(".",))
    gm = llfx.rewrite(graph, cfg)
    assert [row.name for row in llfx.inspect(gm)] == ["sites.weight"]
    randomise(gm, 1)
    wrapped = llfx.wrap(nn.Sequential(linear(model.weight.detach(), model.bias.detach())).eval(), cfg, (x,))
    state = {key.replace("sites.weight", "0"): tensor for key, tensor in llfx.adapter_state_dict(gm).items()}
    llfx.load_adapter_state_dict(wrapped, state)
    expected = output(wrapped, (x,)).detach()
    close(output(gm, (x,)).detach(), expected, 1e-12, "rewritten")
    close(output(llfx.merge(gm), (x,)), expected, 1e-12, "merged")
    removed = llfx.remove(gm)
    assert str(removed.graph) == str(graph.graph)
    assert removed.state_dict().keys() == model.state_dict().keys()
    llfx.save(gm, tmp_path / "adapter.safetensors")
    close(output(llfx.load(graph, tmp_path / "adapter.safetensors"), (x,)).detach(), expected, 1e-12, "loaded")
    with pytest.raises(llfx.ConfigError, match=r"not a module of its own"):
        llfx.save_peft(gm, tmp_path / "peft")


class Split(nn.Module):
    """Takes columns of a stored weight: its transpose is split by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.t().chunk(2)
        return F.linear(x, first) * F.linear(x, second)


def test_columns_of_a_weight_are_not_taken_for_rows() -> None:
    base = llfx.capture(Split().double().eval(), (torch.randn(2, 8).double(),))
    sites = find_sites(base)
    assert {site.name for site in sites} == {"sites.weight", "sites.weight.use_2"}
    assert all(site.kind.rows is None and site.computed_weight is not None for site in sites)
    gm = llfx.rewrite(base, llfx.DoRA(r=2, target_names=(".",)))
    randomise(gm, 0)
    x = (torch.randn(3, 8).double(),)
    close(output(llfx.merge(gm), x), output(gm, x), 1e-10, "merged")
    check_remove(gm, base, base)


class KeptOrder(nn.Module):
    """Permutes a weight without changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.permute(0, 1))


def test_a_permutation_that_changes_nothing_is_not_a_transpose() -> None:
    x = torch.randn(2, 8)
    gm = llfx.rewrite(nn.Sequential(KeptOrder()), llfx.LoRA(r=2, target_names=(".",)), (x,))
    randomise(gm, 1)
    close(output(llfx.merge(gm), (x,)), output(gm, (x,)).detach(), 1e-5, "merged")
