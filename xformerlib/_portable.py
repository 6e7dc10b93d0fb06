"""Attention in graphs that leave Python: ``torch.export``, ONNX, ``torch.jit.trace``, and shapes on the meta device.

Such a graph holds torch's own operations only. Where mask and domains are known while it is made, the structure that a plan finds in them
becomes reshapes, slices and constant indices. Otherwise the mask is computed in the graph, for all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._autograd import constants
from ._compiled import Inputs
from .domains import Domain, Graph
from .kernels import Plan, Problem, Scores, _plain, _sdpa, choose
from .kernels._merge import Part
from .kernels._scores import Pairs
from .kernels._tiled import TiledPart

# What domains keep, beside what they are.
KEPT = ("_facts", "_bound", "_anchor", "_anchored")


def run_portably(problem: Problem, kernel: str, scores: Scores, inputs: Inputs) -> Tensor:
    """The attention, as operations of the graph that is being made; ``scores`` has no predicate yet."""
    query, key, value, sinks = inputs
    known = _is_known(problem)
    if not problem.is_full:
        with constants() if known else nullcontext():
            scores = replace(scores, predicate=problem.mask.bind(problem.domain, problem.keys))
    if known and isinstance(problem.domain.whole, Graph) and scores.biases:
        with constants():  # what biases ask of a graph is found by reading its data; the graph keeps it
            tokens = (torch.arange(n) for n in (problem.num_queries, problem.num_keys))
            scores.bias(Pairs.of(1, problem.heads, *tokens))
    plan = None if problem.is_full or problem.is_causal or not known else _planned(problem, kernel, scores)
    parts = [] if plan is None else plan.parts_of(scores)
    if parts:
        found = [part.plain(own, query, key, value) for part, own in parts]
    elif scores.softcap is None and sinks is None and not scores.dropout_p:
        return _sdpa.run(problem, scores, query, key, value)
    else:
        found = [_plain.dense(scores, query, key, value)]
    return _plain.merged(found, sinks).to(value.dtype)


def shape_of(problem: Problem, kernel: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output on the meta device, after products of the shapes that kernels multiply, for those who count operations."""
    scores = Scores(None, (), 1.0)
    parts: SequenceOf[tuple[Part, Scores]] = []
    if not (problem.is_full or problem.is_causal):
        predicate = problem.mask.bind(problem.domain, problem.keys)
        plan = _planned(replace(problem, bias=None), kernel, replace(scores, predicate=predicate))
        parts = plan.parts_of(scores)
    if not parts:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=problem.heads != problem.kv_heads)
    for tiles in (tiles for part, _ in parts if isinstance(part, TiledPart) for tiles in part.calls):
        batch = query.shape[0] if tiles.batch is None else 1
        shapes = ((query, tiles.rows), (key, tiles.columns), (value, tiles.columns))
        q, k, v = (x.new_empty(batch, tiles.n, x.shape[1], width, x.shape[3]) for x, width in shapes)
        _plain.tile(q, k, v, scores, None, None, None)
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _planned(problem: Problem, kernel: str, scores: Scores) -> Plan:
    """The plan on a CPU, with its constants; ``reference`` and fused kernels are left to dense operations."""
    with constants():
        each = replace(problem, batch=problem.domain.batch_size or 1, device="cpu")
        plan = choose(each, "auto" if kernel == "reference" else kernel, torch.device("cpu"))
        for part, own in plan.parts_of(scores):
            if isinstance(part, TiledPart):
                part.settle(own, each.batch, problem.heads, problem.num_queries)
    return plan


def _is_known(problem: Problem) -> bool:
    """Check that mask and domains hold plain numbers and tensors only: no symbolic sizes, no inputs of the graph."""
    if torch.compiler.is_dynamo_compiling():
        return False  # strict export runs Python symbolically, which cannot plan
    held = (problem.mask, problem.domain, problem.keys)
    return all(
        isinstance(x, int) or (type(x) in (Tensor, nn.Parameter) and not x.is_meta)
        for each in held
        for x in _values(each)
    )


def _values(x: Any) -> Iterator[Any]:
    """Sizes and tensors in a mask or domain."""
    if isinstance(x, (Tensor, torch.SymInt)):
        yield x
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from _values(each)
    elif isinstance(x, dict):
        yield from _values(list(x.values()))
    elif isinstance(x, Domain):
        yield from _values([value for name, value in vars(x).items() if name not in KEPT])
    elif hasattr(x, "__dataclass_fields__"):
        yield from _values([getattr(x, name) for name in x.__dataclass_fields__])
