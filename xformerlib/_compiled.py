"""Attention in graphs of ``torch.compile`` and ``torch.export``.

A plan cannot be traced: it is found by reading the data of domains and masks. What torch computes in one dense call, plainly, is left to
the compiler. All else is one operator of the graph, which is planned and computed as without compilation when the graph runs. The
operator is given the domains as whole numbers (``Domain.ticket()``), which may be dynamic, and the mask as a number and its tensors: a
graph serves all lengths and all domains of a kind, cold or warm, and holds no tensors of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ._autograd import no_autocast, within_operator
from ._inputs import BiasLike
from ._planned import planned, scores_of
from .domains import Domain
from .domains._tickets import domains_of, tickets_of
from .kernels import Plan, Problem, Scores, _sdpa
from .kernels._merge import gradients, merged_parts
from .masks._constants import Ingredients, mask_of, number_of
from .positions import Bias, PairBias
from .positions._base import BIASES

# Domains that backward passes may still need, and what lives as long as those do.
_NEEDED: list[tuple[StorageWeakRef, tuple[Domain, Domain]]] = []


class Inputs(NamedTuple):
    """The tensors that attention is differentiable in, besides those of biases."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None


def run_in_graph(
    problem: Problem,
    kernel: str,
    terms: SequenceOf[BiasLike],
    biases: tuple[Tensor | PairBias, ...],
    inputs: Inputs,
    scale: float,
    softcap: float | None,
    seed: Tensor | None,
) -> Tensor:
    """The attention, as operators of the graph that is being made."""
    query, key, value, sinks = inputs
    if _is_one_dense_call(problem, kernel):
        predicate = None if problem.is_full else problem.mask.bind(problem.domain, problem.keys)
        scores = scores_of(problem, predicate, biases, scale, softcap, seed)
        with no_autocast(query.device):
            return _sdpa.run(problem, scores, query, key, value)
    mask, (sizes, reals, mask_tensors) = number_of(problem.mask)
    numbers = [-1 if isinstance(term, Tensor) else _number_of_bias(term) for term in terms]
    tensors = [t for bias in biases for t in ((bias,) if isinstance(bias, Tensor) else bias.tensors)]
    domains = [problem.domain] if problem.keys is problem.domain else [problem.domain, problem.keys]
    tickets, domain_tensors = tickets_of(*domains)
    out, _ = attend(
        query, key, value, sinks, seed, tensors, mask_tensors, domain_tensors, tickets[0], tickets[-1], mask, sizes, reals,
        numbers, kernel, problem.bias, scale, softcap, problem.dropout_p,
    )  # fmt: skip
    return out.to(value.dtype)


def _is_one_dense_call(problem: Problem, kernel: str) -> bool:
    """Check that attention is planned as one dense call whatever the data: no mask or a causal one, and nothing but sizes to know."""
    if kernel not in ("auto", "sdpa") or not (problem.is_full or problem.is_causal):
        return False
    if problem.softcap or problem.sinks or (problem.domain.valid is not None and kernel == "auto"):
        return False
    if problem.bias is None and (not problem.dropout_p or problem.device != "cpu"):
        return True  # whatever the length, which may be unknown
    # Biases read the data of graphs.
    known = problem.bias is None or problem.domain.kind != "Graph"
    return known and problem.num_queries * problem.num_keys <= _sdpa.SMALL_PAIRS and _sdpa.refuse(problem) is None


def _number_of_bias(bias: Bias) -> int:
    if bias._number is None:
        raise ValueError(f"{type(bias).__name__} was made while the graph is; make it outside of the compiled function")
    return bias._number


class _Work(NamedTuple):
    """What a call of an operator is asked to compute."""

    plan: Plan
    problem: Problem
    scores: Scores
    inputs: Inputs
    tensors: SequenceOf[Tensor]

    @property
    def in_parts(self) -> bool:
        """Whether output and log-sum-exp are all that the backward needs."""
        return bool(self.plan.parts_of(self.scores))

    def run(self, tensors: SequenceOf[Tensor], inputs: Inputs) -> Tensor:
        return self.plan.run(self.problem, self.scores.using(tuple(tensors)), *inputs)


# What both operators are given, besides what only the backward is.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? seed, Tensor[] tensors, Tensor[] mask_tensors, "
    "Tensor[] domain_tensors, SymInt[] ticket, SymInt[] key_ticket, SymInt mask, SymInt[] sizes, float[] reals, SymInt[] biases, "
    "str kernel, str? bias, float scale, float? softcap, float dropout_p"
)


def _work(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    tensors: SequenceOf[Tensor],
    mask_tensors: SequenceOf[Tensor],
    domain_tensors: SequenceOf[Tensor],
    ticket: SequenceOf[int],
    key_ticket: SequenceOf[int],
    mask: int,
    sizes: SequenceOf[int],
    reals: SequenceOf[float],
    biases: SequenceOf[int],
    kernel: str,
    bias: str | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> _Work:
    """What ``_ARGUMENTS`` ask for."""
    domain, keys = domains_of((ticket, key_ticket), domain_tensors)
    terms = [None if number < 0 else BIASES[number] for number in biases]
    problem = Problem(
        mask=mask_of(mask, Ingredients(list(sizes), list(reals), list(mask_tensors))), domain=domain, keys=keys,
        batch=query.shape[0], heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[-1], value_dim=value.shape[-1],
        dtype=query.dtype, device=query.device.type, bias=bias, dropout_p=dropout_p, softcap=softcap is not None,
        sinks=sinks is not None, pointwise_bias=all(term is None or term.is_pointwise(domain) for term in terms),
    )  # fmt: skip
    plan = planned(problem, kernel, query.device)
    if plan.kernel == "sdpa" and dropout_p:  # torch's dropout cannot be drawn again in the backward
        plan = planned(problem, "chunked", query.device)
    rest = list(tensors)
    bound: list[Tensor | PairBias] = []
    for number, term in zip(biases, terms, strict=True):
        if term is None:
            bound.append(rest.pop(0))
            continue
        template = _template(term, number, problem, query.device)
        bound.append(template.using(tuple(rest[: len(template.tensors)])))
        del rest[: len(template.tensors)]
    scores = scores_of(problem, plan.predicate, tuple(bound), scale, softcap, seed)
    return _Work(plan, problem, scores, Inputs(query, key, value, sinks), tensors)


def _template(bias: Bias, number: int, problem: Problem, device: torch.device) -> PairBias:
    """The bias bound to the domains, whose tensors are replaced by those of each call."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    keys = problem.keys.anchor
    with torch.no_grad():
        return problem.domain.bound_fact(
            ("pair", number, keys, dtype, device), lambda domain: bias.pair(domain, keys, dtype=dtype)
        )


def _keep(domains: tuple[Domain, Domain], as_long_as: Tensor) -> None:
    """Keep the anchors of domains alive as long as the memory of a tensor that a backward needs too."""
    _NEEDED[:] = [(storage, needed) for storage, needed in _NEEDED if not storage.expired()]
    if any(domain.ticket()[0] == 0 for domain in domains):
        anchors = (domains[0].anchor, domains[1].anchor)
        _NEEDED.append((StorageWeakRef(as_long_as.untyped_storage()), anchors))


def _by_token(x: Tensor) -> Tensor:
    """(B, H, T, D) in the memory layout (B, T, H, D), in which a layer merges heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


@torch.library.custom_op("xformerlib::attend", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output, in the precision of accumulation, and log-sum-exp (of no meaning where the plan is not in parts)."""
    work = _work(*arguments)
    query, _, value, _ = work.inputs
    wide = torch.promote_types(value.dtype, torch.float32)
    with no_autocast(query.device):
        if work.in_parts:
            out, lse = merged_parts(work.plan.parts_of(work.scores), *work.inputs)
        else:
            out, lse = work.run(work.tensors, work.inputs), query.new_zeros(query.shape[:3], dtype=wide)
    _keep((work.problem.domain, work.problem.keys), lse)
    return _by_token(out.to(wide)), lse.contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(value.dtype, torch.float32)
    return _empty(query, value.shape[-1], wide), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op(
    "xformerlib::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, bool[] needed, {_ARGUMENTS}) -> Tensor[]",
)
def attend_backward(grad: Tensor, out: Tensor, lse: Tensor, needed: SequenceOf[bool], *arguments: Any) -> list[Tensor]:
    """Gradients of query, key, value, the sinks if there are any, and of the tensors of the biases: empty where none is needed."""
    work = _work(*arguments)
    query, _, value, _ = work.inputs
    with no_autocast(query.device), within_operator():
        if work.in_parts:
            parts = work.plan.parts_of(work.scores)
            with torch.no_grad():
                into = gradients(parts, *work.inputs, out, lse, grad.to(value.dtype), needed)
            found = [into.query, into.key, into.value, *([] if into.sinks is None else [into.sinks]), *into.biases]
        else:
            found = _differentiated(work, grad, needed)
    given = [x for x in work.inputs if x is not None] + list(work.tensors)
    return [_laid_out(g, x) for g, x in zip(found, given, strict=True)]


@attend_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, needed: SequenceOf[bool], *inputs: Any) -> list[Tensor]:
    query, key, value, sinks, _, tensors = inputs[:6]
    vectors = [_empty(x, x.shape[-1], x.dtype) for x in (query, key, value)]
    rest = [] if sinks is None else [sinks.new_empty(sinks.shape)]
    return vectors + rest + [t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needed, strict=True)]


def _laid_out(grad: Tensor | None, like: Tensor) -> Tensor:
    if grad is None:
        return like.new_empty(0)
    grad = grad.to(like.dtype)
    return _by_token(grad) if like.ndim == 4 else grad.contiguous()


def _differentiated(work: _Work, grad: Tensor, needed: SequenceOf[bool]) -> list[Tensor | None]:
    """Gradients by autograd, of a forward that is computed again."""
    vectors = [None if x is None else x.detach().requires_grad_() for x in work.inputs]
    leaves = [t.detach().requires_grad_(need) for t, need in zip(work.tensors, needed, strict=True)]
    with torch.enable_grad():
        out = work.run(leaves, Inputs(*vectors))  # type: ignore[arg-type]
    wanted = [x for x in (*vectors, *leaves) if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True, materialize_grads=True))
    return [next(found) if x.requires_grad else None for x in (*vectors, *leaves) if x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, seed, *lists, ctx.rest = (*inputs[:8], inputs[8:])
    ctx.counts = [len(each) for each in lists]
    ctx.save_for_backward(*output, query, key, value, sinks, seed, *(x for each in lists for x in each))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
    out, lse, query, key, value, sinks, seed, *rest = ctx.saved_tensors
    lists = [[rest.pop(0) for _ in range(count)] for count in ctx.counts]
    # Of masks, domains and options; torch wants a list for a list of tensors, and takes any empty list for one.
    nothing = *([None] * len(each) for each in lists[1:]), *([] if option == [] else None for option in ctx.rest)
    if grad is None:
        return None, None, None, None, None, [None] * len(lists[0]), *nothing
    needed = list(ctx.needs_input_grad[5]) if lists[0] else []
    found = attend_backward(grad, out, lse, needed, query, key, value, sinks, seed, *lists, *ctx.rest)
    more = found[3:] if sinks is None else found[4:]
    of_tensors = [g if need else None for g, need in zip(more, needed, strict=True)]
    return *found[:3], None if sinks is None else found[3], None, of_tensors, *nothing


attend.register_autograd(_backward, setup_context=_setup)
