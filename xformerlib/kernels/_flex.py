"""On CUDA: a part of a mask computed by torch's FlexAttention (Dong et al. 2024, arXiv:2412.05496), from the mask's own predicate."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from ..masks import Mask
from ..masks._block_mask import tables, transposed
from ._merge import Part
from ._problem import Problem
from ._scores import Pairs, Scores

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries and keys of a block of the block mask, a multiple of the tiles that FlexAttention's kernels compute.
BLOCK = 128
# Heads of fewer channels are widened by zeros: FlexAttention takes no less.
LEAST_DIM, MOST_DIM = 16, 256
# Pairs that may be asked about for a plan, at every call where a mask or bias cannot be known beforehand, and at a time.
ASKED_ONCE, ASKED_PER_CALL, ASKED_AT_A_TIME = 2**34, 2**30, 2**24
# Whether FlexAttention is compiled. Uncompiled it computes all pairs at once, which serves only to check it.
COMPILED = True
_NUMBERS = count()


def refuse(problem: Problem) -> str | None:
    """Why FlexAttention cannot compute the problem, or None."""
    if problem.batch == 0:
        return "there is nothing to visit"
    if problem.dropout_p:
        return "FlexAttention has no dropout"
    if problem.dtype.itemsize > 4:
        return f"FlexAttention does not compute in {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > MOST_DIM:
        return f"FlexAttention has heads of no more than {MOST_DIM} channels"
    if not problem.pointwise_bias:
        return "a bias that is a network at each pair does not fit into FlexAttention's kernel"
    return None


def refuse_pairs(problem: Problem, fixed: bool) -> str | None:
    """Why it cannot be asked which of all pairs are allowed, or None. At each call, where mask or bias may say something else then."""
    pairs = problem.num_queries * problem.num_keys * (problem.domain.batch_size or 1)
    if fixed and problem.bias != "dense":
        return None if pairs <= ASKED_ONCE else f"FlexAttention would ask about {pairs:,} pairs beforehand"
    pairs = problem.batch * problem.heads * problem.num_queries * problem.num_keys
    return None if pairs <= ASKED_PER_CALL else f"FlexAttention would ask about {pairs:,} pairs before each call"


def refuse_function(problem: Problem) -> str | None:
    """Why the mask, which has functions of the user's, cannot be a part of a kernel, or None."""
    index = torch.zeros(1, dtype=torch.long, device=problem.domain.device)
    try:
        make_fx(problem.mask.bind(problem.domain, problem.keys))(index, index, index, index)
    except Exception as error:  # whatever such a function does
        return f"FlexAttention cannot trace {problem.mask!r}: {type(error).__name__}"
    return None


class FlexPart(Part):
    """A part whose blocks of pairs FlexAttention visits.

    Args:
        kernel: the name of the structure.
        mask: the pairs.
        device: where the block mask is made.
        beyond: a mask that allows whatever the part's does; given where that may say something else at each call. Its blocks are then
            visited, and asked.
    """

    differentiable = True

    def __init__(
        self, kernel: str, mask: Mask, problem: Problem, device: torch.device, *, beyond: Mask | None = None
    ) -> None:
        self.kernel, self.what, self.kind = kernel, f"{mask!r}, by FlexAttention", _kind(mask, problem)
        if beyond is None:
            self.blocks = mask.to_block_mask(
                problem.domain, problem.keys, block_size=BLOCK, batch_size=problem.domain.batch_size, device=device
            )
        else:
            self.blocks = _open_blocks(mask, beyond, problem, device)
        index = torch.zeros(1, dtype=torch.long, device=device)
        self.blocks.mask_mod(index, index, index, index)  # makes what the domain keeps, which compiled code could not
        for where in (problem.domain, problem.keys):
            where.to(device).settle()
        self._met: set[tuple[object, ...]] = set()  # biases of which that holds
        self.pairs = _visited(self.blocks)
        self.asked = 0.0 if beyond is None or problem.is_clean else self.pairs * problem.batch * problem.heads
        self.hidden = _hidden_by_blocks(self.blocks) if beyond is None and not problem.is_clean else None

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not scores.clean:
            if any(isinstance(bias, Tensor) for bias in scores.biases):
                hidden = _hidden_by_asking(scores, query, key)
            else:
                hidden = _hidden_by_blocks(self.blocks) if self.hidden is None else self.hidden
            query, key, value = _without(hidden, query, key, value)
        width = value.shape[-1]
        query, key, value = (F.pad(x, (0, max(0, LEAST_DIM - x.shape[-1]))) for x in (query, key, value))
        biases, score_mod = _bias_kinds(scores), _score_mod(scores)
        if score_mod is not None and biases not in self._met:
            index = torch.zeros(1, dtype=torch.long, device=query.device)
            score_mod(query[0, 0, :1, 0], index, index, index, index)
            self._met.add(biases)
        run = _compiled((self.kind, biases)) if COMPILED else _flex_attention
        grouped = query.shape[1] != key.shape[1]
        out, lse = run(query, key, value, score_mod, self.blocks, scores.scale, grouped)
        return out[..., :width], lse


# -- block masks ---------------------------------------------------------------------------------------------------------


def _open_blocks(mask: Mask, beyond: Mask, problem: Problem, device: torch.device) -> BlockMask:
    """The blocks of ``beyond``, in each row of the batch and head, each to be asked what ``mask`` allows."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = beyond.to_block_mask(
        problem.domain, problem.keys, block_size=BLOCK, batch_size=problem.batch, heads=problem.heads, device=device
    )
    lines, columns = (-(-n // BLOCK) for n in blocks.seq_lengths)
    shape = (problem.batch, problem.heads, lines, columns)
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    listed = zip(
        _listed(blocks.kv_num_blocks, blocks.kv_indices),
        _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices),
        strict=True,
    )
    b, h, q, k = (torch.cat(parts) for parts in listed)
    places = (((b * problem.heads + h) * lines + q) * columns + k).sort().values
    turned = (problem.batch, problem.heads, columns, lines)
    return BlockMask(
        blocks.seq_lengths, *tables(places, shape), None, None, *tables(transposed(places, shape), turned), None, None,
        BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask.bind(problem.domain.to(device), problem.keys.to(device)),
    )  # fmt: skip


def _visited(blocks: BlockMask) -> float:
    """Pairs in the blocks, for each row of the batch and head."""
    counts = [n for n in (blocks.kv_num_blocks, blocks.full_kv_num_blocks) if n is not None]
    return sum(int(n.sum()) for n in counts) * float(BLOCK * BLOCK) / max(blocks.kv_num_blocks.shape[:2].numel(), 1)


def _listed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks of a table: row of the batch, head, query block, key block."""
    longest = int(counts.max()) if counts.numel() else 0
    there = torch.arange(longest, device=counts.device) < counts[..., None]
    b, h, q, slot = there.nonzero().unbind(1)
    return b, h, q, indices[b, h, q, slot].long()


# -- what must not be touched --------------------------------------------------------------------------------------------

Hidden = tuple[Bool[Tensor, "#batch #heads queries"], Bool[Tensor, "#batch #heads keys"]]


def _hidden_by_blocks(blocks: BlockMask) -> Hidden:
    """Queries that see nothing and keys that nobody sees; only blocks that are allowed in part are asked."""
    step = torch.arange(BLOCK, device=blocks.kv_num_blocks.device)
    tokens = tuple(blocks.seq_lengths)
    seen = [
        torch.zeros(*blocks.kv_num_blocks.shape[:2], n, dtype=torch.bool, device=step.device) for n in tokens
    ]  # fmt: skip
    if blocks.full_kv_num_blocks is not None:
        assert blocks.full_kv_indices is not None
        b, h, *places = _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
        for mark, place in zip(seen, places, strict=True):
            mark[b[:, None], h[:, None], place[:, None] * BLOCK + step] = True
    every = _listed(blocks.kv_num_blocks, blocks.kv_indices)
    for b, h, *places in zip(*(x.split(ASKED_AT_A_TIME // BLOCK**2) for x in every), strict=True):
        index = [place[:, None] * BLOCK + step for place in places]
        there = [i < n for i, n in zip(index, tokens, strict=True)]
        q, k = (i.clamp(max=n - 1) for i, n in zip(index, tokens, strict=True))
        allowed = blocks.mask_mod(b[:, None, None], h[:, None, None], q[:, :, None], k[:, None, :])
        allowed = allowed & there[0][:, :, None] & there[1][:, None, :]
        for mark, i, axis in ((seen[0], q, 2), (seen[1], k, 1)):
            n, place = allowed.any(axis).nonzero().unbind(1)
            mark[b[n], h[n], i[n, place]] = True
    return ~seen[0], ~seen[1]


def _hidden_by_asking(scores: Scores, query: Tensor, key: Tensor) -> Hidden:
    """The same by all pairs, a block of queries at a time: where a bias given as a tensor may hide pairs."""
    batch, heads, tokens, _ = query.shape
    every = torch.arange(key.shape[2], device=key.device)
    queries, keys = [], torch.zeros((), dtype=torch.bool, device=key.device)
    rows = max(1, ASKED_AT_A_TIME // max(batch * heads * key.shape[2], 1))
    for some in torch.arange(tokens, device=query.device).split(rows):
        allowed = scores.allowed(Pairs.of(batch, heads, some, every))
        assert allowed is not None
        allowed = allowed.expand(*allowed.shape[:2], some.numel(), every.numel())
        queries.append(allowed.any(-1))
        keys = keys | allowed.any(-2)
    return ~torch.cat(queries, -1), ~keys


def _without(hidden: Hidden, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0 in what is hidden: a NaN there would survive as 0 * NaN in the product with the values and in every gradient."""
    queries, keys = hidden
    if keys.shape[1] > 1:  # a key head is hidden if it is from each query head that it serves
        keys = keys.unflatten(1, (key.shape[1], -1)).all(2)
    keys = keys[..., None]
    return query.masked_fill(queries[..., None], 0), key.masked_fill(keys, 0), value.masked_fill(keys, 0)


# -- calls ---------------------------------------------------------------------------------------------------------------


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, blocks: BlockMask, scale: float, grouped: bool
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # slow to load, and seldom needed

    out, more = flex_attention(query, key, value, score_mod, blocks, scale, grouped, return_aux=AuxRequest(lse=True))
    assert more.lse is not None
    return out, more.lse


@lru_cache(maxsize=256)
def _compiled(kind: tuple[object, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention compiled for a kind of part; lengths may vary within it.

    Code is compiled again for each mask that it meets, and but a few times: so each kind has code of its own. Where that limit is
    reached all the same, a full graph is an error, and not a call that computes all pairs.
    """
    code = _flex_attention.__code__
    own = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")  # lengths seen by one kind are no concern of another
    own_function = FunctionType(own, _flex_attention.__globals__, closure=_flex_attention.__closure__)
    return torch.compile(own_function, fullgraph=True)


def _kind(mask: Mask, problem: Problem) -> tuple[object, ...]:
    """What parts of the same kernel have in common. What tensors are called by, their sizes, may differ."""
    shapes = problem.heads, problem.kv_heads, problem.head_dim, problem.value_dim
    domains = tuple(
        (type(where), where.kind, where.prefix, where.items is None, where.valid is None)
        for where in (problem.domain, problem.keys)
    )
    return re.sub("<[^>]*>", "<>", repr(mask)), problem.dtype, *shapes, problem.softcap, *domains


def _bias_kinds(scores: Scores) -> tuple[object, ...]:
    return tuple(
        (type(bias), any(t.requires_grad for t in ((bias,) if isinstance(bias, Tensor) else bias.tensors)))
        for bias in scores.biases
    )


def _score_mod(scores: Scores) -> Any:
    """Soft cap and biases as FlexAttention asks for them, score by score; None where there are none."""
    if scores.softcap is None and not scores.biases:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if scores.softcap is not None:
            score = scores.softcap * torch.tanh(score / scores.softcap)
        for bias in scores.biases:
            if isinstance(bias, Tensor):
                one = bias[
                    tuple(i if n > 1 else torch.zeros_like(i) for i, n in zip((b, h, q, k), bias.shape, strict=True))
                ]
            else:
                one = bias.of_head(b, h, q, k)
            score = score + one.to(score.dtype)
        return score

    return score_mod
