"""Tell which arguments the `forward` of a class takes, and give a copy of a model another signature.

A subclass often names few arguments or none, and passes the rest on to the class that it extends:
`forward(self, *args, **kwargs)`, or `forward(self, input_ids, **kwargs)`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

_REQUIRED = inspect.Parameter.empty
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


def forward_signature(cls: Any) -> inspect.Signature:
    """Return the signature of `cls.forward`, with `self`, and with the arguments that it may pass on by `**kwargs`."""
    if torch.compiler.is_dynamo_compiling():  # it follows the function, and warns of a cache
        return _signature(cls, cls.forward)
    return _known_signature(cls, cls.forward)


def _signature(cls: Any, forward: Any) -> inspect.Signature:
    signature = inspect.signature(forward)
    for base in cls.__mro__[1:]:
        if "forward" in vars(base) and base is not nn.Module and _VAR_KEYWORD in _kinds(signature):
            signature = _passing_on(signature, inspect.signature(base.forward))
    return signature


_known_signature = functools.lru_cache(maxsize=256)(_signature)  # each call of an adapted model asks


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature by which `model` is called: that of `forward_signature`, without `self`."""
    own = inspect.signature(model.forward)
    if "forward" in vars(model) or _VAR_KEYWORD not in _kinds(own):
        return own
    signature = forward_signature(type(model))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _kinds(signature: inspect.Signature) -> set[Any]:
    return {parameter.kind for parameter in signature.parameters.values()}


def _passing_on(own: inspect.Signature, inherited: inspect.Signature) -> inspect.Signature:
    """Return a signature with the arguments of both; those inherited have a position if `own` passes positions on."""
    by_position = _VAR_POSITIONAL in _kinds(own)
    parameters = {
        name: parameter for name, parameter in own.parameters.items() if parameter.kind is not _VAR_POSITIONAL
    }
    # What is required there may not be passed on, and no required argument can follow an optional one.
    optional = not by_position or any(parameter.default is not _REQUIRED for parameter in parameters.values())
    for parameter in list(inherited.parameters.values())[1:]:
        if parameter.kind is _VAR_POSITIONAL:
            if by_position:
                parameters[parameter.name] = parameter
        elif parameter.kind is not _VAR_KEYWORD and parameter.name not in parameters:
            default = None if optional and parameter.default is _REQUIRED else parameter.default
            kind = parameter.kind if by_position else _KEYWORD_ONLY
            parameters[parameter.name] = parameter.replace(kind=kind, default=default)
    return own.replace(parameters=sorted(parameters.values(), key=lambda parameter: parameter.kind))


def give_signature(model: nn.Module, signature: inspect.Signature) -> None:
    """Give `model`, a copy of the user's, a class like its own whose `forward` has that signature.

    torch.export asks the signature which arguments a call has to have, and what they are called.
    """
    kind: Any = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    vars(forward)["__signature__"] = signature
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def name_arguments(model: nn.Module, inputs: Any) -> None:
    """Give `model`, a copy of the user's, the names of arguments that its `forward` takes without a name.

    Args:
        model: gets the names that `forward` of its class inherits, and those of `inputs` that go to `**kwargs`.
        inputs: a tuple of positional or a dict of keyword arguments.
    """
    signature = forward_signature(type(model))
    *named, last = signature.parameters.values()
    if last.kind is _VAR_KEYWORD and isinstance(inputs, dict):  # torch.export takes no dynamic shapes for such a bundle
        bundled = inputs.keys() - signature.parameters.keys()
        more = [inspect.Parameter(name, _KEYWORD_ONLY, default=None) for name in sorted(bundled)]
        signature = signature.replace(parameters=[*named, *more, last])
    if "forward" not in vars(model) and signature != inspect.signature(type(model).forward):
        give_signature(model, signature)
