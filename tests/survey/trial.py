"""Try on one model what a user would: capture, adapters, other sizes, against the eager wrapper."""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.capture.example_images import IMAGES
from lora_lite_fx.capture.example_sounds import SOUNDS
from lora_lite_fx.capture.hugging_face import is_diffusers, is_hugging_face
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.conformance import randomise

from .calls import calls_of, example_of, other_inputs

_TOLERANCE = 2e-4
_MOST_EXCLUDED = 12

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The outputs of a model by their path, and the gradients of its adapters by name."""

Report = Callable[..., None]
"""Takes what is known so far, as keyword arguments."""


STEPS = ("default", "inputs", "adapt", "generate", "compiled")


def try_model(build: Callable[[], Any], steps: Collection[str], report: Report) -> None:
    """Build a model and try the paths one after the other, and report each as soon as it is known.

    Args:
        build: makes the model.
        steps: those of `STEPS` to try.
        report: takes `built`, `default` (capture without inputs), `inputs` (capture with left padding and without
            labels), `adapt` (the adapted model itself), `generate` (its tokens, where the class generates), `compiled`
            (as one graph, by Dynamo and AOTAutograd), the number of `sites` and `linears`, the names of linears
            `left_out`, and the `seconds` of each.
    """
    with _outcome(report, "built"):
        model = build()
    tried = _Tried(model)
    report(linears=len(tried.linears), main_input=getattr(model, "main_input_name", None))
    if "default" in steps and not is_diffusers(model):  # whose config does not say how a pipeline calls it
        with _outcome(report, "default"):
            _unless_rounding(_compare_with_wrapper, tried, build, report)
    if "inputs" in steps:
        with _outcome(report, "inputs"):
            if is_diffusers(model):
                _unless_rounding(_compare_with_wrapper, tried, build, report)
            else:
                llfx.capture(model, other_inputs(model))  # compares the graph with the model in both modes
    if (is_hugging_face(model) or is_diffusers(model)) and {"adapt", "generate"} & set(steps):
        _try_adapted(tried, steps, build, report)
    if "compiled" in steps:
        with _outcome(report, "compiled"):
            _compare_with_compiled(tried)


class _Tried:
    """A model, and what several steps need of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.without: set[str] = set()
        self.modules = dict(model.named_modules())
        self.linears = [name for name, module in self.modules.items() if isinstance(module, (nn.Linear, Conv1D))]

    @cached_property
    def base(self) -> Any:
        """The graph that is captured without inputs, if the class can be."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gm = llfx.capture(self.model, self.required)
        for warning in caught:
            left_out = re.search(r"is captured without (.*?), and what", str(warning.message))
            self.without |= set(left_out.group(1).split(" and ") if left_out else ())
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return gm

    @property
    def required(self) -> Any:
        """The inputs without which the class cannot be captured; None if it can."""
        return example_of(self.model) if is_diffusers(self.model) else None

    @cached_property
    def adapted(self) -> tuple[Any, Any]:
        """The model as `adapt` makes it, and the eager wrapper, with the same adapters."""
        adapted = llfx.adapt(self.model, self.config, example_inputs=self.required)
        wrapped = llfx.wrap(self.base, self.config)
        randomise(adapted, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
        return adapted, wrapped

    @property
    def config(self) -> llfx.LoRA:
        """Adapters at all linear modules that the wrapper can wrap; at convolutions where there are no linears."""
        return self._configured[0]

    @property
    def excluded(self) -> list[str]:
        """The linear modules that the wrapper refuses to wrap."""
        return self._configured[1]

    @cached_property
    def _configured(self) -> tuple[llfx.LoRA, list[str]]:
        names = [row.name for row in llfx.inspect(self.base)]
        names = [name for name in names if type(self.modules.get(name)) in (nn.Linear, Conv1D)]
        convolutions = [(n, m) for n, m in self.modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
        names = names or [name for name, module in convolutions if module.groups == 1]
        if not names:
            raise Unequal("no linear module or convolution of the model is a site")
        pattern = "^(" + "|".join(map(re.escape, names)) + ")$"
        excluded: list[str] = []
        while True:
            exclude = [f"^{re.escape(name)}$" for name in excluded]
            kinds = ("linear", "conv")
            cfg = llfx.LoRA(r=1, alpha=2, target_names=pattern, exclude_names=exclude, target_kinds=kinds)
            try:
                llfx.wrap(self.base, cfg)
            except llfx.ConfigError as error:
                found = [name for name in names if f"'{name}'" in str(error) and name not in excluded]
                if not found or len(excluded) > _MOST_EXCLUDED:
                    raise
                excluded += found
            else:
                return cfg, excluded


@contextmanager
def _outcome(report: Report, step: str) -> Iterator[None]:
    """Report how a step ended: as itself, refused, wrong, or with an error that is not ours; and its seconds."""
    start = time.process_time()
    raised: Exception | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
            said = "yes"
        except NotApplicable as error:
            said = f"none: {error}"
        except Unequal as error:
            raised, said = error, f"wrong: {error}"
        except llfx.AdapterError as error:
            text = str(error)
            wrong = " differs from the model on the example inputs" in text
            raised, said = error, ("differs: " if wrong else "refused: ") + text
        except Exception as error:
            raised, said = error, f"error: {type(error).__name__}: {error} ({_place(error)})"
    ours = sorted(
        {str(w.message)[:300] for w in caught if "lora_lite_fx" in w.filename or "tests/survey" in w.filename}
    )
    extra = {f"{step}_warnings": ours} if ours else {}
    report(**{step: _without_folders(said)[:700], f"{step}_seconds": round(time.process_time() - start, 1)}, **extra)
    if raised is not None and step == "built":
        raise raised


def _without_folders(text: str) -> str:
    """Return a message without where this machine keeps its files."""
    return re.sub(r"/\S*?/(site-packages/|(?=tests/))", "", text)


class Unequal(Exception):
    """A graph computes something else than the wrapper."""


class NotApplicable(Exception):
    """A step makes no sense for a model."""


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lora_lite_fx/" in frame.filename]
    named = [*ours[-1:], *frames[-1:]]
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in named)


def _unless_rounding(
    compare: Callable[[_Tried, Report], None], tried: _Tried, build: Callable[[], Any], report: Report
) -> None:
    """Compare, and where results are apart, decide in double precision whether they are by more than rounding."""
    try:
        compare(tried, report)
    except Unequal as error:
        try:
            compare(_Tried(build().double()), report)
        except Exception as doubled:
            raise Unequal(f"{error}; in double precision: {doubled}") from doubled
        report(equal_in_double_precision=str(error))


def _compare_with_wrapper(tried: _Tried, report: Report) -> None:
    """Compare results and gradients of `rewrite` with those of `wrap` in both modes, at several sizes."""
    model, table = tried.model, llfx.inspect(tried.base)
    report(captured=True)
    names = {row.name for row in table}
    missing = [name for name in tried.linears if name not in names]
    report(sites=len(names), left_out=missing[:8], without_role=sum(1 for row in table if not row.roles))
    gm = llfx.rewrite(tried.base, tried.config)
    if tried.excluded:
        report(not_wrapped=tried.excluded)
    randomise(gm, 0)
    wrapped = wrap_again(gm, model)
    examples = calls_of(model, tried.without)
    _require_images_and_sounds(model, examples[0][1])
    for what, inputs in examples:
        for training in (True, False) if what == "example" else (what != "left padding",):
            where = f"{what}, {'training' if training else 'evaluation'}"
            try:
                expected = _run(wrapped, inputs, training)
            except Exception as error:  # the model itself does not take this
                report(**{f"not_tried ({what})": f"{type(error).__name__}: {str(error)[:100]}"})
                continue
            try:
                actual = _run(gm, inputs, training)
            except (AssertionError, RuntimeError, llfx.AdapterError) as error:
                if what == "example":
                    raise
                first = next(iter(_without_folders(str(error)).splitlines()), type(error).__name__)
                report(fixed=f"{what}: {first[:160]}")
                continue
            _require_equal(expected, actual, where, lambda: _run_nudged(wrapped, inputs, training))  # noqa: B023


def _require_images_and_sounds(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise `Unequal` if nothing is computed of the images of an example, or of sounds beside text.

    Either a gradient reaches them, however small, or others make a difference: some encoders compute no gradients. A
    codec alone may find the same codes for all sounds, as long as its weights are random.
    """
    names = [name for name in ((*IMAGES, *SOUNDS) if "input_ids" in inputs else IMAGES) if name in inputs]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}

    def outputs(**other: Tensor) -> list[Tensor]:
        torch.manual_seed(7)
        return [leaf for leaf in pytree.tree_leaves(dict(model(**inputs | other))) if isinstance(leaf, Tensor)]

    model.eval()
    before = outputs(**leaves)
    differentiable = [leaf.float().sum() for leaf in before if leaf.requires_grad]
    for name in names:
        total = torch.stack(differentiable).sum() if differentiable else torch.zeros((), requires_grad=True)
        (gradient,) = torch.autograd.grad(total, [leaves[name]], allow_unused=True, retain_graph=True)
        if gradient is None:
            after = outputs(**{name: inputs[name].flip(0) + 1})
            if all(torch.equal(one, other) for one, other in zip(after, before, strict=True)):
                raise Unequal(f"nothing is computed of {name}")


def _try_adapted(tried: _Tried, steps: Collection[str], build: Callable[[], Any], report: Report) -> None:
    """Compare an adapted model with the wrapper: results, gradients, and what it generates."""
    with _outcome(report, "adapt"):
        _unless_rounding(_compare_adapted, tried, build, report)
    if "generate" in steps:
        with _outcome(report, "generate"):
            if is_diffusers(tried.model) or not tried.model.can_generate():
                raise NotApplicable("the class does not generate")
            _unless_rounding(_compare_generated, tried, build, report)


def _compare_adapted(tried: _Tried, report: Report) -> None:
    adapted, wrapped = tried.adapted
    for what, inputs in calls_of(tried.model, tried.without):
        for training in (True, False) if what == "example" else (False,):
            where = f"{what}, {'training' if training else 'evaluation'}"
            try:
                expected = _run(wrapped, inputs, training)
            except Exception as error:  # the model itself does not take this
                report(**{f"not_tried ({what})": f"{type(error).__name__}: {str(error)[:100]}"})
                continue
            actual = _run(adapted, inputs, training)
            _require_equal(expected, actual, where, lambda: _run_nudged(wrapped, inputs, training))  # noqa: B023


def _compare_generated(tried: _Tried, report: Report) -> None:
    adapted, wrapped = tried.adapted
    inputs = other_inputs(tried.model).items()
    prompt = {name: value for name, value in inputs if not name.startswith("decoder_")}
    try:
        expected = _generated(wrapped, prompt)
    except Exception as error:
        raise NotApplicable(f"the model itself raises {type(error).__name__}: {str(error)[:100]}") from None
    _require_equal(expected, _generated(adapted, prompt), "generate")


def _generated(model: Any, prompt: dict[str, Tensor]) -> Results:
    """Return the logits of each token that a model generates."""
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return {str(i): logits for i, logits in enumerate(model.eval().generate(**prompt, **options).logits)}, {}


def _compare_with_compiled(tried: _Tried) -> None:
    """Compare a rewritten graph with itself, compiled as a whole."""
    gm, inputs = llfx.rewrite(tried.base, tried.config), example_of(tried.model, tried.without)
    randomise(gm, 0)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        expected = _run(gm, inputs, training)
        try:
            actual = _run(gm, inputs, training, compiled)
        except llfx.AdapterError:
            raise
        except Exception as error:
            _require_compiles(tried.model, inputs, training)
            raise error
        _require_equal(expected, actual, f"training={training}")


def _require_compiles(model: nn.Module, inputs: dict[str, Any], training: bool) -> None:
    """Raise NotApplicable if the model itself cannot be compiled."""
    try:
        _run(model, inputs, training, torch.compile(model, backend="aot_eager"))
    except Exception as error:
        raise NotApplicable(f"the model itself raises {type(error).__name__}: {str(error)[:100]}") from None


def _run(model: nn.Module, inputs: dict[str, Any], training: bool, call: Any = None) -> Results:
    """Return the results of a model, called as itself or by `call`."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    result = (model if call is None else call)(**inputs)
    if type(result).__module__.startswith("diffusers."):  # whose outputs have no paths
        result = result.to_tuple()
    paths, _ = pytree.tree_flatten_with_path(result)
    outputs = {pytree.keystr(path): value for path, value in paths if isinstance(value, Tensor)}
    floats = [value for value in outputs.values() if value.is_floating_point() and value.requires_grad]
    if floats:
        total = sum((value.float() * torch.arange(value.numel()).cos().view(value.shape)).sum() for value in floats)
        assert isinstance(total, Tensor)
        total.backward()
    names = llfx.adapter_state_dict(model)
    gradients = {n: p.grad for n, p in zip(names, llfx.adapter_parameters(model), strict=False) if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def _run_nudged(model: nn.Module, inputs: dict[str, Any], training: bool) -> Results:
    """Return the results with the last bits of the adapters changed."""
    state = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(model).items()}
    signs = torch.Generator().manual_seed(5)
    changed = {
        name: tensor * (1 + 2.0**-22 * (torch.rand(tensor.shape, generator=signs) - 0.5).sign())
        for name, tensor in state.items()
    }
    llfx.load_adapter_state_dict(model, changed)
    try:
        return _run(model, inputs, training)
    finally:
        llfx.load_adapter_state_dict(model, state)


def _require_equal(expected: Results, actual: Results, where: str, nudged: Callable[[], Results] | None = None) -> None:
    """Raise `Unequal` if results are further apart than rounding, and than ten times what changed last bits make."""
    if not actual[0]:
        raise Unequal(f"{where}: no outputs")
    others: Results | None = None
    gradients = [float(value.abs().max()) for value in expected[1].values()]
    for index, what in enumerate(("", "gradient of ")):
        scale = max(gradients, default=0.0) if index else 0.0
        for name in actual[0] if index == 0 else expected[1]:
            theirs, ours = expected[index].get(name), actual[index].get(name)
            away = _distance(theirs, ours, scale)
            if away > _TOLERANCE and nudged is not None:
                others = others or nudged()
                away /= max(1.0, 10 * _distance(theirs, others[index].get(name), scale) / _TOLERANCE)
            if away > _TOLERANCE:
                raise Unequal(f"{where}: {what}{name} is {away:.2g} away")


def _distance(theirs: Tensor | None, ours: Tensor | None, scale: float) -> float:
    """Return the largest difference relative to the largest value, or to `scale`; infinite if they do not compare."""
    if theirs is None or ours is None or theirs.shape != ours.shape:
        return float("inf")
    theirs, ours = theirs.double(), ours.double()
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    theirs, ours = theirs[finite], ours[finite]
    return float((theirs - ours).abs().max()) / max(float(theirs.abs().max()), scale, 1e-12)
