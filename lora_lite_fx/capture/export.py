"""Capture a model by `torch.export`, with every dimension dynamic that can be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from ..compat.torch import assert_in_graph, check, pytree
from ..errors import CaptureError
from ..graph.calls_and_traces import tracing
from ..graph.copies import Draft
from ..graph.writes import returns_what_it_writes
from .autograd_functions import keeping_functions
from .forward_signature import signature_of
from .quiet_torch import failures_unlogged, quiet_export
from .quirks import all_quirks
from .quirks.quirk import Call, Quirk
from .refusal import refusal
from .sizes_of_one import sizes_of_one_that_decide


def export(
    model: nn.Module,
    call: Call,
    dynamic_shapes: Any,
    batch_only: Collection[str] = (),
    unread: Sequence[Tensor] = (),
) -> fx.GraphModule:
    """Export `model` on the inputs of a call.

    Args:
        model, call: the call.
        dynamic_shapes: as for `capture`.
        batch_only: names of arguments of which `"auto"` makes the batch alone dynamic. Where the model cannot be
            exported, this is tried with its images too.
        unread: tensors of the call that the model does not read, as the caches of layers that it lacks. Those among the
            keyword arguments are exported with fixed sizes, because symbols for their sizes take as long as a layer.
    """
    if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
        if unread and not call[0] and isinstance(dynamic_shapes, dict):
            fixes = {name for name, value in call[1].items() if any(value is tensor for tensor in unread)}
            dynamic_shapes = {name: None if name in fixes else shape for name, shape in dynamic_shapes.items()}
        return _export_as(model, call, dynamic_shapes)

    def dynamic(leaf: Any, others: Any = Dim.AUTO) -> list[Any] | None:
        return [Dim.AUTO, *[others] * (leaf.dim() - 1)][: leaf.dim()] if isinstance(leaf, Tensor) else None

    def shapes(arguments: dict[str, Any], fixed: Collection[str]) -> dict[str, Any]:
        dimensions: dict[str, Any] = pytree.tree_map(dynamic, arguments)
        return dimensions | {name: dynamic(arguments[name], Dim.STATIC) for name in fixed if name in arguments}

    # Show a batch of one twice if the model takes that, because torch.export specializes a size of one without a word.
    doubled = double_batch_of_one(call)
    calls = [call] if doubled is None else [doubled, call]
    bound = [signature_of(model).bind(*args, **kwargs).arguments for args, kwargs in calls]
    errors: list[CaptureError] = []
    for fixed in dict.fromkeys((tuple(batch_only), (*batch_only, *images_in(bound[0])))):
        for each, arguments in zip(calls, bound, strict=True):
            try:
                return _export_as(model, each, shapes(arguments, fixed))
            except CaptureError as error:
                errors.append(error)
    raise errors[len(calls) - 1]  # of the call as it is, with every dimension dynamic


def images_in(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the arguments that look like images: numbers in four dimensions or more.

    A model may decide by their height and width, as by whether a patch divides them, where a graph has to hold for all.
    """
    return tuple(
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dim() >= 4 and value.is_floating_point()
    )


def _export_as(model: nn.Module, call: Call, dynamic_shapes: Any) -> fx.GraphModule:
    quirks = all_quirks.concerning(model)
    before: Exception | None = None
    while True:
        try:
            gm, check_quirks = _trace(model, call, dynamic_shapes, quirks)
            break
        except Exception as error:
            more = [quirk for quirk in all_quirks.concerning(model, error) if quirk not in quirks]
            if not more:
                if before is None:
                    raise
                raise before from error  # which names what the model does, as the last quirks did not help
            before, quirks = error, [*quirks, *more]
    check_quirks(gm)
    draft = Draft(gm, gm.graph)  # because what follows changes the graph, and calls it as another module
    guard_sizes(draft, {}, sizes_of_one_that_decide(draft, model, call))
    return draft


@tracing()
def _trace(
    model: nn.Module, call: Call, dynamic_shapes: Any, quirks: Sequence[Quirk]
) -> tuple[fx.GraphModule, Callable[[fx.GraphModule], None]]:
    """Return the graph, and a function that checks what the quirks have done to it."""
    from ..compat.dynamo import without_fake_tensor_cache

    with (
        keeping_functions() as kept,
        all_quirks.entered(quirks, model, call) as check_quirks,
        quiet_export(),
        failures_unlogged(),
        # A trace of few layers makes more entries of this cache than it reads, and each takes as long as an operator.
        without_fake_tensor_cache(),
    ):
        try:
            program = torch.export.export(model, *call, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise refusal(model, error, "torch.export") from error
        gm = program.module()
        for guards in gm.graph.find_nodes(op="call_module", target=GUARDS):
            guards.meta.pop("nn_module_stack", None)  # that of the first operator, whose layer would check them
        kept.put_calls(gm)
        _leave_out_needless_copies(gm)
        _index_by_operator(gm)
    return gm, check_quirks


def _index_by_operator(gm: fx.GraphModule) -> None:
    """Index by `aten.index` where a mask of transformers is indexed inside `vmap`.

    torch has an autograd function for that, whose backward pass is that of the operator. torch.export calls it by an
    operator that Dynamo cannot compile, with the function by name and its arguments flat.

    Raises:
        CaptureError: the graph names another function of torch, as a release may that calls this one otherwise.
    """
    from ..compat.dynamo import MOD_INDEX

    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flat_apply):
        function, *arguments = node.args[2:]
        if str(function).startswith("torch.") and function != MOD_INDEX:
            raise CaptureError(
                f"torch.export of torch {torch.__version__} recorded {function} by its name, which is not known to"
                " compile and to keep its gradient. The way out: another release of torch, or a newer lora_lite_fx."
            )
        if function == MOD_INDEX:
            with gm.graph.inserting_before(node):
                index = gm.graph.call_function(torch.ops.aten.index.Tensor, (arguments[0], arguments[1:]))
            index.meta = dict(node.meta)
            node.replace_all_uses_with(index)
            gm.graph.erase_node(node)
            gm.recompile()


def _leave_out_needless_copies(gm: fx.GraphModule) -> None:
    """Remove the copies into a buffer of what an operator in place has written there already.

    torch.export ends a graph with them. Autograd takes them for writes after the buffer was read, and refuses the
    backward pass of what was computed with it.
    """
    for copy in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        buffer, value = copy.args[:2]
        while isinstance(value, fx.Node) and returns_what_it_writes(value):
            value = value.args[0]
        if value is buffer and not copy.users:
            gm.graph.erase_node(copy)
            gm.recompile()


def double_batch_of_one(inputs: Any) -> Any:
    """Return a tree of inputs with its batch of one shown twice; None if the batch is of another size or missing."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return None
    twice = lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf  # noqa: E731
    return pytree.tree_map(twice, inputs)


def take_for_one(size: int | torch.SymInt, other: int | torch.SymInt) -> None:
    """Let an export take two sizes for one, in the forward of what it exports. The graph's guards compare them."""
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        check(size == other)


GUARDS = "_guards_fn"
"""The name of the module that torch.export puts its guards into; there is no other way to ask whether a graph holds."""


_FAILED = "Guard failed: "
"""What the message of a guard begins with, as torch.export writes it."""


def failed_guard(error: AssertionError) -> str | None:
    """Return the condition that a graph asks of its inputs and that they fail, or None if the error is another one."""
    condition = str(error).removeprefix(_FAILED)
    return condition if condition != str(error) else None


class _GuardsOfSizes(nn.Module):
    """Guards of a graph, and further ones: that inputs have the sizes of others, and that sizes are not one.

    Args:
        first: the guards that the graph has.
        names: of the inputs.
        same: the numbers of inputs, with those of the inputs whose sizes they have.
        several: the numbers of inputs and the dimensions of which the size is not one.
        examples: the numbers of inputs, with the tensors that the first guards see in their place.
    """

    def __init__(
        self,
        first: nn.Module,
        names: Sequence[str],
        same: Mapping[int, int],
        several: Sequence[tuple[int, int]],
        examples: Mapping[int, Tensor],
    ) -> None:
        super().__init__()
        self.first = first
        self.examples = examples
        self.pairs = [
            (one, other, f"{_FAILED}{names[one]}.shape == {names[other]}.shape") for one, other in same.items()
        ]
        self.several = [(one, dim, f"{_FAILED}{names[one]}.shape[{dim}] != 1") for one, dim in several]
        self._is_impure = True  # torch.fx would remove the call, whose result nobody reads

    def forward(self, *inputs: Any) -> None:
        """Raise AssertionError for inputs that the graph does not hold for."""
        self.first(*(self.examples.get(number, value) for number, value in enumerate(inputs)))
        for one, other, message in self.pairs:
            assert_in_graph(inputs[one].shape == inputs[other].shape, message)
        for one, dim, message in self.several:
            assert_in_graph(inputs[one].shape[dim] != 1, message)


def guard_sizes(
    gm: fx.GraphModule,
    same: Mapping[int, int],
    several: Sequence[tuple[int, int]],
    examples: Mapping[int, Tensor] = MappingProxyType({}),
) -> None:
    """Let the guards of a graph check further sizes of inputs.

    Args:
        gm: as torch.export made it.
        same, several, examples: what they check, as for `_GuardsOfSizes`; nothing is done without the first two.
    """
    if not same and not several:
        return
    names = [node.name for node in gm.graph.find_nodes(op="placeholder", sort=True)]
    without_data = {number: tensor.to("meta") for number, tensor in examples.items()}
    gm.add_module(GUARDS, _GuardsOfSizes(gm.get_submodule(GUARDS), names, same, several, without_data))


def take_guards(gm: fx.GraphModule) -> Callable[..., object]:
    """Remove the guards of `gm` on its inputs; return them as a function of the inputs that raises AssertionError."""
    calls = gm.graph.find_nodes(op="call_module", target=GUARDS)
    if not calls:
        return lambda *inputs: None
    guards = gm.get_submodule(GUARDS)
    for node in calls:
        gm.graph.erase_node(node)
    gm.delete_submodule(GUARDS)
    gm.recompile()
    return guards
