"""Hold the private names of torch's compiler that this library uses.

Importing this module imports Dynamo, which takes a second: import it in the functions that compile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .names import missing, needed, offered, preferred
from .torch import CONSTANT

lookup_backend: Callable[[str], Any] = offered(
    "torch._dynamo.lookup_backend",
    "torch.compile(backend=name): no public function returns a backend",
    "An inner backend that is given by name",
)
autograd_function_apply = preferred(
    "torch._functorch.autograd_function.autograd_function_apply",
    "nothing: Dynamo's graphs hold this operator for an autograd function",
    None,
)
inductor_modes: Callable[[], dict[str, Any]] = offered(
    "torch._inductor.list_mode_options",
    "torch.compile(mode=...): no public function lists the modes",
    "backend(mode=...)",
)
inductor_options: Callable[[], list[str]] = offered(
    "torch._inductor.list_options",
    "torch.compile(options=...): no public function lists the options",
    "backend(options=...)",
)
inductor_with: Callable[..., Any] = offered(
    "torch._TorchCompileInductorWrapper",
    "torch.compile(mode=..., options=...): no public function compiles a graph with them",
    "backend(mode=..., options=...) with Inductor",
)
aoti_compile_and_package: Callable[..., str] = offered(
    "torch._inductor.aoti_compile_and_package",
    "nothing: torch documents this function under this name",
    "llfx.save_aoti",
)
_mod_index = preferred(
    "torch._dynamo._trace_wrapped_higher_order_op.ModIndex",
    "Tensor.__getitem__: torch's modes put this function in its place inside vmap, and a graph names it. Without it, a"
    " graph that names another function of torch is refused",
    None,
)
MOD_INDEX = "" if _mod_index is None else f"{_mod_index.__module__}.{_mod_index.__qualname__}"
"""The function that indexes inside `vmap`, as graphs of torch.export name it; empty in a release without it."""

EXPORT_LOG: logging.Logger | None = preferred(
    "torch._export.non_strict_utils.log",
    "torch.export's warnings: one of them, of sizes that stay fixed, is printed where it is of no use",
    None,
)
_config = needed("torch._dynamo.config", "torch.compiler.config, which does not have this field")


def without_fake_tensor_cache() -> AbstractContextManager[Any]:
    """Let torch not keep what operators did to tensors without data: most are asked once in a trace of few layers."""
    patch: AbstractContextManager[Any] = _config.patch(fake_tensor_cache_enabled=False)
    return patch


if not hasattr(torch.compiler.assume_constant_result(lambda: None), CONSTANT):
    raise ImportError(missing(f"torch.compiler.assume_constant_result().{CONSTANT}"))
