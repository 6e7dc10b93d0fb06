"""Time and memory of two ways to compute the same thing, taken in turns, and what the machine could do at best."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Setting:
    """Where and at which size lines are measured.

    Attributes:
        device, dtype: of every tensor of tokens.
        quick: small sizes, which show that a line runs and nothing else.
        rounds: how often each side runs at most; the fastest counts.
        seconds: after which no further round of a line begins (two are always run).
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    rounds: int = 10
    seconds: float = 20.0

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def tokens(self, batch: int, heads: int, tokens: int, dim: int, seed: int) -> Tensor:
        """``(batch, heads, tokens, dim)`` with the strides that a linear layer leaves, as in a model."""
        return self.random(batch, tokens, heads, dim, seed=seed).transpose(1, 2)

    def qkv(self, batch: int, heads: int, tokens: int, dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Queries, keys and values that want gradients, and the gradient of the output."""
        q, k, v, grad = (self.tokens(batch, heads, tokens, dim, seed) for seed in range(4))
        return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), grad


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        forward: computes the output.
        inputs: what gradients are taken for.
        grad: the gradient of the output.
        shown: output, and gradients of its shape, in the layout of the other side.
        held: tensors made beforehand that the way needs to keep, such as a dense mask; they count as its memory.
    """

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    grad: Tensor
    shown: Callable[[Tensor], Tensor] = lambda x: x
    held: Sequence[Tensor] = ()

    def step(self) -> tuple[Tensor, ...]:
        """Output and gradients."""
        out = self.forward()
        return out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)


class Call(Side):
    """A way that is only called: for outputs without gradients."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        super().__init__(forward, (), torch.empty(0))

    def step(self) -> tuple[Tensor, ...]:
        """Output."""
        return (self.forward(),)


@dataclass(frozen=True)
class Work:
    """What is computed, by ours and by a peer.

    Attributes:
        ours, peer: the two sides; a peer that cannot run is the reason, and None where there is none.
        kernel: what the plan chose.
        flops, bytes: what has to be computed and moved at least, forward and backward.
    """

    ours: Side
    peer: Side | str | None
    kernel: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Target:
    """What is to be reached: ``faster`` and ``smaller`` times the peer, and at most ``bytes`` and ``seconds``."""

    faster: float | None = None
    smaller: float | None = None
    bytes: float | None = None
    seconds: float | None = None

    def reached(self, row: dict[str, Any]) -> bool | None:
        """None where there is no peer to compare with."""
        checks = []
        for name in ("faster", "smaller"):
            least = getattr(self, name)
            if least is not None:
                checks.append(None if row[name] is None else row[name] >= least)
        for name in ("bytes", "seconds"):
            most = getattr(self, name)
            if most is not None:
                checks.append(row[name] <= most)
        return None if None in checks or not checks else all(checks)

    def __str__(self) -> str:
        parts = [
            self.faster and f">= {self.faster:g} x faster",
            self.smaller and f">= {self.smaller:g} x smaller",
            self.bytes and f"<= {self.bytes / 1e9:g} GB",
            self.seconds and f"<= {self.seconds * 1e6:g} us",
        ]
        return ", ".join(part for part in parts if part) or "-"


@dataclass(frozen=True)
class Line:
    """A line of the table: a name to ask for, the work and the peer in words, how to build them, and what is to be reached."""

    name: str
    work: str
    peer: str
    build: Callable[[Setting], Work]
    target: Target = Target()


def installed(build: Callable[[], Side]) -> Side | str:
    """A peer's side, or that it is missing."""
    try:
        return build()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install 'xformerlib[bench]'"


def attention_flops(pairs: float, heads: int, dim: int) -> float:
    """Two products of matrices in the forward, five in the backward."""
    return 7 * 2.0 * pairs * heads * dim


def attention_bytes(grad: Tensor) -> float:
    """q, k, v and o once in the forward; these, three gradients and that of the output in the backward."""
    return 12.0 * grad.numel() * grad.element_size()


# -- time ----------------------------------------------------------------------------------------------------------------


def _synchronize(setting: Setting) -> None:
    if setting.device != "cpu":
        torch.cuda.synchronize()


def fastest(steps: Sequence[Callable[[], object]], setting: Setting) -> tuple[list[float], int]:
    """The least time of each, in seconds, taking turns; and how many rounds were run."""
    best = [math.inf] * len(steps)
    begin, rounds = time.perf_counter(), 0
    while rounds < setting.rounds and (rounds < 2 or time.perf_counter() - begin < setting.seconds):
        for i, step in enumerate(steps):
            _synchronize(setting)
            start = time.perf_counter()
            step()
            _synchronize(setting)
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best, rounds


# -- memory --------------------------------------------------------------------------------------------------------------


def memory(step: Callable[[], tuple[Tensor, ...]], setting: Setting) -> tuple[int, int, tuple[Tensor, ...]]:
    """The most bytes that a step held beside what was there, how many it leaves beside its result, and the result."""
    gc.collect()
    if setting.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step()
        _synchronize(setting)
        most, now = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    else:
        with _without_log(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            result = step()
        now = most = 0
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
    return most, max(0, now - sum(map(_size, result))), result


@contextmanager
def _without_log() -> Iterator[None]:
    """The profiler's library writes each start and stop to the standard error, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -- a line --------------------------------------------------------------------------------------------------------------


def measure(line: Line, setting: Setting, roof: dict[str, float]) -> dict[str, Any]:
    """One row of the table, in plain numbers."""
    work = line.build(setting)
    sides = [work.ours] + ([work.peer] if isinstance(work.peer, Side) else [])
    both = len(sides) == 2
    first = [memory(side.step, setting) for side in sides]  # which also warms up
    if both:
        check_agreement(work.ours, sides[1], first[0][2], first[1][2])
    lasting = [kept + sum(map(_size, side.held)) for side, (_, kept, _) in zip(sides, first, strict=True)]
    del first
    peak = [kept + memory(side.step, setting)[0] for side, kept in zip(sides, lasting, strict=True)]
    seconds, rounds = fastest([side.step for side in sides], setting)
    at_best = max(work.flops / roof["flops"], work.bytes / roof["bytes"])
    row: dict[str, Any] = {
        "name": line.name, "work": line.work, "peer": line.peer, "kernel": work.kernel, "rounds": rounds,
        "missing": work.peer if isinstance(work.peer, str) else None,
        "seconds": seconds[0], "peer_seconds": seconds[1] if both else None,
        "bytes": peak[0], "peer_bytes": peak[1] if both else None,
        "faster": seconds[1] / seconds[0] if both else None,
        "smaller": peak[1] / max(peak[0], 1) if both else None,
        "gflops": work.flops / seconds[0] / 1e9, "roofline": at_best / seconds[0] if at_best else None,
        "target": str(line.target),
    }  # fmt: skip
    return row | {"reached": line.target.reached(row)}


def check_agreement(ours: Side, peer: Side, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Both sides computed the same, gradients included, or the comparison says nothing."""
    precision = 2e-4 if mine[0].dtype == torch.float32 else 4e-2
    for at, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        b = peer.shown(b) if b.shape == theirs[0].shape else b
        a = ours.shown(a) if a.shape == mine[0].shape else a
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() if a.numel() else 0.0
        if not error <= precision:
            what = "outputs" if at == 0 else f"gradients of input {at - 1}"
            raise AssertionError(f"ours and the peer compute different {what}: apart by {error:.1e} of the largest")


# -- the machine ---------------------------------------------------------------------------------------------------------


def roofline(setting: Setting) -> dict[str, float]:
    """What the machine reaches on a large product of matrices and on a large copy: operations and bytes a second."""
    side = setting.size(1024 if setting.device == "cpu" else 8192, 128)
    a, b = setting.random(side, side), setting.random(side, side, seed=1)
    long = torch.empty(setting.size(2**27, 2**16), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(long)
    for _ in range(2):
        a @ b
    (product, copy), _ = fastest([lambda: a @ b, lambda: target.copy_(long)], replace(setting, rounds=30, seconds=5))
    return {"flops": 2 * side**3 / product, "bytes": 2 * long.numel() / copy}


def hot_spots(line: Line, setting: Setting, rows: int = 12) -> str:
    """Where our side of a line spends its time, by operator."""
    side = line.build(setting).ours
    side.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setting.device != "cpu" else [])
    with _without_log(), profile(activities=activities, acc_events=True) as record:
        side.step()
    order = "self_cpu_time_total" if setting.device == "cpu" else "self_cuda_time_total"
    return record.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=60)
