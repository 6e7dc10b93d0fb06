"""Which kernels compute a problem, and why not faster ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd import is_finite, is_transformed, twice_differentiable
from ..domains import Graph
from ..domains._ball import within_ball
from ..domains._neighbours import Neighbours
from ..masks import And, Edges, Expander, Full, Local, Mask, Not, Or, Where
from ..masks._algebra import Predicate
from . import _chunked, _flex, _plain, _reference, _sdpa, _varlen
from ._flex import FlexPart
from ._merge import Part, attend
from ._normal import Term, disjoint_terms
from ._problem import Problem
from ._scores import Scores
from ._sparse import SparsePart
from ._structure import Structure, reach, tiled_structures
from ._tiled import TiledPart
from ._varlen import VarlenPart

# From the one that is fastest where it fits to the one that always fits; the oracle only on request.
KERNELS = ("sdpa", "blocks", "packed", "windowed", "sparse", "chunked", "reference")

# What a call of a kernel costs, in pairs of a dense one, all rows of the batch and heads together: the more of these, the less it weighs.
CALL_COST = 2**17
# The same for a call of one of torch's fused kernels on a GPU.
FUSED_CALL_COST = 2**24
# What a listed pair costs, in pairs of a dense one.
LISTED_PAIR_COST = 8

_STRICT: ContextVar[str | None] = ContextVar("strict", default=None)


@contextmanager
def strict(level: str) -> Iterator[None]:
    """Within this context a slow path is an error: ``strict("fused")`` refuses ``chunked``, the kernel of masks without structure.

    Layers and calls that name a kernel themselves are left alone.

    Raises:
        ValueError: when the attention is called (or planned), naming why each faster kernel was refused.

    Example:
        >>> with strict("fused"):
        ...     plan(masks.Where(lambda b, h, q, k: q > k), Sequence(4096))
        Traceback (most recent call last):
        ...
        ValueError: strict("fused") forbids the kernel 'chunked', the only one for Where(fn=...
    """
    if level != "fused":
        raise ValueError(f"level must be 'fused'; got level={level!r}")
    token = _STRICT.set(level)
    try:
        yield
    finally:
        _STRICT.reset(token)


# Of the whole process: a model's call may run in several threads (data parallel replicas, the backward of another device).
_USED: list[tuple[object, str]] = []


@contextmanager
def using(*, kernel: str) -> Iterator[None]:
    """Within this context every attention is computed by ``kernel``, whatever layers and calls name themselves, in all threads.

    ``using(kernel="reference")`` runs a whole model by the oracle: plain formulas in double precision, to compare with.

    Raises:
        ValueError: an unknown kernel; later, an attention that the kernel cannot compute.

    Example:
        >>> encoder, x = Encoder(16, 2, 4, mask=masks.Local(2)).double(), torch.randn(1, 50, 16).double()
        >>> with using(kernel="reference"):
        ...     exact = encoder(x)
        >>> torch.allclose(encoder(x), exact, atol=1e-12)
        True
    """
    _check_name(kernel)
    entry = (object(), kernel)  # of its own: contexts of several threads may end in any order
    _USED.append(entry)
    try:
        yield
    finally:
        _USED.remove(entry)


def kernel_in_use(kernel: str) -> str:
    """The kernel that ``using`` names, or else the given one."""
    return _USED[-1][1] if _USED else kernel


def _check_name(kernel: str) -> None:
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(map(repr, KERNELS))}; got kernel={kernel!r}")


def check_strict(plan: Plan, problem: Problem, kernel: str) -> None:
    """Raise if the plan is slow where that is forbidden."""
    slow = plan.kernel == "chunked" and not any(isinstance(part, FlexPart) for part, _ in plan._run)
    if _STRICT.get() is not None and kernel == "auto" and slow:
        why = "; ".join(f"{name}: {reason}" for name, reason in plan.reasons.items())
        raise ValueError(
            f"strict(\"fused\") forbids the kernel 'chunked', the only one for {problem.mask!r} on {problem.domain!r}. {why}"
        )


@dataclass(frozen=True)
class Plan:
    """How an attention will be computed.

    Attributes:
        kernel: the kernel that does most of the work.
        parts: what each part of the mask is computed by, as ``(description, kernel)``.
        reasons: for each kernel that would be faster, why it cannot be used.
        flops: floating-point operations of the forward, as the kernels execute them.
        bytes: what scores, masks and biases of pairs take at most at a time in the forward, as estimated.
        predicate: the bound mask; None where it allows everything.
        guarded: whether the kernels let a NaN reach queries that may not see it, so that outputs and gradients are looked at.
    """

    kernel: str
    parts: tuple[tuple[str, str], ...]
    reasons: Mapping[str, str]
    flops: int
    bytes: int
    predicate: Predicate | None = field(default=None, repr=False, compare=False)
    guarded: bool = field(default=False, repr=False, compare=False)
    _run: tuple[tuple[Part, Predicate], ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        rows = [f"{'kernel':<13} {self.kernel}"]
        rows += [f"{'part':<13} {what}: {kernel}" for what, kernel in self.parts]
        rows += [f"{'not ' + name:<13} {why}" for name, why in self.reasons.items()]
        rows += [f"{'forward':<13} {self.flops / 1e9:.3g} GFLOP, {self.bytes / 2**20:.3g} MiB"]
        return "\n".join(rows)

    def parts_of(self, scores: Scores) -> list[tuple[Part, Scores]]:
        """The parts that are merged, each with its scores; none where one dense kernel computes it all."""
        alone = len(self._run) == 1
        return [
            (part, scores if alone else replace(scores, predicate=predicate, reflexive=False))
            for part, predicate in self._run
        ]

    def run(
        self, problem: Problem, scores: Scores, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """The attention, computed as planned; by torch's own operations where something is asked that kernels do not have."""
        if self.kernel == "reference":
            return _reference.run(scores, query, key, value, sinks)

        def plain(q: Any, k: Any, v: Any, sinks: Any, *tensors: Any) -> tuple[Tensor]:
            return (self._plain(problem, scores.using(tensors), q, k, v, sinks),)

        def refused(*_: Any) -> tuple[Tensor]:
            raise RuntimeError(
                "second derivatives need the weights that dropout kept, which torch's kernel does not tell; got kernel 'sdpa' and "
                f"dropout_p={problem.dropout_p}. Use kernel='reference' or 'chunked', whose dropout can be drawn again, or no dropout."
            )

        inputs = (query, key, value, sinks, *scores.tensors)
        if is_transformed():
            return plain(*inputs)[0]
        out = self.fast(problem, scores, query, key, value, sinks)
        if self.guarded and not is_finite(out):
            return plain(*inputs)[0]
        again = refused if problem.dropout_p and not self._run else plain
        return twice_differentiable((out,), again, inputs, guard=self.guarded and again is plain)[0]

    def fast(
        self, problem: Problem, scores: Scores, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """The attention by its kernels, which have a first derivative."""
        parts = self.parts_of(scores)
        return attend(parts, query, key, value, sinks) if parts else _sdpa.run(problem, scores, query, key, value)

    def _plain(
        self, problem: Problem, scores: Scores, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        parts = self.parts_of(scores)
        if not parts or any(part.differentiable for part, _ in parts):
            parts = [(_chunked.part(problem, query.device), replace(scores, predicate=self.predicate))]
        found = [part.plain(own, query, key, value) for part, own in parts]
        return _plain.merged(found, sinks).to(value.dtype)


def choose(problem: Problem, kernel: str, device: torch.device) -> Plan:
    """The plan for a problem; ``kernel`` names one that must be used or refused with an error."""
    _check_name(kernel)
    reasons: dict[str, str] = {}
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")  # a plan that is only looked at
    if kernel == "reference":
        return _dense("reference", problem, reasons)
    dense = _sdpa.refuse(problem)
    if kernel == "sdpa" and dense is not None:
        raise _refused(kernel, dense)
    if kernel == "sdpa" or (kernel == "auto" and dense is None and _sdpa.is_best(problem)):
        return _dense("sdpa", problem, reasons)
    if dense is not None:
        reasons["sdpa"] = dense
    not_flex = _not_flex(problem)
    if not_flex is not None and problem.device == "cuda":
        reasons["flex"] = not_flex
    if kernel == "chunked":
        return _chunks(problem, reasons, device)
    found = _structured(problem, kernel, device)
    if isinstance(found, str):
        if kernel != "auto":
            raise _refused(kernel, found)
        reasons["windowed, blocks, packed, sparse"] = found
        return _dense("sdpa", problem, reasons) if dense is None else _chunks(problem, reasons, device)
    whole = problem.num_queries * problem.num_keys * (0.5 if problem.is_causal else 1)
    if kernel == "auto" and dense is None and sum(_cost(part, problem) for part, _ in found) >= whole:
        return _dense("sdpa", problem, {"windowed, blocks, packed, sparse": "so few pairs are done sooner at once"})
    return _plan(problem, found, reasons)


def _refused(kernel: str, reason: str) -> ValueError:
    return ValueError(
        f"kernel={kernel!r} cannot compute this attention: {reason}. Use kernel='auto', which chooses one that can."
    )


def _not_flex(problem: Problem) -> str | None:
    """Why FlexAttention cannot compute any part of the problem, or None."""
    if problem.device != "cuda":
        return "it is for CUDA"
    return _flex.refuse(problem) or (None if _is_fixed(problem.mask) else _flex.refuse_function(problem))


def _structured(problem: Problem, kernel: str, device: torch.device) -> list[tuple[Part, Mask]] | str:
    """The parts that cover the mask, each by the cheapest structure in its term (of the kernel, if named), or why there are none."""
    if problem.bias == "dense":
        return "a bias given as a tensor is dense already"
    if problem.num_queries == 0 or problem.num_keys == 0:
        return "there is nothing to visit"
    terms = disjoint_terms(problem.mask, problem.domain, problem.keys)
    if terms is None:
        return "the mask has too many alternatives to take apart"
    chosen: list[tuple[Structure | _Listed, Mask]] = []
    for term, own in terms:
        candidates: list[Structure | _Listed] = [*tiled_structures(term, problem, device), *_listed(term, problem)]
        named = [structure for structure in candidates if structure.kernel == kernel]
        if not candidates or (kernel != "auto" and len(terms) == 1 and not named):
            return f"nothing in {own!r} on {problem.domain!r} says where its pairs are" + (
                "" if kernel == "auto" else f" in a way that {kernel} uses"
            )
        chosen.append((min(named or candidates, key=partial(_cost, problem=problem)), own))
    if kernel != "auto" and not any(structure.kernel == kernel for structure, _ in chosen):
        return f"no part of {problem.mask!r} on {problem.domain!r} has the structure that {kernel} uses"
    parts: list[tuple[Part, Mask]] = []
    fused = _fused(chosen, kernel, problem, device) if _not_flex(problem) is None else None
    if fused is not None:
        parts = [fused]
        chosen = [(structure, own) for structure, own in chosen if isinstance(structure, _Listed)]
    parts += [(_part(structure, own, len(terms) == 1, problem), own) for structure, own in chosen]
    parts = [(part, own) for part, own in parts if part.pairs]
    small = problem.num_queries * problem.num_keys
    if kernel == "auto" and problem.device == "cpu" and sum(_cost(part, problem) for part, _ in parts) >= small:
        return "its structure leaves out too few pairs"
    return parts if parts else "no pair is allowed"


def _fused(
    chosen: list[tuple[Structure | _Listed, Mask]], kernel: str, problem: Problem, device: torch.device
) -> tuple[Part, Mask] | None:
    """One part for all that has a structure of tiles, which one of torch's fused kernels visits together; None where it cannot."""
    visited = [(structure, own) for structure, own in chosen if isinstance(structure, Structure)]
    if not visited:
        return None
    named = [structure for structure, _ in visited if structure.kernel == kernel]
    name = max(named or [structure for structure, _ in visited], key=lambda structure: structure.pairs).kernel
    own = problem.mask if len(visited) == len(chosen) else Or.of(*(own for _, own in visited))
    if len(chosen) == 1 and visited[0][0].exact and _varlen.refuse(problem) is None:
        return VarlenPart(name, problem, device), own
    part = FlexPart(name, own, problem, device, beyond=_beyond(own))
    return (part, own) if part.asked <= _flex.ASKED_PER_CALL else None


def _beyond(mask: Mask) -> Mask | None:
    """Where the mask may say something else at each call, one that allows whatever it does and says the same; otherwise None."""
    return None if _is_fixed(mask) else _at_most(mask)


def _at_most(mask: Mask) -> Mask:
    if _is_fixed(mask):
        return mask
    if isinstance(mask, And):
        return And.of(*map(_at_most, mask.parts))
    return Or.of(*map(_at_most, mask.parts)) if isinstance(mask, Or) else Full()


@dataclass(frozen=True)
class _Listed:
    """A structure whose pairs are listed."""

    neighbours: Neighbours
    rows: int | None
    exact: bool
    kernel: str = "sparse"


def _listed(term: Term, problem: Problem) -> Iterator[_Listed]:
    """Every list that covers a term: edges, tokens within some hops or some distance, links of an expander."""
    domain = problem.domain
    if domain != problem.keys or domain.whole is not domain:
        return
    for literal in term:
        if isinstance(literal, Expander):
            rows = None if domain.valid is None else domain.batch_size
            yield _Listed(literal.neighbours(domain), rows, len(term) == 1)
        elif isinstance(domain, Graph) and isinstance(literal, Edges) and not literal.self_loops:
            yield _Listed(domain.csr, None, len(term) == 1)
        elif isinstance(domain, Graph) and isinstance(literal, (Edges, Local)):
            radius = literal.radius if isinstance(literal, Local) else 1
            yield _Listed(domain.within_hops(int(radius)), None, len(term) == 1)  # type: ignore[arg-type]
        elif isinstance(literal, Local) and domain.continuous and reach(literal, domain) is None:
            near = domain.fact(("ball", literal.radius), partial(within_ball, domain, float(literal.radius)))  # type: ignore[arg-type]
            if near is not None:
                yield _Listed(near, domain.batch_size, False)


def _part(structure: Structure | _Listed, own: Mask, alone: bool, problem: Problem) -> TiledPart | SparsePart:
    """The part that computes a term by a structure."""
    if isinstance(structure, Structure):
        exact = structure.exact if alone else None
        return TiledPart(structure.kernel, repr(own), structure.calls, exact, _is_fixed(own), alone)
    if structure.exact and alone:
        return SparsePart(structure.neighbours, repr(own), rows=structure.rows)
    fixed, extent = _is_fixed(own), own.extent()
    return SparsePart(
        structure.neighbours,
        repr(own),
        rows=structure.rows,
        predicate=own.bind(problem.domain, problem.keys),
        batch=1 if fixed and extent.batch is None and problem.domain.batch_size is None else problem.batch,
        heads=1 if fixed and extent.heads is None else problem.heads,
    )


def _is_fixed(mask: Mask) -> bool:
    """Whether the mask says the same at each call: a function of the user's may not."""
    parts = mask.parts if isinstance(mask, (And, Or)) else (mask.part,) if isinstance(mask, Not) else ()
    return not isinstance(mask, Where) and all(_is_fixed(part) for part in parts)


def _cost(work: Structure | _Listed | Part, problem: Problem) -> float:
    """In pairs of a dense kernel, for one row of the batch and one head."""
    call = CALL_COST / max(problem.batch * problem.heads, 1)
    if isinstance(work, _Listed):
        return call + LISTED_PAIR_COST * work.neighbours.col.numel() / (work.rows or 1)
    if isinstance(work, SparsePart):
        return call + LISTED_PAIR_COST * work.pairs
    if isinstance(work, (Structure, TiledPart)):
        return call * len(work.calls) + work.pairs
    return FUSED_CALL_COST / max(problem.batch * problem.heads, 1) + work.pairs


def _chunks(problem: Problem, reasons: Mapping[str, str], device: torch.device) -> Plan:
    part: Part = _chunked.part(problem, device)
    if _not_flex(problem) is None and part.pairs:
        beyond = _beyond(problem.mask)
        refused = _flex.refuse_pairs(problem, beyond is None)
        if refused is None:
            part = FlexPart("chunked", problem.mask, problem, device, beyond=beyond)
        else:
            reasons = {**reasons, "flex": refused}
    return _plan(problem, [(part, problem.mask)], reasons)


def _plan(problem: Problem, parts: list[tuple[Part, Mask]], reasons: Mapping[str, str]) -> Plan:
    pairs = sum(part.pairs for part, _ in parts)
    heads = problem.batch * problem.heads
    flops = int(2 * heads * pairs * (problem.head_dim + problem.value_dim))
    held = max((part.held(problem) for part, _ in parts), default=0)
    main = max(parts, key=lambda part: part[0].pairs)[0].kernel
    run = tuple((part, own.bind(problem.domain, problem.keys)) for part, own in parts)
    described = tuple((part.what, part.kernel) for part, _ in parts)
    guarded = problem.device == "cpu" and not all(part.isolates for part, _ in parts)
    return Plan(main, described, dict(reasons), flops, held, _predicate(problem), guarded, run)


def _dense(kernel: str, problem: Problem, reasons: Mapping[str, str]) -> Plan:
    pairs = problem.num_queries * problem.num_keys
    flops = 2 * problem.batch * problem.heads * pairs * (problem.head_dim + problem.value_dim)
    if kernel == "reference":
        held = problem.batch * problem.heads * pairs * 8
    else:
        held = _sdpa.held(problem)
        flops = flops // 2 if problem.is_causal and problem.bias is None else flops
    described = ((f"{problem.mask!r} on {problem.domain!r}", kernel),)
    guarded = problem.device == "cpu" and not _sdpa.isolates(problem)
    return Plan(kernel, described, dict(reasons), flops, held, _predicate(problem), guarded)


def _predicate(problem: Problem) -> Predicate | None:
    return None if problem.is_full else problem.mask.bind(problem.domain, problem.keys)
