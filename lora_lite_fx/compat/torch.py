"""Hold the private names of torch that this library uses, but for those of its compiler (`dynamo.py`).

`import torch` brings all of these modules along, so that looking the names up costs nothing.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .names import needed, preferred
from .versions import release

# Values as the tracers of torch make them.

if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    pytree = _pytree
else:
    FakeTensor = needed(
        "torch._subclasses.fake_tensor.FakeTensor",
        "Tensor.is_meta: a tensor on the meta device has no data either, but computes as on no device",
    )
    FakeTensorMode = needed(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.device('meta'): runs a model without data, but not one that asks for the device or makes tensors on one",
    )
    DataDependentOutputException = needed(
        "torch._subclasses.fake_tensor.DataDependentOutputException",
        "NotImplementedError, which operators on the meta device raise for other reasons too",
    )
    DynamicOutputShapeException = needed(
        "torch._subclasses.fake_tensor.DynamicOutputShapeException",
        "NotImplementedError, which operators on the meta device raise for other reasons too",
    )
    FunctionalTensor = needed(
        "torch._subclasses.functional_tensor.FunctionalTensor",
        "torch.func.functionalize: makes such tensors, but nothing public tells one",
    )
    TorchDispatchMode = needed(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.overrides.TorchFunctionMode: sees functions, but not the operators that these call. Documented by torch"
        " under this name",
    )
    OpOverload = type(torch.ops.aten.add.Tensor)  # it has no public name
    HigherOrderOperator = needed(
        "torch._ops.HigherOrderOperator",
        "type(torch.ops.higher_order.cond): the class of operators on functions has no public name",
    )
    pytree = needed("torch.utils._pytree", "torch.utils.pytree, which none of these releases has")

FAKE_TENSORS_LOG: logging.Logger | None = preferred(
    "torch._subclasses.fake_tensor.log",
    "the traceback of each operator that fails without data, which torch logs there, is printed",
    None,
)

disable_current_modes: Callable[[], AbstractContextManager[Any]] = needed(
    "torch.utils._python_dispatch._disable_current_modes",
    "leaving the modes one by one, which only whoever entered them can do",
)

unseen_by_function_modes: Callable[[], AbstractContextManager[Any]] = needed(
    "torch._C.DisableTorchFunction",
    "torch._C.DisableTorchFunctionSubclass: documented, but lets modes see what an operator calls inside",
)
_without_dispatch: Callable[[], AbstractContextManager[Any]] = needed(
    "torch.utils._mode_utils.no_dispatch", "disable_current_modes, which does it for some twenty times as long"
)


def tensors_without_data(like: Tensor) -> Callable[[FakeTensorMode], Tensor]:
    """Return a function that makes tensors like one without data, each in a storage of its own.

    Stands for `torch.empty_strided` under the mode, which takes six times as long. Function modes see it called, unless
    the body of `unseen_by_function_modes` does.
    """
    size, stride, dtype, device = like.size(), like.stride(), like.dtype, like.device

    def make(mode: FakeTensorMode) -> Tensor:
        with _without_dispatch():
            tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        made: Tensor = FakeTensor(mode, tensor, device)
        return made

    return make


# Operators.

needed("torch.ops.aten.add.Tensor._schema", "a table of our own: operators do not show their schemas")


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator: its arguments with names, types, defaults, and which it writes to."""
    return operator._schema


def _operator(name: str, public: str) -> Any:
    """Return an operator that may stand in a graph, or None for a release in whose graphs it cannot stand."""
    return preferred(f"torch.ops.aten.{name}", public, None)


ASSERT_ASYNC = needed("torch.ops.aten._assert_async.msg", "assert, which a trace does not keep")
ASSERT_METADATA = _operator("_assert_tensor_metadata.default", "nothing: torch.export writes it at changes of dtype")
GROUPED_MM = _operator("_grouped_mm.default", "torch.nn.functional.grouped_mm, which calls it")
LOCAL_SCALAR_DENSE = _operator("_local_scalar_dense.default", "Tensor.item, which calls it")
TO_COPY = _operator("_to_copy.default", "Tensor.to, which calls it")
UNSAFE_VIEW = _operator("_unsafe_view.default", "Tensor.view, for which torch writes it into graphs")

assert_async: Callable[[Tensor, str], None] = needed("torch._assert_async", "assert, which a trace does not keep")
assert_in_graph: Callable[[Any, str], None] = needed("torch._assert", "assert, which a trace does not keep")
check: Callable[..., None] = needed("torch._check", "torch._check is public, but for its name")


# Options that only some of the releases have.

ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
"""Options with which each function that is compiled counts its recompilations alone, from torch 2.13 on.

Before, functions of one code count together, and those beyond the limit run without being compiled.
"""

AUTOCAST_REGIONS_COMPILE = release(torch.__version__) >= (2, 13)
"""Whether Dynamo takes the operator of an autocast region whose body reads a dynamic size."""


_Function = TypeVar("_Function", bound=Callable[..., Any])

CONSTANT = "_dynamo_marked_constant"
"""The mark of `torch.compiler.assume_constant_result`, which imports the compiler first; `dynamo.py` checks it."""


def constant_when_compiled(function: _Function) -> _Function:
    """Decorate a function that torch.compile calls once, while it compiles, to take its result for a constant."""
    setattr(function, CONSTANT, True)
    return function


not_compiled: Callable[[_Function], _Function] = preferred(
    "torch._compile._disable_dynamo",
    "torch.compiler.disable: the same, but imports the compiler when it decorates, which takes a second",
    torch.compiler.disable,
)
"""A decorator: torch.compile leaves the function out of its graphs and calls it."""


# What runs a call.

# Whether a transform of torch.func runs, and on which tensors.
_functorch_level = needed(
    "torch._C._functorch.maybe_current_level", "nothing: torch.func does not tell whether a transform runs"
)
_is_functorch_wrapped = needed(
    "torch._C._functorch.is_functorch_wrapped_tensor", "nothing: torch.func does not tell its tensors"
)
_is_legacy_batched = preferred(
    "torch._C._functorch.is_legacy_batchedtensor",
    "nothing: torch.autograd.grad(is_grads_batched=True) does not tell its tensors",
    lambda tensor: False,
)
needed("torch.autograd.forward_ad._current_level", "forward_ad.unpack_dual, which tells of one tensor, not of a call")
_is_jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def is_wrapped(*tensors: Tensor) -> bool:
    """Check whether a transform runs on one of the tensors: of `torch.func`, or the one behind `is_grads_batched`."""
    return any(_is_functorch_wrapped(tensor) or _is_legacy_batched(tensor) for tensor in tensors)


def transform_is_active() -> bool:
    """Check whether a transform of `torch.func`, forward-mode AD or a trace of `torch.jit` runs this call.

    They need operations that they know: no autograd functions of our own, and no writes to results.
    """
    return bool(name_of_transform()) or forward_ad._current_level >= 0


def name_of_transform() -> str:
    """Return "torch.func" or "torch.jit.trace" if one of them runs this call, else an empty string."""
    if _functorch_level() is not None:
        return "torch.func"
    return "torch.jit.trace" if _is_jit_tracing() else ""


def trace_is_active() -> bool:
    """Check whether `torch.fx` traces this call: symbolically, or by `make_fx`."""
    if torch.compiler.is_dynamo_compiling():  # which cannot ask, and makes a graph of its own
        return False
    return is_fx_symbolic_tracing() or get_proxy_mode() is not None


def graph_of_trace() -> fx.Graph | None:
    """Return the graph in which `make_fx`, or an export by it, records this call; None outside of such a trace."""
    if torch.compiler.is_dynamo_compiling():
        return None
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


exporting: Callable[[], AbstractContextManager[Any]] = needed(
    "torch._export.utils._compiling_state_context",
    "torch.compiler.is_exporting, by which models ask: nothing public lets it answer yes outside of torch.export",
)

outside_symbolic_trace: Callable[[], AbstractContextManager[Any]] = needed(
    "torch.fx._symbolic_trace._maybe_revert_all_patches", "nothing: a symbolic trace cannot be left for a while"
)
"""Leave a symbolic trace for the body: in a trace, each read of a module's parameter is recorded."""

# The functions that torch.export traces at the borders of a no_grad or autocast region, before it makes the region an
# operator. It traces them again when it captures a graph whose regions are opened.
SET_GRAD_ENABLED = needed("torch._C._set_grad_enabled", "torch.set_grad_enabled, which a graph cannot hold")
ENTER_AUTOCAST = needed("torch.amp.autocast_mode._enter_autocast", "torch.autocast, which a graph cannot hold")
EXIT_AUTOCAST = needed("torch.amp.autocast_mode._exit_autocast", "torch.autocast, which a graph cannot hold")

RegionMode: Any = needed(
    "torch.fx.experimental.proxy_tensor.PreDispatchTorchFunctionMode",
    "torch.overrides.TorchFunctionMode: is told where autograd is switched, but not of torch.autocast, which tells"
    " modes of this class alone",
)

_TRANSFORMS = needed(
    "torch._functorch.predispatch", "torch.vmap, for whose borders torch.export traces the functions of this module"
).__name__


def is_transform(node: fx.Node) -> bool:
    """Check whether `node` begins or ends a level of `vmap` or another transform, or moves a value across its border.

    Nothing reads the results of those that begin and end a level, and the graph is wrong without them.
    """
    return node.op == "call_function" and getattr(node.target, "__module__", None) == _TRANSFORMS


needed("torch.Tensor._version", "nothing: the documentation of autograd calls the counter by this name")


version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""Return how often a tensor was written to in place. `frozen` asks this of every parameter in each call."""


needed(
    "torch.distributions.Distribution._validate_args", "Distribution.set_default_validate_args: sets what nothing reads"
)


def validates_arguments() -> bool:
    """Tell whether distributions check the values of their parameters, as they do by default."""
    return Distribution._validate_args


# Graphs.

needed("torch.fx.Graph()._codegen", "fx.Graph.set_codegen: sets what nothing public reads")
needed("torch.fx.Graph()._tracer_cls", "fx.Graph(tracer_cls=...): sets what nothing public reads")
if TYPE_CHECKING:
    from torch.fx.graph import _PyTreeCodeGen

    PyTreeCodeGen = _PyTreeCodeGen
else:
    PyTreeCodeGen = needed("torch.fx.graph._PyTreeCodeGen", "fx.CodeGen, whose subclass for nested inputs has no name")
SPECS = ("_in_spec", "_out_spec")
"""The attributes under which torch keeps the signature of an exported graph once more, where it does."""
CODE = ("_code", "_lineno_map", "_prologue_start")
"""What else `fx.GraphModule.recompile` sets. Nothing public lists that; what is not listed would stay as it was."""


def codegen_of(graph: fx.Graph) -> Any:
    """Return what writes the code of `graph`. It has the names of its inputs, and how these and results are nested."""
    return graph._codegen


def empty_like(graph: fx.Graph) -> fx.Graph:
    """Return a graph without nodes, of the tracer of `graph`."""
    return fx.Graph(tracer_cls=graph._tracer_cls)
