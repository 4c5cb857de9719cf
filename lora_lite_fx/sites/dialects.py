"""The dialects, and the kinds of sites that they find: adding a kind is its file in `kinds/` and its line here."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, fx

from ..graph.insertion import is_inserted
from ..graph.tensors import tensor_of
from .computed import Computation, obstacle
from .dataflow import op_name
from .kinds.contraction import EINSUM
from .kinds.convolution import CONVOLUTION
from .kinds.embedding import EMBEDDING
from .kinds.experts import EXPERTS
from .kinds.linear import ADDMM, LINEAR, MATMUL
from .kinds.norm import NORM
from .matching import Dialect, FrozenReader, Match

DIALECTS = (LINEAR, ADDMM, MATMUL, EINSUM, EMBEDDING, CONVOLUTION, EXPERTS, NORM)
"""All dialects. Of those that share an operator, the first that matches counts."""

KINDS = tuple(dict.fromkeys(kind.name for dialect in DIALECTS for kind in dialect.kinds))
"""The kinds of sites, as `Variant.target_kinds` names them."""

_BY_OPERATOR: dict[object, list[Dialect]] = defaultdict(list)
for _dialect in DIALECTS:
    for _operator in _dialect.operators:
        _BY_OPERATOR[_operator].append(_dialect)


def match_site(reader: FrozenReader, node: fx.Node) -> Match | None:
    """Return the match of `node` as a product with a frozen weight of real numbers, or None if it is not one."""
    if node.op != "call_function" or is_inserted(node):
        return None
    dialects = _BY_OPERATOR.get(node.target) or _BY_OPERATOR.get(op_name(node)) or ()
    match = next((match for dialect in dialects if (match := dialect.match(reader, node)) is not None), None)
    if match is None or is_complex(reader.gm, node, match.weight.name, match.weight.computed):
        return None
    return match


def is_complex(gm: fx.GraphModule, product: fx.Node, weight: str, computed: fx.Node | None) -> bool:
    """Return whether a product is one of complex numbers, for which adapters are not made.

    Args:
        gm: the graph module.
        product: the node.
        weight: the name of the parameter that it multiplies with, the largest if it multiplies with a computed tensor.
        computed: that tensor, or None. It is not looked at if computing it changes something, as spectral norm does.
    """
    value = product.meta.get("val")
    if "val" not in product.meta and computed is not None:  # symbolic tracing does not tell
        value = None if obstacle(gm, computed, product) else Computation.of(computed).run(gm)
    return tensor_of(gm, weight).is_complex() or (isinstance(value, Tensor) and value.is_complex())
