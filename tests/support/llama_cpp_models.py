"""GGUF files of tiny models of transformers, and what llama.cpp computes of them, with adapters and without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WITH_ONE_ADDED = ("gemma2", "gemma3")
"""The architectures in whose files the weights of norms are what transformers adds to one."""


def write_base(model: Any, path: Path, architecture: str, permuted: bool) -> None:
    """Write a causal language model as llama.cpp's converter does, in float32 and without a vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float()
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = rows.swapaxes(1, 2).reshape(value.shape)
        if architecture in _WITH_ONE_ADDED and name.endswith("norm.weight"):
            value = value + 1
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(known, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


class LlamaCpp:
    """A base in llama.cpp, through the functions of its C library.

    Args:
        path: of the GGUF file of the base.
    """

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        assert self.model, f"llama.cpp does not load {path}"

    def logits(self, ids: list[int], adapters: Mapping[Path, float] | None = None) -> Tensor:
        """Return the logits `(tokens, vocabulary)` of a text, with each adapter's file by its strength."""
        import ctypes

        library = self.library
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 64
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = 0
        context = library.llama_init_from_model(self.model, options)
        loaded = {path: library.llama_adapter_lora_init(self.model, str(path).encode()) for path in adapters or {}}
        for path, pointer in loaded.items():
            assert pointer, f"llama.cpp does not load {path}"
        if loaded:
            pointers = (library.llama_adapter_lora_p_ctypes * len(loaded))(*loaded.values())
            scales = (ctypes.c_float * len(loaded))(*(adapters or {}).values())
            assert library.llama_set_adapters_lora(context, pointers, len(loaded), scales) == 0
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert library.llama_decode(context, batch) == 0
        size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        pointer = library.llama_get_logits(context)
        found = torch.tensor(pointer[: len(ids) * size]).reshape(len(ids), size)
        library.llama_batch_free(batch)
        library.llama_free(context)
        return found
