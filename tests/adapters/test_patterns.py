"""Patterns of names: what `re` says they mean, in bounded time."""

from __future__ import annotations

import itertools
import random
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import patterns
from lora_lite_fx.adapters.patterns import check_pattern, first_occurring, occurs

NAME = "model.layers.0." + "a" * 60
EVIL = ["(a|aa)+$!", "(?:a|a)" * 40 + "!", r"(?:a|aa)+(?<!a)"]
"""Patterns that `re` would search for in `NAME` for years."""


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    patterns._search.cache_clear()


@pytest.mark.parametrize("evil", EVIL)
def test_a_pattern_that_would_run_for_years_is_an_error(evil: str) -> None:
    check_pattern(evil)
    began = time.thread_time()
    with pytest.raises(llfx.ConfigError, match=r"takes too long to be searched in .*matches in one way"):
        occurs([evil], NAME)
    assert time.thread_time() - began < 5


def test_names_share_the_time_of_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the number of sites does not multiply it: each of these names alone would be done in time."""
    slow = "(?:a|a)" * 14 + "!"
    names = ["a" * (60 + i) for i in range(200)]
    began = time.thread_time()
    monkeypatch.setattr(patterns, "_ORDINARY", 1e-4)
    with pytest.raises(llfx.ConfigError, match="takes too long"):
        [occurs([slow], name) for name in names]
    assert time.thread_time() - began < 5


def test_ordinary_searches_take_nothing_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # of microseconds: a real one may stand still in this thread for longer than a search
    monkeypatch.setattr(time, "thread_time", lambda: 1e-6 * next(clock))
    many = tuple(rf"^(.*\.)?(layers\.{i}\.q_proj)$" for i in range(100))
    for i in range(300):
        assert first_occurring(many, f"model.layers.{i}.q_proj") == (i if i < 100 else None)
    assert patterns._search(many).seconds_left == patterns.SECONDS


@pytest.mark.parametrize(
    "make",
    [
        lambda evil: llfx.LoRA(target_names=evil),
        lambda evil: llfx.LoRA(target_names="fc", exclude_names=evil),
        lambda evil: llfx.LoRA(target_names="fc", rank_pattern={evil: 2}),
        lambda evil: llfx.LoRA(target_names="fc", alpha_pattern={evil: 2.0}),
        lambda evil: llfx.IA3(target_names="fc", feedforward_names=evil),
        lambda evil: llfx.from_peft_config({"peft_type": "LORA", "r": 2, "target_modules": f".*{evil}"}),
        lambda evil: llfx.from_peft_config(
            {"peft_type": "LORA", "r": 2, "target_modules": ["fc" + "a" * 60], "rank_pattern": {f"fc{evil}": 3}}
        ),
    ],
)
def test_every_field_with_patterns_is_bounded(make: Any) -> None:
    model = nn.Sequential()
    model.add_module("fc" + "a" * 60, nn.Linear(4, 4))
    with pytest.raises(llfx.ConfigError, match="takes too long"):
        llfx.rewrite(model, make(EVIL[0]), (torch.ones(2, 4),))


@pytest.mark.parametrize("pattern", ["([a-z_0-9.]+)+!", "(a+)+$!", r"(\w+\s?)+$!"])
def test_the_pattern_of_the_report_ends(pattern: str) -> None:
    """These are exponential for `re`, and not for `regex`."""
    assert not occurs([pattern], NAME)


@pytest.mark.parametrize("pattern", ["a{e}", "(?:name){e<=1}", "a{s<2}", "{a}", "[[:alpha:]]", "[:a]", "\\\\{x}"])
def test_what_the_two_packages_read_differently_is_refused(pattern: str) -> None:
    with pytest.raises(llfx.ConfigError, match=r"read in several ways"):
        llfx.LoRA(target_names=pattern)


@pytest.mark.parametrize("pattern", ["a{2}", "a{2,}", "a{,2}", "a{2,3}", "{}", "\\{a", "x\\{e<=1\\}", "[\\[a]", "\\[:"])
def test_what_they_read_alike_is_taken(pattern: str) -> None:
    check_pattern(pattern)
    for name in ("a", "aa", "aaa", "{}", "{a", "x{e<=1}", "[", "[:", "layers"):
        assert occurs([pattern], name) == bool(re.search(pattern, name)), name


def test_a_pattern_that_is_too_deep_is_not_an_expression() -> None:
    with pytest.raises(llfx.ConfigError, match="is not a regular expression") as caught:
        llfx.LoRA(target_names="(" * 5000 + "a" + ")" * 5000)
    assert len(str(caught.value)) < 500


ATOMS = (
    "a", "b", ".", "\\.", "x", "[ab]", "[^a]", "\\d", "\\w", "(a)", "(?:b|x)", "(?=a)", "(?!b)", "^", "$", "\\b", "0",
    "(?i:A)", "(?P<n>a)", "\\1", "{", "}", "{2}", "{,2}", "{1,}", "{,}", "{}", "*", "+", "?", "*?", "+?", "++", "|",
    "(", ")", "[", "]", "\\\\", "_", "(?<=a)", "(?<!b)", "\\Z", "\\A", "\\s", "[[:alpha:]]", "{e}", "{e<=1}", "(?>a)",
    "[a||b]", "[a--b]", "[a&&b]", "\\x61", "\\141", "(?(1)a|b)", ":", "#", "(?x)", "(?a)", "é", "É", "(?i)", " ",
)  # fmt: skip
NAMES = ["a", "aab", "a.b", "x0", "layers.0.a", "a1b_", "ba-x", "aXb", "é", "É", "{", "a{2}", "a{e<=1}", "a\nb", ""]


def test_a_pattern_means_what_re_says() -> None:
    random.seed(0)
    compared = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4000):
            pattern = "".join(random.choices(ATOMS, k=random.randint(1, 6)))
            try:
                check_pattern(pattern)
            except ValueError:
                continue
            compared += 1
            for name in NAMES:
                assert occurs([pattern], name) == bool(re.search(pattern, name)), (pattern, name)
    assert compared > 500


def test_the_packages_that_read_names_of_sites_do_not_use_re() -> None:
    """`re.search` on a pattern of a config would bring the danger back."""
    package = Path(llfx.__file__).parent
    for folder in ("adapters", "variants", "sites", "rewriting", "formats", "hugging_face", "torch_compile"):
        for file in (package / folder).rglob("*.py"):
            for call in re.findall(r"\bre\.(?:search|match|fullmatch)\((\w+)", file.read_text(encoding="utf-8")):
                assert call == "r", f"{file}: re on a pattern that is not written there"
    assert regex.__version__
