"""Experts and heads of models of transformers that default targets leave out, told of by `rewrite` and `inspect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_lite_fx as llfx
from lora_lite_fx.capture.origins.transformers_model import new_head
from tests.rewriting.test_unadapted import logged, warned
from tests.support.captured import captured
from tests.support.selection import broad_after

hf: Any = transformers
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 29,
}
EXPERTS = ("model.layers.0.mlp.experts.sites.gate_up_proj", "model.layers.0.mlp.experts.sites.down_proj")


def moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, num_key_value_heads=2, **experts))


def classifier(**fields: Any) -> Any:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0, **fields))


def encoder() -> Any:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, max_position_embeddings=24))


def drawn(model: Any) -> tuple[str, ...]:
    return new_head(model)


def test_experts_that_default_roles_leave_out_are_one_warning_with_the_way_to_adapt_them() -> None:
    graph = captured(moe)[1]
    (message,) = warned(lambda: llfx.rewrite(graph, llfx.LoRA(r=2)))
    assert f"leave out 2 stacks of experts ({', '.join(EXPERTS).replace('.0.', '.*.')}; 2,304 parameters)" in message
    (config,) = re.findall(r'LoRA\(\.\.\., (target_kinds="experts")\)', message)
    further = eval(f"llfx.LoRA(r=2, {config})")
    gm: Any = None

    def both() -> None:
        nonlocal gm
        gm = llfx.rewrite(graph, [llfx.LoRA(r=2), further])

    assert warned(both) == []
    assert {row.name for row in llfx.inspect(gm) if row.adapters} >= set(EXPERTS)
    assert llfx.inspect(gm).unadapted == ()


def test_a_variant_that_cannot_be_at_experts_is_not_named_for_them() -> None:
    graph = captured(moe)[1]
    (message,) = warned(lambda: llfx.rewrite(graph, llfx.MiSS(r=2)))
    assert message.startswith("MiSS: ")
    assert 'add a config: LoRA(..., target_kinds="experts").' in message


def gathering_moe() -> Any:
    model = moe()
    model.set_experts_implementation("batched_mm")
    return model


@pytest.mark.broad
def test_experts_that_are_no_sites_are_named_with_the_reason() -> None:
    graph = captured(gathering_moe)[1]
    (message,) = warned(lambda: llfx.rewrite(graph, llfx.LoRA(r=2)))
    assert "2 stacks of experts without a site (model.layers.*.mlp.experts.sites.gate_up_proj, because its" in message
    assert "experts_implementation='grouped_mm' of from_pretrained" in message
    assert "2,304 parameters)" in message
    assert "add a config" not in message
    assert "without a site" in str(llfx.inspect(graph))
    with pytest.raises(llfx.SelectionError, match="gathered for each token"):
        llfx.rewrite(graph, llfx.LoRA(r=2, target_kinds="experts"))


@pytest.mark.parametrize(
    ("cfg", "lines"),
    broad_after(
        1,
        [
            (llfx.LoRA(r=2, target_roles=("attention", "mlp")), 1),
            (llfx.LoRA(r=2, target_roles="attention"), 0),
            (llfx.LoRA(r=2, target_names="_proj"), 1),
            (llfx.LoRA(r=2, target_names="_attn"), 0),
        ],
        several=True,
    ),
)
def test_experts_that_a_user_has_decided_on_are_a_line_of_the_log_at_most(cfg: Any, lines: int) -> None:
    graph = captured(moe)[1]
    assert len(logged(lambda: llfx.rewrite(graph, cfg))) == lines


def test_the_error_of_roles_that_only_experts_have_names_their_kind() -> None:
    graph = captured(moe)[1]
    with pytest.raises(llfx.SelectionError, match=r'target_kinds="experts" in place of target_roles, for .*gate_up'):
        llfx.rewrite(graph, llfx.LoRA(r=2, target_roles="mlp"))
    with pytest.raises(llfx.SelectionError, match="leave target_roles out, because only linears have roles"):
        llfx.rewrite(graph, llfx.LoRA(r=2, target_roles="mlp", target_kinds="experts"))


def test_inspect_has_a_footer_of_what_default_targets_leave_out() -> None:
    table = llfx.inspect(captured(moe)[1])
    line = f"2 stacks of experts ({', '.join(EXPERTS).replace('.0.', '.*.')}; 2,304 parameters)"
    assert str(table).endswith(
        f'\n\nwithout an adapter, because default targets leave them out:\n  {line}: target_kinds="experts"'
    )
    assert f"<li>{line}: target_kinds=&quot;experts&quot;</li>" in table.to_html()
    assert table.to_dict()["unadapted"] == [
        {
            "sort": "stack of experts",
            "names": EXPERTS,
            "parameters": 2304,
            "way": 'target_kinds="experts"',
            "variant": "",
        }
    ]


@pytest.mark.broad
def test_a_head_that_was_drawn_at_random_is_a_warning_with_the_way_to_train_it() -> None:
    graph = captured(classifier)[1]
    (message,) = warned(lambda: llfx.rewrite(graph, llfx.LoRA(r=2, layers=0)))
    assert "1 linear of a head that was drawn at random (score; 48 parameters)" in message
    assert 'add a config: Full(target_names="score").' in message
    assert warned(lambda: llfx.rewrite(graph, [llfx.LoRA(r=2), llfx.Full(target_names="score")])) == []
    assert warned(lambda: llfx.rewrite(graph, llfx.LoRA(r=2, exclude_names="score"))) == []
    (line,) = logged(lambda: llfx.rewrite(graph, llfx.LoRA(r=2, target_roles="query")))
    assert "score" in line
    (unadapted,) = llfx.inspect(graph).unadapted
    assert unadapted.told().endswith('(score; 48 parameters): Full(target_names="score")')


@pytest.mark.broad
def test_a_head_of_several_linears_is_named_by_a_pattern_that_finds_it_alone() -> None:
    graph = captured(encoder)[1]
    (message,) = warned(lambda: llfx.rewrite(graph, llfx.LoRA(r=2)))
    assert "2 linears of a head that was drawn at random (classifier.dense, classifier.out_proj;" in message
    assert 'Full(target_names="classifier")' in message
    both = llfx.rewrite(graph, [llfx.LoRA(r=2), llfx.Full(target_names="classifier")])
    assert [row.name for row in llfx.inspect(both) if "Full" in row.adapters] == [
        "classifier.dense",
        "classifier.out_proj",
    ]


def test_a_head_counts_as_drawn_by_its_bias_or_by_the_class_that_the_checkpoint_has(tmp_path: Path) -> None:
    model = encoder()
    assert drawn(model) == ("classifier.dense", "classifier.out_proj")
    torch.nn.init.ones_(model.classifier.out_proj.bias)
    assert drawn(model) == ("classifier.dense",)
    with torch.device("meta"):
        assert drawn(encoder()) == ("classifier.dense", "classifier.out_proj")
    with FakeTensorMode():
        assert drawn(encoder()) == ("classifier.dense", "classifier.out_proj")
    silent = encoder()
    silent.get_output_embeddings = lambda: silent.missing
    assert drawn(silent) == ()
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    fresh = hf.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert drawn(fresh) == ("score",)
    fresh.save_pretrained(tmp_path / "trained")
    assert drawn(hf.LlamaForSequenceClassification.from_pretrained(tmp_path / "trained")) == ()
    assert drawn(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))) == ()
    assert drawn(hf.LlamaModel(hf.LlamaConfig(**SIZES))) == ()
