"""What the programs of ``_triton_kernels`` are given."""

from __future__ import annotations

from typing import Any, NamedTuple


class Planes(NamedTuple):
    """A tensor ``(batch, heads, tokens, dim)`` whose last stride is 1, or one without ``dim``."""

    ptr: Any
    b: int
    h: int
    t: int


class PerEntry(NamedTuple):
    """A tensor ``(#batch, #heads, entries)`` whose last stride is 1; strides of axes that broadcast are 0."""

    ptr: Any
    b: int
    h: int


class Inputs(NamedTuple):
    """What all passes read: u and e are the features' queries and the features, ``(entries, features)``, seed is that of dropout.

    What there is not is None, and stands last: Triton 3.6 loses count of a tuple's strides of 1 behind it.
    """

    query: Planes
    key: Planes
    value: Planes
    u: Planes | None
    e: Planes | None
    seed: Any


class Upstream(NamedTuple):
    """What the backward passes read besides: the output's gradient, log-sum-exp, delta, the gradient of the sums of features."""

    grad: Planes
    lse: Planes
    delta: Planes
    sums: Planes | None


class Ranges(NamedTuple):
    """Pieces of runs of entries: where each begins and ends, the run it is of, and its place among the parts of divided runs or -1.

    The last two are None where no run is divided: piece i is run i.
    """

    bounds: Any
    item: Any
    slot: Any


class Counts(NamedTuple):
    """Heads of the queries, how many of them share a head of the keys, Tq and Tk."""

    heads: int
    group: int
    queries: int
    keys: int


class Static(NamedTuple):
    """What programs are compiled for.

    Attributes:
        D, DV, F: numbers of a key, of a value and of an entry's features; ``BLOCK_D`` and so on are the next powers of two.
        BLOCK_E: entries that are taken at a time.
        ACC: the precision of accumulation.
        CAPPED: whether there is a soft cap.
        OWN: whether rows of the batch have entries of their own.
        HEADS_FIRST: whether neighbouring programs are heads of a piece rather than pieces of a head.
    """

    D: int
    DV: int
    F: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_F: int
    BLOCK_E: int
    ACC: Any
    CAPPED: bool
    OWN: bool
    HEADS_FIRST: bool
