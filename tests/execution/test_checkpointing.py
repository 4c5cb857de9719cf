"""Check gradient checkpointing: equal results bit for bit, fewer saved activations, and a graph that stays flat."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.execution.optimize import checkpoints_layers, execution_of, run_as
from lora_lite_fx.passes import OPTIMIZATIONS, Pipeline
from tests.support.conformance import check_merge, check_remove, close, output, randomise, small
from tests.support.models import (
    WIDTH,
    Case,
    GatedMLP,
    Normed,
    ResidualMLP,
    SharedLinear,
    ids,
    tiny_albert,
    tiny_llama,
)
from tests.support.models import Attention as AttentionBlock
from tests.support.saved import saved_by
from tests.support.selection import broad_after, slow_after, slow_unless
from tests.support.untouched import untouched

VOCABULARY = 40


def llama() -> Any:
    config = tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY, attention_dropout=0.1)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    make_config: Any = transformers.T5Config
    config = make_config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def albert() -> Any:
    return transformers.AlbertForMaskedLM(tiny_albert(0.1, vocab_size=VOCABULARY))


MODELS: tuple[Callable[[], Any], ...] = (llama, gpt2, bert, t5, albert)
models = pytest.mark.parametrize(
    "build", broad_after(1, slow_unless((llama, albert).__contains__, MODELS)), ids=lambda build: build.__name__
)


@functools.cache
def model_and_base(build: Callable[[], Any]) -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = build()
    return model, llfx.capture(model)


def tokens(batch: int = 4, length: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(drawn)
    mask[0, :3] = 0
    return {"input_ids": drawn, "attention_mask": mask, "labels": drawn}


LORA = llfx.LoRA(r=3, dropout=0.2)


def checkpointed(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the same graph over the same tensors, with checkpointed layers."""
    return run_as(gm, dataclasses.replace(execution_of(gm), checkpoint_layers=True))


@functools.cache
def plain_and_checkpointed(build: Callable[[], Any]) -> tuple[fx.GraphModule, fx.GraphModule]:
    plain = llfx.rewrite(model_and_base(build)[1], LORA)
    randomise(plain, 1)
    return plain.train(), checkpointed(plain)


def step(model: nn.Module, inputs: Any, seed: int = 0, between: Callable[[], Any] = lambda: None) -> dict[str, Tensor]:
    """Return the output of a forward pass under "", and the gradients of the trained parameters by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    result = getattr(result, "logits", result)
    between()
    (result.float() * torch.randn(result.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert gradients or not any(parameter.requires_grad for parameter in model.parameters())
    return {"": result.detach(), **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name or "output"


# The same numbers.


@models
def test_outputs_and_gradients_are_those_of_the_plain_graph(build: Callable[[], Any]) -> None:
    plain, ours = plain_and_checkpointed(build)
    inputs = tokens()
    expected = step(plain, inputs)
    assert_same(step(ours, inputs), expected)
    other = step(plain, inputs, seed=1)
    assert not torch.equal(other[""], expected[""]), "nothing was dropped"
    # Of a weight that layers share, `DroppedProduct` sums the gradients in float32, and autocast in bfloat16.
    without = llfx.optimize(plain, OPTIMIZATIONS.without("recompute_inputs"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(step(ours, inputs), step(without, inputs))
    assert_same(step(ours.eval(), inputs), step(plain.eval(), inputs))
    assert_same(step(ours.train(), inputs), step(plain.train(), inputs))


BLOCKS = (ResidualMLP, AttentionBlock, SharedLinear, Normed)


@functools.cache
def small_base(exported: bool) -> fx.GraphModule:
    case = Case(BLOCKS, bias=True, tied=False, dtype=torch.float32, exported=exported, seed=0)
    return llfx.capture(case.build(), case.example_inputs)


# List variants that read the weight (DoRA), that share tensors among sites (VeRA), and that scale inputs or outputs.
VARIANTS = [
    (llfx.DoRA, False),
    (llfx.VeRA, True),
    (llfx.DoRA, True),
    (llfx.IA3, False),
]


@pytest.mark.broad
@pytest.mark.parametrize(("cls", "exported"), slow_after(2, VARIANTS, several=True))
def test_two_adapters_with_dropout_and_batch_norm_compute_the_same(cls: type[llfx.Variant], exported: bool) -> None:
    cfg = [small(cls, target_names=("blocks",)), llfx.LoRA(r=2, dropout=0.5, target_names=("fc", "lin"))]
    base = small_base(exported)
    plain = llfx.rewrite(base, cfg, checkpoint_layers=False).train()
    randomise(plain, 1)
    ours = checkpointed(copy.deepcopy(plain))
    assert_same(step(ours, (ids(3, 6),)), step(plain, (ids(3, 6),)))
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    assert saved_by(ours, (ids(3, 6),)) < saved_by(plain, (ids(3, 6),))


@pytest.mark.broad
def test_the_backward_pass_uses_the_mode_of_the_forward_pass() -> None:
    plain, ours = plain_and_checkpointed(bert)
    expected = step(plain, tokens())
    assert_same(step(ours, tokens(), between=ours.eval), expected)
    ours.train()


class Layer(nn.Module):
    """A layer that overwrites a tensor of its own, and its input if `writes_input`."""

    def __init__(self, writes_input: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.writes_input = writes_input

    def forward(self, x: Tensor) -> Tensor:
        # Read x only in operators that do not save x, because autograd then cannot notice the write to x.
        y = self.drop(self.down(self.relu(self.up(torch.tanh(torch.sin(torch.sin(x + 0)))))))
        return x.add_(y) if self.writes_input else x + y


class InPlace(nn.Module):
    def __init__(self, writes_input: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(writes_input) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x + 1


@pytest.mark.parametrize("exported", broad_after(1, [True, False]), ids=["exported", "symbolic"])
@pytest.mark.parametrize("writes_input", broad_after(1, [True, False]))
def test_layers_that_overwrite_tensors_in_place_compute_the_same(writes_input: bool, exported: bool) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = llfx.rewrite(InPlace(writes_input), llfx.LoRA(r=2, target_names=(".",)), (x,) if exported else None)
    randomise(plain, 1)
    ours = checkpointed(plain)
    assert_same(step(ours, (x,)), step(plain, (x,)))
    if exported:  # because a symbolic trace does not know which tensors are views
        assert saved_by(ours, (x,)) < saved_by(plain, (x,))


class Interleaved(nn.Module):
    """A model that computes and draws random numbers between the parts of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualMLP(bias=True) for _ in range(2))
        self.layers[0].other = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Any:
        scale = x.mean()
        layers: Any = self.layers
        first, second = layers
        y = first.drop(first.fc_in(x))
        noise = nn.functional.dropout(scale.expand(6), 0.5, self.training)
        y = first.other(y) + noise.sum()
        y = first.fc_out(torch.tanh(y + y.mean()))
        return second(first.norm(y)) * scale


@pytest.mark.parametrize("exported", broad_after(1, [True, False]), ids=["exported", "symbolic"])
def test_layers_with_other_computations_between_their_parts_compute_the_same(exported: bool) -> None:
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = llfx.rewrite(Interleaved(), llfx.LoRA(r=2, target_names=("fc",)), (x,) if exported else None)
    randomise(plain, 1)
    for seed in range(3):
        assert_same(step(checkpointed(plain), (x,), seed), step(plain, (x,), seed))


@pytest.mark.broad
def test_the_blocks_of_a_sequential_are_checkpointed() -> None:
    model = nn.Sequential(nn.Linear(6, WIDTH), *(ResidualMLP(bias=False) for _ in range(3)), nn.Linear(WIDTH, 4))
    x = torch.randn(5, 6)
    plain = llfx.rewrite(model, LORA, checkpoint_layers=False)
    ours = llfx.rewrite(model, LORA, checkpoint_layers=True)
    for gm in (plain, ours):
        randomise(gm, 1)
    assert_same(step(ours, (x,)), step(plain, (x,)))
    assert saved_by(ours, (x,)) < saved_by(plain, (x,)) / 2


# Memory.


@pytest.mark.parametrize(
    "build", slow_unless((llama,).__contains__, [llama, gpt2, bert, t5]), ids=lambda build: build.__name__
)
def test_a_graph_saves_no_more_tensors_than_hugging_face(build: Callable[[], Any]) -> None:
    """Train the weights in Hugging Face's model that the graph adapts, on the same inputs. Neither trains embeddings.

    Adapters add nothing to the saved tensors: checkpointing only saves the inputs of layers, and adapters are inside.
    """
    plain, ours = plain_and_checkpointed(build)
    theirs = copy.deepcopy(model_and_base(build)[0]).train()
    adapted = {row.name for row in llfx.inspect(plain) if row.adapters}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in adapted)
    inputs = tokens(4, 16)
    unchecked = saved_by(theirs, inputs)
    enable_checkpointing(theirs)
    theirs.disable_input_require_grads()
    assert saved_by(ours, inputs) <= 1.1 * saved_by(theirs, inputs) < 0.3 * unchecked
    assert saved_by(ours.eval(), inputs) == saved_by(plain.eval(), inputs)
    ours.train(), plain.train()


@pytest.mark.broad
def test_every_call_of_a_shared_layer_is_checkpointed() -> None:
    plain, ours = plain_and_checkpointed(albert)
    assert saved_by(ours, tokens()) < 0.15 * saved_by(plain, tokens())


# Compiled, copied, exported.


@pytest.mark.broad
def test_a_compiled_graph_has_no_breaks_and_saves_memory() -> None:
    x = torch.randn(64, 32, WIDTH)  # large compared with the saved random states, whose size is fixed
    model = nn.Sequential(*(GatedMLP(bias=True) for _ in range(3)))
    plain = llfx.rewrite(model, llfx.LoRA(r=2), (x,)).train()
    randomise(plain, 1)
    ours = checkpointed(plain)
    results = []
    for gm in (plain, ours):
        torch.compiler.reset()
        # Use the partitioner of inductor without its code generation.
        compiled: Any = torch.compile(gm, fullgraph=True, backend="aot_eager_decomp_partition")
        results.append((step(compiled, (x,)), saved_by(compiled, (x,))))
    torch.compiler.reset()
    (expected, unchecked), (actual, saved) = results
    assert saved < 0.3 * unchecked
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        close(tensor, expected[name], 1e-5, name or "output")


@pytest.mark.broad
def test_a_deep_copy_is_checkpointed_and_independent() -> None:
    _, ours = plain_and_checkpointed(gpt2)
    twin = copy.deepcopy(ours)
    assert checkpoints_layers(twin)
    expected = step(ours, tokens())
    assert_same(step(twin, tokens()), expected)
    assert saved_by(twin, tokens()) == saved_by(ours, tokens())
    randomise(twin, 7)
    assert_same(step(ours, tokens()), expected)
    assert not torch.equal(step(twin, tokens())[""], expected[""])


@pytest.mark.broad
def test_an_export_is_flat() -> None:
    plain, ours = plain_and_checkpointed(gpt2)
    inputs = tokens()
    for training in (True, False):
        programs = [torch.export.export(gm.train(training), (), inputs) for gm in (plain, ours)]
        graphs = [[node.target for node in program.graph.nodes] for program in programs]
        assert graphs[0] == graphs[1]
    file = io.BytesIO()
    torch.export.save(programs[1], file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(**inputs).logits, llfx.optimize(plain, Pipeline(()))(**inputs).logits)
    plain.train(), ours.train()


# Checkpointing across capture, rewriting and files.


def enable_checkpointing(model: Any, *options: Any) -> None:
    """Let a model checkpoint its layers, by the name that its release has for that."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(*options)


@pytest.mark.broad
def test_the_graph_of_a_hugging_face_model_that_checkpoints_checkpoints_too() -> None:
    model = copy.deepcopy(model_and_base(llama)[0])
    enable_checkpointing(model, {"use_reentrant": True})
    with untouched(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoint.*")
        gm = llfx.rewrite(model, LORA).train()
    plain, ours = plain_and_checkpointed(llama)
    assert checkpoints_layers(gm)
    assert str(gm.graph) == str(plain.graph)
    llfx.load_adapter_state_dict(gm, llfx.adapter_state_dict(ours))
    assert_same(step(gm, tokens()), step(plain, tokens()))


@pytest.mark.broad
def test_rewriting_keeps_checkpointing_unless_it_is_switched_off() -> None:
    case = Case(BLOCKS, bias=True, tied=True, dtype=torch.float32, exported=True, seed=0)
    model = case.build()
    base = llfx.capture(model, case.example_inputs, checkpoint_layers=True)
    gm = llfx.rewrite(base, [llfx.DoRA(r=2), llfx.IA3()])
    randomise(gm, 1)
    plain = llfx.rewrite(gm, LORA, checkpoint_layers=False)
    both = llfx.rewrite(gm, LORA)
    for made in (plain, both):
        randomise(made, 1)
    assert not checkpoints_layers(plain)
    assert all(checkpoints_layers(made) for made in (gm, both, llfx.remove(gm), llfx.merge(gm)))
    assert_same(step(both.train(), (ids(3, 6),)), step(plain.train(), (ids(3, 6),)))
    check_remove(gm, base, model)
    check_merge(gm, base, (ids(3, 6),), 1e-4)
    assert str(llfx.inspect(both)) == str(llfx.inspect(plain))


@pytest.mark.broad
@pytest.mark.parametrize("library", broad_after(1, ["own", "peft", "lora_lite"]))
def test_a_loaded_adapter_is_checkpointed_like_its_base(library: str, tmp_path: Path) -> None:
    save, load = {
        "own": (llfx.save, llfx.load),
        "peft": (llfx.save_peft, llfx.load_peft),
        "lora_lite": (llfx.save_lora_lite, llfx.load_lora_lite),
    }[library]
    gm = llfx.rewrite(small_base(True), llfx.LoRA(r=2, target_names=("fc", "lin")), checkpoint_layers=True)
    randomise(gm, 1)
    save(gm, tmp_path / "adapter")
    loaded = load(llfx.capture(small_base(True), checkpoint_layers=True), tmp_path / "adapter")
    assert checkpoints_layers(loaded)
    assert_same(step(loaded.train(), (ids(3, 6),)), step(gm.train(), (ids(3, 6),)))
    assert not checkpoints_layers(load(small_base(True), tmp_path / "adapter"))


@pytest.mark.slow
def test_a_checkpointed_graph_shares_the_parameters_of_the_plain_graph() -> None:
    plain, ours = plain_and_checkpointed(t5)
    assert dict(ours.named_parameters(remove_duplicate=False)) == dict(plain.named_parameters(remove_duplicate=False))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert str(ours.graph) == str(plain.graph)


def test_a_model_without_layers_is_refused() -> None:
    model = Normed(bias=True)
    with untouched(model), pytest.raises(llfx.CaptureError, match=r"no layers to checkpoint.*model\.layers\.0"):
        llfx.rewrite(model, LORA, checkpoint_layers=True)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=("lin",)))
    assert output(gm, (torch.randn(2, 3, WIDTH),)).shape == (2, 3, WIDTH)
