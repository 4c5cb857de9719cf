"""Train adapted models by what people train with, and compare with the eager wrapper under the same trainer.

`python -m tests.hugging_face.trainers [word of a name ...]` prints the table in trainers.md. It needs accelerate, trl
and datasets. Each case trains three steps on the CPU, the adapted model and the eager wrapper from the same values.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf

import lora_lite_fx as llfx
from tests.support.conformance import randomise

WORDS = 64
CONFIG = llfx.LoRA(r=2, target_roles=("attention", "mlp"))
Train = Callable[[Callable[[], Any], Path], tuple[list[float], Any]]
"""A function of one that makes a model, and of a folder; it returns the losses and the trained model."""


def llama(cls: Any = hf.LlamaForCausalLM, dtype: torch.dtype = torch.float64) -> Any:
    """Return a Llama of one layer; a classifier has one label, as reward models do."""
    torch.manual_seed(0)
    config: Any = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=WORDS,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    if cls is hf.LlamaForSequenceClassification:
        config.num_labels = 1
    return cls(config).to(dtype)


def t5() -> Any:
    """Return a T5 of one layer, without dropout."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    fields |= {"vocab_size": WORDS, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    config = hf.T5Config(**fields)
    return hf.T5ForConditionalGeneration(config).double()


def gpt2() -> Any:
    """Return a GPT-2 of one layer, with dropout."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": WORDS}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**fields, pad_token_id=0, eos_token_id=1, bos_token_id=1)).double()


def tokenizer() -> Any:
    """Return a tokenizer of words w3, w4, ..."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


_generator = torch.Generator().manual_seed(1)


def _text(count: int) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(3, WORDS, (count,), generator=_generator))


PROMPTS = [_text(3 + i % 4) for i in range(16)]
ANSWERS = [" " + _text(2 + i % 5) for i in range(16)]
OTHERS = [" " + _text(2 + i % 3) for i in range(16)]
ROWS = [torch.randint(3, WORDS, (6,), generator=_generator) for _ in range(16)]


def _arguments(folder: Path, **more: Any) -> dict[str, Any]:
    # Plain descent, because Adam divides gradients that are nothing but rounding by themselves.
    fixed = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
    }
    return {**fixed, **more}


def _losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# transformers and accelerate.


def with_trainer(resumes: bool = False, **arguments: Any) -> Train:
    """Return a case of transformers' Trainer; of one that is resumed from its second step if `resumes`."""

    def train(make: Callable[[], Any], folder: Path) -> tuple[list[float], Any]:
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ROWS]
        seq2seq = arguments.get("predict_with_generate", False)
        kinds: Any = (hf.Seq2SeqTrainer, hf.Seq2SeqTrainingArguments) if seq2seq else (hf.Trainer, hf.TrainingArguments)
        model, saving = make(), {"save_strategy": "steps", "save_steps": 2} if resumes else {}

        def trainer(model: Any) -> Any:
            args = kinds[1](**_arguments(folder, **{"bf16": False, **saving, **arguments}))
            return kinds[0](model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])

        first = trainer(model)
        first.train()
        if not resumes:
            return _losses(first) + ([first.evaluate()["eval_loss"]] if seq2seq else []), model
        model = make()
        second = trainer(model)
        second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return _losses(second), model

    return train


def with_accelerate(make: Callable[[], Any], folder: Path) -> tuple[list[float], Any]:
    """Train by accelerate's own loop, with accumulation, clipping and a schedule."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make()
    optimizer = torch.optim.SGD(llfx.adapter_parameters(model), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    losses = []
    for step in range(6):
        ids = torch.stack(ROWS[2 * step : 2 * step + 2])
        with accelerator.accumulate(prepared):
            loss = prepared(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, accelerator.unwrap_model(prepared)


# TRL.


def with_trl(
    kind: str, data: dict[str, Any], shares_base: bool = False, reference: Callable[[], Any] = llama, **arguments: Any
) -> Train:
    """Return a case of a trainer of TRL, by the beginning of its name.

    Args:
        kind: the beginning of the trainer's name.
        data: the columns of the data.
        shares_base: whether the reference of an adapted model is its own base, over the same weights.
        reference: makes it otherwise.
        arguments: for the config of the trainer.
    """

    def train(make: Callable[[], Any], folder: Path) -> tuple[list[float], Any]:
        import datasets
        import trl

        model, more = make(), {}
        if kind in ("DPO", "KTO"):
            own = shares_base and hasattr(model, "graphs")
            more["ref_model"] = llfx.remove(model) if own else reference()
        if kind == "GRPO":
            more["reward_funcs"] = lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions]
        args = getattr(trl, f"{kind}Config")(**_arguments(folder, bf16=False, **arguments))
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=args, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer(), **more
        )
        trainer.train()
        return _losses(trainer), model

    return train


@dataclass(frozen=True)
class Case:
    """A way to train.

    Args:
        train: trains a model and returns losses and model.
        base: makes the frozen model.
        tolerance: how far losses and adapters may be apart. In bfloat16 the eager wrapper is 0.2 from its own run in
            float32.
        fuse_loss: of the adapted model; transformers computes the loss in float32.
    """

    train: Train
    base: Callable[[], Any] = llama
    tolerance: float = 1e-9
    fuse_loss: bool = False


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _named_base() -> Any:
    """Return a base that was loaded from a folder, from which GRPO loads its reference."""
    llama().save_pretrained(_folder().name)
    return hf.LlamaForCausalLM.from_pretrained(_folder().name, dtype=torch.float64)


def nf4() -> Any:
    """Return a Llama whose linears but the head are held in 4 bits by bitsandbytes."""
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with tempfile.TemporaryDirectory() as folder:
        llama(dtype=torch.float32).save_pretrained(folder)
        return hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


_TEXTS = {"text": [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]}
_ANSWERED = {"prompt": PROMPTS, "completion": ANSWERS}
_PREFERRED = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": OTHERS}
_RATED = {**_ANSWERED, "label": [i % 2 == 0 for i in range(16)]}
_GRPO: dict[str, Any] = {"num_generations": 2, "max_completion_length": 6}

CASES: dict[str, Case] = {
    "Trainer": Case(with_trainer()),
    "Trainer, accumulation": Case(with_trainer(gradient_accumulation_steps=2)),
    "Trainer, bf16": Case(with_trainer(bf16=True), lambda: llama(dtype=torch.float32), 5e-2),
    "Trainer, checkpointing": Case(with_trainer(gradient_checkpointing=True)),
    "Trainer, torch_compile": Case(with_trainer(torch_compile=True, torch_compile_backend="aot_eager")),
    "Trainer, label smoothing": Case(with_trainer(label_smoothing_factor=0.1)),
    "Trainer, NEFTune": Case(with_trainer(neftune_noise_alpha=5.0)),
    "Trainer, best model": Case(
        with_trainer(
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
        )
    ),
    "Trainer, resumed": Case(with_trainer(resumes=True)),
    "Trainer, fused loss": Case(with_trainer(gradient_accumulation_steps=2), tolerance=1e-5, fuse_loss=True),
    "Trainer, fused loss, checkpointing": Case(
        with_trainer(gradient_checkpointing=True), tolerance=1e-5, fuse_loss=True
    ),
    "Trainer, fused loss, torch_compile": Case(
        with_trainer(torch_compile=True, torch_compile_backend="aot_eager"), tolerance=1e-5, fuse_loss=True
    ),
    "Trainer, fused loss, label smoothing": Case(with_trainer(label_smoothing_factor=0.1), fuse_loss=True),
    "Trainer, fused loss, best model": Case(
        with_trainer(
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
        ),
        tolerance=1e-5,
        fuse_loss=True,
    ),
    "Seq2SeqTrainer": Case(with_trainer(predict_with_generate=True), t5),
    "accelerate": Case(with_accelerate),
    "TRL SFT": Case(with_trl("SFT", _TEXTS)),
    "TRL SFT, no checkpointing": Case(with_trl("SFT", _TEXTS, gradient_checkpointing=False)),
    "TRL SFT, packed": Case(with_trl("SFT", _TEXTS, packing=True, max_length=16)),
    "TRL SFT, padding-free": Case(with_trl("SFT", _TEXTS, padding_free=True, max_length=None)),
    "TRL SFT, completion only": Case(with_trl("SFT", _ANSWERED)),
    "TRL SFT, chunked loss": Case(with_trl("SFT", _TEXTS, loss_type="chunked_nll")),
    "TRL SFT, loss of all logits": Case(with_trl("SFT", _TEXTS, loss_type="nll")),
    "TRL SFT, fused loss": Case(with_trl("SFT", _ANSWERED), fuse_loss=True),
    "TRL SFT, fused loss, loss of all logits": Case(with_trl("SFT", _TEXTS, loss_type="nll"), fuse_loss=True),
    "TRL SFT, base of 4 bits": Case(with_trl("SFT", _TEXTS), nf4, 1e-5),
    "TRL DPO, fused loss": Case(with_trl("DPO", _PREFERRED), fuse_loss=True),
    "TRL GRPO, fused loss": Case(with_trl("GRPO", {"prompt": PROMPTS}, **_GRPO), fuse_loss=True),
    "TRL DPO, with a reference": Case(with_trl("DPO", _PREFERRED)),
    "TRL DPO, with its own base as reference": Case(with_trl("DPO", _PREFERRED, shares_base=True)),
    "TRL DPO, dropout switched off": Case(with_trl("DPO", _PREFERRED, reference=gpt2), gpt2),  # by default
    "TRL GRPO": Case(with_trl("GRPO", {"prompt": PROMPTS}, **_GRPO)),
    "TRL GRPO, with a reference": Case(with_trl("GRPO", {"prompt": PROMPTS}, **_GRPO, beta=0.1), _named_base),
    "TRL KTO, with a reference": Case(with_trl("KTO", _RATED)),
    "TRL Reward": Case(with_trl("Reward", _PREFERRED), lambda: llama(hf.LlamaForSequenceClassification)),
}


@dataclass(frozen=True)
class Outcome:
    """The largest differences between an adapted model and the eager wrapper, and what they are compared with.

    Args:
        loss, adapters: the differences.
        moved: how far the adapters moved from where they started.
        graphs: that were captured.
        seconds: that both took together.
    """

    loss: float
    adapters: float
    moved: float
    graphs: int
    seconds: float


def compare(case: Case) -> Outcome:
    """Train the eager wrapper and an adapted model by a case."""
    start = time.perf_counter()
    values: dict[str, torch.Tensor] = {}

    def maker(adapt: Callable[..., Any]) -> Callable[[], Any]:
        def make() -> Any:
            model = adapt(case.base(), CONFIG)
            randomise(model, 0)
            values.update(copy.deepcopy(llfx.adapter_state_dict(model)))
            return model

        return make

    results = []
    for adapt in (_wrap, functools.partial(llfx.adapt, fuse_loss=case.fuse_loss)):
        with tempfile.TemporaryDirectory() as folder:
            results.append(case.train(maker(adapt), Path(folder)))
    (expected, wrapped), (actual, adapted) = results
    theirs, ours = (llfx.adapter_state_dict(model) for model in (wrapped, adapted))
    assert ours.keys() == theirs.keys()
    assert len(actual) == len(expected) > 0
    return Outcome(
        max(abs(one - other) for one, other in zip(actual, expected, strict=True)),
        max(float((ours[name] - theirs[name]).abs().max()) for name in ours),
        max(float((ours[name] - values[name]).abs().max()) for name in ours),
        adapted._graphs.captures,
        time.perf_counter() - start,
    )


def _wrap(model: Any, config: llfx.Variant) -> Any:
    """Return the eager wrapper. transformers would refuse a quantized one, and TRL would round its adapters."""
    wrapped = llfx.wrap(model, config)
    for name in ("is_quantized", "is_loaded_in_4bit"):
        if getattr(wrapped, name, False):
            setattr(wrapped, name, False)
    return wrapped


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run the cases that have one of these words in their names")
    words = parser.parse_args().words
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    hf.logging.set_verbosity_error()
    titles = ("trainer", "outcome", "loss differs by", "adapters differ by", "of a move of", "graphs", "s")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # trainers print their logs
                outcome = compare(case)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:200]} | | | | | |", flush=True)
            continue
        equal = max(outcome.loss, outcome.adapters) <= case.tolerance < outcome.moved
        numbers = f"{outcome.loss:.1e} | {outcome.adapters:.1e} | {outcome.moved:.1e} | {outcome.graphs}"
        print(f"| {name} | {'equal' if equal else 'DIFFERENT'} | {numbers} | {outcome.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
