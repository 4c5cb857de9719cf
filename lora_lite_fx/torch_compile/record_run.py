"""Record one run of a model as a graph, for models that neither `torch.export` nor symbolic tracing captures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture.quirks import all_quirks
from ..capture.shared_copy import shared_copy
from ..compat.torch import pytree
from ..graph.tensors import name_tensors, tensor_names
from ..log import phase


def record_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Record what `model` computes for these inputs in evaluation mode, as one graph to find sites and roles in.

    The graph has the branches that were taken and the shapes that were seen, so it is not for running again. But every
    model can be recorded, and the graph is whole where `torch.compile` sees pieces.

    Args:
        model: left as it is.
        args, kwargs: its inputs, which are copied.

    Returns:
        The graph; `meta["called"]` has the names of the modules that were called.
    """
    shadow = shared_copy(model).eval()
    names = {id(module): name for name, module in shadow.named_modules()}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    others = [None if isinstance(leaf, Tensor) else copy.deepcopy(leaf) for leaf in leaves]
    # Copy each input once, because a model may look at whether two of its inputs are the same object.
    copies = {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)}
    running: list[Any] = []
    called: set[str] = set()

    def enter(module: nn.Module, inputs: Any) -> None:
        called.add(names[id(module)])
        running.append(fx.traceback.annotate({"module": names[id(module)]}))
        running[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    for module in shadow.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def run(*tensors: Tensor) -> list[Tensor]:
        traced = dict(zip(copies, tensors, strict=True))
        inputs = [traced.get(id(leaf), other) for leaf, other in zip(leaves, others, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        return [leaf for leaf in pytree.tree_leaves(shadow(*args, **kwargs)) if isinstance(leaf, Tensor)]

    # Trace real tensors with the private flag set, so that the model may look at its data as it does when it runs.
    tracer = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for whole layers, in which no linear is to be seen
    try:
        name = type(model).__name__
        with phase(f"recorded a run of {name}", f"recording a run of {name}") as details:
            with (
                torch.no_grad(),
                torch.random.fork_rng(),
                fx.traceback.preserve_node_meta(),
                all_quirks.entered(all_quirks.OF_RUNS, shadow, (args, kwargs)),
            ):
                gm = tracer(*copies.values())
            details.append(f"{len(gm.graph.nodes)} nodes")
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    for node in gm.graph.nodes:
        if (path := (node.meta.pop("custom", None) or {}).get("module")) is not None:
            node.meta["nn_module_stack"] = {"": (path, nn.Module)}
    # Look for names in the original too: a bound method that is kept as an attribute still refers to it.
    name_tensors(gm, tensor_names(model) | tensor_names(shadow))
    gm.meta["called"] = called
    return gm
