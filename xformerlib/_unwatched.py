"""Whether tensors are nothing but their numbers, so that these may be computed in another way than by torch's own operations."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn


def unwatched(*tensors: Tensor) -> bool:
    """Whether all are plain tensors on a CPU without tangents, and nobody counts, transforms or replaces operations."""
    return (
        all(x.is_cpu and type(x) in (Tensor, nn.Parameter) for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and fwAD._current_level < 0
    )
