"""Any mask, any bias, in memory that is linear in tokens: blocks of queries by all keys, computed again in the backward."""

from __future__ import annotations

import torch

from ._problem import Problem
from ._tiled import TiledPart
from ._tiles import Block

# Scores held at a time. Larger blocks save launches, smaller ones stay in cache.
BLOCK_SCORES = 2**21


def rows_per_block(problem: Problem) -> int:
    """Queries of one block, so that its scores number about ``BLOCK_SCORES``."""
    return max(1, BLOCK_SCORES // max(problem.batch * problem.heads * problem.num_keys, 1))


def part(problem: Problem, device: torch.device) -> TiledPart:
    """The whole mask, a block of queries at a time."""
    rows, queries = rows_per_block(problem), problem.num_queries
    blocks = [
        Block(slice(a, min(a + rows, queries)), slice(0, problem.num_keys), device) for a in range(0, queries, rows)
    ]
    return TiledPart("chunked", f"{problem.mask!r} on {problem.domain!r}", blocks)
