"""Check that a graph is called like its model: optional arguments stay optional, other calls raise an error."""

from __future__ import annotations

import copy
import gc
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.capture.graph_calls import _NotesExport
from lora_lite_fx.compat.transformers import CACHE
from lora_lite_fx.execution.optimize import checkpoints_layers
from tests.support.conformance import randomise
from tests.support.models import ids, tiny_llama, tiny_t5
from tests.support.selection import broad_after, slow_after

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def tiny(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**{**SMALL, **fields})).eval()


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama()).eval()


@pytest.fixture(scope="module")
def adapted() -> tuple[fx.GraphModule, nn.Module]:
    """Return a rewritten Llama with random adapters, and the eager wrapper with the same."""
    model, cfg = llama(), llfx.LoRA(r=2)
    gm, wrapped = llfx.rewrite(model, cfg), llfx.wrap(model, cfg)
    randomise(gm, 0)
    randomise(wrapped, 0)
    return gm.eval(), wrapped.eval()


def check(gm: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Assert that the graph and the model return the same class, the same fields and the same values."""
    with torch.no_grad():
        expected, result = model(*args, **kwargs), gm(*args, **kwargs)
    assert type(result) is type(expected)
    if isinstance(expected, Mapping):
        assert [key for key in expected if key != CACHE] == list(result)
        pairs = [(result[key], expected[key]) for key in result]
    else:
        pairs = [(result, expected)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


CALLS: dict[str, dict[str, Any]] = {
    "tokens": {"input_ids": ids(2, 5)},
    "mask": {"input_ids": ids(2, 5), "attention_mask": MASK},
    "labels": {"input_ids": ids(2, 5), "labels": ids(2, 5, seed=1)},
    "None": {"input_ids": ids(2, 5), "attention_mask": None, "labels": None},
    "all": {"input_ids": ids(2, 5), "attention_mask": MASK, "labels": ids(2, 5, seed=1)},
    "switches": {"input_ids": ids(2, 5), "use_cache": False, "return_dict": True, "logits_to_keep": 0},
}


@pytest.mark.broad
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_a_language_model_takes_its_optional_arguments_or_not(
    call: str, training: bool, adapted: tuple[fx.GraphModule, nn.Module]
) -> None:
    gm, wrapped = adapted
    gm.train(training)
    try:
        check(gm, wrapped, **CALLS[call])
    finally:
        gm.eval()


@pytest.mark.broad
def test_positional_arguments_have_the_order_of_the_model(adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, wrapped = adapted
    check(gm, wrapped, ids(2, 5))
    check(gm, wrapped, ids(2, 5), MASK)
    check(gm, wrapped, ids(2, 5), None, labels=ids(2, 5, seed=1))
    model = inspect.signature(llama().forward).parameters
    graph = inspect.signature(gm.forward).parameters
    assert list(graph) == [name for name, parameter in model.items() if parameter.kind is not parameter.VAR_KEYWORD]


@pytest.mark.broad
def test_gradients_of_a_custom_loss_equal_those_of_the_wrapper(adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, wrapped = adapted
    grads = []
    for model in (gm, wrapped):
        model.zero_grad()
        logits = model(ids(2, 5)).logits
        F.cross_entropy(logits.flatten(0, 1), ids(2, 5, seed=1).flatten()).backward()
        grads.append([parameter.grad for parameter in llfx.adapter_parameters(model)])
        model.zero_grad()
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_labels_the_loss_is_not_computed(adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, _ = adapted
    called: list[Any] = []

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        gm(ids(2, 5), labels=ids(2, 5))
        with_labels = [name for name in called if "cross_entropy" in name]
        called.clear()
        gm(ids(2, 5))
    assert with_labels
    assert not [name for name in called if "cross_entropy" in name]


@pytest.mark.broad
def test_a_compiled_graph_is_called_like_the_model(adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, wrapped = adapted
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for call in ("tokens", "labels"):
        check(fast, wrapped, **CALLS[call])


@pytest.mark.parametrize(
    "names", [("labels", "input_ids", "attention_mask"), ("attention_mask", "input_ids"), ("input_ids",)]
)
def test_an_export_takes_arguments_by_name(names: tuple[str, ...], adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, wrapped = adapted
    kwargs = {name: CALLS["all"][name] for name in names}
    program = torch.export.export(gm, (), kwargs)
    check(program.module(), wrapped, **kwargs)
    losses = [node for node in program.graph.nodes if "cross_entropy" in str(node.target)]
    assert bool(losses) == ("labels" in names)


def test_an_export_takes_arguments_in_both_ways_and_copies_take_them(
    adapted: tuple[fx.GraphModule, nn.Module],
) -> None:
    gm, wrapped = adapted
    for graph in (gm, copy.deepcopy(gm)):
        kwargs = {"labels": ids(2, 5, seed=1), "attention_mask": MASK}
        program = torch.export.export(graph, (ids(2, 5),), kwargs)
        check(program.module(), wrapped, ids(2, 5), **kwargs)


def test_a_release_that_does_not_tell_the_names_of_exported_arguments_is_refused(
    adapted: tuple[fx.GraphModule, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, _ = adapted
    kwargs = {"attention_mask": MASK, "input_ids": ids(2, 5)}
    torch.export.export(gm, (), kwargs)
    monkeypatch.setattr(_NotesExport, "bind", inspect.Signature.bind)
    other = llfx.rewrite(Optional(), PLAIN, (X, WEIGHTS))
    with pytest.raises(llfx.CallError, match=rf"not known.*torch {re.escape(torch.__version__)} does not bind"):
        torch.export.export(other, (), {"mask": WEIGHTS, "x": X})
    with pytest.raises(llfx.CallError, match="does not bind"):  # also not for the names of the call before
        torch.export.export(gm, (), {"input_ids": ids(2, 5)})


def test_further_adapters_copies_and_removal_keep_the_signature(adapted: tuple[fx.GraphModule, nn.Module]) -> None:
    gm, _ = adapted
    model = llama()
    twice = llfx.rewrite(gm, llfx.IA3()).eval()
    check(twice, gm, ids(2, 5))
    check(copy.deepcopy(gm), gm, ids(2, 5))
    check(llfx.remove(gm), model, ids(2, 5))
    check(llfx.optimize(gm), gm, ids(2, 5))


MODELS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "BertForSequenceClassification": ({"vocab_size": 40, "num_labels": 3}, {"input_ids": ids(2, 5)}),
    "BertModel": ({"vocab_size": 40}, {"input_ids": ids(2, 5)}),
    "ViTForImageClassification": (
        {"image_size": 8, "patch_size": 4, "num_labels": 3},
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))},
    ),
    "HubertForSequenceClassification": (
        {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1, "layerdrop": 0.0,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
         "apply_spec_augment": False},
        {"input_values": torch.randn(2, 600, generator=torch.Generator().manual_seed(0))},
    ),
}  # fmt: skip


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(1, MODELS))
def test_models_of_every_kind_are_called_without_labels(name: str) -> None:
    fields, inputs = MODELS[name]
    model = tiny(name, **fields)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=".", target_kinds=("linear",))).eval()
    check(gm, model, **inputs)


@pytest.mark.broad
def test_an_encoder_decoder_says_why_labels_cannot_be_left_out() -> None:
    model = transformers.T5ForConditionalGeneration(tiny_t5()).eval()
    gm = llfx.rewrite(model, llfx.LoRA(r=2)).eval()
    check(gm, model, input_ids=ids(2, 5), labels=ids(2, 4))
    with pytest.raises(llfx.CallError, match="labels cannot be left out, because the model then raises") as why:
        gm(input_ids=ids(2, 5))
    for way_out in ("decoder_input_ids': ...}), or load(", "'input_ids': ..., 'decoder", "adapt(model, cfg)"):
        assert way_out in str(why.value)
    with pytest.raises(llfx.CallError, match="decoder_input_ids was not captured"):
        gm(input_ids=ids(2, 5), decoder_input_ids=ids(2, 4))


@pytest.mark.broad
@pytest.mark.parametrize("by_position", slow_after(1, [False, True]))
def test_padding_that_a_model_finds_by_itself_is_not_taken_for_text(by_position: bool) -> None:
    """Check with XLM: without a mask it looks for padding tokens, so a mask of ones gives another result."""
    sizes = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40, "n_langs": 1}
    fields: dict[str, Any] = {**sizes, "pad_index": 2, "pad_token_id": 2}
    model = transformers.XLMModel(transformers.XLMConfig(**fields)).eval()
    cfg = llfx.LoRA(r=2, target_names=("q_lin",))
    examples = (ids(3, 7), torch.ones(3, 7, dtype=torch.long)) if by_position else None
    gm = llfx.rewrite(model, cfg, examples).eval()
    check(gm, model, input_ids=ids(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(
        llfx.CallError, match="attention_mask cannot be left out, because the model then computes another"
    ):
        gm(input_ids=ids(2, 5))


class Optional(nn.Module):
    """A module that is not of transformers, with optional arguments of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        scale: float = 1.0,
        twice: bool = False,
        extra: Tensor | None = None,
    ) -> dict[str, Tensor]:
        y = self.fc(x if mask is None else x * mask[..., None]) * scale
        y = y if bias is None else y + bias
        y = 2 * y if twice else y
        return {"y": y} if extra is None else {"y": y, "extra": y * extra, "shifted": extra + 1}


X, WEIGHTS = torch.randn(3, 5, 4), torch.ones(3, 5)
PLAIN = llfx.LoRA(r=2, target_names="fc")


def test_a_plain_modules_arguments_stay_optional() -> None:
    model = Optional()
    inputs = {"x": X, "mask": WEIGHTS, "bias": torch.randn(4), "extra": torch.randn(3, 5, 4)}
    gm = llfx.rewrite(model, PLAIN, inputs)
    for names in (("x",), ("x", "bias"), ("x", "mask", "extra"), ("x", "extra"), tuple(inputs)):
        check(gm, model, **{name: inputs[name][:2] if inputs[name].dim() > 1 else inputs[name] for name in names})
    check(gm, model, X, WEIGHTS, extra=inputs["extra"])


def test_constants_of_the_graph_may_be_left_out_only_if_they_are_the_default() -> None:
    model = Optional()
    gm = llfx.rewrite(model, PLAIN, {"x": X, "scale": 1.0, "twice": True})
    check(gm, model, X, twice=True)
    with pytest.raises(llfx.CallError, match="twice=False differs from twice=True, which this graph was captured with"):
        gm(X)
    with pytest.raises(llfx.CallError, match=r"scale=2\.0 differs from scale=1\.0"):
        gm(X, twice=True, scale=2.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    broad_after(
        3,
        [
            ((), {}, "x is missing. The graph of Optional was captured for calls with x."),
            ((X,), {"x": X}, "multiple values for argument 'x'"),
            ((X, None, None, None), {}, "too many positional arguments"),
            ((X,), {"weights": X}, "weights is not an argument that this graph has."),
            ((X, WEIGHTS), {}, "mask was not captured. .* For calls with it, capture such a call: rewrite"),
            ((X,), {"scale": 2.0}, "scale was not captured."),
        ],
        several=True,
    ),
)
def test_a_call_that_was_not_captured_is_an_error_that_names_the_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    gm = llfx.rewrite(Optional(), PLAIN, (X,))
    with pytest.raises(llfx.CallError, match=message):
        gm(*args, **kwargs)
    check(gm, gm, X)


def test_a_model_is_not_changed_by_the_calls_that_capture_tries() -> None:
    class Counting(Optional):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            self.calls.add_(1)
            y: Tensor = self.fc(x if mask is None else x * mask[..., None])
            return y

    model = Counting()
    gm = llfx.rewrite(model, PLAIN, (X, WEIGHTS))
    assert model.calls == 0
    assert gm.calls == 0
    torch.testing.assert_close(gm(X), model(X))


def test_a_model_without_data_allows_no_argument_to_be_left_out() -> None:
    with torch.device("meta"):
        model = Optional()
    gm = llfx.rewrite(model, PLAIN, (X.to("meta"), WEIGHTS.to("meta")))
    with pytest.raises(llfx.CallError, match="mask cannot be left out, because the model has no data"):
        gm(X.to("meta"))


# `capture` by itself.


@pytest.mark.broad
def test_one_capture_serves_rewrite_wrap_inspect_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    base = llfx.capture(model)
    monkeypatch.setattr(torch.export, "export", None)  # Makes a second capture raise.
    cfg = llfx.LoRA(r=2)
    gm, wrapped = llfx.rewrite(base, cfg).eval(), llfx.wrap(base, cfg).eval()
    assert type(wrapped) is type(model)
    randomise(gm, 0)
    randomise(wrapped, 0)
    check(gm, wrapped, ids(2, 5))
    assert [row.name for row in llfx.inspect(base)] == [row.name for row in llfx.inspect(gm)]
    llfx.save(gm, tmp_path / "adapter.safetensors")
    check(llfx.load(base, tmp_path / "adapter.safetensors"), gm, ids(2, 5))
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.broad
def test_wrap_takes_a_graph_without_adapters_whose_model_was_let_go() -> None:
    model = llama()
    base = llfx.capture(model)
    with pytest.raises(llfx.AdapterError, match="this graph has adapters"):
        llfx.wrap(llfx.rewrite(base, llfx.LoRA(r=2)), llfx.IA3())
    expected, kind = llfx.wrap(model, llfx.LoRA(r=2)).eval(), type(model)
    del model
    gc.collect()
    wrapped = llfx.wrap(base, llfx.LoRA(r=2)).eval()
    assert type(wrapped) is kind
    randomise(expected, 0)
    randomise(wrapped, 0)
    check(wrapped, expected, ids(2, 5), use_cache=False)


def test_capture_keeps_its_settings() -> None:
    model = llama()
    base = llfx.capture(model, {"input_ids": ids(2, 5)}, dynamic_shapes=None, checkpoint_layers=True)
    gm = llfx.rewrite(base, llfx.LoRA(r=2))
    assert checkpoints_layers(gm)
    check(gm.eval(), model, ids(2, 5))
    with pytest.raises(llfx.CallError, match="This graph holds for calls with"):
        gm(ids(3, 5))
