"""Sites of every kind: the ones that targets choose, that tables list, and that are refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, output, randomise, unchanged

WIDTH, NUMBER = 8, 20
anything: Any = llfx  # takes arguments of wrong types, as a user without a type checker may pass them


def _ids(*shape: int) -> Tensor:
    return torch.randint(NUMBER, shape, generator=torch.Generator().manual_seed(0))


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.grouped = (
            nn.Embedding(NUMBER, WIDTH),
            nn.Conv1d(WIDTH, WIDTH, 3),
            nn.Conv1d(8, 8, 1, groups=2),
        )
        self.scaled = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(WIDTH, NUMBER, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.scaled(self.grouped(self.conv(self.embed(ids).transpose(1, 2))))
        return self.head(x.transpose(1, 2))


@functools.cache
def everything() -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = Everything().double()
    return model, llfx.capture(model, (_ids(2, 6),))


def adapted(cfg: llfx.Variant) -> list[str]:
    return [row.name for row in llfx.inspect(llfx.rewrite(everything()[1], cfg)) if row.adapters]


def test_kinds_other_than_linears_are_adapted_only_when_asked_for() -> None:
    lora = functools.partial(llfx.LoRA, r=2)
    assert adapted(lora(target_names=(".",))) == ["head"]
    assert adapted(lora(target_kinds=("conv",))) == ["conv", "scaled"]  # without the convolution that has groups
    assert adapted(lora(target_kinds="embedding")) == ["embed"]
    assert adapted(lora(target_kinds=("embedding", "conv"), target_names=("embed", "scaled"))) == ["embed", "scaled"]
    assert adapted(lora(target_kinds=("embedding", "linear"), target_roles=("head",))) == ["head"]
    assert adapted(lora(target_kinds=("linear", "conv"), target_names=(".",), exclude_names=("conv",))) == [
        "scaled",
        "head",
    ]


def test_inspect_lists_the_kinds_asked_for() -> None:
    _, base = everything()
    assert [row.name for row in llfx.inspect(base)] == ["head"]
    table = llfx.inspect(base, kinds=("embedding", "conv"))
    assert [(row.name, row.kind, row.d_in, row.d_out) for row in table] == [
        ("embed", "embedding", NUMBER, WIDTH),
        ("conv", "conv", 3 * WIDTH, WIDTH),
        ("scaled", "conv", 3 * WIDTH, WIDTH),
    ]


def test_a_tied_embedding_is_adapted_and_merged_alone() -> None:
    model, base = everything()
    ids = _ids(3, 8)
    gm = llfx.rewrite(base, llfx.LoRA(r=2, target_kinds=("embedding",)))
    randomise(gm, 1)
    assert gm.get_parameter("embed.weight") is gm.get_parameter("head.weight")
    merged = llfx.merge(gm)
    close(output(merged, (ids,)), output(gm, (ids,)), 1e-9, "merged")
    expected = copy.deepcopy(model)
    expected.embed.weight = nn.Parameter(merged.get_parameter("embed.merged_weight"))
    close(output(merged, (ids,)), output(expected, (ids,)), 1e-9, "untied")
    assert merged.get_parameter("head.weight").data_ptr() == model.head.weight.data_ptr()


def test_a_convolution_with_another_padding_mode_is_rewritten_but_not_wrapped() -> None:
    model, base = everything()
    cfg = llfx.LoRA(r=2, target_kinds=("conv",), target_names=("scaled",))
    gm = llfx.rewrite(base, cfg)
    randomise(gm, 1)
    close(output(llfx.merge(gm), (_ids(3, 8),)), output(gm, (_ids(3, 8),)), 1e-9, "merged")
    with pytest.raises(llfx.ConfigError, match="'scaled' is not a module that is called and does nothing else"):
        llfx.wrap(model, cfg, (_ids(2, 6),))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: llfx.LoRA(target_kinds=("lstm",)),
            llfx.ConfigError,
            "unknown kind of site 'lstm'; the kinds are linear",
        ),
        (lambda: anything.LoRA(target_kinds=None), llfx.ConfigError, "target_kinds must be a tuple"),
        (
            lambda: llfx.LoRA(r=2, target_names=("embed",)),
            llfx.SelectionError,
            r"to adapt embed \(embedding\), name its kind",
        ),
        (lambda: llfx.LoRA(r=2, target_kinds=("experts",)), llfx.SelectionError, "the model has no experts site"),
        (
            lambda: llfx.MiSS(r=2, target_kinds=("conv",)),
            llfx.ConfigError,
            "MiSS cannot adapt 'conv', which is a convolution",
        ),
    ],
)
def test_bad_kinds_are_refused(make: Callable[[], llfx.Variant], error: type[Exception], message: str) -> None:
    model, base = everything()
    rewrite_and_wrap: tuple[Callable[[Any], Any], ...] = (
        lambda cfg: llfx.rewrite(base, cfg),
        lambda cfg: llfx.wrap(model, cfg, (_ids(2, 6),)),
    )
    for adapt in rewrite_and_wrap:
        with unchanged(model), pytest.raises(error, match=message):
            adapt(make())


def test_only_linears_are_calibrated() -> None:
    _, base = everything()
    with pytest.raises(llfx.ConfigError, match="only the inputs of plain linears can be observed"):
        llfx.rewrite(base, llfx.EVA(r=2, target_kinds=("embedding",)), calibration=[(_ids(4, 6),)])
