"""Check that a graph is compared with its model: at capture, on the example inputs, and by `verify`."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise, unchanged
from tests.support.models import ids, tiny_llama
from tests.support.selection import broad_after

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Scaled(nn.Linear):
    """A linear that computes something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if torch.compiler.is_compiling() else 1.0)


class OnesAreNoMask(nn.Module):
    """A module that leaves out a mask of ones, unless it is traced: as attention in transformers does."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool((mask == 1).all()):
            return x
        return x * mask - 1


class Chain(nn.Module):
    """Calls its parts one after the other; `mask` goes to those that take it."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for part in self.parts:
            x = part(x, mask) if isinstance(part, OnesAreNoMask) else part(x)
        return x


def chain(*parts: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Chain(*(part() for part in parts)).eval()


def linear() -> nn.Module:
    return nn.Linear(4, 4)


# At capture.


def test_a_branch_on_tracing_is_found_and_its_module_named() -> None:
    model = chain(linear, nn.ReLU, lambda: Scaled(4, 4), linear)
    with unchanged(model), pytest.raises(llfx.CaptureError) as error:
        llfx.capture(model, (X,))
    assert "in evaluation: result by" in str(error.value)
    assert "The first module whose output differs is parts.2 (Scaled)" in str(error.value)
    assert "verify=False" in str(error.value)


@pytest.mark.parametrize("is_ones", [True, False])
def test_a_branch_on_a_mask_of_ones_is_found_for_such_a_mask(is_ones: bool) -> None:
    model = chain(linear, OnesAreNoMask, linear)
    mask = torch.ones(3, 4)
    mask[0, -1] = float(is_ones)
    if not is_ones:
        graph = llfx.capture(model, (X, mask))
        assert llfx.verify(graph, model, (X, mask)).ok
        first = llfx.verify(graph, model, (X, torch.ones(3, 4))).first
        assert first is not None
        assert first.module == "parts.1"
        return
    with pytest.raises(llfx.CaptureError, match=r"parts\.1 \(OnesAreNoMask\)"):
        llfx.capture(model, (X, mask))


class OnlyInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if self.training and not torch.compiler.is_compiling() else y


def test_a_difference_in_training_alone_is_found() -> None:
    with pytest.raises(llfx.CaptureError, match=r"in training: .* parts\.1 \(OnlyInTraining\)"):
        llfx.rewrite(chain(linear, lambda: OnlyInTraining(4, 4)), llfx.LoRA(r=2, target_names="."), (X,))


def test_the_comparison_is_switched_off_by_name() -> None:
    model = chain(lambda: Scaled(4, 4))
    assert isinstance(llfx.capture(model, (X,), verify=False), fx.GraphModule)
    assert isinstance(llfx.rewrite(model, llfx.LoRA(r=2, target_names="."), (X,), verify=False), fx.GraphModule)


class SharedAndNested(nn.Module):
    """Calls one part twice, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.part = chain(linear, lambda: Scaled(4, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.part(x).detach()
        return {"first": x + 1, "second": self.part(first)}


def test_results_and_calls_are_told_apart() -> None:
    model = SharedAndNested().eval()
    with pytest.raises(llfx.CaptureError, match=r"evaluation: second by .* part\.parts\.1 \(Scaled\) in part"):
        llfx.capture(model, (X,))
    table = llfx.verify(llfx.capture(model, (X,), verify=False), model, (X,))
    wrong = [row.module for row in table if row.mode == "evaluation" and not row.ok]
    assert wrong == ["part.parts.1", "part", "part.parts.0@1", "part.parts.1@1", "part@1", "second"]
    assert not table.ok


@pytest.mark.broad
@pytest.mark.parametrize("name", ["dropout", "attention", "unread"])
def test_random_draws_do_not_count_as_differences(name: str) -> None:
    """In training mode too, and where the graph draws in another order or draws less."""

    class Unread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nn.functional.dropout(x, 0.5, self.training)  # nobody reads it
            return x + torch.rand_like(x)

    parts: dict[str, list[Callable[[], nn.Module]]] = {
        "dropout": [linear, lambda: nn.Dropout(0.5), linear, lambda: nn.Dropout(0.2)],
        "attention": [
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True), 2, enable_nested_tensor=False
            )
        ],
        "unread": [linear, Unread, lambda: nn.Dropout(0.5)],
    }
    model = chain(*parts[name]).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    graph = llfx.capture(model, (X.reshape(3, 2, 2).repeat(1, 1, 2),))
    assert torch.equal(torch.rand(3), expected), "the global generator was used"
    assert graph.training
    assert llfx.verify(graph, model, (X.reshape(3, 2, 2).repeat(1, 1, 2),)).ok
    assert torch.equal(torch.rand(3), torch.rand(6, generator=torch.Generator().manual_seed(5))[3:])


class Counting(nn.Module):
    """Writes to a buffer, to a tensor that is not registered, and, by its embedding, to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embedding = nn.BatchNorm1d(4), nn.Embedding(9, 4, max_norm=0.1)
        self.register_buffer("calls", torch.zeros(1))
        self.calls: Tensor
        self.loose = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        if not torch.compiler.is_compiling():
            self.loose += 1
        y: Tensor = self.norm(self.embedding((x * 4).long().abs()).mean(1) + x)
        return y


@pytest.mark.broad
@pytest.mark.parametrize("training", [False, True])
def test_what_a_run_writes_to_is_as_before(training: bool) -> None:
    model = chain(linear, Counting).train(training)
    counting = model.get_submodule("parts.1")
    hooks: list[int] = []
    model.register_forward_hook(lambda *_: hooks.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with unchanged(model):
        graph = llfx.capture(model, (X,))
        table = llfx.verify(graph, model, (X,))
    assert table.ok
    assert counting.loose == 0
    assert {module.training for module in (*graph.modules(), *model.modules())} == {training}
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(graph.state_dict()[name], tensor), name


def test_buffers_that_a_graph_does_not_write_to_are_differences() -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                self.seen.add_(1)
            return x * 1

    with pytest.raises(llfx.CaptureError, match=r"buffer parts\.1\.seen by 1"):
        llfx.capture(chain(linear, Forgets), (X,))


def test_models_without_data_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora_lite_fx")
    with torch.device("meta"):
        model = chain(linear, lambda: Scaled(4, 4))
    graph = llfx.capture(model, (X.to("meta"),))
    assert not [record for record in caplog.records if "compared" in record.message]
    with pytest.raises(llfx.CaptureError, match="no data"):
        llfx.verify(graph, model, (X.to("meta"),))


def test_fake_tensors_are_not_compared() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = chain(linear, lambda: Scaled(4, 4))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(llfx.capture(model, (mode.from_tensor(X),)), fx.GraphModule)


def test_a_model_that_raises_for_the_example_is_captured_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Batch norm in training mode takes no batch of one; capture shows it twice."""
    caplog.set_level(logging.INFO, logger="lora_lite_fx")
    llfx.capture(chain(lambda: nn.BatchNorm1d(4), linear), (X[:1],))
    assert "not in training, where the model raises ValueError: Expected more than 1" in caplog.text


def test_control_flow_operators_are_compared() -> None:
    class Cond(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
            return y

    model = chain(linear, Cond)
    assert llfx.verify(llfx.capture(model, (X,)), model, (X,)).ok


def test_graphs_with_vmap_are_compared() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.func.vmap(self.linear)(x)
            return y + 1

    model = chain(linear, Each)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."), (X,))
    randomise(gm, 0)
    table = llfx.verify(gm, model, (X,))
    assert table.ok
    assert "parts.1" in {row.module for row in table}


def test_the_comparison_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora_lite_fx")
    llfx.capture(chain(linear), (X,))
    (line,) = [record.message for record in caplog.records if "compared" in record.message]
    assert line.startswith("compared the graph of Chain with the model in 0.")
    assert line.endswith("s: evaluation: 0 apart, training: 0 apart")


def test_a_graph_that_raises_on_its_own_example_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("escaped from vmap")

    monkeypatch.setattr(fx.Interpreter, "run", raises)
    with pytest.raises(llfx.CaptureError, match=r"graph of Chain raises on the example .* RuntimeError: escaped"):
        llfx.capture(chain(linear), (X,))


class Chaotic(nn.Module):
    """Magnifies rounding errors: another kernel for the same product gives another result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) if torch.compiler.is_compiling() else self.linear(x.double().float()) * (1 + 2.0**-23)
        return torch.sin(y * 1e6)


def test_differences_that_rounding_explains_are_allowed() -> None:
    model = chain(Chaotic)
    table = llfx.verify(llfx.capture(model, (X,)), model, (X,))
    assert table.ok
    assert any(row.relative > 1e-3 for row in table)


# By `verify`.


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama(**fields)).eval()


@pytest.fixture(scope="module")
def model_and_graph() -> tuple[Any, fx.GraphModule]:
    model = llama(num_hidden_layers=2)
    return model, llfx.capture(model)


CFGS: dict[str, Any] = {
    "none": None,
    "LoRA": llfx.LoRA(r=2, dropout=0.3),
    "DoRA": llfx.DoRA(r=2),
    "VeRA": llfx.VeRA(r=2),
    "PiSSA": llfx.PiSSA(r=2),
    "stacked": [llfx.LoRA(r=2), llfx.IA3()],
}


@pytest.mark.parametrize("name", broad_after(1, CFGS))
def test_a_rewritten_graph_agrees_with_the_wrapper_of_its_adapters(
    name: str, model_and_graph: tuple[Any, fx.GraphModule]
) -> None:
    model, graph = model_and_graph
    gm = graph if CFGS[name] is None else llfx.rewrite(graph, CFGS[name])
    if CFGS[name] is not None:
        randomise(gm, 1)
    state = {key: tensor.clone() for key, tensor in gm.state_dict().items()}
    inputs = {"labels": ids(2, 5, seed=1), "input_ids": ids(2, 5)}
    with unchanged(model):
        table = llfx.verify(gm, model, inputs)
    assert table.ok
    assert table.first is None
    modes = [row.mode for row in table]
    assert modes == sorted(modes)
    assert modes.count("training") == modes.count("evaluation")
    compared = {row.module for row in table if not row.is_result}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "model.layers.1", "lm_head"} <= compared
    assert {row.module for row in table if row.is_result} == {"loss", "logits"}
    assert max(row.relative for row in table) < 1e-5
    for key, tensor in state.items():
        assert torch.equal(gm.state_dict()[key], tensor), key


def test_a_wrong_adapter_is_found_and_named(model_and_graph: tuple[Any, fx.GraphModule]) -> None:
    model, graph = model_and_graph
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names="q_proj"))
    randomise(gm, 1)
    (scale, *_) = [
        node
        for node in gm.graph.nodes
        if node.target is torch.ops.aten.mul.Tensor and "layers.1.self_attn.q_proj" in str(node.meta.get("custom"))
    ]
    scale.update_arg(1, 3 * scale.args[1])
    gm.recompile()
    table = llfx.verify(gm, model, {"input_ids": ids(2, 5)})
    assert not table.ok
    assert table.first is not None
    assert table.first.module == "model.layers.1.self_attn.q_proj"
    assert table.first.difference > table.first.allowed
    text = str(table).splitlines()
    assert text[0].split() == ["output", "of", "mode", "difference", "relative", "allowed"]
    assert text[2].startswith("model.layers.1.self_attn.q_proj")
    assert text[2].endswith("DIFFERS")
    assert any(line.startswith("logits") for line in text)
    assert "outputs of modules agree" in text[-1]


def test_a_table_of_equal_results_shows_these_alone(model_and_graph: tuple[Any, fx.GraphModule]) -> None:
    model, graph = model_and_graph
    table = llfx.verify(graph, model, (ids(2, 5),))
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["logits", "logits"]
    modules = len([row for row in table if not row.is_result])
    assert lines[-1] == f"LlamaForCausalLM: {modules} of {modules} outputs of modules agree"
    assert list(table[:2]) == [table[0], table[1]]


def test_symbolically_traced_graphs_are_verified() -> None:
    model = (
        chain(linear, nn.ReLU, linear, nn.BatchNorm1d(4))
        if False
        else nn.Sequential(linear(), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(4), linear())
    )
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."))
    randomise(gm, 0)
    table = llfx.verify(gm, model, (X,))
    assert table.ok
    assert {"0", "1", "3", "4"} <= {row.module for row in table}


def test_mistakes_are_errors(model_and_graph: tuple[Any, fx.GraphModule]) -> None:
    model, graph = model_and_graph
    with pytest.raises(llfx.AdapterError, match="not a LlamaForCausalLM"):
        llfx.verify(model, model, (ids(2, 5),))
    with pytest.raises(llfx.CaptureError, match="model raises ValueError: You must specify exactly one"):
        llfx.verify(graph, model, {"tokens": ids(2, 5)})
    with pytest.raises(llfx.CaptureError, match=r"example_inputs=\(x,\)|\(x,\)"):
        llfx.verify(graph, model, ids(2, 5))  # type: ignore[arg-type]
    with pytest.raises(llfx.CallError, match="position_ids was not captured"):
        llfx.verify(graph, model, {"input_ids": ids(2, 5), "position_ids": torch.arange(5)[None]})
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_roles="query"))
    with pytest.raises(llfx.AdapterError, match=r"Chain has no site 'model\.layers\.0\.self_attn\.q_proj'"):
        llfx.verify(gm, chain(linear), (X,))


def test_another_base_is_a_difference(model_and_graph: tuple[Any, fx.GraphModule]) -> None:
    model, graph = model_and_graph
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    first = llfx.verify(graph, other, (ids(2, 5),)).first
    assert first is not None
    assert first.module == "model.layers.1.mlp.up_proj"
    assert math.isclose(first.relative, 0.5, rel_tol=0.2)


# PaliGemma: eager attention sees everything where the mask is all ones, and nothing says what is the prefix.


def paligemma() -> Any:
    text = {"model_type": "gemma", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=16, image_token_index=59, vocab_size=60
    )
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def paligemma_graph() -> tuple[Any, fx.GraphModule]:
    model = paligemma()
    return model, llfx.capture(model)


def text_inputs(padding: int = 0) -> dict[str, Tensor]:
    """Return inputs without an image, which are captured in much less time."""
    inputs = paligemma_inputs(padding) | {"input_ids": ids(2, 10) % 50}
    del inputs["pixel_values"]
    return inputs


def paligemma_inputs(padding: int = 0) -> dict[str, Tensor]:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((2, 4), 59), ids(2, 6) % 50], dim=1)
    mask = torch.ones_like(tokens)
    mask[0, len(mask[0]) - padding :] = 0
    types = (torch.arange(10) > 6).long().expand(2, 10)
    return {"input_ids": tokens, "pixel_values": images, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.broad
@pytest.mark.parametrize("padding", [0, 2])
def test_paligemma_is_right_with_token_types(padding: int, paligemma_graph: tuple[Any, fx.GraphModule]) -> None:
    model, graph = paligemma_graph
    inputs = paligemma_inputs(padding)
    assert llfx.verify(graph, model, inputs).ok
    with torch.no_grad():
        close(graph(**inputs).logits, model(**inputs).logits, 1e-5, "logits")


@pytest.mark.broad
def test_paligemma_without_token_types_is_refused(paligemma_graph: tuple[Any, fx.GraphModule]) -> None:
    """The answer without them depends on whether the mask is all ones."""
    model, graph = paligemma_graph
    inputs = paligemma_inputs()
    del inputs["token_type_ids"]
    with pytest.raises(llfx.CallError, match="token_type_ids cannot be left out, because the model then computes"):
        graph(**inputs)
    inputs = text_inputs(padding=2)  # a mask of ones is tried too
    del inputs["token_type_ids"]
    with pytest.raises(llfx.CaptureError, match=r"layers\.0\.self_attn(?s:.*)pass token_type_ids in example_inputs"):
        llfx.capture(model, inputs)


@pytest.mark.broad
def test_an_adapted_paligemma_reads_token_types_when_it_opens_a_cache() -> None:
    """A cache that the adapted model opened for it would make it take the call for a later step, and ignore them."""
    model, inputs = paligemma(), text_inputs()
    chat = llfx.adapt(model, llfx.LoRA(r=2, target_names="language_model.*q_proj"), inputs)
    with torch.no_grad():
        close(chat(**inputs).logits, model(**inputs).logits, 1e-5, "logits")
