"""Attention in graphs that leave Python: ``torch.export``, ONNX, ``torch.jit.trace``, and shapes on the meta device.

Such a graph holds torch's own operations only. Where mask and domains are known while it is made, the structure that a plan finds in them
becomes reshapes, slices and constant indices. Otherwise the mask is computed in the graph, for all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import constants
from ._compiled import Inputs
from .domains import Graph
from .domains._kept import are_known
from .kernels import Plan, Problem, Scores, _plain, _sdpa, choose
from .kernels._merge import Part
from .kernels._scores import Pairs
from .kernels._tiled import TiledPart


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
    dense = problem.is_full or problem.is_causal or not known or kernel == "reference"
    parts = [] if dense else _planned(problem, kernel, scores).parts_of(scores)
    if kernel == "reference":
        found = [_plain.dense(scores, query.double(), key.double(), value.double())]
    elif parts:
        found = [part.plain(own, query, key, value) for part, own in parts]
    elif scores.softcap is None and sinks is None and not scores.dropout_p:
        return _sdpa.run(problem, scores, query, key, value)
    else:
        found = [_plain.dense(scores, query, key, value)]
    return _plain.merged(found, sinks).to(value.dtype)


def shape_of(problem: Problem, kernel: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Output on the meta device, after products of the shapes that kernels multiply, for counters of operations."""
    scores = Scores(None, (), 1.0)
    parts: SequenceOf[tuple[Part, Scores]] = []
    if not (problem.is_full or problem.is_causal or kernel == "reference"):
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
    """Plan for a CPU, with constants made; fused kernels are left to dense operations."""
    with constants():
        each = replace(problem, batch=problem.domain.batch_size or 1, device="cpu")
        plan = choose(each, kernel, torch.device("cpu"))
        for part, own in plan.parts_of(scores):
            if isinstance(part, TiledPart):
                part.settle(own, each.batch, problem.heads, problem.num_queries)
    return plan


def _is_known(problem: Problem) -> bool:
    """Check that mask and domains hold plain numbers and tensors only: no symbolic sizes, no inputs of the graph."""
    # Strict export runs Python symbolically, which cannot plan.
    return not torch.compiler.is_dynamo_compiling() and are_known([problem.mask, problem.domain, problem.keys])
