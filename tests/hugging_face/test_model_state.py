"""Change an adapted model besides its tensors: the next call is that of the model as it is then, or says why not."""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import lora_lite_fx as llfx
from lora_lite_fx.hugging_face.config_reads import recorded_reads
from lora_lite_fx.hugging_face.model_state import ModelState
from tests.support.conformance import randomise
from tests.support.models import one_layer_llama
from tests.support.selection import broad_after, slow_after

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
LORA = llfx.LoRA(r=2, target_roles=("reader", "writer"))


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def adapted() -> Any:
    torch.manual_seed(0)
    model = llfx.adapt(one_layer_llama().eval(), LORA)
    randomise(model, 0)
    return model


def require_acts(change: Callable[[Any], object], model: Any) -> None:
    """Change an adapted model: the next call must be that of the merged model that is changed alike, and another."""
    plain = llfx.merge(model)
    before = model(IDS).logits
    change(plain)
    change(model)
    assert same(model(IDS).logits, plain(IDS).logits)
    assert not same(model(IDS).logits, before)


def with_bias(model: Any) -> None:
    torch.manual_seed(1)
    model.lm_head = nn.Linear(16, 32)


def with_bias_alone(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 32))


def with_biased_site(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.linspace(-1, 1, 16))


class OtherNorm(nn.Module):
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.weight


class OtherLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states * 2, *args, **kwargs)


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


class OtherHelper(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        return 3 * self.down_proj(self.up_proj(x))


def of_class(path: str, kind: type) -> Callable[[Any], object]:
    return lambda model: setattr(model.get_submodule(path), "__class__", kind)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a bias where there was none": with_bias_alone,
    "a class": of_class("model.norm", OtherNorm),
    "a bias at an adapted site": with_biased_site,
    "the class of a layer": of_class("model.layers.0", OtherLayer),
    "the class of a part of a layer": of_class("model.layers.0.mlp", OtherHelper),
    "the class of an adapted module": of_class("model.layers.0.mlp.up_proj", OtherLinear),
    "a norm of another class": lambda model: setattr(model.model, "norm", nn.LayerNorm(16)),
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "a function for a module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Sequential(nn.Tanh())),
    "a number": lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
    "a head that has a bias": with_bias,
    "no more layers": lambda model: setattr(model.model, "layers", nn.ModuleList()),
}


@pytest.mark.parametrize("change", broad_after(1, slow_after(3, CHANGES.values())), ids=CHANGES)
def test_a_change_acts_in_the_next_call(change: Callable[[Any], object], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    plain = llfx.merge(model)
    before = model(IDS).logits
    change(plain)
    change(model)
    expected = plain(IDS).logits
    assert not same(expected, before)
    if not model.model.layers:
        with pytest.raises(llfx.AdapterError, match=r"adapter of 'model.layers.0.self_attn.q_proj' is gone.*put back"):
            model(IDS)
        return
    with caplog.at_level(logging.INFO, logger="lora_lite_fx"):
        assert same(model(IDS).logits, expected)
        assert same(model(IDS).logits, expected)
    assert [record for record in caplog.messages if "will be captured again, because" in record]
    assert len([record for record in caplog.messages if "captured a graph" in record]) == 1


@pytest.mark.broad
def test_dropout_that_a_trainer_switches_off_is_off() -> None:
    # TRL's disable_dropout sets p of all nn.Dropout to zero, and its default for DPO is to do so.
    config = hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = llfx.adapt(hf.GPT2LMHeadModel(config), LORA).train()
    randomise(model, 0)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = model(IDS).logits
    assert torch.equal(model(IDS).logits, logits)
    assert same(model.eval()(IDS).logits, logits)


@pytest.mark.broad
def test_a_config_that_the_model_reads_acts_in_the_next_call(caplog: pytest.LogCaptureFixture) -> None:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = llfx.adapt(hf.LlamaForSequenceClassification(config).eval(), LORA)
    randomise(model, 0)
    ids = IDS.clone()
    ids[0, 4:] = 1
    before = model(ids).logits
    for pad in (1, 0):
        with caplog.at_level(logging.INFO, logger="lora_lite_fx"):
            model.config.pad_token_id = pad  # which tells the last token of each text
            logits = model(ids).logits
            model.config.bos_token_id = 5  # which the model does not read
            assert torch.equal(model(ids).logits, logits)
        merged = llfx.merge(model)
        assert merged.config.pad_token_id == pad
        assert same(logits, merged(ids).logits)
        assert same(logits, before) == (pad == 0)
    assert len([record for record in caplog.messages if "captured a graph" in record]) == 1
    assert "config.pad_token_id is 1, and was 0" in caplog.text


@pytest.mark.broad
def test_what_a_config_asks_to_be_returned_is_returned() -> None:
    model = adapted()
    expected = model(IDS).logits
    model.config.output_hidden_states = True
    hidden = model(IDS).hidden_states
    plain = llfx.merge(model)
    assert all(same(one, other) for one, other in zip(hidden, plain(IDS).hidden_states, strict=True))
    for each in (model, plain):
        each.config.output_hidden_states = False
        each.set_attn_implementation("eager")
        each.config.output_attentions = True
    assert same(model(IDS).attentions[0], plain(IDS).attentions[0])
    captures = model._graphs.captures
    model.config.output_attentions = False
    model.set_attn_implementation("sdpa")
    result = model(IDS)
    assert torch.equal(result.logits, expected)
    assert not {"hidden_states", "attentions"} & result.keys()
    assert model._graphs.captures == captures  # the first graph holds again


@pytest.mark.slow
def test_a_compiled_call_follows_the_config() -> None:
    model = adapted()
    compiled: Any = torch.compile(model, backend="eager")
    logits = {}
    with torch.no_grad():
        for is_causal in (True, False, True):
            model.config.is_causal = is_causal
            logits[is_causal] = compiled(IDS).logits
            assert same(logits[is_causal], llfx.merge(model)(IDS).logits)
    assert not same(logits[True], logits[False])


def see_all_tokens(model: Any) -> None:
    model.config.is_causal = False  # which the config did not have before


def other_config(model: Any) -> None:
    for part in (model, model.model):
        part.config = copy.deepcopy(part.config)
    see_all_tokens(model.model)


@pytest.mark.broad
@pytest.mark.parametrize("change", broad_after(1, [see_all_tokens, other_config]))
def test_a_config_field_that_was_absent_acts_in_the_next_call(change: Callable[[Any], object]) -> None:
    model = adapted()
    require_acts(change, model)


@pytest.mark.broad
def test_modules_that_are_causal_with_a_mask_alone_are_refused() -> None:
    # Sdpa leaves out the mask of a text without padding, whose tokens see all then; with padding they see those before.
    model = adapted()
    model(IDS)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(llfx.CaptureError, match=r"The way out: set model\.config\.is_causal = False if tokens are to"):
        model(IDS)
    base = one_layer_llama().eval()
    base.model.layers[0].self_attn.is_causal = False
    with pytest.raises(llfx.CaptureError, match="differs from the model"):
        llfx.adapt(base, LORA)


class Factor:
    """A function with a number of its own, as the processors of attention in diffusers are objects."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Scaled(hf.LlamaForCausalLM):
    """Multiplies its logits with what attributes of many kinds say."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tensor = torch.tensor(2.0)
        self.numbers, self.by_name = [1.0, 2.0], {"default": 3.0}
        self.bias: float | None = None
        self._factor, self._function = 2.0, doubled
        self.processor = Factor(0.5)
        self.warnings_issued: dict[str, bool] = {}
        self.model_tags = ["mine"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        factor = self.tensor * self._factor * self.numbers[0] * self.by_name["default"]
        result.logits = self._function(self.processor(result.logits)) * factor + (self.bias or 0)
        return result


@pytest.mark.slow
def test_attributes_of_every_kind_act_in_the_next_call() -> None:
    config = one_layer_llama().config
    base: Any = Scaled(config)
    model = llfx.adapt(base.eval(), LORA)
    randomise(model, 0)
    model(IDS)
    captures = model._graphs.captures
    model.warnings_issued["estimate_tokens"] = True  # as TRL does
    model.add_model_tags(["sft"])
    model(IDS)
    assert model._graphs.captures == captures
    changes: list[Callable[[Any], object]] = [
        lambda model: setattr(model, "tensor", torch.tensor(5.0)),
        lambda model: model.numbers.__setitem__(0, 0.5),
        lambda model: model.by_name.__setitem__("default", 7.0),
        lambda model: setattr(model, "bias", 1.5),
        lambda model: setattr(model, "processor", Factor(2.0)),
        lambda model: setattr(model, "_factor", 0.25),
        lambda model: setattr(model, "_function", torch.Tensor.square),
    ]
    for change in changes:
        require_acts(change, model)
        captures = model._graphs.captures
        model(IDS)
        assert model._graphs.captures == captures


@dataclasses.dataclass
class Options:
    scale: float = 2.0


class Way(enum.Enum):
    ADD, MULTIPLY = 1, 2


SCALE_OF_FILE = 2.0
SCALE_IN_LOOP = 1.0


class HoldsObjects(hf.LlamaForCausalLM):
    """Multiplies its logits with what objects, containers in containers, private attributes, its class and file say."""

    scale_of_class = 0.5

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.options, self.namespace, self.way = Options(), types.SimpleNamespace(inner=Options()), Way.ADD
        self.table, self.steps, self._private = [[1.0], [2.0]], [Options()], [1.0]
        self.tensors, self.names, self.processor = [torch.tensor([2.0])], {"all"}, Factor(0.5)
        vars(self.processor)["unread"] = torch.ones(2)

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        result = super().forward(input_ids=input_ids, **more)
        y = result.logits * self.options.scale * self.namespace.inner.scale * self.table[1][0] * self.steps[0].scale
        y = self.processor(y * self._private[0] * self.tensors[0]) * self.scale_of_class * SCALE_OF_FILE
        y = y * max(SCALE_IN_LOOP for _ in range(1))  # in a function inside of this one
        y = 2 * y if self.way is Way.MULTIPLY else y
        result.logits = 3 * y if "all" in self.names else y
        return result


OBJECTS: dict[str, Callable[[Any], object]] = {
    "a field of an object": lambda model: setattr(model.options, "scale", 5.0),
    "an object": lambda model: setattr(model, "options", Options(5.0)),
    "a field of an object in an object": lambda model: setattr(model.namespace.inner, "scale", 5.0),
    "a field of a function": lambda model: setattr(model.processor, "factor", 5.0),
    "a field of an object in a list": lambda model: setattr(model.steps[0], "scale", 5.0),
    "an object in a list": lambda model: model.steps.__setitem__(0, Options(5.0)),
    "a list in a list": lambda model: model.table[1].__setitem__(0, 5.0),
    "a private list": lambda model: model._private.__setitem__(0, 5.0),
    "a tensor in a list": lambda model: model.tensors.__setitem__(0, torch.tensor([5.0])),
    "a tensor in a list, written to": lambda model: model.tensors[0].fill_(5.0),
    "a set": lambda model: model.names.clear(),
    "an enum": lambda model: setattr(model, "way", Way.MULTIPLY),
}


@pytest.mark.broad
@pytest.mark.parametrize("change", slow_after(2, OBJECTS.values()), ids=OBJECTS)
def test_an_object_that_the_code_of_a_user_reads_acts_in_the_next_call(change: Callable[[Any], object]) -> None:
    base: Any = HoldsObjects(one_layer_llama().config)
    model = llfx.adapt(base.eval(), LORA)
    randomise(model, 0)
    model(IDS)
    captures = model._graphs.captures
    model.generation_config.max_length = 7
    model(IDS)
    assert model._graphs.captures == captures
    require_acts(change, model)
    captures = model._graphs.captures
    model(IDS)
    assert model._graphs.captures == captures


@pytest.mark.broad
def test_numbers_of_the_class_and_of_the_file_act_in_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = HoldsObjects(one_layer_llama().config)
    model = llfx.adapt(base.eval(), LORA)
    before = model(IDS).logits
    monkeypatch.setattr(HoldsObjects, "scale_of_class", 1.5)
    torch.testing.assert_close(model(IDS).logits, 3 * before)
    monkeypatch.setattr(sys.modules[__name__], "SCALE_OF_FILE", 1.0)
    torch.testing.assert_close(model(IDS).logits, 1.5 * before)
    monkeypatch.setattr(sys.modules[__name__], "SCALE_IN_LOOP", 2.0)
    torch.testing.assert_close(model(IDS).logits, 3 * before)


class ScaledLater(hf.LlamaForCausalLM):
    """A model that reads an attribute which it does not have at first."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        result.logits = result.logits * getattr(self, "scale_of_logits", 1.0)
        return result


@pytest.mark.broad
def test_an_attribute_that_the_code_of_a_model_names_acts_from_when_it_is_set() -> None:
    base: Any = ScaledLater(one_layer_llama().config)
    model: Any = llfx.adapt(base.eval(), LORA)
    before = model(IDS).logits
    model.scale_of_logits = 3.0
    torch.testing.assert_close(model(IDS).logits, 3 * before)


@pytest.mark.broad
def test_a_loss_function_that_is_set_is_that_of_the_next_call() -> None:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = llfx.adapt(hf.LlamaForTokenClassification(config).eval(), LORA)
    labels = IDS % 2
    before = model(IDS, labels=labels).loss
    model.loss_function = lambda logits, labels, config, **_: logits.square().mean()
    result = model(IDS, labels=labels)
    assert torch.allclose(result.loss, result.logits.square().mean())
    assert not torch.allclose(result.loss, before)


@pytest.mark.broad
def test_what_a_graph_does_not_hold_is_not_a_change(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    expected = model(IDS).logits
    with caplog.at_level(logging.INFO, logger="lora_lite_fx"):
        model.some_flag = True  # as trainers put on models
        model._internal = 3
        model.train()
        model.eval()
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        norm = copy.deepcopy(model.model.norm)
        model.model.norm = norm  # another module, and alike
        parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())  # is read as any tensor is
        assert torch.equal(model(IDS).logits, expected)
        llfx.add(model, {"other": LORA})
        llfx.delete(model, "other")
        assert same(model(IDS).logits, expected)
    assert not [record for record in caplog.messages if "captured" in record]


@pytest.mark.broad
def test_a_forward_that_is_put_on_a_module_inside_is_told_of_once() -> None:
    model = adapted()
    expected = model(IDS).logits

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        return hidden * 0

    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(forward, mlp)
    with pytest.warns(UserWarning, match=r"forward was replaced on 'model.layers.0.mlp', and does not act"):
        assert torch.equal(model(IDS).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.broad
def test_a_module_that_is_put_back_brings_its_adapter_back() -> None:
    model = adapted()
    expected = model(IDS).logits
    mlp = model.model.layers[0].mlp
    old, mlp.up_proj = mlp.up_proj, nn.Linear(16, 16, bias=False)
    for _ in range(2):
        with pytest.raises(llfx.AdapterError, match=r"adapter of 'model.layers.0.mlp.up_proj' is gone"):
            model(IDS)
    mlp.up_proj = old
    assert same(model(IDS).logits, expected)


@pytest.mark.broad
def test_a_scope_of_frozen_sees_changes_from_before_it() -> None:
    model = adapted()
    model(IDS)
    plain = llfx.merge(model)
    for each in (model, plain):
        each.model.norm.variance_epsilon = 0.5
    with torch.no_grad(), llfx.frozen(model):
        assert same(model(IDS).logits, plain(IDS).logits)


@pytest.mark.broad
def test_a_wrapper_around_the_forward_of_a_layer_acts() -> None:
    model, calls = adapted(), []
    expected = model(IDS).logits
    layer = model.model.layers[0]
    inside = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return inside(*args, **kwargs)

    layer.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(IDS).logits, expected)
    assert len(calls) == 1


@pytest.mark.broad
def test_a_layer_without_adapters_may_be_replaced_by_another_of_its_class() -> None:
    model = llfx.adapt(one_layer_llama().eval(), llfx.LoRA(r=2, target_names=("lm_head",)))
    randomise(model, 0)
    before = model(IDS).logits
    torch.manual_seed(1)
    layer = one_layer_llama().model.layers[0]
    plain = llfx.merge(model)
    for each in (model, plain):
        each.model.layers[0] = copy.deepcopy(layer)
    logits = model.eval()(IDS).logits
    assert same(logits, plain.eval()(IDS).logits)
    assert not same(logits, before)


# Weights that are computed since `adapt`.


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)  # by a hook


def changed(module: Any, name: str) -> None:
    """Change a tensor, of which a weight is computed, as training does."""
    with torch.no_grad():
        module.get_parameter(name).mul_(1.7)


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a hook": (weight_norm, "weight_g"),
    "pruning": (lambda module: prune.l1_unstructured(module, "weight", 0.5), "weight_orig"),
    "a parametrization": (parametrizations.weight_norm, "parametrizations.weight.original0"),
    "one with a buffer named base": (parametrizations.orthogonal, "parametrizations.weight.original"),
}


@pytest.mark.broad
@pytest.mark.parametrize("compute", slow_after(1, COMPUTED.values()), ids=COMPUTED)
def test_a_weight_that_is_computed_since_is_computed_in_each_call(
    compute: tuple[Callable[[nn.Module], object], str],
) -> None:
    model = llfx.adapt(one_layer_llama().eval(), llfx.LoRA(r=2, target_names=(".*q_proj",)))
    randomise(model, 0)
    before = model(IDS).logits
    plain = llfx.merge(model)
    make, name = compute
    for each in (model, plain):
        each(IDS)
        make(each.model.layers[0].self_attn.o_proj)
        each(IDS)
        changed(each.model.layers[0].self_attn.o_proj, name)
    logits = plain(IDS).logits
    assert not same(logits, before)
    assert same(model(IDS).logits, logits)
    assert same(model(IDS, output_hidden_states=True).logits, logits)  # which is captured anew


@pytest.mark.broad
def test_an_adapted_weight_that_is_parametrized_since_is_merged() -> None:
    model = adapted()
    model(IDS)
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    changed(model.model.layers[0].mlp.up_proj, "parametrizations.weight.original0")
    logits = model(IDS).logits
    assert same(model(IDS, output_hidden_states=True).logits, logits)
    merged = llfx.merge(model)
    assert same(merged(IDS).logits, logits)
    assert not parametrize.is_parametrized(merged.model.layers[0].mlp.up_proj)


def test_reads_of_a_copied_config_and_of_its_copies_are_recorded_by_the_class_of_the_models() -> None:
    model: Any = nn.Module()
    model.config = hf.CLIPConfig(projection_dim=8)
    kinds = type(model.config), type(model.config.text_config)
    with recorded_reads(model) as reads:
        again = copy.deepcopy(model.config)
        assert isinstance(again, kinds[0])
        assert again.projection_dim == 8
        assert again.text_config.hidden_size
    assert reads >= {(kinds[0], "projection_dim"), (kinds[1], "hidden_size")}
    assert (type(model.config), type(model.config.text_config)) == kinds
    count = len(reads)
    assert again.logit_scale_init_value
    assert len(reads) == count


# What `ModelState` sees of any module.


class Part(nn.Module):
    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(2, 2, bias=False), nn.Linear(2, 2), nn.LayerNorm(2)
        self.register_buffer("table", None)
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x)

    def helped(self, x: Tensor) -> Tensor:
        return x


class Helped(Part):
    def helped(self, x: Tensor) -> Tensor:
        return 2 * x


class Mixin:
    """Adds a method and changes one of `nn.Module`, as the class that fully_shard puts before that of a module."""

    def reshard(self) -> None: ...

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


class Mixed(Mixin, Part): ...


SEEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "a bias": (lambda model: setattr(model.up, "bias", nn.Parameter(torch.ones(2))), "up.bias was added"),
    "no bias": (lambda model: setattr(model.down, "bias", None), "down.bias was taken away"),
    "a bias by its registry": (lambda model: model.down._parameters.pop("bias"), "down.bias was taken away"),
    "a buffer": (lambda model: setattr(model, "table", torch.ones(2)), "Part.table was added"),
    "no buffer": (lambda model: setattr(model, "mask", None), "Part.mask was taken away"),
    "a new buffer": (lambda model: model.norm.register_buffer("more", torch.ones(2)), "norm.more was added"),
    "a class": (lambda model: setattr(model.down, "__class__", nn.Bilinear), "down is a Bilinear, and was a Linear"),
    "a class with another method": (
        lambda model: setattr(model, "__class__", Helped),
        "Helped is a Helped, and was a Part",
    ),
}
UNSEEN: dict[str, Callable[[Any], object]] = {
    "a class that adds": lambda model: setattr(model, "__class__", Mixed),
    "a parametrization": lambda model: parametrize.register_parametrization(model.down, "weight", nn.Identity()),
    "another tensor": lambda model: setattr(model.down, "bias", nn.Parameter(torch.ones(2))),
    "another buffer": lambda model: setattr(model, "mask", torch.zeros(3)),
    "data": lambda model: setattr(model.down.bias, "data", torch.ones(2)),
}


@pytest.mark.parametrize("part", ["weight", "weight.0"])
def test_a_forward_that_is_put_on_what_computes_a_weight_is_told_of(part: str) -> None:
    model = Part()
    parametrizations.weight_norm(model.down)
    state, module = ModelState(model), model.get_submodule(f"down.parametrizations.{part}")
    module.forward = types.MethodType(nn.Identity.forward, module)
    assert not state.is_as_it_was()
    with pytest.warns(UserWarning, match=f"forward was replaced on 'down.parametrizations.{part}'"):
        assert state.change() == ""


@pytest.mark.parametrize(("change", "message"), SEEN.values(), ids=SEEN)
def test_what_a_module_has_and_of_which_class_it_is_is_seen(change: Callable[[Any], object], message: str) -> None:
    model = Part()
    state = ModelState(model)
    assert state.is_as_it_was()
    change(model)
    assert not state.is_as_it_was()
    assert state.change().startswith(message)
    assert state.is_as_it_was()
    assert state.change() == ""


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_what_graphs_follow_by_themselves_is_not_a_change(change: Callable[[Any], object]) -> None:
    model = Part()
    state = ModelState(model)
    change(model)
    assert state.change() == ""
    assert state.is_as_it_was()


class HoldsNumbers(nn.Module):
    """Has objects with which a comparison is a tensor, an array, or an error."""

    def __init__(self) -> None:
        super().__init__()
        self.array, self.tensors, self.odd = numpy.ones(3), [torch.ones(3)], Odd()

    def forward(self, x: Tensor) -> Any:
        return x * torch.from_numpy(self.array) * self.tensors[0] if self.odd else x


class Odd:
    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError


def test_objects_are_compared_with_themselves_alone() -> None:
    model = HoldsNumbers()
    state = ModelState(model)
    for name, value in (("array", numpy.ones(3)), ("tensors", [torch.ones(3)]), ("odd", Odd())):
        assert state.is_as_it_was()
        setattr(model, name, value)
        assert not state.is_as_it_was()
        assert state.change().startswith(f"HoldsNumbers.{name} is ")


def test_a_function_that_is_put_into_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ModelState(Part())
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
    assert not state.is_as_it_was()
    assert state.change() == "forward of LayerNorm is another function"
    assert state.is_as_it_was()


@pytest.mark.broad
def test_an_adapted_module_of_another_class_runs_alone_with_its_adapter() -> None:
    model = adapted()
    of_class("model.layers.0.mlp.up_proj", OtherLinear)(model)
    model(IDS)
    plain = llfx.merge(model)
    x = torch.randn(2, 16)
    assert same(model.model.layers[0].mlp.up_proj(x), plain.model.layers[0].mlp.up_proj(x))


@pytest.mark.broad
@pytest.mark.parametrize("had", slow_after(1, [True, False]))
def test_a_bias_that_full_trains_or_would_train_is_not_taken_away_or_added(had: bool) -> None:
    plain = one_layer_llama()
    head = plain.lm_head
    bias = nn.Parameter(torch.linspace(-1, 1, 32))
    head.bias = bias if had else None
    model = llfx.adapt(plain.eval(), llfx.Full(target_names="lm_head"))
    expected = model(IDS).logits
    model.lm_head.bias = None if had else bias
    with pytest.raises(
        llfx.AdapterError, match=f"'lm_head' {'has no place for' if had else 'needs'} lora_bias of Full"
    ):
        model(IDS)
    model.lm_head.bias = nn.Parameter(torch.zeros(32)) if had else None
    assert same(model(IDS).logits, expected)
