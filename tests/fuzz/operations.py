"""What users do to a model, as data: each operation changes the oracle's model and the adapted one in the same way."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_lite_fx.rewriting.adapted_linear import AdaptedLinear
from tests.fuzz.blocks import WIDTH
from tests.fuzz.verdict import Void


def place_of(model: nn.Module, name: str) -> Any:
    """Return what stands in a model at a name: in the result of `wrap` the wrapper, which has all that is computed.

    Raises:
        Void: the model has no such part, as a graph has none of what has no tensors.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise Void(f"there is no {name}") from error


def part_of(model: nn.Module, name: str) -> Any:
    """Return a part of a model by its name in the plain model: in the result of `wrap` that which has the tensors.

    Raises:
        Void: as `place_of`.
    """
    module = place_of(model, name)
    return module.base if isinstance(module, AdaptedLinear) else module


def stands_on_linear(model: nn.Module, change: Change) -> bool:
    """Return whether a change is of what a linear computes, besides its tensors: only branches can be added to that."""
    return isinstance(change, (Exchange, Forward, Hook)) and isinstance(part_of(model, change.part), nn.Linear)


def _values(like: Tensor, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like)


@dataclass(frozen=True)
class Change:
    """A change of a part of a model.

    Args:
        part: its qualified name; empty for the model.
    """

    part: str = ""

    def of(self, model: nn.Module) -> None:
        """Make the change."""
        raise NotImplementedError

    def fits(self, part: nn.Module) -> bool:
        """Return whether there is something to change in such a part."""
        return True

    def words(self) -> str:
        """Return the change in words, for names of findings."""
        return type(self).__name__


@dataclass(frozen=True)
class Mode(Change):
    """`train()` or `eval()` of a part."""

    training: bool = False

    def of(self, model: nn.Module) -> None:
        part_of(model, self.part).train(self.training)

    def words(self) -> str:
        return f"{'part' if self.part else 'model'}.{'train' if self.training else 'eval'}()"


@dataclass(frozen=True)
class Tensors(Change):
    """New values of the parameters of a part.

    Args:
        how: "in place", "data" or "replaced".
    """

    how: str = "in place"

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        for name, tensor in list(part.named_parameters(recurse=False)):
            if name.startswith("lora_"):
                continue
            new = _values(tensor)
            if self.how == "in place":
                with torch.no_grad():
                    tensor.copy_(new)
            elif self.how == "data":
                tensor.data = new
            else:
                setattr(part, name, nn.Parameter(new, requires_grad=tensor.requires_grad))

    def fits(self, part: nn.Module) -> bool:
        return any(True for _ in part.parameters(recurse=False))

    def words(self) -> str:
        return f"parameters {self.how}"


@dataclass(frozen=True)
class Bias(Change):
    """A bias where there was none, or none where there was one."""

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        if getattr(part, "bias", None) is not None:
            part.bias = None
        elif isinstance(getattr(part, "weight", None), Tensor):
            of_outputs = part.weight.detach().reshape(len(part.weight), -1)[:, 0]
            part.bias = nn.Parameter(_values(of_outputs), requires_grad=False)
        else:
            raise Void("no part that has a bias")

    def fits(self, part: nn.Module) -> bool:
        return hasattr(part, "bias") and isinstance(part, (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Conv1d))

    def words(self) -> str:
        return "bias set or taken away"


@dataclass(frozen=True)
class Buffer(Change):
    """Another value of the buffers of a part, or a value where there was None.

    Args:
        how: "in place", "assigned" or "none".
    """

    how: str = "assigned"

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        buffers = dict(part.named_buffers(recurse=False))
        if self.how == "none":
            if not hasattr(part, "mask"):
                raise Void("no part that has an empty buffer")
            part.mask = torch.linspace(0, 2, WIDTH).to(part.shift)
            return
        for name, tensor in buffers.items():
            if tensor.is_floating_point() and not name.startswith("lora_"):
                new = _values(tensor).abs() + 0.5
                if self.how == "in place":
                    tensor.detach().copy_(new)
                else:
                    setattr(part, name, new)

    def fits(self, part: nn.Module) -> bool:
        return any(buffer.is_floating_point() for buffer in part.buffers(recurse=False))

    def words(self) -> str:
        return f"buffer {self.how}" if self.how != "none" else "buffer set where there was none"


@dataclass(frozen=True)
class Setting(Change):
    """Another number or list on a part, or on an object that it has."""

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        if isinstance(part, nn.Dropout):
            part.p = 0.25
        elif hasattr(part, "gain"):
            part.gain = 3.0
            part.taps = [0.25]
        elif hasattr(part, "options"):
            part.options.gain = 3.0
            part.table[1][0] = 0.25
        elif hasattr(part, "eps"):
            part.eps = 0.5
        else:
            raise Void("no part that has numbers")

    def fits(self, part: nn.Module) -> bool:
        return any(hasattr(part, name) for name in ("gain", "options", "eps")) or isinstance(part, nn.Dropout)

    def words(self) -> str:
        return "attribute"


class Shifted(nn.Linear):
    """A linear that adds one, for `__class__`. It is the same function wherever an adapter adds its branch."""

    def forward(self, input: Tensor) -> Tensor:
        return 1 + super().forward(input)


@dataclass(frozen=True)
class Exchange(Change):
    """Another module in the place of a part, or another class.

    Args:
        how: "module" or "class".
    """

    how: str = "module"

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        if self.how == "class":
            if type(part) is nn.GELU:
                part.__class__ = nn.Tanh  # type: ignore[assignment]
            elif isinstance(part, nn.Linear) and not parametrize.is_parametrized(part):
                part.__class__ = Shifted
            else:
                raise Void("no part of a class that is exchanged")
            return
        parent, _, leaf = self.part.rpartition(".")
        if isinstance(part, nn.GELU):
            setattr(part_of(model, parent), leaf, nn.Tanh())
        elif isinstance(part, nn.LayerNorm):
            norm = nn.LayerNorm(WIDTH, eps=0.3).to(part.weight.dtype)
            setattr(part_of(model, parent), leaf, norm.requires_grad_(False).train(part.training))
        else:
            raise Void("no part that is exchanged")

    def fits(self, part: nn.Module) -> bool:
        return isinstance(part, (nn.GELU, nn.Linear if self.how == "class" else nn.LayerNorm))

    def words(self) -> str:
        return f"{self.how} exchanged"


def _add_one(module: nn.Module, args: Any, output: Any) -> Any:
    return 1 + output if isinstance(output, Tensor) else output


def _add_one_before(module: nn.Module, args: Any) -> Any:
    return tuple(1 + each if isinstance(each, Tensor) and each.is_floating_point() else each for each in args)


@dataclass(frozen=True)
class Hook(Change):
    """A hook on a part.

    Args:
        kind: "forward" or "pre".
    """

    kind: str = "forward"

    def of(self, model: nn.Module) -> None:
        part = place_of(model, self.part)
        if self.kind == "forward":
            part.register_forward_hook(_add_one)
        else:
            part.register_forward_pre_hook(_add_one_before)

    def words(self) -> str:
        return f"{self.kind} hook"


def _one_more(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return 1 + forward(*args, **kwargs)


@dataclass(frozen=True)
class Forward(Change):
    """`forward` replaced on an instance."""

    def of(self, model: nn.Module) -> None:
        part = part_of(model, self.part)
        part.forward = functools.partial(_one_more, part.forward)  # not a closure, which copies of a model would share

    def words(self) -> str:
        return "forward replaced"


@dataclass(frozen=True)
class Unfreeze(Change):
    """Parameters of the base that train, too."""

    def of(self, model: nn.Module) -> None:
        for name, tensor in part_of(model, self.part).named_parameters(recurse=False):
            if "lora_" not in name:
                tensor.requires_grad_(True)

    def fits(self, part: nn.Module) -> bool:
        return any(True for _ in part.parameters(recurse=False))

    def words(self) -> str:
        return "requires_grad of the base"
