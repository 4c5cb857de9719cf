"""Models of diffusers (UNets, transformers), as far as they differ from those of transformers."""

from __future__ import annotations

from typing import Any

import torch

from ..capture.capture_model import Inputs
from ..capture.forward_signature import forward_signature
from ..errors import AdapterError, CaptureError

_TAKES_SCALE = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Arguments whose `scale` diffusers hands to layers of PEFT."""


def require_example(model: Any, example_inputs: Inputs | None) -> None:
    """Raise CaptureError without example inputs, because the config does not say how a pipeline calls the model."""
    if example_inputs is None:
        parameters = list(forward_signature(type(model)).parameters.values())[1:]
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        raise CaptureError(
            f"adapt needs example_inputs for {type(model).__name__}: its config does not say how a pipeline calls it."
            f" The way out: example_inputs={{{', '.join(f'{name!r}: ...' for name in needed)}}}, tensors of a call with"
            " two images or more."
        )


def prepare_arguments(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call in the form in which a graph takes them.

    A timestep that is a number becomes a tensor, because each number would have a graph of its own.

    Raises:
        AdapterError: a scale for layers of PEFT is given, which the adapters of a graph do not follow.
    """
    for name in _TAKES_SCALE:
        if (arguments.get(name) or {}).get("scale", 1) != 1:
            raise AdapterError(
                f"{name}={{'scale': {arguments[name]['scale']}}} scales layers of PEFT, and the adapters here are not"
                " such layers. The way out: reconfigure(model, alpha=...), or adapters with another alpha."
            )
    if isinstance(step := arguments.get("timestep"), (int, float)):
        arguments = {**arguments, "timestep": torch.tensor(step, device=model.device)}
    return arguments


class AdaptedDiffuser:
    """The methods of an adapted model of diffusers.

    Its graphs are captured again when its modules are told to compute in another way.
    """

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Let the graphs checkpoint their layers, as `rewrite(..., checkpoint_layers=True)` does."""
        self._change("enable_gradient_checkpointing", *args, **kwargs)

    def disable_gradient_checkpointing(self) -> None:
        """Let the graphs save all activations again."""
        self._change("disable_gradient_checkpointing")

    def fuse_qkv_projections(self) -> None:
        """Raise AdapterError, because the adapters of the projections would have no place in the fused one."""
        raise AdapterError("Fuse the projections before adapt: the adapters of to_q, to_k and to_v are at theirs.")

    def _change(self, method: str, *args: Any, **kwargs: Any) -> None:
        getattr(super(), method)(*args, **kwargs)
        self._graphs.drop()  # type: ignore[attr-defined]  # see `Adapted`
