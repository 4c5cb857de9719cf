"""A folder with a tiny language model, its tokenizer and a text, as a command line names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from tests.support.models import tiny_llama

WORDS = [f"w{i}" for i in range(40)]
PARAGRAPHS = [" ".join(WORDS[(3 * i + j * (i % 5 + 1)) % 40] for j in range(24)) for i in range(60)]
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} w9 {% endfor %}"


def tokenizer(**options: Any) -> Any:
    """Return a tokenizer of the words; `user` is one more, and other words are `w0`."""
    ids = {word: i for i, word in enumerate([*WORDS[:39], "user"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", **options)


def write_tiny_folder(folder: Path, **config: Any) -> Path:
    """Write a Llama of two layers, its tokenizer, and `text.txt`; return the folder."""
    tokenizer().save_pretrained(folder)
    transformers.set_seed(0)
    sizes = tiny_llama(num_hidden_layers=2, vocab_size=40, **config)
    transformers.LlamaForCausalLM(sizes).save_pretrained(folder)
    (folder / "text.txt").write_text("\n\n".join(PARAGRAPHS))
    return folder
