"""Clone tensors in a deep copy, because a tensor without data has no storage to copy.

torch copies the storage all the same, which raises or spoils the memory of the process. A clone is what torch itself
makes of tensors that have no storage. A parameter stays the copy that torch makes.

Needed by Dory, which copies layers of its cache. Entered for every model, because nothing else keeps the memory whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .quirk import Quirk, always


class DeepCopiesAreClones(TorchFunctionMode):
    """Clones tensors where they are deeply copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or isinstance(args[0], nn.Parameter):
            return func(*args, **kwargs or {})
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone()
        return memo[id(tensor)]


QUIRK = Quirk(always, lambda model, call: DeepCopiesAreClones())
