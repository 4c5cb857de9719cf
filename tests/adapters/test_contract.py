"""Check what happens when a user's variant breaks a rule: each mistake is an error with this message, by every way."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.sites.site import Site
from tests.support.models import one_layer_llama
from tests.support.refusals import WAYS, Mine, Net, X, refusal
from tests.support.releases import has
from tests.support.selection import broad_after

FROZEN = torch.tensor([1.0, 2.0, 3.0, 4.0])
NUMBER = torch.tensor(2.0)


class ReturnsNone(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        base(x)


class ReturnsTuple(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x), x


class Broadcasts(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x).sum(-1, keepdim=True)


class Twice(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + base(x)


class Never(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return self.update(x, p)


class LeavesOut(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        base(x)
        return self.update(x, p)


class CutsGradient(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        with torch.no_grad():
            y = base(x)
        return y + self.update(x, p)


class Same(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x)


class MoreRows(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(torch.cat([x, x]))[: len(x)]


class WritesX(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        x += 1
        return base(x)


class WritesPartOfX(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        x.flatten(0)[0] = 0
        return 2 * base(x)


class WritesWeight(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        base.weight.view(-1).mul_(2)
        return 2 * base(x)


class WritesBias(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        torch.add(base.bias, 1, out=base.bias)
        return 2 * base(x)


class WritesOwn(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        p.lora_A.clamp_(-1, 1)
        return base(x) + self.update(x, p)


class Normalizes(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(F.batch_norm(x, p.lora_A[0], p.lora_A[1], training=True))


class UsesTensorOfModule(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x * FROZEN)


class UsesNumberOfModule(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) * NUMBER


class MakesTensor(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x * torch.tensor([1.0, 2.0, 3.0, 4.0]))


class Decides(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        y = base(x)
        return 2 * y if y.sum() > 0 else y


class Item(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) * p.lora_A.sum().item()


class Numpy(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) * p.lora_A.numpy().sum()


class WrongShape(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + x @ p.lora_A @ p.lora_B


class Typo(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + F.linear(x, p.lora_a)


class Assigns(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        p.lora_A = 2 * p.lora_A
        return base(x) + self.update(x, p)


class WrongType(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) @ "p.lora_A"


class OnlyInEvaluation(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return 2 * base(x) if base.training else base(x)[..., :1]


SHAPES = "Shapes: x (3, 4), lora_A (2, 4), lora_B (8, 2)."
NEW = "The way out: an operation that returns a new tensor, such as t * 2 in place of t.mul_(2) or t *= 2."
VALUES = (
    "depends on the values of a tensor in Python (an if, a loop, a size, .item(), .numpy()), which a graph cannot. The"
    " way out: torch.where in place of an if, and a field of the config in place of a number."
)
CUTS = (
    "leaves out the result of base(...), or cuts its gradient by detach() or torch.no_grad(), and the layers before the"
    " site train through it."
)
MOVES = "([1.0, 2.0, 3.0, 4.0]), which would not move with the model. The way out: Python numbers; or a tensor of the"
SPEC = 'variant, p.lora_c, with "lora_c": ParamSpec((4,), init=lambda t: t.copy_(...), trainable=False) in params.'
LINE = "Line N of test_contract.py:"
MISTAKES = {
    ReturnsNone: "must return a tensor like base(x), and returned None.",
    ReturnsTuple: "must return a tensor like base(x), and returned (<Tensor>, <Tensor>).",
    Broadcasts: "returned a tensor (3, 1), and base(x) is (3, 8).",
    Twice: "must call base(...) exactly once; it called it 2 times.",
    Never: "must call base(...) exactly once; it called it 0 times.",
    LeavesOut: CUTS,
    CutsGradient: CUTS,
    Same: "returns base(x) unchanged.",
    MoreRows: f"calls base on an input (6, 4), and x is (3, 4). {LINE} return base(torch.cat([x, x]))[: len(x)].",
    WritesX: f"writes to x in place (add_), which it may only read. {NEW} {LINE} x += 1.",
    WritesPartOfX: (
        f"writes to x in place ({'fill_' if has('torch', '2.15') else 'copy_'}), which it may only read. {NEW}"
        f" {LINE} x.flatten(0)[0] = 0."
    ),
    WritesWeight: (
        f"writes to base.weight in place (mul_), which it may only read. {NEW} {LINE} base.weight.view(-1).mul_(2)."
    ),
    WritesBias: (
        f"writes to base.bias in place (add), which it may only read. {NEW}"
        f" {LINE} torch.add(base.bias, 1, out=base.bias)."
    ),
    WritesOwn: f"writes to p.lora_A in place (clamp_), which it may only read. {NEW} {LINE} p.lora_A.clamp_(-1, 1).",
    Normalizes: (
        f"writes to p.lora_A in place (native_batch_norm), which it may only read. {NEW}"
        f" {LINE} return base(F.batch_norm(x, p.lora_A[0], p.lora_A[1], training=True))."
    ),
    UsesTensorOfModule: f"uses a tensor made outside of it {MOVES} {SPEC} {LINE} return base(x * FROZEN).",
    UsesNumberOfModule: (
        "uses a tensor made outside of it (2.0), which would not move with the model. The way out: a Python number in"
        f" its place. {LINE} return base(x) * NUMBER."
    ),
    MakesTensor: (
        f"uses a tensor made in it {MOVES} {SPEC} {LINE} return base(x * torch.tensor([1.0, 2.0, 3.0, 4.0]))."
    ),
    Decides: f"{VALUES} {LINE} return 2 * y if y.sum() > 0 else y.",
    Item: f"{VALUES} {LINE} return base(x) * p.lora_A.sum().item().",
    Numpy: VALUES,
    WrongShape: (
        "failed, RuntimeError: a and b must have same reduction dim, but got [3, 4] X [2, 4]."
        f" {LINE} return base(x) + x @ p.lora_A @ p.lora_B. {SHAPES}"
    ),
    Typo: (
        "failed, AttributeError: p has no tensor 'lora_a', did you mean 'lora_A'? params gives it lora_A, lora_B."
        f" {LINE} return base(x) + F.linear(x, p.lora_a). {SHAPES}"
    ),
    Assigns: (
        "failed, AttributeError: p.lora_A cannot be assigned, because that would not change the adapter's tensor. Write"
        f" to it in place: p.lora_A.copy_(...). {LINE} p.lora_A = 2 * p.lora_A. {SHAPES}"
    ),
    WrongType: (
        "failed, TypeError: unsupported operand type(s) for @: 'Tensor' and 'str'."
        f' {LINE} return base(x) @ "p.lora_A". {SHAPES}'
    ),
    OnlyInEvaluation: "returned a tensor (3, 1), and base(x) is (3, 8).",
}


@pytest.mark.parametrize("way", broad_after(1, WAYS))
@pytest.mark.parametrize(("cls", "expected"), MISTAKES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_forward_that_breaks_a_rule(way: Any, cls: type[Mine], expected: str) -> None:
    assert refusal(way, cls) == f"{cls.__name__}.forward at 'fc' (d_in=4, d_out=8) {expected}"


@pytest.mark.parametrize("way", WAYS)
def test_the_line_of_the_user_is_in_the_traceback_and_in_the_message(way: Any) -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "x @ p.lora_A @ p.lora_B" in line)
    with pytest.raises(llfx.ConfigError, match=rf" Line {number} of test_contract\.py: ") as caught:
        way(Net(), WrongShape(target_names="fc"), (X,))
    traceback = caught.value.__cause__.__traceback__ if caught.value.__cause__ else None
    places = []
    while traceback:
        places.append((traceback.tb_frame.f_code.co_name, traceback.tb_lineno))
        traceback = traceback.tb_next
    assert ("forward", number) in places


@pytest.mark.parametrize("way", WAYS)
def test_what_python_draws_is_refused_and_what_torch_draws_is_not(way: Any) -> None:
    class Draws(Mine):
        def forward(self, x: Tensor, base: Any, p: Any) -> Any:
            return base(x) * random.random()

    numbers = r"aten\.mul\.Tensor\(torch\.float32 \(3, 8\), [\d.e-]+\)"
    assert re.fullmatch(
        rf"Draws\.forward at 'fc' \(d_in=4, d_out=8\) does not compute the same at each call: it runs {numbers}, and"
        rf" {numbers} the next time\. A graph keeps the first\. The way out: draw random numbers with torch, such as"
        r" torch\.rand_like\(x\), and keep what is the same at each call in fields of the config\.",
        refusal(way, Draws),
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_with_other_names_says_which_to_use(way: Any) -> None:
    class Renamed(Mine):
        def forward(self, x: Tensor, linear: Any, tensors: Any) -> Any:
            return linear(x)

    assert refusal(way, Renamed) == (
        "Renamed.forward(x: 'Tensor', linear: 'Any', tensors: 'Any') -> 'Any' is called as forward(x, base=base, p=p),"
        " missing a required argument: 'linear'. Write def forward(self, x, base, p)."
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_variant_without_its_two_functions_says_which(way: Any) -> None:
    class Empty(llfx.Variant):
        pass

    class Half(llfx.Variant):
        def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
            return {}

    assert refusal(way, Empty) == "Empty has no function params. Write def params(self, site) in the class."
    assert refusal(way, Half) == "Half has no function forward. Write def forward(self, x, base, p) in the class."


# Every way comes by the same checks.


def refusal_of_backend(cls: type[llfx.Variant]) -> str:
    with pytest.raises(llfx.ConfigError) as caught:
        llfx.backend(cls(target_names="fc")).adapt(Net(), X)
    return re.sub(r"Line \d+ of", "Line N of", str(caught.value))


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, [WritesX, Twice, WrongShape]))
def test_backend_and_adapt_refuse_the_same(cls: type[Mine]) -> None:
    assert refusal_of_backend(cls) == f"{cls.__name__}.forward at 'fc' (d_in=4, d_out=8) {MISTAKES[cls]}"
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(
        llfx.ConfigError, match=rf"^{cls.__name__}\.forward at '{re.escape(name)}' \(d_in=16, d_out=16\) "
    ):
        llfx.adapt(one_layer_llama(), cls(target_names="q_proj"))
