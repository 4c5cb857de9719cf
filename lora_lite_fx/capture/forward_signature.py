"""Tell which arguments the `forward` of a class takes, and give a copy of a model another signature.

`forward(self, *args, **kwargs)` of a subclass that passes all on to the class that it extends names none of them.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_NAMELESS = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def forward_signature(cls: Any) -> inspect.Signature:
    """Return the signature of `forward`, with `self`.

    Args:
        cls: a class of modules. If its `forward` takes `*args, **kwargs` alone, that of the class before it is meant.
    """
    own = inspect.signature(cls.forward)
    if _passes_on(_without_self(own)):
        for base in cls.__mro__:
            if base is not nn.Module and "forward" in vars(base):
                signature = inspect.signature(vars(base)["forward"])
                if not _passes_on(_without_self(signature)):
                    return signature
    return own


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature by which `model` is called: that of `forward_signature`, without `self`."""
    own = inspect.signature(model.forward)
    if "forward" in vars(model) or not _passes_on(own):
        return own
    return _without_self(forward_signature(type(model)))


def _passes_on(signature: inspect.Signature) -> bool:
    return {parameter.kind for parameter in signature.parameters.values()} == _NAMELESS


def _without_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def give_signature(model: nn.Module, signature: inspect.Signature) -> None:
    """Give `model`, a copy of the user's, a class like its own whose `forward` has that signature.

    torch.export asks the signature which arguments a call has to have, and what they are called.
    """
    kind: Any = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    vars(forward)["__signature__"] = signature
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def name_arguments(model: nn.Module) -> None:
    """Give `model`, a copy of the user's, the names of arguments that its `forward` takes without a name."""
    signature = forward_signature(type(model))
    if "forward" not in vars(model) and signature != inspect.signature(type(model).forward):
        give_signature(model, signature)
