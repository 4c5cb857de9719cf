"""Trials of kind "models": tiny models of transformers under `adapt`, in random sequences of calls and changes.

The oracle is the model itself, with the branches of the adapters added by hooks. All that a call returns is compared,
the types of caches, too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from hypothesis import strategies as st
from torch import Tensor

import lora_lite_fx as llfx
from tests.fuzz import operations as ops
from tests.fuzz.verdict import Void, Wrong, require_close, the_oracle
from tests.support.conformance import randomise
from tests.support.models import tiny_llama

SCALE = 1.5
LORA = llfx.LoRA(r=2, alpha=3.0, target_names=".")
VOCABULARY = 99


def _bert(**fields: Any) -> hf.BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **fields)


MODELS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: hf.LlamaForCausalLM(tiny_llama()),
    "tied LlamaForCausalLM": lambda: hf.LlamaForCausalLM(tiny_llama(tie_word_embeddings=True)),
    "BertForMaskedLM": lambda: hf.BertForMaskedLM(_bert()),
    "BertForSequenceClassification": lambda: hf.BertForSequenceClassification(_bert(num_labels=3)),
    "LlamaForSequenceClassification": lambda: hf.LlamaForSequenceClassification(
        tiny_llama(num_labels=3, pad_token_id=0)
    ),
    "GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ),
}
CALLS = (
    *("ids", "mask", "left padding", "labels", "float labels", "cache", "next token", "embeds", "positions", "tuple"),
    *("hidden states", "autocast", "autocast cache", "inference", "no_grad"),
)


@dataclass(frozen=True)
class Called:
    """A call of the model, one of `CALLS`."""

    how: str

    def words(self) -> str:
        return f"call with {self.how}"


@dataclass(frozen=True)
class Config(ops.Change):
    """Another value of a field of the config."""

    value: str = "num_labels"

    def of(self, model: Any) -> None:
        if self.value == "output_hidden_states":
            model.config.output_hidden_states = True
        elif self.value == "use_cache":
            model.config.use_cache = False
        else:
            model.config.problem_type = "multi_label_classification"

    def words(self) -> str:
        return f"config.{self.value}"


@dataclass(frozen=True)
class Models:
    """An adapted model, and what is done with it.

    Args:
        model: a key of `MODELS`.
        steps: calls and changes.
        training: the mode.
    """

    model: str
    steps: tuple[Any, ...] = ()
    training: bool = False

    def features(self) -> frozenset[str]:
        words = {self.model, *(each.words() for each in self.steps)} - {"LlamaForCausalLM", "call with ids"}
        return frozenset(words | ({"training"} if self.training else set()))

    def check(self) -> None:
        adapted = copy.deepcopy(_adapted(self.model)).train(self.training)
        oracle = _with_adapters(_plain(self.model).train(self.training), adapted)
        for step in (*self.steps, Called("ids")):
            if isinstance(step, Called):
                with the_oracle():
                    expected = _run(oracle, step.how)
                actual = _run(adapted, step.how)
                tolerance = 0.05 if "autocast" in step.how else 1e-4
                # The account says that these caches have the types of the weights.
                without_caches = self.training and step.how.startswith("autocast")
                _compare(actual, expected, tolerance, f"{step.how}: ", without_caches)
            else:
                with the_oracle():
                    step.of(oracle)
                step.of(adapted)
        if oracle.config.to_dict() != adapted.config.to_dict():
            fields, ours = oracle.config.to_dict(), adapted.config.to_dict()
            odd = next(name for name in fields if fields[name] != ours.get(name))
            raise Wrong("config", f"{odd} is {ours.get(odd)!r} in place of {fields[odd]!r}")


def _plain(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]().eval()


@functools.cache
def _adapted(name: str) -> Any:
    """Return an adapted model with one graph. Trials take copies, because captures take most of their time."""
    adapted = llfx.adapt(_plain(name), LORA)
    randomise(adapted, 0)
    return adapted


def _with_adapters(plain: Any, adapted: Any) -> Any:
    """Return a copy of the model whose linears add the branch of the adapter."""
    oracle, values = plain.requires_grad_(False), llfx.adapter_state_dict(adapted)
    for name, module in oracle.named_modules():
        if f"{name}.lora_A" in values:
            a, b = (values[f"{name}.lora_{factor}"].detach().clone() for factor in "AB")

            def add(_: Any, args: tuple[Tensor, ...], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                with torch.autocast("cpu", enabled=False):
                    return (y.float() + SCALE * args[0].float() @ a.T @ b.T).to(y.dtype)

            module.register_forward_hook(add)
    return oracle


def _run(model: Any, how: str) -> Any:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    decodes, classifies = "LM" in type(model).__name__, "Sequence" in type(model).__name__
    call: dict[str, Any] = {"input_ids": ids}
    if how in ("mask", "left padding"):
        mask = torch.ones_like(ids)
        mask[0, :2] = 0 if how == "left padding" else 1
        call["attention_mask"] = mask
    if "labels" in how:
        labels: Any = ids
        if classifies:
            labels = torch.tensor([0, 2]) if how == "labels" else torch.rand(2, 3, generator=generator)
        elif how == "float labels":
            raise Void("only classifiers take float labels")
        call["labels"] = labels
    if how == "embeds":
        call = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    if how == "positions":
        call["position_ids"] = torch.arange(7).flip(0)[None].expand(2, -1)
    if how == "tuple":
        call["return_dict"] = False
    if how == "hidden states":
        call["output_hidden_states"] = True
    if "cache" in how or how == "next token":
        if not decodes or "Masked" in type(model).__name__:
            raise Void("it has no cache")
        call["use_cache"] = True
    context: Any = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(how, torch.enable_grad)
    with context(), torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in how):
        output = model(**call)
        if how == "next token":
            call = {"input_ids": ids[:, :1], "past_key_values": output.past_key_values, "use_cache": True}
            output = model(**call)
    return output


def _compare(actual: Any, expected: Any, tolerance: float, where: str, without_caches: bool) -> None:
    if type(actual) is not type(expected):
        raise Wrong("class of the output", f"{where}{type(actual).__name__} in place of {type(expected).__name__}")
    one, other = (_flat(each, without_caches) for each in (actual, expected))
    require_close(one, other, tolerance, "output of a model", where)


def _flat(output: Any, without_caches: bool) -> dict[str, Tensor]:
    """Return the tensors of an output by name, those of caches among them unless they are left out."""
    named = output.items() if hasattr(output, "items") else enumerate(output)
    tensors: dict[str, Tensor] = {}
    for name, value in named:
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, (tuple, list)):
            tensors |= {f"{name}{key}": each for key, each in _flat(value, without_caches).items()}
        elif hasattr(value, "layers") and not without_caches:
            for i, layer in enumerate(value.layers):
                tensors |= {f"{name}{i} keys": layer.keys, f"{name}{i} values": layer.values}
    return tensors


@functools.cache
def _changes(name: str) -> tuple[ops.Change, ...]:
    """Return all changes that fit a part of a model."""
    parts = dict(_plain(name).named_modules())
    made: list[ops.Change] = []
    for part in parts:
        made += [ops.Bias(part), ops.Setting(part), *(ops.Mode(part, training) for training in (False, True))]
        made += [ops.Tensors(part, how) for how in ("in place", "data", "replaced")]
        made += [ops.Exchange(part, how) for how in ("module", "class")]
    return tuple(change for change in made if change.fits(parts[change.part]))


@st.composite
def models(draw: Any) -> Models:
    """Draw a trial."""
    name = draw(st.sampled_from(list(MODELS)))
    fields = st.sampled_from(["problem_type", "output_hidden_states", "use_cache"])
    change = st.sampled_from(_changes(name)) | st.builds(lambda value: Config("", value), fields)
    call = st.builds(Called, st.sampled_from(CALLS))
    return Models(name, tuple(draw(st.lists(call | change, min_size=1, max_size=3))), draw(st.booleans()))
