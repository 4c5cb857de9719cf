"""Try on one model what a user would: capture, adapters, other sizes, against the eager wrapper."""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.images import IMAGES
from lora_lite_fx.capture.inputs.other_media import SOUNDS
from lora_lite_fx.capture.origins.origin import is_diffusers, is_hugging_face
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.conformance import randomise

from .by_backend import compare_by_backend, require_compiles
from .calls import calls_of, example_of, given_calls, other_inputs
from .comparing import NotApplicable, Results, Unequal, require_equal, run, run_nudged
from .tried import Tried

Report = Callable[..., None]
"""Takes what is known so far, as keyword arguments."""


PATHS = ("default", "inputs", "part", "backend")
"""The steps that adapt a model; it is enough that one ends equal."""

STEPS = (*PATHS, "adapt", "generate", "compiled")


def try_model(build: Callable[[], Any], steps: Collection[str], report: Report) -> None:
    """Build a model and try the paths one after the other, and report each as soon as it is known.

    Args:
        build: makes the model. Its `survey_calls` are the inputs that a user passes, where the config tells none.
        steps: those of `STEPS` to try.
        report: takes `built`, `default` (capture without inputs), `inputs` (capture with those that a user passes, or
            with left padding and without labels), `part` (the default of the part that a refusal names), `backend` (by
            `torch.compile`), `adapt` (the adapted model itself), `generate` (its tokens, where the class generates),
            `compiled` (as one graph, by Dynamo and AOTAutograd), the number of `sites` and `linears`, the names of
            linears `left_out`, and the `seconds` of each.
    """
    with _outcome(report, "built"):
        tried = Tried(build)
    model = tried.model
    report(linears=len(tried.linears), main_input=getattr(model, "main_input_name", None))
    if "default" in steps and not is_diffusers(model):  # whose config does not say how a pipeline calls it
        with _outcome(report, "default"):
            _unless_rounding(_compare_with_wrapper, tried, report)
    if given_calls(model):
        tried = Tried(build, given=True)
    if "inputs" in steps:
        with _outcome(report, "inputs"):
            if tried.given:
                _unless_rounding(_compare_with_wrapper, tried, report)
            else:
                llfx.capture(model, other_inputs(model, tried.given))  # compares the graph with the model in both modes
    if "part" in steps:
        with _outcome(report, "part"):
            _unless_rounding(_compare_with_wrapper, Tried(lambda: _part_to_adapt(build())), report)
    if "backend" in steps:
        with _outcome(report, "backend"):
            _unless_rounding(compare_by_backend, tried, report)
    if (is_hugging_face(model) or is_diffusers(model)) and {"adapt", "generate"} & set(steps):
        _try_adapted(tried, steps, report)
    if "compiled" in steps:
        with _outcome(report, "compiled"):
            _unless_rounding(_compare_with_compiled, tried, report)


def _part_to_adapt(model: Any) -> Any:
    """Return the part of a class without `forward` that the error names as the one to adapt."""
    if type(model).forward.__name__ == "_forward_unimplemented":
        try:
            llfx.capture(model)
        except llfx.CaptureError as error:
            named = re.search(r"adapt the part that is meant, such as model\.(\S+)\.", str(error))
            if named is None:
                raise
            part = model.get_submodule(named.group(1))
            if not any(isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) for module in part.modules()):
                raise NotApplicable(f"model.{named.group(1)} has no linear module and no convolution") from None
            return part
    raise NotApplicable("the class has a forward")


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
        {
            _without_folders(str(w.message))[:300]
            for w in caught
            if "lora_lite_fx" in w.filename or "tests/survey" in w.filename
        }
    )
    extra = {f"{step}_warnings": ours} if ours else {}
    report(**{step: _without_folders(said)[:700], f"{step}_seconds": round(time.process_time() - start, 1)}, **extra)
    if raised is not None and step == "built":
        raise raised


def _without_folders(text: str) -> str:
    """Return a message without where this machine keeps its files."""
    return re.sub(r"/\S*?/(site-packages/|(?=(tests|lora_lite_fx)/))", "", text)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lora_lite_fx/" in frame.filename]
    named = [*ours[-1:], *frames[-1:]]
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in named)


def _unless_rounding(compare: Callable[[Tried, Report], None], tried: Tried, report: Report) -> None:
    """Compare, and where results are apart, decide in double precision whether they are by more than rounding."""
    try:
        compare(tried, report)
    except Unequal as error:
        try:
            compare(tried.doubled(), report)
        except Exception as doubled:
            raise Unequal(f"{error}; in double precision: {doubled}") from doubled
        report(equal_in_double_precision=str(error))


def _compare_with_wrapper(tried: Tried, report: Report) -> None:
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
    examples = calls_of(model, tried.given, tried.without)
    _require_images_and_sounds(model, examples[0][1])
    for what, inputs in examples:
        for training in (True, False) if what == "example" else (what != "left padding",):
            where = f"{what}, {'training' if training else 'evaluation'}"
            try:
                expected = run(wrapped, inputs, training)
            except Exception as error:  # the model itself does not take this
                report(**{f"not_tried ({what})": f"{type(error).__name__}: {str(error)[:100]}"})
                continue
            try:
                actual = run(gm, inputs, training)
            except (AssertionError, RuntimeError, llfx.AdapterError) as error:
                if what == "example":
                    raise
                first = next(iter(_without_folders(str(error)).splitlines()), type(error).__name__)
                report(fixed=f"{what}: {first[:160]}")
                continue
            require_equal(expected, actual, where, lambda: run_nudged(wrapped, inputs, training))  # noqa: B023


def _require_images_and_sounds(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise `Unequal` if nothing is computed of the images of an example, or of sounds beside text.

    Either a gradient reaches them, however small, or others make a difference: some encoders compute no gradients. A
    codec alone may find the same codes for all sounds, as long as its weights are random.
    """
    names = [name for name in ((*IMAGES, *SOUNDS) if "input_ids" in inputs else IMAGES) if name in inputs]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}

    def outputs(**other: Tensor) -> list[Tensor]:
        torch.manual_seed(7)
        copies = {name: value.clone() for name, value in other.items()}  # TVP writes to its images
        return [leaf for leaf in pytree.tree_leaves(dict(model(**inputs | copies))) if isinstance(leaf, Tensor)]

    model.eval()
    before = outputs(**leaves)
    differentiable = [leaf.float().sum() for leaf in before if leaf.requires_grad]
    for name in names:
        total = torch.stack(differentiable).sum() if differentiable else torch.zeros((), requires_grad=True)
        try:
            (gradient,) = torch.autograd.grad(total, [leaves[name]], allow_unused=True, retain_graph=True)
        except RuntimeError:  # Gemma 3n writes to what the gradients of its images need
            gradient = None
        if gradient is None:
            after = outputs(**{name: inputs[name].flip(0) + 1})
            if all(torch.equal(one, other) for one, other in zip(after, before, strict=True)):
                raise Unequal(f"nothing is computed of {name}")


def _try_adapted(tried: Tried, steps: Collection[str], report: Report) -> None:
    """Compare an adapted model with the wrapper: results, gradients, and what it generates."""
    with _outcome(report, "adapt"):
        _unless_rounding(_compare_adapted, tried, report)
    if "generate" in steps:
        with _outcome(report, "generate"):
            if is_diffusers(tried.model) or not tried.model.can_generate():
                raise NotApplicable("the class does not generate")
            _unless_rounding(_compare_generated, tried, report)


def _compare_adapted(tried: Tried, report: Report) -> None:
    adapted, wrapped = tried.adapted
    for what, inputs in calls_of(tried.model, tried.given, tried.without):
        for training in (True, False) if what == "example" else (False,):
            where = f"{what}, {'training' if training else 'evaluation'}"
            try:
                expected = run(wrapped, inputs, training)
            except Exception as error:  # the model itself does not take this
                report(**{f"not_tried ({what})": f"{type(error).__name__}: {str(error)[:100]}"})
                continue
            actual = run(adapted, inputs, training)
            require_equal(expected, actual, where, lambda: run_nudged(wrapped, inputs, training))  # noqa: B023


def _compare_generated(tried: Tried, report: Report) -> None:
    adapted, wrapped = tried.adapted
    inputs = other_inputs(tried.model, tried.given).items()
    prompt = {name: value for name, value in inputs if not name.startswith("decoder_")}
    try:
        expected = _generated(wrapped, prompt)
    except Exception as error:
        raise NotApplicable(f"the model itself raises {type(error).__name__}: {str(error)[:100]}") from None
    require_equal(expected, _generated(adapted, prompt), "generate")


def _generated(model: Any, prompt: dict[str, Tensor]) -> Results:
    """Return the logits of each token that a model generates."""
    torch.manual_seed(0)  # VibeVoice adds noise to what it hears
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return {str(i): logits for i, logits in enumerate(model.eval().generate(**prompt, **options).logits)}, {}


def _compare_with_compiled(tried: Tried, report: Report) -> None:
    """Compare a rewritten graph with itself, compiled as a whole."""
    gm, inputs = llfx.rewrite(tried.base, tried.config), example_of(tried.model, tried.given, tried.without)
    randomise(gm, 0)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        expected = run(gm, inputs, training)
        try:
            actual = run(gm, inputs, training, compiled)
        except llfx.AdapterError:
            raise
        except Exception as error:
            require_compiles(tried.model, inputs, training, "aot_eager")
            raise error
        require_equal(expected, actual, f"training={training}")
