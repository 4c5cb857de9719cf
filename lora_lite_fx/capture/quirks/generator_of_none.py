"""Leave out `generator=None`, because `torch.randn` with it is an operator that takes no sizes of a trace.

None asks for the generator that is used anyway.

Needed by UnivNet, and by the autoencoders of diffusers with `sample_posterior=True`.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from .quirk import Quirk, where_mentioned


class WithoutGeneratorOfNone(TorchFunctionMode):
    """Leaves out `generator=None`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator", self) is None:
            del kwargs["generator"]
        return func(*args, **kwargs)


QUIRK = Quirk(where_mentioned("generator="), lambda model, call: WithoutGeneratorOfNone())
