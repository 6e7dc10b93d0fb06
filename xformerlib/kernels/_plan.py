"""Which kernel computes a problem, and why not a faster one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from . import _chunked, _reference, _sdpa
from ._problem import Problem

# From the one that is fastest where it fits to the one that always fits; the oracle only on request.
KERNELS: Mapping[str, ModuleType] = {"sdpa": _sdpa, "chunked": _chunked, "reference": _reference}


@dataclass(frozen=True)
class Plan:
    """How an attention will be computed.

    Attributes:
        kernel: the name of the kernel.
        parts: what each part of the mask is computed by, as ``(description, kernel)``.
        reasons: for each kernel that would be faster, why it cannot be used.
        flops: multiply-adds of the forward counted as two operations, as the kernel executes them.
        bytes: memory that the forward allocates beside inputs and output.
    """

    kernel: str
    parts: tuple[tuple[str, str], ...]
    reasons: Mapping[str, str]
    flops: int
    bytes: int

    def __str__(self) -> str:
        rows = [f"{'kernel':<10} {self.kernel}"]
        rows += [f"{'part':<10} {what}: {kernel}" for what, kernel in self.parts]
        rows += [f"{'not ' + name:<10} {why}" for name, why in self.reasons.items()]
        rows += [f"{'forward':<10} {self.flops / 1e9:.3g} GFLOP, {self.bytes / 2**20:.3g} MiB"]
        return "\n".join(rows)


def choose(problem: Problem, kernel: str = "auto") -> Plan:
    """The plan for a problem; ``kernel`` names one that must be used or refused with an error."""
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(map(repr, KERNELS))}; got kernel={kernel!r}")
    if kernel != "auto":
        reason = KERNELS[kernel].refuse(problem)
        if reason is not None:
            raise ValueError(f"kernel={kernel!r} cannot compute this attention: {reason}. Use kernel='auto', which chooses one that can.")
        return _plan(problem, kernel, {})
    reasons: dict[str, str] = {}
    for name, module in KERNELS.items():
        reason = module.refuse(problem)
        if reason is None:
            return _plan(problem, name, reasons)
        reasons[name] = reason
    raise AssertionError("chunked computes everything")


def _plan(problem: Problem, kernel: str, reasons: Mapping[str, str]) -> Plan:
    pairs = problem.num_queries * problem.num_keys
    flops = 2 * problem.batch * problem.heads * pairs * (problem.head_dim + problem.value_dim)
    dense = problem.batch * problem.heads * pairs
    if kernel == "sdpa" and problem.bias is None and (problem.is_causal or problem.is_full):
        flops, held = (flops // 2 if problem.is_causal else flops), 0
    elif kernel == "chunked":
        held = 4 * problem.dtype.itemsize * min(_chunked.rows_per_block(problem) * dense // max(problem.num_queries, 1), dense)
    else:
        held = dense * (8 if kernel == "reference" else problem.dtype.itemsize)
    return Plan(kernel, ((f"{problem.mask!r} on {problem.domain!r}", kernel),), dict(reasons), flops, held)
