"""What a model asks of the process, and what it keeps in Python: a graph has one answer for good, or there is none."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.process import default_dtype, deterministic
from tests.support.untouched import untouched

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
CFG = llfx.LoRA(r=2, target_names=(".",))
BFLOAT16 = torch.bfloat16


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


class AsksGrad(Layers):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.a if torch.is_grad_enabled() else self.b
        result: Tensor = layer(x)
        return result


class AsksAutocast(Layers):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.a if torch.is_autocast_enabled("cpu") else self.b
        result: Tensor = layer(x)
        return result


class AsksDtype(Layers):
    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if torch.get_default_dtype() is torch.float32 else 3.0
        result: Tensor = self.a(x) * scale
        return result


class AsksInference(Layers):
    def forward(self, x: Tensor) -> Tensor:
        scale = 3.0 if torch.is_inference_mode_enabled() else 2.0
        result: Tensor = self.a(x) * scale
        return result


class AsksDeterministic(Layers):
    def forward(self, x: Tensor) -> Tensor:
        scale = 3.0 if torch.are_deterministic_algorithms_enabled() else 2.0
        result: Tensor = self.a(x) * scale
        return result


ASKING = {
    AsksGrad: r"is_grad_enabled\(\) at `layer = self\.a if torch\.is_grad_enabled\(\) else self\.b`",
    AsksAutocast: r"is_autocast_enabled\(\) at `layer = self\.a if torch\.is_autocast_enabled\(\"cpu\"\) else self\.b`",
    AsksDtype: r"get_default_dtype\(\) at `scale = 2\.0 if torch\.get_default_dtype\(\)",
    AsksInference: r"is_inference_mode_enabled\(\) at `scale = 3\.0 if torch\.is_inference_mode_enabled\(\)",
    AsksDeterministic: r"are_deterministic_algorithms_enabled\(\) at `scale = 3\.0 if torch\.are_det",
}


@pytest.mark.parametrize("kind", ASKING)
def test_a_question_that_symbolic_tracing_would_answer_for_good_is_refused_with_the_line(kind: Any) -> None:
    model = made(kind)
    with untouched(model), pytest.raises(llfx.CaptureError, match=rf"{ASKING[kind]}.*:\d+\).*The way out: "):
        llfx.capture(model)


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad])
def test_a_question_for_gradients_is_refused_with_example_inputs_whatever_the_mode_of_the_caller(caller: Any) -> None:
    with caller(), pytest.raises(llfx.CaptureError, match=rf"differs from the model.*{ASKING[AsksGrad]}"):
        llfx.capture(made(AsksGrad), (X[:2],))


@pytest.mark.broad
def test_a_graph_holds_for_the_autocast_of_its_capture() -> None:
    model = made(AsksAutocast)
    gm = llfx.rewrite(model, CFG, (X[:2],))
    randomise(gm, 0)
    assert torch.equal(llfx.remove(gm)(X), model(X))
    for graph in (gm, gm.eval(), llfx.remove(gm), llfx.merge(gm)):
        graph(X)
        with torch.autocast("cpu", BFLOAT16), pytest.raises(llfx.errors.CallError, match=ASKING[AsksAutocast]):
            graph(X)
    compiled = torch.compile(gm, backend="eager")
    close(compiled(X), gm(X), 0.0, "compiled")
    with torch.autocast("cpu", BFLOAT16), pytest.raises(Exception, match=ASKING[AsksAutocast]):
        compiled(X)
    with torch.autocast("cpu", BFLOAT16):
        of_autocast = llfx.capture(model, (X[:2],))
        close(of_autocast(X), model(X), 0.0, "under autocast")
    with pytest.raises(llfx.errors.CallError, match=r"it is torch\.bfloat16 there, and another one in this call"):
        of_autocast(X)


STATES: dict[Any, Any] = {
    AsksInference: torch.inference_mode,
    AsksDtype: lambda: default_dtype(torch.float64),
    AsksDeterministic: deterministic,
}


@pytest.mark.parametrize("kind", STATES)
def test_a_graph_holds_for_the_other_settings_of_its_capture(kind: Any) -> None:
    model = made(kind)
    gm = llfx.capture(model, (X[:2],))
    assert torch.equal(gm(X), model(X))
    with STATES[kind](), pytest.raises(llfx.errors.CallError, match=ASKING[kind]):
        gm(X)
    assert torch.equal(gm(X), model(X))


class AsksInVain(Layers):
    """Asks, and computes the same whatever the answer is, as models that choose a faster way to the same."""

    def forward(self, x: Tensor) -> Tensor:
        faster = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        result: Tensor = self.a(x) if faster else nn.functional.linear(x, self.a.weight, self.a.bias)
        return result


class AsksTorch(Layers):
    """Leaves it to torch to ask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        result: Tensor = self.layer(x[None])[0]
        return result


@pytest.mark.parametrize("kind", [AsksInVain, AsksTorch])
@pytest.mark.parametrize("inputs", [None, (X[:2],)], ids=["traced", "exported"])
def test_questions_without_effect_are_no_matter(kind: Any, inputs: Any) -> None:
    if kind is AsksTorch and inputs is None:
        pytest.skip("the layer looks at shapes, which symbolic tracing cannot")
    model = made(kind).eval()
    gm = llfx.capture(model, inputs)
    for caller in (torch.enable_grad, torch.no_grad, lambda: torch.autocast("cpu", BFLOAT16)):
        with caller():
            close(gm(X), model(X), 1e-6, "output")


def test_questions_are_found_by_their_effect_while_a_profiler_runs() -> None:
    def profiler(*_: object) -> None: ...

    sys.setprofile(profiler)
    try:
        with pytest.raises(llfx.CaptureError, match="because a profiler runs"):
            llfx.capture(made(AsksAutocast))
        gm = llfx.capture(made(AsksAutocast), (X[:2],))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    with torch.autocast("cpu", BFLOAT16), pytest.raises(llfx.errors.CallError, match="because a profiler runs"):
        gm(X)


# Python state.


class Counts(Layers):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.a(x) * self.calls
        return result


class CountsOfClass(Layers):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        result: Tensor = self.a(x) * type(self).calls
        return result


CALLS = [0]


class CountsOfFile(Layers):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(CALLS))
        result: Tensor = self.a(x) * CALLS[-1]
        return result


class Remembers(Layers):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if self.last is not None:
            y = y + self.last
        self.last = y
        return y


class Alternates(Layers):
    odd = False

    def forward(self, x: Tensor) -> Tensor:
        self.odd = not self.odd
        result: Tensor = (self.a if self.odd else self.b)(x)
        return result


KEEPING = {
    Counts: r"keeps calls from one call for the next at `self\.calls \+= 1`",
    CountsOfClass: r"keeps calls from one call for the next at `type\(self\)\.calls \+= 1`",
    CountsOfFile: r"keeps CALLS from one call for the next at `CALLS\.append\(len\(CALLS\)\)`",
    Remembers: r"keeps last from one call for the next at `self\.last = y`",
    Alternates: r"keeps odd from one call for the next at `self\.odd = not self\.odd`",
}


@pytest.mark.parametrize("inputs", [None, (X[:2],)], ids=["traced", "exported"])
@pytest.mark.parametrize("kind", KEEPING)
def test_what_a_call_changes_for_the_next_is_refused_with_the_line(kind: Any, inputs: Any) -> None:
    model, before = made(kind), (CountsOfClass.calls, list(CALLS))
    with untouched(model), pytest.raises(llfx.CaptureError, match=KEEPING[kind] + r" \(.*:\d+\).*The way out: "):
        llfx.capture(model, inputs)
    assert before == (CountsOfClass.calls, CALLS)


class CountsInVain(Layers):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = (self.b if self.calls > 100 else self.a)(x)
        return result


class Notes(Layers):
    """Notes what is the same in each call, and the last result, which nothing reads."""

    width = 0

    def forward(self, x: Tensor) -> Tensor:
        self.width = self.a.out_features
        self.last: Tensor = self.a(x) / self.width
        result: Tensor = self.last
        return result


class Marks(Layers):
    """A call without a mask marks the model, which changes calls with one."""

    marked = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x)
        if mask is None:
            self.marked = True
        else:
            y = y * mask
        return self.b(y) if self.marked else y


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Marks()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.inner(x, mask)
        return result


def test_a_trace_does_not_find_what_another_one_has_left() -> None:
    model = made(Around)
    with untouched(model):
        gm = llfx.capture(model)
    for training in (True, False):
        assert torch.equal(gm.train(training)(X, X), model.train(training)(X, X))
    with pytest.raises(llfx.errors.CallError, match="mask=None"):
        gm(X, None)


@pytest.mark.parametrize("inputs", [None, (X[:2],)], ids=["traced", "exported"])
def test_a_count_is_warned_of_and_what_stays_the_same_is_not(inputs: Any) -> None:
    model = made(CountsInVain)
    with untouched(model), pytest.warns(UserWarning, match=r"changes calls in each call at `self\.calls \+= 1`"):
        gm = llfx.capture(model, inputs)
    assert torch.equal(gm(X), model(X))
    model = made(Notes)
    with untouched(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* in each call")
        gm = llfx.capture(model, inputs)
    assert torch.equal(gm(X), model(X))
    assert not hasattr(gm, "last")


class Draws(Layers):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) * random.random()
        return result


def test_what_python_draws_is_refused() -> None:
    with pytest.raises(llfx.CaptureError, match="draws numbers of random"):
        llfx.capture(made(Draws))


class Iterates(Layers):
    """Has another number in each call, of an iterator; `itertools.count` cannot be copied with the model."""

    numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) * next(self.numbers)
        return result


class DrawsOfItsOwn(Layers):
    """Draws from a generator of its own, where torch's are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) * self.generator.random()
        return result


class Loops(Layers):
    """Runs a layer once more in each call."""

    times = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(next(self.times)):
            x = self.a(x)
        return x


@pytest.mark.parametrize("kind", [Iterates, DrawsOfItsOwn, Loops])
def test_a_number_that_is_another_one_in_each_trace_is_refused(kind: Any) -> None:
    with pytest.raises(llfx.CaptureError, match=r"(with other numbers each time it is traced|draws numbers of random)"):
        llfx.capture(made(kind))
    with pytest.raises(llfx.CaptureError, match=r"differs from the model|draws numbers of random"):
        llfx.capture(made(kind), (X,))


class Assigns(Layers):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        self.count = self.count + 1
        return y + self.count


def test_a_buffer_that_is_assigned_is_refused_with_the_line_and_exported() -> None:
    model = made(Assigns)
    pattern = r"assigns to its buffer count at `self\.count = self\.count \+ 1`.*The way out: pass example_inputs"
    with untouched(model), pytest.raises(llfx.CaptureError, match=pattern):
        llfx.capture(model)
    gm = llfx.capture(model, (X[:2],))
    assert torch.equal(gm(X), model(X))
    assert torch.equal(gm(X), model(X))
