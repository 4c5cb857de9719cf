"""Losses that depend on what calls before had as labels, and those that a graph cannot compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.against_wrapper import EVERYWHERE, adapted_and_wrapped, require_equal
from tests.support.conformance import randomise
from tests.support.process import default_dtype
from tests.support.selection import slow_after

IDS = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
}


def bert(labels: int) -> Any:
    fields = {**SMALL, "num_labels": labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**fields))


def llama(labels: int) -> Any:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**SMALL, "num_labels": labels}))


CLASSES, MANY, NUMBERS = torch.tensor([0, 2, 1]), torch.rand(3, 3).round(), torch.tensor([0.5, -1.0, 2.0])


@pytest.mark.broad
@pytest.mark.parametrize("build", slow_after(1, [bert, llama]))
@pytest.mark.parametrize(
    ("labels", "sequence"),
    slow_after(1, [(3, [CLASSES, MANY, CLASSES]), (3, [MANY, CLASSES, MANY]), (1, [NUMBERS, NUMBERS])], several=True),
)
def test_the_first_labels_decide_on_the_loss_of_all(
    build: Callable[[int], Any], labels: int, sequence: list[Tensor]
) -> None:
    """A model writes `problem_type` to its config, also where labels of another kind are an error afterwards."""
    model = build(labels)
    adapted, wrapped = adapted_and_wrapped(model)
    assert adapted.config.problem_type is None
    outcomes: list[list[Any]] = []
    for each in (adapted, wrapped):
        outcomes.append([])
        for target in sequence:
            try:
                outcomes[-1].append(round(each(IDS, labels=target).loss.item(), 4))
            except (RuntimeError, ValueError):  # a CaptureError is the first
                outcomes[-1].append("raises")
            outcomes[-1].append(each.config.problem_type)
    assert outcomes[0] == outcomes[1]
    assert model.config.problem_type is None


@pytest.mark.broad
def test_a_loss_that_is_set_in_the_config_is_taken() -> None:
    adapted, wrapped = adapted_and_wrapped(bert(3))
    for kind in ("multi_label_classification", "regression", None, "regression"):
        losses = []
        for model in (adapted, wrapped):
            model.config.problem_type = kind
            losses.append(model(IDS, labels=MANY).loss.item())
            assert model.config.problem_type == (kind or "multi_label_classification")
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.broad
def test_a_model_without_such_a_loss_writes_none() -> None:
    model = llfx.adapt(hf.BertForTokenClassification(hf.BertConfig(**SMALL)), llfx.LoRA(r=2))
    model(IDS, labels=IDS % 2)
    assert model.config.problem_type is None


def transcriber() -> tuple[Any, dict[str, Any], Any]:
    fields: dict[str, Any] = {
        **{**SMALL, "vocab_size": 20},
        **{f"{what}_dropout": 0.0 for what in ("hidden", "attention", "activation", "feat_proj", "final")},
        "conv_dim": (8, 8),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }
    labels = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[1, 3:] = -100
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**fields)), {"input_values": torch.randn(2, 400)}, labels


def detector() -> tuple[Any, dict[str, Any], Any]:
    backbone: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "out_features": ["stage2"],
        "layer_type": "basic",
    }
    fields: dict[str, Any] = {
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": hf.ResNetConfig(**backbone),
        "d_model": 16,
        "num_queries": 5,
        "num_labels": 4,
        "auxiliary_loss": True,
    }
    boxes = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) / 2 + 0.2
    labels = [
        {"class_labels": torch.tensor([1, 2]), "boxes": boxes[:2]},
        {"class_labels": torch.tensor([3]), "boxes": boxes[2:]},
    ]
    return hf.DetrForObjectDetection(hf.DetrConfig(**fields)), {"pixel_values": torch.randn(2, 3, 64, 64)}, labels


def _assigned(costs: Any) -> tuple[list[int], list[int]]:
    """Return which row goes with which column, as SciPy, which the library asks for and which may not be there."""
    rows, columns = costs.shape
    best = min(
        itertools.permutations(range(rows), columns),
        key=lambda chosen: sum(float(costs[row, column]) for column, row in enumerate(chosen)),
    )
    pairs = sorted((row, column) for column, row in enumerate(best))
    return [row for row, _ in pairs], [column for _, column in pairs]


@pytest.fixture
def doubles() -> Iterator[None]:
    """Make new tensors double, because DETR makes the weights of its classes in each call."""
    with default_dtype(torch.float64):
        yield


@pytest.mark.usefixtures("doubles")
@pytest.mark.broad
@pytest.mark.parametrize("build", slow_after(1, [transcriber, detector]))
def test_a_loss_that_no_graph_computes_is_the_models_own(
    build: Callable[[], tuple[Any, dict[str, Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.loss.loss_for_object_detection as detection

    monkeypatch.setattr(detection, "linear_sum_assignment", _assigned, raising=False)
    monkeypatch.setattr(detection, "requires_backends", lambda *_: None)
    torch.manual_seed(0)
    model, inputs, labels = build()
    inputs = {name: value.double() for name, value in inputs.items()}
    if isinstance(labels, list):
        labels = [{**each, "boxes": each["boxes"].double()} for each in labels]
    models = adapted_and_wrapped(model.double(), EVERYWHERE)
    require_equal(models, inputs)
    for training in (True, False):
        require_equal(models, {**inputs, "labels": labels}, training)
    captures = models[0]._graphs.captures
    require_equal(models, {**inputs, "labels": labels}, True)
    assert models[0]._graphs.captures == captures


class ReadsWeight(hf.BertForTokenClassification):
    """Has a loss that depends on how many labels there are, and reads the weight of its classifier."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids, **kwargs)
        hidden = self.bert(input_ids).last_hidden_state
        result["logits"] = torch.nn.functional.linear(hidden, self.classifier.weight)
        if labels is not None:
            counts = labels.flatten().bincount().tolist()
            result["loss"] = sum(count * result.logits[..., 0].mean() for count in counts)
        return result


@pytest.mark.broad
def test_a_part_that_is_not_called_is_not_left_out() -> None:
    model = llfx.adapt(ReadsWeight(hf.BertConfig(**SMALL)), llfx.LoRA(r=2, target_names=("classifier", "query")))
    randomise(model, 0)
    with pytest.raises(llfx.CaptureError, match="could not be captured"):
        model(IDS, labels=IDS)
