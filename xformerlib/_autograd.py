"""Derivatives that kernels do not have: of second order, of ``torch.func`` and in forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


def is_transformed() -> bool:
    """Check for an active ``torch.func`` transform or forward-mode AD, which see only torch's own operations."""
    return torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0


def check_not_batched(name: str, x: Tensor) -> None:
    """Raise where ``torch.func.vmap`` makes a batch of ``x``, whose data must be read."""
    inner = x
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_batchedtensor(inner):
            raise ValueError(
                f"{name} must not be batched by torch.func.vmap, since a domain reads them; got {tuple(x.shape)} for each row. Give a "
                "batch of coordinates to one domain, (batch, tokens, ndim), or loop over the rows."
            )
        inner = torch._C._functorch.get_unwrapped(inner)


def unwatched(*tensors: Tensor) -> bool:
    """Check that all are plain CPU tensors, and that no tracer, dispatch mode or transform observes operations."""
    return (
        all(x.is_cpu and type(x) in (Tensor, nn.Parameter) for x in tensors)
        and not is_compiling()
        and not is_jit_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not is_transformed()
    )


def is_jit_tracing() -> bool:
    """Check for ``torch.jit.trace``."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Check for a trace of ``torch.export`` that runs Python, which can read the data of tensors that are not inputs of the graph."""
    # ``torch.compiler.is_exporting()`` is also true in the compiler of torch 2.11.
    return torch.compiler._is_exporting_flag and not torch.compiler.is_dynamo_compiling() and not _REAL[0]


def is_leaving(x: Tensor) -> bool:
    """Check for ``torch.export``, ``torch.jit.trace`` and the meta device, under which a graph of torch's own operations is wanted."""
    # ``torch.compiler.is_exporting()`` is also true in the compiler of torch 2.11.
    return x.is_meta or is_jit_tracing() or torch.compiler._is_exporting_flag


Function = TypeVar("Function", bound=Callable[..., Any])

# How many contexts of ``constants`` are entered.
_REAL = [0]


def is_compiling() -> bool:
    """Check for ``torch.compile`` or ``torch.export``, outside of ``constants``."""
    return torch.compiler.is_compiling() and not _REAL[0]


def outside_graphs(function: Function, reason: str) -> Function:
    """The function, left out of graphs of ``torch.compile``, for a reason that ``fullgraph=True`` tells: it reads the data of tensors."""
    return torch.compiler.disable(function, reason=reason) if torch.compiler.is_dynamo_compiling() else function


@contextmanager
def constants() -> Iterator[None]:
    """Within this context tensors are real and sizes are numbers, whoever traces: what is computed becomes constants of the graph."""
    _REAL[0] += 1
    try:
        with untraced(), _disable_current_modes():
            yield
    finally:
        _REAL[0] -= 1


@contextmanager
def keeping() -> Iterator[None]:
    """Within this context tensors are made that outlive the call: plain ones, whatever traces, transforms or infers around it."""
    with ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))
        if is_jit_tracing():
            contexts.enter_context(untraced())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            contexts.enter_context(temporarily_clear_interpreter_stack())
        if torch.get_default_device().type == "meta":
            contexts.enter_context(torch.device("cpu"))
        yield


@contextmanager
def untraced() -> Iterator[None]:
    """Within this context ``torch.jit.trace`` sees nothing: what is kept for later calls is a constant of the graph."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def within_operator() -> Any:
    """A context in which autograd works within a custom operator, where it is out of reach otherwise."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off, on devices that have it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_finite(x: Tensor) -> bool:
    """Check for NaN and infinities by one sum, which cannot hide them. Reads a number back: for tensors on a CPU."""
    return math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def twice_differentiable(
    outputs: tuple[Tensor, ...],
    again: Callable[..., tuple[Tensor, ...]],
    inputs: SequenceOf[Tensor | None],
    *,
    guard: bool = False,
) -> tuple[Tensor, ...]:
    """Double backward for outputs of kernels that have a first derivative only.

    The first backward goes through the kernels. Where it will be differentiated in its turn (``create_graph=True``), the gradients come
    from ``again(*inputs)`` instead: the same outputs computed anew by torch's own operations, which have derivatives of any order.

    Args:
        guard: take that way also where the gradient, or one of the first two inputs, has NaN or infinities, which ``again`` keeps apart
            where the kernels do not.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in outputs):
        return outputs
    found = _Twice.apply(again, guard, len(outputs), *outputs, *inputs)
    return found if isinstance(found, tuple) else (found,)


def touching(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``x`` with a gradient of 0 for parameters that it does not depend on: distributed training waits for one from each."""
    if not torch.is_grad_enabled():
        return x
    return x + sum((0 * p.sum() for p in parameters if p.requires_grad), x.new_zeros(()))


class _Twice(torch.autograd.Function):
    """The identity of the outputs; its backward decides which way gradients take."""

    @staticmethod
    def forward(ctx: Any, again: Any, guard: bool, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.again, ctx.guard, ctx.count = again, guard, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(x.view_as(x) for x in tensors[:count] if x is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        batched = is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grads[0])  # ``is_grads_batched``
        twice, inputs = torch.is_grad_enabled() or batched, ctx.saved_tensors
        if not twice and not (ctx.guard and not all(is_finite(x) for x in (*grads, *inputs[:2]))):
            return None, None, None, *grads, *[None] * len(inputs)
        needed = ctx.needs_input_grad[3 + ctx.count :]
        with torch.enable_grad(), no_autocast(grads[0].device):
            # Other names: where one input is made of another, the way between the two is for the rest of the graph to go.
            inputs = [
                x if x is None else x.view_as(x) if twice else x.detach().requires_grad_(need)
                for x, need in zip(inputs, needed, strict=True)
            ]
            made = ctx.again(*inputs)
        ways = [(y, grad) for y, grad in zip(made, grads, strict=True) if y.requires_grad]
        if not ways:  # no pair at all: outputs that depend on nothing
            return (None,) * len(ctx.needs_input_grad)
        asked = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        outputs, directions = zip(*ways, strict=True)
        found = iter(torch.autograd.grad(outputs, asked, directions, create_graph=twice, allow_unused=True))
        return None, None, None, *[None] * ctx.count, *(next(found) if need else None for need in needed)
