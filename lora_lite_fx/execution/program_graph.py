"""A program of an adapted graph as a graph of its own, to read, step through and draw."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from ..capture.graph_calls import further_inputs
from ..capture.signature import CallSignature
from ..errors import CallError
from ..graph.copies import prepare_copy
from ..graph.modes import modes_of, set_modes
from ..graph.queries import reads_tensor
from ..graph.tensors import has_attribute, register_tensor, tensor_of


class ProgramGraph(fx.GraphModule):
    """A graph that is called like the model that it was captured from, and that runs what its code says.

    Its `meta` has the `signature` of such calls, or None, and the names of the arguments that they are `without`.
    """

    @classmethod
    def over(
        cls,
        gm: fx.GraphModule,
        host: nn.Module,
        graph: fx.Graph,
        signature: CallSignature | None,
        without: Sequence[str],
    ) -> ProgramGraph:
        """Return `graph` over the tensors of `host`, and over those of `gm` that `host` lacks; none is copied.

        Args:
            gm: has all modules and tensors that the graph reads.
            host: the module whose tensors the programs of `gm` read.
            graph: derived from the graph of `gm`; it belongs to the result.
            signature: how the result is called; None for a graph that takes its inputs and nothing else.
            without: the arguments that calls leave out, for which constants are built into the graph.
        """
        result = cls(gm, graph)
        for node in graph.find_nodes(op="get_attr"):
            if reads_tensor(gm, node) and has_attribute(host, name := str(node.target)):
                register_tensor(result, name, tensor_of(host, name))
        for node in graph.find_nodes(op="call_module"):
            # A module object of its own, because it may be in another mode than that of `gm`.
            module = gm.get_submodule(str(node.target))
            tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
            result.set_submodule(str(node.target), copy.deepcopy(module, dict(tensors)))
        result.meta |= {"signature": signature, "without": tuple(without)}
        set_modes(result, modes_of(host))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        prepare_copy(self, memo)
        return super().__deepcopy__(memo)

    def recompile(self) -> Any:
        code = super().recompile()
        cls: Any = type(self)  # torch.fx makes a class for each module
        cls.forward = _called_like_the_model(cls.forward)
        return code


def _called_like_the_model(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: ProgramGraph, *args: Any, **kwargs: Any) -> Any:
        signature = self.meta.get("signature")
        if signature is None:
            return plain(self, *args, **kwargs)
        further = {name: kwargs.pop(name, None) for name in further_inputs(self.graph)}
        values, left_out = signature.bind(args, kwargs)
        if set(left_out) != set(self.meta["without"]):
            without = ", ".join(self.meta["without"])
            raise CallError(
                f"This program is that of calls {f'without {without}' if without else 'with all arguments'}, and this"
                f" call leaves out {', '.join(left_out) or 'none'}. The way out: llfx.program(graph, ...,"
                f" without={left_out})."
            )
        return plain(self, *values, **further)

    return forward
