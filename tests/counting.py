"""Costs as counts, which are the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Counts the operators that are called inside, and the bytes that they make, those of views apart."""

    operators = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            {
                x.untyped_storage()._cdata: x
                for x in tree_leaves(tree)
                if isinstance(x, Tensor) and x.layout == torch.strided
            }
            for tree in (args, out)
        )
        self.operators += 1
        self.bytes += sum(x.untyped_storage().nbytes() for key, x in made.items() if key not in given)
        return out
