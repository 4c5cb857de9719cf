"""What servers of LoRA take of a PEFT directory: one table, with the release that it was read from.

Some servers refuse an adapter when it is loaded. Others apply less than the file holds, and say nothing. Both are
errors when the file is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Server = Literal["vllm", "sglang", "openvino"]


@dataclass(frozen=True)
class ServerRules:
    """The rules of one server.

    All have plain LoRA alone, without biases, magnitudes (DoRA) and whole modules (`modules_to_save`).

    Args:
        name: of the server.
        release: the release whose sources the rules were read from.
        read: its files that say so.
        ranks: the ranks that it can be started with, ascending; an adapter is filled up with zeros to the next. Empty
            if it takes any.
        by_layer: whether it keeps tensors by the number in `layers.<number>.` and leaves out what has none.
        modules: the last names of the modules that it has adapters for; it leaves out others. Empty if it has them for
            all linears, or refuses others itself.
        embeddings: the last names of the embeddings and heads that it has adapters for.
        together: modules that it computes as one. An adapter at one of them needs tensors for the others.
        by_part_of_name: whether it finds modules by a part of their name.
        left_out: an expression for the names of modules that it leaves out: the towers of other inputs than text.
    """

    name: str
    release: str
    read: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    by_layer: bool = False
    modules: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    together: tuple[tuple[str, ...], ...] = ()
    by_part_of_name: bool = False
    left_out: re.Pattern[str] | None = None

    def rank_for(self, rank: int) -> int | None:
        """Return the rank that an adapter of this rank is filled up to; None if it is too large."""
        return next((allowed for allowed in self.ranks if allowed >= rank), None) if self.ranks else rank

    def leaves_out(self, module: str) -> str:
        """Return why the server leaves out the adapter of a module; empty if it does not."""
        last = module.rpartition(".")[2]
        if self.left_out is not None and self.left_out.search(module):
            return "it has adapters for the language model alone"
        if last in self.embeddings:
            return ""
        if self.by_layer and not re.search(r"layers\.\d+\.", module):
            return "it finds tensors by layers.<number> in their names"
        if self.modules and last not in self.modules:
            return f"it has adapters for {', '.join(sorted(self.modules))}"
        return ""


_TOWERS = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mtp)\.")
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

SERVERS: dict[str, ServerRules] = {
    "vllm": ServerRules(
        "vLLM",
        "0.33.0",
        read=("vllm/config/lora.py", "vllm/lora/peft_helper.py", "vllm/lora/lora_model.py", "vllm/lora/utils.py"),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        embeddings=frozenset({"embed_tokens", "lm_head"}),
        left_out=_TOWERS,
    ),
    "sglang": ServerRules(
        "SGLang",
        "0.5.23",
        read=("sglang/srt/lora/lora.py", "sglang/srt/lora/lora_manager.py", "sglang/srt/lora/utils.py"),
        by_layer=True,
        modules=frozenset({*_QKV, *_GATE_UP, "qkv_proj", "gate_up_proj", "o_proj", "down_proj"}),
        embeddings=frozenset({"embed_tokens", "lm_head"}),
        together=(_QKV, _GATE_UP),
        left_out=_TOWERS,
    ),
    "openvino": ServerRules(
        "OpenVINO GenAI",
        "2026.4.1",
        read=("src/cpp/src/lora/adapter.cpp", "src/cpp/src/llm/pipeline_stateful.cpp"),
        by_part_of_name=True,
    ),
}
