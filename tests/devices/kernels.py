"""Count the kernels that torch.compile makes of an adapted layer for a CUDA device, beside the frozen layer's.

    python -m tests.devices.kernels     # writes kernels.md; needs a torch that knows CUDA, and no device

Inductor generates the code, which is not run. A step is the forward and the backward pass in one graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton

import lora_lite_fx as llfx
from lora_lite_fx.compat.torch import disable_current_modes as no_modes
from tests.devices.backward_pass import gradients_of
from tests.devices.fake_cuda import FAKE, on

VARIANTS = ("LoRA", "DoRA", "HRA", "DeLoRA", "IA3", "RoAd", "OFT")
WIDTH, INNER, ROWS, LENGTH = 576, 1536, 2, 64
TABLE = Path(__file__).with_name("kernels.md")

_CARD = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}
"""Of an H100."""


@contextmanager
def _as_if_there_was_a_card() -> Iterator[None]:
    """Answer what Inductor asks about the device while it generates code."""
    card = SimpleNamespace(**_CARD, name="", minor=0, total_memory=80 << 30, shared_memory_per_block_optin=232448)
    properties = DeviceProperties(type="cuda", index=0, cc=90, **_CARD)
    with ExitStack() as stack:
        for module, name, answer in (
            (torch.cuda, "get_device_properties", card),
            (torch.cuda, "get_device_capability", (9, 0)),
            (torch.cuda, "current_device", 0),
            (_triton, "triton_hash_with_backend", ""),
            (scheduler, "has_triton", True),
            (DeviceProperties, "create", properties),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=answer))
        yield


def generated(function: Callable[..., Any], *inputs: Tensor) -> str:
    """Return the code that Inductor makes of a function of tensors without data on a CUDA device."""
    traced = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    traced.graph.eliminate_dead_code()
    graph = GraphLowering(traced, example_inputs=inputs)
    with (
        no_modes(),
        torch.device("cpu"),
        _as_if_there_was_a_card(),
        V.set_debug_handler(DebugContext()),
        V.set_graph_handler(graph),
        V.set_fake_mode(FAKE),
    ):
        graph.run(*inputs)
        code: Any = graph.codegen()[0]
    return str(getattr(code, "value", code))


def kernels_in(code: str) -> tuple[int, int]:
    """Return how many kernels of Triton the code calls, and how many of libraries, such as products."""
    return len(re.findall(r"^\s+triton_\w+\.run\(", code, re.M)), len(
        re.findall(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.\w+", code, re.M)
    )


def code_of(name: str) -> tuple[str, str]:
    """Return the code of a layer with an adapter, or of the frozen layer without a name: forward, and of a step."""
    with on("cuda"):
        x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        graph = llfx.capture(_layer(), {"inputs_embeds": torch.randn(3, 7, WIDTH, dtype=torch.bfloat16)}, verify=False)
        gm: Any = llfx.rewrite(graph, llfx.registry()[name]()) if name else graph
        forward, step = (_function(gm, kind) for kind in ("inference", "training"))
        tensors = [x.detach(), *gm.parameters(), *gm.buffers()]
        return generated(forward, *tensors), generated(step, x, *tensors[1:])


def _function(gm: Any, kind: Any) -> Callable[..., Any]:
    """Return a function of the input and of all tensors of a graph that runs a program of it."""
    with no_modes():
        program, _ = gm.program_graph(kind)
    names = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]

    def run(x: Tensor, *tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        y = torch.func.functional_call(program, given, (), {"inputs_embeds": x}, strict=False)
        (y,) = (leaf for leaf in torch.utils._pytree.tree_leaves(y) if isinstance(leaf, Tensor))
        return y if kind == "inference" else [y, *(gradient for _, gradient in gradients_of(y.sum()))]

    return run


def _layer() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
    )
    return transformers.LlamaModel._from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def table() -> str:
    """Return the table, as Markdown."""
    lines = [
        f"torch {torch.__version__}, bfloat16, one layer of width {WIDTH} with its seven linears adapted, {ROWS} x"
        f" {LENGTH} tokens: kernels of Triton + calls of libraries. Attention counts as its parts.",
        "",
        "| | forward | step |",
        "|---|---:|---:|",
    ]
    for name in ("", *VARIANTS):
        counts = (" + ".join(map(str, kernels_in(code))) for code in code_of(name))
        lines.append(f"| {name or 'frozen'} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
