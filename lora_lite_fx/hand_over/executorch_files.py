"""`save_executorch`: an adapted model as files of ExecuTorch, where adapters of one base share its tensors."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.placement import adapter_tensor_names
from ..adapters.switches import active
from ..errors import AdapterError, CheckpointError, ConfigError, shown
from ..formats.atomic_writing import write_folders
from ..graph.insertion import recorded
from ..graph.tensors import outside_inference_mode
from .bake import bake as constants
from .bake import is_baked
from .distance_from_torch import difference
from .exported_program import exported, served
from .served_graph import ServedGraph, Tensors
from .targets import import_package

BASE = "base"
"""The name of the file that has the tensors of the base, without its ending."""

_TOLERANCE = 1e-2
"""How far a program may be from torch on the example, for the largest output: more than rounding is another result."""

_ONE_OPEN_SIZE = ("squeeze_copy.dim", "unsqueeze_copy.default")
"""XNNPACK takes these with one open size only, and its partitioner gives it others too. They stay outside of it."""


@outside_inference_mode()
def save_executorch(
    model: nn.Module,
    folder: str | Path,
    name: str,
    inputs: Tensors | tuple[Tensor, ...] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    bake: bool | None = None,
    cache: bool = False,
    largest: tuple[int, int] = (4, 512),
) -> None:
    """Write a model for ExecuTorch with XNNPACK: `folder/<name>.pte`, and once `folder/base.ptd` with the base.

    `base.ptd` has the tensors of the model without adapters. It is written by the first call for a folder and never
    again: adapters of one base share it, and each adds one small `.pte` that has its own tensors. The program runs as
    `Runtime.get().load_program("fr.pte", data_path="base.ptd").load_method("forward").execute((input_ids, ...))`, with
    the inputs in the order of the model's arguments. Before a file is written, the program is run on the example and
    compared with torch.

    Args:
        model: a result of `rewrite`, `load`, `adapt` or `merge`, on the CPU. Only the adapters that act are written;
            with `active(model, [])` the program is the base alone.
        folder: is made if it is not there.
        name: of the adapter, a file name without an ending.
        inputs: as for `export`.
        outputs: as for `export`.
        bake: make constants of what depends on parameters alone, see `bake`; None for what suits ExecuTorch, which is
            yes: it lacks the operators of some adapters, and the adapter's tensors cannot be exchanged in a `.pte`.
        cache: write a step of a causal language model, see `step_with_cache`.
        largest: the largest batch and the largest of each other open size, such as the length. ExecuTorch reserves
            memory for these when a program is loaded. Sizes of the example are possible in any case.

    Raises:
        ImportError: executorch is not installed.
        AdapterError: ExecuTorch lacks an operator; the program computes something else than torch; or `base.ptd` does
            not have the tensors that the program reads. No file is written or changed.
        CallError, ConfigError, CaptureError: as for `export`; or the name or sizes cannot be.
        CheckpointError: the files cannot be written, or `base.ptd` cannot be read.
    """
    _check_arguments(name, largest)
    for package in ("executorch.exir", "executorch.runtime"):
        import_package(package, "executorch")
    path = Path(folder) / f"{BASE}.ptd"
    base = _read(path)
    is_new = base is None
    _tensors(base or b"", path)  # raises before anything is lowered
    adapters = set(adapter_tensor_names(model)) if isinstance(model, nn.Module) else set[str]()
    bake = bake is not False

    def served_as(bake: Any) -> ServedGraph:
        whole = constants(model, whole_updates=True) if bake == "whole" else model
        return served(whole, inputs, outputs, cache, bool(bake), "save_executorch")

    def lowered(bake: bool) -> _Files:
        graph = served_as(bake)
        with _explained(served_as, bake):
            return _Files.of(graph, {n for n in _tensor_names(graph.gm) if n in adapters or is_baked(n)}, largest)

    files = lowered(bake)
    if base is None:
        if adapters:
            with active(model, []):
                base = lowered(False).base
        elif files.has_own:
            raise AdapterError(
                f"{path} does not exist, and a graph of llfx.bake does not have the base any more. The way out: first"
                " save the model that was baked, with llfx.active(model, []) as the base alone."
            )
        else:
            base = files.base
    _check_fit(files, base, path)
    files.check_run(base)
    contents = [(path, base)] if is_new else []
    write_folders([[*contents, (path.with_name(f"{name}.pte"), files.program)]])


@dataclass(frozen=True)
class _Files:
    """A lowered program.

    Args:
        graph: what it was lowered from.
        program: the bytes of the `.pte` file.
        base: the bytes of a `.ptd` file with the tensors of the base that it reads.
        has_own: whether the program has tensors that are not the base's.
    """

    graph: ServedGraph
    program: bytes
    base: bytes
    has_own: bool

    @classmethod
    def of(cls, graph: ServedGraph, own: set[str], largest: tuple[int, int]) -> _Files:
        """Lower a graph, in which the tensors `own` belong to the program and all others to the base."""
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted

        tensors = _tensor_names(graph.gm) - own
        _check_devices(graph.gm)

        def file_of(name: object) -> str | None:
            return BASE if name in tensors else None

        delegate_external_constants_pass_unlifted(graph.gm, lambda node: file_of(node.target))  # those of XNNPACK
        program = exported(graph, largest)
        _check_numbers(program.graph)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        configs = [config for config in ALL_PARTITIONER_CONFIGS if config.target_name not in _ONE_OPEN_SIZE]
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=configs)])
        external: Callable[[fx.Node], str | None] = lambda node: file_of(names.get(node.name))  # noqa: E731
        done = edge.to_executorch(ExecutorchBackendConfig(external_constants=external))
        with tempfile.TemporaryDirectory() as temporary:
            done.write_tensor_data_to_file(temporary)
            data = _read(Path(temporary) / f"{BASE}.ptd") or b""
        _check_operators(done.executorch_program.execution_plan)
        return cls(graph, bytes(done.buffer), data, bool(own))

    def check_run(self, base: bytes) -> None:
        """Run the program on the example, and compare it with torch.

        Raises:
            AdapterError: it does not run, or computes something else.
        """
        inputs = tuple(self.graph.inputs.values())
        with torch.no_grad():
            expected = self.graph.gm(*inputs)
        try:
            results = _run(self.program, base, inputs)
        except Exception as error:
            raise AdapterError(
                f"ExecuTorch cannot run the program that it made: {error} Nothing was written. XNNPACK crashes on"
                " operations whose operands are all constant. The way out: bake=False; or save llfx.bake(model,"
                " whole_updates=True), and the base alone before it."
            ) from error
        if (apart := difference(results, expected)) > _TOLERANCE:
            raise AdapterError(
                f"ExecuTorch computes something else than torch: its {', '.join(self.graph.outputs)} differ by"
                f" {apart:.1e} of the largest. Nothing was written."
            )


_RUN = """
import sys, torch
from executorch.runtime import Runtime
program, base, inputs, results = sys.argv[1:]
method = Runtime.get().load_program(program, data_path=base or None).load_method("forward")
torch.save([result.clone() for result in method.execute(torch.load(inputs))], results)
"""


def _run(program: bytes, base: bytes, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what ExecuTorch's runtime computes, in a process of its own, because it may end with a crash.

    Raises:
        RuntimeError: it does not run to its end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: Path(temporary) / name for name in ("program.pte", "base.ptd", "inputs.pt", "results.pt")}
        paths["program.pte"].write_bytes(program)
        paths["base.ptd"].write_bytes(base)
        torch.save([tensor.contiguous() for tensor in inputs], paths["inputs.pt"])
        arguments = [str(path) if name != "base.ptd" or base else "" for name, path in paths.items()]
        done = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"the runtime ended with {done.returncode}: {said[-1] if said else 'no message'}")
        results: list[Tensor] = torch.load(paths["results.pt"])
        return results


# What does not fit.


def _check_arguments(name: object, largest: object) -> None:
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"name is a file name without an ending, such as 'fr', not {shown(name)}.")
    if not isinstance(largest, Sequence) or len(largest) != 2 or not all(type(n) is int and n > 0 for n in largest):
        raise ConfigError(f"largest is two sizes, of the batch and of each other open size, not {shown(largest)}.")


def _check_devices(gm: fx.GraphModule) -> None:
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        if tensor.device.type != "cpu":
            raise AdapterError(
                f"save_executorch takes a model on the CPU, and {name} is on {tensor.device}. The way out: model.cpu()"
            )


def _tensor_names(gm: fx.GraphModule) -> set[str]:
    return {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}


def _check_numbers(graph: fx.Graph) -> None:
    """Raise RuntimeError for an operation on complex numbers, because ExecuTorch's own error names another one."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for value in (node, *node.all_input_nodes):
            if isinstance(tensor := value.meta.get("val"), Tensor) and tensor.is_complex():
                raise RuntimeError(f"{node.target} has complex numbers")


def _check_operators(plans: Sequence[Any]) -> None:
    """Raise RuntimeError if the runtime has no kernel for an operator, which it would say at loading only."""
    from executorch.runtime import Runtime

    kernels = Runtime.get().operator_registry.operator_names
    for plan in plans:
        for operator in plan.operators:
            full = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
            if full not in kernels:
                raise RuntimeError(f"the runtime has no kernel for {full}")


@contextlib.contextmanager
def _explained(served_as: Callable[[Any], ServedGraph], bake: bool) -> Iterator[None]:
    """Raise AdapterError for an error of ExecuTorch; it names the operator, and its variant and site if it has one.

    Args:
        served_as: returns the graph with `bake=False`, `bake=True` or all updates as constants.
        bake: how it was lowered.
    """
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        operator = re.search(r"aten(?:::|\.)(\w+)", text)
        nodes = [] if operator is None else _calls(served_as(False), operator[1])
        insertion = next((insertion for node in nodes if (insertion := recorded(node)) is not None), None)
        if operator is None or insertion is None:
            way_out = "" if bake else " The way out: bake=True."
            raise AdapterError(f"ExecuTorch does not take this program: {text}.{way_out}") from error
        ways = {True: "bake=True", "whole": "save llfx.bake(model, whole_updates=True), and the base alone before it"}
        possible = (way for way in ways if way is not bake and not _calls(served_as(way), operator[1]))
        way_out = next((ways[way] for way in possible), "save llfx.merge(model) in a folder of its own")
        raise AdapterError(
            f"ExecuTorch does not take aten.{operator[1]} of {insertion.variant} at {insertion.site!r}: {text}. The way"
            f" out: {way_out}."
        ) from error


def _calls(graph: ServedGraph, operator: str) -> list[fx.Node]:
    """Return the calls of an operator, by its name in ExecuTorch, in a graph and in what it is decomposed to."""
    program = exported(graph)
    nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    return [node for node in nodes if re.search(rf"\b{operator}\b", str(node.target))]


def _check_fit(files: _Files, base: bytes, path: Path) -> None:
    """Raise AdapterError unless `base` has the tensors that the program reads, with the same values."""
    if files.base == base:
        return
    present = _tensors(base, path)
    for key, value in _tensors(files.base, path).items():
        if key not in present:
            named = "a tensor" if re.fullmatch(r"[0-9a-f]{64}", key) else key  # XNNPACK names tensors by their values
            problem = f"does not have {named} that the program reads"
        elif present[key] != value:
            problem = f"has other values of {key}"
        else:
            continue
        raise AdapterError(
            f"{path} {problem}: it was written for another base, or for inputs or outputs that need less of it. The"
            " way out: another folder. Nothing was written."
        )


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _tensors(data: bytes, path: Path) -> Mapping[str, tuple[bytes, Any]]:
    """Return the tensors of a `.ptd` file by name: their bytes, and their types and sizes."""
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    if not data:
        return {}
    try:
        read = FlatTensorSerializer().deserialize_to_named_data_store_output(data, BASE)
    except Exception as error:
        raise CheckpointError(f"{path} is not a file of tensors of ExecuTorch: {error}") from error
    named = read.external_data[BASE]
    return {key: (bytes(read.buffers[entry.buffer_index]), entry.tensor_layout) for key, entry in named.items()}
