"""Trials of kind "calls": a random net, adapted in some way, and random things that are done to it between calls."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.fuzz import operations as ops
from tests.fuzz.modules import Net
from tests.fuzz.oracle import FORMULAS, Oracle, gradients_of
from tests.fuzz.verdict import Void, require_close, the_oracle
from tests.support.conformance import randomise

PATHS = ("rewrite", "traced", "wrap", "adapt")
SECOND = "de"
PLAIN = "Linear"
"""The plainest block."""
STEPS = ("step", "reload", "remove", "merge", "copy", "add", "delete", "active", "scaled", "by_row", "double")
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "frozen": torch.no_grad,  # and the scope of the adapted model
}


@dataclass(frozen=True)
class Step:
    """Something that is done with the adapted model as a whole, one of `STEPS`."""

    what: str

    def words(self) -> str:
        return self.what


@dataclass(frozen=True)
class Call:
    """A call in a process-wide mode, one of `CONTEXTS`, with a batch of another size."""

    context: str
    rows: int = 2

    def words(self) -> str:
        return f"call under {self.context}"


@dataclass(frozen=True)
class Calls:
    """Adapt a net, do things to it, and compare each call with the oracle.

    Args:
        net: the net.
        path: one of `PATHS`.
        variant: a key of `FORMULAS`.
        before: changes of the model before it is adapted.
        after: what is done to the adapted model, with a call after each.
        training: the mode in which the model is adapted.
    """

    net: Net
    path: str = "rewrite"
    variant: str = "LoRA"
    before: tuple[ops.Change, ...] = ()
    after: tuple[Any, ...] = ()
    training: bool = False

    def features(self) -> frozenset[str]:
        words = {each.words() for each in self.after} | {f"before: {each.words()}" for each in self.before}
        words |= {self.path, *self.net.blocks} | ({"training"} if self.training else set())
        return frozenset(words | {self.variant}) - {"LoRA", "rewrite", PLAIN, "call under grad"}

    def check(self) -> None:
        session = _Session(self)
        session.call(Call("grad", 3), "the first call")
        for each in self.after:
            where = f"after {each!r}"
            if isinstance(each, ops.Change):
                session.change(each)
            elif isinstance(each, Step):
                getattr(session, each.what)(where)
            session.call(each if isinstance(each, Call) else Call("grad", 3), where)


class _Session:
    """A model with adapters, and the oracle beside it."""

    def __init__(self, trial: Calls) -> None:
        self.trial, self.net = trial, trial.net
        self.changes: list[ops.Change] = []
        model = self._fresh()
        for change in trial.before:
            self._refuse_doubtful(model, change)
            change.of(model)
        config, formula = FORMULAS[trial.variant]
        self.formulas = {"default": formula}
        self.oracle = Oracle(copy.deepcopy(model))
        self.oracle.model.requires_grad_(False)
        self.adapted: Any = None
        with the_oracle():
            self._run(copy.deepcopy(model), Call("grad", 3), 0)
        self.adapted = self._adapt(model, config)
        self.model = model  # a graph refers to it weakly
        randomise(self.adapted, 0)
        self.oracle.copy_adapters(self.adapted, self.formulas)

    def _fresh(self) -> Any:
        """Return the base model, as the user changed it and before any training."""
        model = self.net.build(self.trial.path == "adapt").train(self.trial.training)
        for change in (*self.trial.before, *self.changes) if hasattr(self, "oracle") else ():
            change.of(model)
        return model

    def _adapt(self, model: Any, config: llfx.Variant) -> Any:
        example = (self.net.inputs(2),)
        if self.trial.path == "wrap":
            return llfx.wrap(model, config, example)
        if self.trial.path == "adapt":
            return llfx.adapt(model, config, example)
        return llfx.rewrite(model, config, None if self.trial.path == "traced" else example)

    @property
    def tolerance(self) -> float:
        halves = any(isinstance(each, Call) and each.context == "autocast" for each in self.trial.after)
        return 0.05 if (halves and self.net.single) or "Autocast" in self.net.blocks else self.net.tolerance

    def _run(self, model: nn.Module, call: Call, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = self.net.inputs(call.rows, seed).to(next(model.parameters()).dtype)
        is_adapted = call.context == "frozen" and model is self.adapted
        with CONTEXTS[call.context](), llfx.frozen(model) if is_adapted else nullcontext():
            output: Tensor = model(x)
        return output

    def call(self, call: Call, where: str) -> None:
        """Compare outputs and gradients of a call."""
        if self.rows is not None:
            call = replace(call, rows=self.rows)
        with the_oracle():
            expected = self._run(self.oracle.model, call, 1)
            of_base = {n: p for n, p in self.oracle.model.named_parameters() if p.requires_grad}
            expected_gradients = gradients_of(expected, {**self.oracle.leaves(), **of_base})
        actual = self._run(self.adapted, call, 1)
        require_close(actual, expected, self.tolerance, "output", f"{where} ")
        wanted = self.oracle.leaves().keys() | of_base.keys()
        named = {name.replace(".base.", "."): p for name, p in self.adapted.named_parameters()}
        gradients = gradients_of(actual, {name: p for name, p in named.items() if name in wanted})
        for name in sorted((expected_gradients.keys() | gradients.keys()) & named.keys()):
            zeros = torch.zeros_like(named[name])  # no gradient is one of zeros
            one, other = gradients.get(name, zeros), expected_gradients.get(name, zeros)
            require_close(one, other, 10 * self.tolerance, "gradient", f"{where} {name} ")

    rows: int | None = None
    """The number of rows of a call, where a coefficient for each row says it."""

    def _refuse_doubtful(self, model: nn.Module, change: ops.Change) -> None:
        """Make the trial void if it is open whether the adapter or the change comes first."""
        is_branch = self.trial.variant == "LoRA" and not (self.trial.path == "wrap" and isinstance(change, ops.Hook))
        if ops.stands_on_linear(model, change) and not is_branch:
            raise Void("the adapter replaces what is changed")

    def change(self, change: ops.Change) -> None:
        self._refuse_doubtful(self.oracle.model, change)
        with the_oracle():
            change.of(self.oracle.model)
        self.oracle.hook()
        change.of(self.adapted)
        self.changes.append(change)

    def step(self, where: str) -> None:
        """Train one step of SGD."""
        expected = gradients_of(self._run(self.oracle.model, Call("grad", 3), 2), self.oracle.leaves())
        actual = self._run(self.adapted, Call("grad", 3), 2)
        parameters = llfx.adapter_parameters(self.adapted)
        direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if not actual.requires_grad:
            return
        (actual * direction.to(actual)).sum().backward()
        torch.optim.SGD(parameters, lr=0.01).step()
        with torch.no_grad():
            for name, tensor in self.oracle.leaves().items():
                if name in expected:
                    tensor.sub_(0.01 * expected[name])
        for parameter in self.adapted.parameters():
            parameter.grad = None

    def reload(self, where: str) -> None:
        """Save the adapters, and load them onto a fresh base."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            llfx.save(self.adapted, path)
            fresh = self._fresh()
            fresh.train(self.oracle.model.training)
            example = None if self.trial.path == "traced" else (self.net.inputs(2),)
            self.adapted, self.model = llfx.load(fresh, path, example), fresh
            self.oracle.model.requires_grad_(False)  # because `load` freezes the base, as `rewrite` does
            for name, module in self.oracle.model.named_modules():  # modes of parts are no part of files
                if isinstance(module, nn.Module) and name in dict(self.adapted.named_modules()):
                    self.adapted.get_submodule(name).training = module.training
        for adapter in self.oracle.adapters.values():
            adapter.scale, adapter.acts = None, True
        self.rows = None

    def _refuse_hooked(self) -> None:
        """Make the trial void if something stands on the adapted model that is no part of its graph."""
        if any(isinstance(change, (ops.Hook, ops.Forward)) for change in (*self.changes, *self.trial.before)):
            raise Void("what stands on a module is not merged")

    def remove(self, where: str) -> None:
        """Compare the model without its adapters with the base."""
        self._refuse_hooked()
        plain, fresh = llfx.remove(self.adapted) if self.trial.path != "wrap" else self._fresh(), self._fresh()
        for training in (False, True):
            require_close(
                self._run(plain.train(training), Call("grad", 3), 4),
                self._run(fresh.train(training), Call("grad", 3), 4),
                self.tolerance,
                "removed",
                where,
            )

    def merge(self, where: str) -> None:
        """Compare the merged model, in evaluation mode."""
        self._refuse_hooked()
        if self.trial.path == "wrap":
            return
        merged = copy.deepcopy(llfx.merge(self.adapted)).eval()
        modes = {module: module.training for module in self.oracle.model.modules()}
        expected = self._run(self.oracle.model.eval(), Call("no_grad", 3), 5)
        require_close(self._run(merged, Call("no_grad", 3), 5), expected, 10 * self.tolerance, "merged", where)
        for module, training in modes.items():
            module.training = training

    def copy(self, where: str) -> None:
        self.adapted = copy.deepcopy(self.adapted)

    def double(self, where: str) -> None:
        """Cast the model."""
        self.oracle.model.double()
        for adapter in self.oracle.adapters.values():
            for tensors in adapter.tensors.values():
                for name, tensor in tensors.items():
                    tensors[name] = tensor.detach().double().requires_grad_()
        self.adapted = self.adapted.double()

    def add(self, where: str) -> None:
        """Add a second adapter."""
        config, self.formulas[SECOND] = FORMULAS["LoRA"]
        current = llfx.adapter_state_dict(self.adapted)
        llfx.add(self.adapted, {SECOND: config})
        llfx.active(self.adapted)
        randomise(self.adapted, 1)
        llfx.load_adapter_state_dict(self.adapted, {**llfx.adapter_state_dict(self.adapted), **current})
        self.oracle.copy_adapters(self.adapted, self.formulas)
        for adapter in self.oracle.adapters.values():
            adapter.acts = True

    def delete(self, where: str) -> None:
        """Delete the second adapter."""
        if SECOND not in self.formulas:
            raise Void("there is no second adapter")
        llfx.delete(self.adapted, SECOND)
        del self.formulas[SECOND], self.oracle.adapters[SECOND]

    def active(self, where: str) -> None:
        """Let the last adapter act alone."""
        last = list(self.formulas)[-1]
        llfx.active(self.adapted, last)
        for name, adapter in self.oracle.adapters.items():
            adapter.acts = name == last

    def scaled(self, where: str) -> None:
        """Scale the first adapter."""
        llfx.scaled(self.adapted, {"default": -0.5})
        self.oracle.adapters["default"].scale = -0.5

    def by_row(self, where: str) -> None:
        """Let each row have an adapter of its own."""
        names = [None, "default", SECOND if SECOND in self.formulas else None]
        llfx.by_row(self.adapted, names)
        self.rows = len(names)
        for name, adapter in self.oracle.adapters.items():
            scale = 1.0 if not isinstance(adapter.scale, float) else adapter.scale
            adapter.acts = True
            adapter.scale = scale * torch.tensor([float(each == name) for each in names], dtype=torch.float64)
