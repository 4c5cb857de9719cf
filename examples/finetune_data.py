"""The data of `finetune.py`: a text, or JSON by line; a fifth is held out. Reading needs no torch.

A line of a `.jsonl` file is an object with one of these:

- `text`: a text. The loss counts its tokens, and the end token after it.
- `messages`: a list of `{"role": ..., "content": ...}`, which the tokenizer's chat template makes a text.
- `prompt` and `completion`: the loss counts the tokens of the completion, and the end token after it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]


class DataError(Exception):
    """Data that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Example:
    """One text to train on or to score.

    Args:
        text: the text; of `prompt` and `completion` the completion.
        prompt: what comes before it, and does not count.
        messages: in place of a text.
        place: the file and the line, for errors.
        is_line: whether it is a line of many, with an end token after it.
    """

    text: str = ""
    prompt: str = ""
    messages: Messages | None = None
    place: str = ""
    is_line: bool = False


@dataclass(frozen=True)
class Data:
    """What to train on and what is held out; `digest` tells other data apart."""

    train: list[Example]
    held: list[Example]
    digest: str


def read(file: Path | None) -> Data:
    """Return the training data and the held-out data: every fifth topic, or the last fifth of a file.

    Args:
        file: a `.jsonl` file, or else a text, whose paragraphs are divided; None for the Python reference.

    Raises:
        DataError: the file is not there, is not UTF-8, or has a line that is none of the three kinds.
    """
    if file is None:
        from pydoc_data.topics import topics

        texts = [text.split("\n\n") for _, text in sorted(topics.items())]
        held = [paragraph for text in texts[4::5] for paragraph in text]
        train = [paragraph for i, text in enumerate(texts) if i % 5 != 4 for paragraph in text]
        return _texts(train, held, "".join(topics.values()))
    content = _content(file)
    if file.suffix != ".jsonl":
        paragraphs = content.split("\n\n")
        cut = len(paragraphs) * 4 // 5
        return _texts(paragraphs[:cut], paragraphs[cut:], content)
    lines = [(f"{file}, line {number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    examples = [(line.strip(), _example(line, place)) for place, line in lines]
    cut = len(examples) * 4 // 5
    known = {line for line, _ in examples[cut:]}
    train_examples = [example for line, example in examples[:cut] if line not in known]
    held_examples = [example for _, example in examples[cut:]]
    if not train_examples:
        raise DataError(f"{file} has too few lines: {len(examples)}, of which the last fifth is held out")
    return Data(train_examples, held_examples, _digest(content))


def _content(file: Path) -> str:
    if file.suffix in (".json", ".parquet", ".csv", ".tsv"):
        raise DataError(f"{file}: a text or a .jsonl file is read, which has one JSON object by line")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 (byte {content[error.start]:#x})") from error


def _texts(train: list[str], held: list[str], content: str) -> Data:
    """Return paragraphs as data: one text of each, without those in training that are held out."""
    # Topics repeat paragraphs of one another, so drop the held-out ones from the training text.
    known = {paragraph.strip() for paragraph in held}
    kept = [paragraph for paragraph in train if paragraph.strip() not in known]
    one, other = (Example("\n\n".join(part)) for part in (kept, held))
    return Data([one], [other], _digest(content))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _example(line: str, place: str) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f'{place}: an object is needed, as {{"text": ...}}, not {type(fields).__name__}')
    kinds = [
        kind for kind in (("text",), ("messages",), ("prompt", "completion")) if any(name in fields for name in kind)
    ]
    if len(kinds) != 1 or not all(name in fields for name in kinds[0]):
        has = ", ".join(fields) or "nothing"
        raise DataError(f"{place}: needs text, or messages, or prompt and completion; it has {has}")
    if kinds == [("messages",)]:
        return Example(messages=_messages(fields["messages"], place), place=place)
    for name in kinds[0]:
        if not isinstance(fields[name], str) or not fields[name]:
            raise DataError(f"{place}: {name} must be a text that is not empty, not {fields[name]!r:.40}")
    *prompt, text = (fields[name] for name in kinds[0])
    return Example(text, "".join(prompt), place=place, is_line=True)


def _messages(messages: Any, place: str) -> Messages:
    """Return the messages of a line, checked."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of messages, not {messages!r:.40}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise DataError(f"{place}: a message needs role and content, both texts, not {message!r:.60}")
    return messages


def encoded(tokenizer: Any, example: Example) -> tuple[list[int], list[bool]]:
    """Return the tokens of an example, and which of them the loss counts.

    Args:
        tokenizer: of the model, from transformers.

    Raises:
        DataError: it has no chat template, or one that refuses the messages.
    """
    if example.messages is not None:
        ids: list[int] = tokenizer(_from_template(tokenizer, example), add_special_tokens=False).input_ids
        return ids, [True] * len(ids)
    ids = tokenizer(example.prompt or example.text, verbose=False).input_ids
    counts = [not example.prompt] * len(ids)
    if example.prompt:
        completion = tokenizer(example.text, add_special_tokens=False, verbose=False).input_ids
        ids, counts = ids + completion, counts + [True] * len(completion)
    if example.is_line and (end := tokenizer.eos_token_id) is not None and ids[-1:] != [end]:
        ids, counts = [*ids, end], [*counts, True]
    return ids, counts


def _from_template(tokenizer: Any, example: Example) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{example.place}: messages need a chat template, and the tokenizer has none: use an instruct model"
        )
    try:
        text: str = tokenizer.apply_chat_template(example.messages, tokenize=False)
    except Exception as error:  # as the template raises it
        raise DataError(f"{example.place}: the chat template refuses the messages: {error}") from error
    return text
