"""The arms of `benchmark.py`: the same adapter of one step in each implementation."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import finetune_model
import peft
import safetensors.torch
import torch
import transformers
from benchmark_cases import Case, Linears, Step
from benchmark_report import disagreement
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

import lora_lite_fx as llfx
from lora_lite_fx.passes import DropMetadataAsserts, Pipeline

VARIANTS = ("LoRA", "DoRA", "HRA", "DeLoRA", "IA3", "RoAd", "OFT")


def config(variant: str, rank: int, case: Case) -> llfx.Variant:
    """Return the config of a variant at its default roles, or at all linears of a layer, which have no roles."""
    targets: dict[str, Any] = {"target_names": (".",)} if case.tokens else {}
    return finetune_model.config(llfx.registry()[variant], rank, **targets)


@dataclass
class Arm:
    """An implementation, ready to be called.

    Args:
        name: its name on the command line.
        step: the call of the frozen module.
        run: the adapted module, or its compiled form.
        parameters: the trained parameters by name.
        named: renames tensors that have the names of `parameters` to the names of our graphs.
    """

    name: str
    step: Step
    run: Callable[..., Any]
    parameters: dict[str, nn.Parameter]
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def __call__(self) -> Any:
        """Run the step in the caller's mode and return its outputs; a training step leaves gradients."""
        if ":" in self.name:  # with CUDA graphs, the outputs of the last call are given up here
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.run(**self.step.inputs)
        if self.step.trains:
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.autograd.backward(outputs, [_direction(y.shape, y.dtype, y.device) for y in outputs])
        return outputs

    @property
    def inputs(self) -> list[Tensor]:
        """Return the inputs that have a gradient."""
        return [tensor for tensor in self.step.inputs.values() if isinstance(tensor, Tensor) and tensor.requires_grad]

    def renew(self) -> None:
        """Do the work between two training steps: drop gradients and mark parameters as changed; keep values."""
        if not self.step.trains:
            return
        with torch.no_grad():
            for tensor in (*self.parameters.values(), *self.inputs):
                tensor.grad = None
            for parameter in self.parameters.values():
                parameter.mul_(1)

    def results(self) -> dict[str, Tensor]:
        """Run the step; return its outputs and, of a training step, all gradients."""
        self.renew()
        with torch.set_grad_enabled(self.step.trains):
            outputs = pytree.tree_leaves(self())
        results = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
        if self.step.trains:
            results |= {
                f"input gradient {index}": x.grad.clone() for index, x in enumerate(self.inputs) if x.grad is not None
            }
            gradients = self.named({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
            results |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
            self.renew()
        return results


@functools.cache
def _direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient to start from at an output: one at a loss, else random."""
    if not shape:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
BASE = ("base", "base-again", "base-graph", "base-compiled", "base-exported")
ADAPTED = (
    "peft",
    "peft-uncast",
    "peft-compiled",
    "peft-liger",
    "hooks",
    "ours-plain",
    "ours",
    "ours-compiled",
    "ours-frozen",
    "ours-frozen-compiled",
    "ours-exported",
    "ours-adapt",
    "ours-adapt-frozen",
    "ours-fused",
    "ours-balanced",
    "merged",
)


class Arms:
    """The implementations of one adapter for one step. They share the frozen weights, and each is made when asked for.

    Args:
        step: the call of the frozen module.
        graph: the module's graph, from `capture`.
        cfg: the adapter; its values are random, and the same in all implementations.
    """

    def __init__(self, step: Step, graph: nn.Module, cfg: llfx.Variant) -> None:
        self.step, self.graph, self.cfg = step, graph, cfg
        self.ours = llfx.rewrite(graph, cfg)
        self._expected: dict[str, dict[str, Tensor]] = {}
        self._scopes = contextlib.ExitStack()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in llfx.adapter_parameters(self.ours):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.02)

    def make(self, name: str) -> Arm:
        """Make the arm of that name; after a compiled one's name, a mode of `torch.compile` may follow a colon.

        Raises:
            ConfigError: the variant or the module has no such implementation.
        """
        kind, _, mode = name.partition(":")
        if kind.endswith("-compiled"):
            arm = self.make(kind.removesuffix("-compiled"))
            return Arm(name, self.step, self.compile(arm, dynamic=False, mode=mode or None), arm.parameters, arm.named)
        if name == "peft":
            return self._peft()
        if name == "peft-uncast":
            return replace(self._peft(autocast_adapter_dtype=False), name=name)
        if name == "peft-liger":
            arm = self._peft()
            apply_liger(arm.run)
            return replace(arm, name=name)
        if name == "base-exported":
            module = self.step.module.train(self.step.trains)
            program = torch.export.export(module, (), self.step.example, dynamic_shapes=self.step.dynamic)
            return Arm(name, self.step, program.module(), {})
        if name == "ours-exported":
            return Arm(name, self.step, self._exported(), {})
        return self._arm(name, self._module(name))

    def _exported(self) -> nn.Module:
        if self.step.trains:
            raise llfx.ConfigError("a baked program does not train")
        program = torch.export.export(llfx.bake(llfx.optimize(self.ours).eval()), (), dict(self.step.inputs))
        exported: torch.fx.GraphModule = program.module()
        Pipeline((DropMetadataAsserts(),)).run(exported)  # as `llfx.export`, which takes no caches as they are here
        return exported

    def _module(self, name: str) -> nn.Module:
        step = self.step
        if name in ("base", "base-again"):
            return step.module
        if name == "base-graph":
            return self.graph
        if name == "hooks":
            return self._filled(
                llfx.wrap(llfx.capture(step.module, step.example, dynamic_shapes=step.dynamic), self.cfg)
            )
        if name == "ours":
            return self.ours
        if name == "ours-frozen":
            if step.trains:
                raise llfx.ConfigError("nothing is kept in training")
            gm = llfx.optimize(self.ours)
            self._scopes.enter_context(llfx.frozen(gm))  # as inside generate
            return gm
        if name == "ours-fused":
            if not step.trains or "labels" not in step.inputs:
                raise llfx.ConfigError("only a training step with labels has a loss to fuse")
            return self._filled(llfx.rewrite(self.graph, self.cfg, fuse_loss=True))
        if name == "ours-balanced":
            if not step.trains:
                raise llfx.ConfigError("memory is planned for training steps")
            return self._filled(llfx.rewrite(self.graph, self.cfg, memory="balanced"))
        if name == "ours-plain":
            return llfx.optimize(self.ours, Pipeline(()))
        if name == "merged":
            merged: nn.Module = llfx.merge(self.ours)
            return merged
        if name in ("ours-adapt", "ours-adapt-frozen"):
            if isinstance(step.module, Linears):
                raise llfx.ConfigError("adapt takes only models of transformers")
            if step.trains and name == "ours-adapt-frozen":
                raise llfx.ConfigError("nothing is kept in training")
            model = llfx.adapt(step.module.model, self.cfg)
            adapted: nn.Module = self._filled(type(step.module)(model))
            if name == "ours-adapt-frozen":
                self._scopes.enter_context(llfx.frozen(model.eval()))
            return adapted
        raise ValueError(f"There is no arm {name!r}; there are {', '.join((*BASE, *ADAPTED))}.")

    def compile(self, arm: Arm, **options: Any) -> Callable[..., Any]:
        """Compile an arm. PEFT's may break the graph; for all others that is an error."""
        return torch.compile(arm.run, fullgraph=arm.name != "peft", **options)

    def disagreement(self, arm: Arm) -> str:
        """Say where an arm differs from the base or, if it is adapted, from our graph without optimizations."""
        expected = "base" if arm.name.startswith("base") else "ours-plain"
        if expected not in self._expected:
            self._expected[expected] = self.make(expected).results()
        tolerance = TOLERANCES[next(self.step.module.parameters()).dtype]
        return disagreement(arm.results(), self._expected[expected], tolerance, trained=arm.name != "merged")

    def exact_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the adapter's parameters in float64, from the same weights, values and inputs."""
        inputs = {name: _doubled(value) for name, value in self.step.inputs.items()}
        module = copy.deepcopy(self.step.module).double()
        step = replace(self.step, module=module, inputs=inputs)
        arm = self._arm("exact", self._filled(llfx.rewrite(llfx.capture(module, inputs), self.cfg)))
        results = replace(arm, step=step).results()
        return {name: result for name, result in results.items() if name.startswith("gradient of")}

    def _arm(self, name: str, module: nn.Module) -> Arm:
        parameters = {path: p for path, p in module.named_parameters() if p.requires_grad}
        return Arm(name, self.step, module.train(self.step.trains), parameters)

    def _filled(self, module: nn.Module) -> nn.Module:
        values = dict(self.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(values[name])
        return module

    def seconds_of_peft(self) -> float:
        """Return the seconds in which PEFT adapts a copy of the module, without files and the adapter's values."""
        with tempfile.TemporaryDirectory() as folder:
            llfx.save_peft(self.ours, folder)
            settings = peft.PeftConfig.from_pretrained(folder, inference_mode=False)
        module = copy.deepcopy(self.step.module)
        start = time.perf_counter()
        peft.get_peft_model(module, settings)
        return time.perf_counter() - start

    def _peft(self, **options: Any) -> Arm:
        with tempfile.TemporaryDirectory() as folder:
            llfx.save_peft(self.ours, folder)
            settings = (Path(folder) / "adapter_config.json").read_bytes()
            memo = {id(tensor): tensor for tensor in (*self.step.module.parameters(), *self.step.module.buffers())}
            module = copy.deepcopy(self.step.module, memo)
            module = peft.PeftModel.from_pretrained(module, folder, is_trainable=True, **options)

        def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            """Rename by way of files, because the library knows their names and layouts."""
            everything = {**module.state_dict(), **tensors}
            state = peft.get_peft_model_state_dict(module, everything, save_embedding_layers=False)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "adapter_config.json").write_bytes(settings)
                contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
                safetensors.torch.save_file(contiguous, Path(folder) / "adapter_model.safetensors")
                read = llfx.adapter_state_dict(llfx.load_peft(self.graph, folder))
            return {name: read[name] for name, parameter in self.ours.named_parameters() if parameter.requires_grad}

        return replace(self._arm("peft", module), named=named)


def apply_liger(module: Any) -> None:
    """Give the transformers model in a module Liger's kernels, and its loss computed with the head.

    Liger changes the instance, and puts its own classes into the file of the model, where the next model that is built
    would find them. The file is put back, because the other arms run the model's own code.

    Raises:
        ConfigError: liger-kernel is not installed, or the module has no model of transformers.
    """
    if not is_liger_kernel_available():
        raise llfx.ConfigError("liger-kernel is not installed, or is too old for transformers")
    model = next((part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)), None)
    if model is None:
        raise llfx.ConfigError("Liger takes only models of transformers")
    with mock.patch.dict(vars(sys.modules[type(model).__module__])):
        apply_liger_kernel(model, {})


def capture(step: Step, cfg: llfx.Variant | None = None) -> tuple[nn.Module, float]:
    """Capture a step's module; return its graph, into which adapters are inserted quickly, and the seconds it took.

    Args:
        step: the call of the module.
        cfg: an adapter whose insertion counts too; without, one at all linears.
    """
    start = time.perf_counter()
    # Rewrite and remove the adapter again, because that leaves the captured base.
    any_adapter = llfx.LoRA(r=1, target_names=(".",)) if cfg is None else cfg
    rewritten = llfx.rewrite(step.module, any_adapter, step.example, dynamic_shapes=step.dynamic)
    seconds = time.perf_counter() - start
    return llfx.remove(rewritten), seconds
