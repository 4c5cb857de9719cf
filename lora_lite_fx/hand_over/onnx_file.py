"""`save_onnx`, `save_onnx_adapter`: a model and its adapters as the files that ONNX Runtime takes."""

from __future__ import annotations

import operator
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ..compat.torch import OpOverload
from ..errors import AdapterError, CheckpointError
from ..formats.atomic_writing import write_atomically, write_together
from ..graph.insertion import insertions, is_inserted, place_of
from ..graph.tensors import outside_inference_mode
from ..rewriting.sums import graph_with_adapters
from .bake import make_constants
from .exported_program import graph_of_call
from .served_graph import ServedGraph, Tensors
from .swappable_adapters import ActingAdapter, SwappableGraph, acting_adapters, swappable_graph
from .targets import import_package

_ONE_FILE = 1 << 30
"""Bytes of tensors that are a part of the file; larger models have them beside it, because protobuf ends at 2 GB."""

_LACKING = re.compile(r"(^|_)(fft|conv_transpose|linalg_(?!vector_norm|matrix_norm|norm|cross|vecdot))")
"""Operators that ONNX or its runtime lacks. Of Fourier transforms ONNX Runtime has one, whose error is 7e-5."""

_CACHE = re.compile(r"(past|present)_(key|value)_(\d+)")


@outside_inference_mode()
def save_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Tensors | tuple[Tensor, ...] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    cache: bool = False,
    bake: bool | None = None,
) -> None:
    """Write a model as an ONNX file, in which adapters are optional inputs: without them it is the frozen model.

    Batch and length stay open, and the rank where the variant allows it. The inputs have the names of the model's
    arguments, and the adapters those of `adapter_state_dict` for an adapter without a name, so that files of
    `save_onnx_adapter` for any adapter of the same variant and sites fit, whatever their alpha.

    Adapters whose operators ONNX lacks, such as the solver of HRA, are constants of the file. The slots of a `Bank` are
    in the file too, as defaults of its inputs, and `adapter_ids` says the slot of each row.

    Args:
        model: a result of `rewrite`, `load`, `adapt` or `merge`. Only the adapters that act are in the file.
        path: of the file. A model above 1 GB has its tensors beside it, in `<path>.data`.
        inputs: as for `export`.
        outputs: names of fields of the model's output; None for all its tensors.
        cache: write a step of a causal language model, see `step_with_cache`. The cache has the names that ONNX Runtime
            GenAI expects: `past_key_values.0.key`, `present.0.key`.
        bake: True for constants in place of all adapters, False for none. None for those that ONNX takes only so.

    Raises:
        ImportError: a package of the extra `onnx` is missing.
        AdapterError: `model` is no such result; or ONNX lacks an operator, whose site the message names.
        CallError, ConfigError: the inputs or outputs are not those of the model.
        CaptureError: the call of an adapted model cannot be captured.
        CheckpointError: the file cannot be written. What was there is unchanged.
    """
    ir = import_package("onnx_ir", "onnx")
    import_package("onnxscript", "onnx")
    graph, adapters, labels = _served(model, inputs, outputs, cache, bake)
    program = _exported(graph, adapters)
    try:
        converted = _converted(program, graph, adapters)
    except Exception as error:
        raise _unconverted(error, graph.gm) from error
    _let_be_left_out(ir, converted, adapters.values(), labels)
    _write(ir, converted, Path(path))


def save_onnx_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter that acts as a file for ONNX Runtime's `LoraAdapter`, which fits the file of `save_onnx`.

    Its scale is in its tensors (alpha and rank, `rank_stabilized`, patterns, and for variants of two factors the
    coefficient of `scaled`), so that it runs at its own strength whatever adapter the model's file was written from.

    Args:
        model: a result of `rewrite`, `load` or `adapt`.
        path: of the file, `fr.onnx_adapter`.

    Raises:
        ImportError: the package onnxruntime is missing.
        AdapterError: no adapter acts; one is of a variant that is constants of the model's file; or one has a
            coefficient that its tensors cannot take.
        CheckpointError: the file cannot be written. What was there is unchanged.
    """
    ort = import_package("onnxruntime", "onnx")
    gm = graph_with_adapters(model)
    adapters = acting_adapters(gm)
    if not adapters:
        raise AdapterError("No adapter acts, so that there is none to write. The way out: active(model, names).")
    for adapter, reason in _fixed(gm, adapters):
        raise AdapterError(
            f"{adapter.label} at {adapter.placed.site!r} is constants of the file that save_onnx writes, because"
            f" {reason}. The way out: a file of the model for each adapter."
        )
    values = dict[str, Any]()
    for adapter in adapters:
        values |= adapter.values()
        values[_acts(adapter.label)] = torch.ones(1)
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    parameters = {name: _at_least_1d(value).cpu().contiguous().numpy() for name, value in values.items()}
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()})
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "adapter"
        file.export_adapter(str(made))
        write_atomically(Path(path), made)


def _acts(label: str) -> str:
    """Return the name of the input that says whether adapters of a label act."""
    return f"adapter_acts.{label}"


def _at_least_1d(tensor: Tensor) -> Tensor:
    """Return a tensor `()` as `(1,)`, because ONNX Runtime's files of adapters lack tensors without dimensions."""
    return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()


_Default = Literal["own", "zeros", "rank one"]


@dataclass(frozen=True)
class _Input:
    """A tensor of an adapter as an input of the file.

    Args:
        name: of the input.
        value: an example.
        default: its value where none is given: the example (`own`), zeros of its shape, or zeros of rank one.
        open_dims: the dimensions that may have any size.
    """

    name: str
    value: Tensor
    default: _Default = "zeros"
    open_dims: Sequence[int] = ()


def _served(
    model: nn.Module,
    inputs: Tensors | tuple[Tensor, ...] | None,
    outputs: str | Sequence[str] | None,
    cache: bool,
    bake: bool | None,
) -> tuple[ServedGraph, dict[str, _Input], list[str]]:
    """Return the graph of the file; the inputs for adapters, by the names of the graph's inputs; and their labels."""
    gm, inputs, outputs = graph_of_call(model, inputs, outputs, cache)
    adapters = acting_adapters(gm)
    reasons = _fixed(gm, adapters)
    if reasons and bake is False:
        adapter, reason = reasons[0]
        raise AdapterError(
            f"{adapter.label} at {adapter.placed.site!r} cannot be inputs of an ONNX file, because {reason}. The way"
            " out: bake=True makes constants of adapters."
        )
    configs = {adapter.index for adapter, _ in reasons}
    fixed = [each for each in adapters if bake or each.index in configs]
    swapped = [each for each in adapters if not bake and each.index not in configs]
    swappable = swappable_graph(gm, swapped, fixed)
    graph = ServedGraph.of(swappable.gm, inputs, outputs, "save_onnx")
    taken = _as_inputs(graph.gm, _inputs_of(swappable, swapped))
    if fixed:
        make_constants(graph.gm, whole_updates=False)
        if _operators(filter(is_inserted, graph.gm.graph.nodes)):
            make_constants(graph.gm, whole_updates=True)
        for node, lacking in _operators(filter(is_inserted, graph.gm.graph.nodes)):
            raise AdapterError(
                f"The adapter at {place_of(node)!r} applies {lacking} to its input, which ONNX lacks. The way out:"
                " llfx.to_lora, or llfx.merge."
            )
    return graph, taken, list(dict.fromkeys(each.label for each in swapped))


def _fixed(gm: fx.GraphModule, adapters: Sequence[ActingAdapter]) -> list[tuple[ActingAdapter, str]]:
    """Return the adapters that cannot be inputs of a file, each with the reason."""
    found = list[tuple[ActingAdapter, str]]()
    for adapter in adapters:
        if others := {str(tensor.dtype) for tensor in adapter.tensors.values()} - {"torch.float32", "torch.float16"}:
            found.append((adapter, f"ONNX Runtime's files of adapters lack {min(others)}"))
    by_place = {(each.index, each.placed.site): each for each in adapters}
    for insertion in insertions(gm.graph) if adapters else ():
        place = insertion.adapter, insertion.site
        if place in by_place and (lacking := _operators(insertion.nodes)):
            found.append((by_place[place], f"ONNX lacks {lacking[0][1]}"))
    return found


def _operators(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, str]]:
    """Return those of the nodes that ONNX lacks, with the names of their operators."""
    called = [(node, node.target.name()) for node in nodes if isinstance(node.target, OpOverload)]
    return [(node, name) for node, name in called if _LACKING.search(name.partition("::")[2].partition(".")[0])]


def _inputs_of(swappable: SwappableGraph, adapters: Iterable[ActingAdapter]) -> dict[str, _Input]:
    """Return the inputs for adapters, by the names of the tensors in the graph."""
    found = {buffer: _Input(_acts(label), torch.ones(1)) for label, buffer in swappable.switches.items()}
    for adapter in adapters:
        default: _Default = "rank one" if adapter.is_nothing_at_rank_one else "zeros"
        default = "own" if adapter.placed.variant.slots else default
        for name, tensor in adapter.values().items():
            found[name] = _Input(name, tensor, default, swappable.open_dims.get(name, ()))
    return found


def _as_inputs(gm: fx.GraphModule, tensors: Mapping[str, _Input]) -> dict[str, _Input]:
    """Make inputs of a graph of these of its tensors. Return them by the names of the inputs, in order."""
    taken, values = dict[str, _Input](), dict[str, fx.Node]()
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in tensors:
            continue
        if name not in values:
            taken[f"adapter_{len(taken)}"] = tensors[name]
            with gm.graph.inserting_after(last):
                values[name] = last = gm.graph.placeholder(f"adapter_{len(taken) - 1}")
            last.meta = dict(node.meta)
        node.replace_all_uses_with(values[name])
        gm.graph.erase_node(node)
    for given in [value for name, value in values.items() if tensors[name].value.dim() == 0]:
        with gm.graph.inserting_after(last):
            scalar = gm.graph.call_function(torch.ops.aten.view.default, (given, []))
        scalar.meta = dict(given.meta)
        given.replace_all_uses_with(scalar, delete_user_cb=partial(operator.is_not, scalar))
    gm.recompile()
    return taken


def _exported(graph: ServedGraph, adapters: Mapping[str, _Input]) -> ExportedProgram:
    sizes = {name: dict.fromkeys(range(tensor.dim()), Dim.AUTO) for name, tensor in graph.inputs.items()}
    sizes |= {name: dict.fromkeys(each.open_dims, Dim.AUTO) for name, each in adapters.items()}
    inputs = {**graph.inputs, **{name: _at_least_1d(each.value) for name, each in adapters.items()}}
    with torch.no_grad():
        return torch.export.export(graph.gm, (), inputs, dynamic_shapes=sizes, strict=False)


def _converted(program: ExportedProgram, graph: ServedGraph, adapters: Mapping[str, _Input]) -> Any:
    """Return a program as a model of `onnx_ir`, with the names that are asked for."""
    names = [_of_genai(name) for name in graph.inputs] + [each.name for each in adapters.values()]
    outputs = [_of_genai(name) for name in graph.outputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted: Any = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, output_names=outputs)
    for value in converted.model.graph.inputs:  # sizes that torch.export has found to be constant are names of sizes
        sizes = [str(getattr(size, "value", size)) for size in value.shape]
        value.shape = type(value.shape)([int(size) if size.isdigit() else size for size in sizes])
    return converted.model


def _of_genai(name: str) -> str:
    """Return the name that ONNX Runtime GenAI has for an input or output of `step_with_cache`."""
    match = _CACHE.fullmatch(name)
    return name if match is None else f"{match[1]}{'_key_values' if match[1] == 'past' else ''}.{match[3]}.{match[2]}"


def _unconverted(error: Exception, gm: fx.GraphModule) -> AdapterError:
    """Return the error for a graph that is not converted, with the place at which it fails."""
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    said = " ".join(" ".join(str(cause).split("See the stack trace")[0].split()) for cause in causes[1:] or causes)
    found = re.search(r"target=torch\.ops\.([\w.]+)", said)
    called = [node for node in gm.graph.nodes if found is not None and str(node.target) == found[1]]
    where = f" at {place_of(called[0])!r} ({found[1]})" if called and found is not None else ""
    return AdapterError(
        f"The model is not converted to ONNX{where}: {said[:500]} The way out for an adapter: bake=True,"
        " llfx.to_lora or llfx.merge."
    )


def _let_be_left_out(ir: Any, model: Any, adapters: Iterable[_Input], labels: Iterable[str]) -> None:
    """Give the inputs for adapters their defaults, each an initializer of the same name.

    Args:
        ir: the package onnx_ir.
        model: the model, which is changed.
        adapters: the inputs.
        labels: of the adapters. Each is an input, also where nothing reads it, so that ONNX Runtime refuses an adapter
            of another variant, some of whose tensors may have the same names.
    """
    given = {value.name: value for value in model.graph.inputs}
    known = {_acts(label): _Input(_acts(label), torch.ones(1)) for label in labels}
    for name, each in (known | {each.name: each for each in adapters}).items():
        value = given.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
            model.graph.inputs.append(value)
        default = _at_least_1d(each.value)
        if each.default != "own":
            sizes = list(default.shape)
            if each.default == "rank one":
                sizes = [size if isinstance(size, int) else 1 for size in value.shape]
            default = torch.zeros(sizes, dtype=default.dtype)
        value.const_value = ir.tensor(default.cpu().contiguous(), name=name)
        model.graph.register_initializer(value)


def _write(ir: Any, model: Any, path: Path) -> None:
    """Write a model whole or not at all, with large tensors in a file of their own."""
    if sum(value.const_value.nbytes for value in model.graph.initializers.values()) <= _ONE_FILE:
        write_atomically(path, ir.to_proto(model).SerializeToString())
        return
    data = path.with_name(path.name + ".data")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lora_lite_fx-") as folder:
            made = Path(folder) / path.name
            ir.save(model, made, external_data=data.name)
            write_together([(data, made.with_name(data.name)), (path, made)])
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}.") from error
