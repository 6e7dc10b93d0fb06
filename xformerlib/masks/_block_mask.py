"""FlexAttention's block masks, from the structure of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ._outline import Outline, Tiling
from ._runs import held_by

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from ._algebra import Predicate

# Pairs that are asked at a time, and blocks that are settled at a time.
ASKED_PAIRS = 2**22
SETTLED_BLOCKS = 2**20

# Entries of a table, for one row of the batch and head, that are kept in full.
PLAIN_ENTRIES = 2**16


class Blocks(NamedTuple):
    """Numbers of the blocks of which some pairs are allowed, and of those of which all are; ``Tiling`` says which number is which."""

    partial: Int[Tensor, " partial"]
    full: Int[Tensor, " full"]


def block_mask_of(predicate: Predicate, outline: Outline, tiling: Tiling, heads: int) -> BlockMask:
    """The blocks that ``create_block_mask`` finds by asking all pairs, by asking only pairs of blocks that the outline leaves open."""
    from torch.nn.attention.flex_attention import BlockMask  # slow to load, and seldom needed

    by_head = [_blocks(predicate, outline, tiling, head) for head in range(heads)]
    shape = (tiling.rows, heads, tiling.query_blocks, tiling.key_blocks)
    turned = (tiling.rows, heads, tiling.key_blocks, tiling.query_blocks)
    partial = _places([blocks.partial for blocks in by_head], shape)
    full = _places([blocks.full for blocks in by_head], shape)
    return BlockMask(
        (tiling.domain.num_tokens, tiling.keys.num_tokens),
        *tables(partial, shape), *tables(full, shape),
        *tables(transposed(partial, shape), turned), *tables(transposed(full, shape), turned),
        BLOCK_SIZE=tiling.size, mask_mod=predicate,
    )  # fmt: skip


# -- which blocks --------------------------------------------------------------------------------------------------------


def _blocks(predicate: Predicate, outline: Outline, tiling: Tiling, head: int) -> Blocks:
    partial, full = [], []
    for block in outline.certain.numbers(SETTLED_BLOCKS):
        whole = ~_is_cut(block, tiling)
        partial.append(block[~whole])
        full.append(block[whole])
    seen = _seen(predicate, outline, tiling, head)
    for block in held_by([outline.possible, outline.certain.complement()], 2).numbers(SETTLED_BLOCKS):
        some, every = _settled(predicate, block, torch.isin(block, seen, assume_unique=True), tiling, head)
        partial.append(block[some & ~every])
        full.append(block[every])
    nothing = torch.empty(0, dtype=torch.long, device=tiling.device)
    return Blocks(*(torch.cat([nothing, *found]).sort().values for found in (partial, full)))


def _is_cut(block: Int[Tensor, " n"], tiling: Tiling) -> Bool[Tensor, " n"]:
    """Whether tokens are missing to make a block whole. What is missing counts as not allowed."""
    _, q, k = tiling.split(block)
    tokens = (tiling.domain.num_tokens, tiling.keys.num_tokens)
    return torch.stack([(i + 1) * size > n for i, size, n in zip((q, k), tiling.size, tokens, strict=True)]).any(0)


def _seen(predicate: Predicate, outline: Outline, tiling: Tiling, head: int) -> Int[Tensor, " blocks"]:
    """The blocks that have one of the likely pairs."""
    if outline.likely is None:
        return torch.empty(0, dtype=torch.long, device=tiling.device)
    b, q, k = outline.likely
    allowed = predicate(b, torch.full_like(b, head), q, k).expand(b.shape)
    line = b[allowed] * tiling.query_blocks + q[allowed] // tiling.size[0]
    return (line * tiling.key_blocks + k[allowed] // tiling.size[1]).unique()


def _settled(
    predicate: Predicate, block: Int[Tensor, " n"], some: Bool[Tensor, " n"], tiling: Tiling, head: int
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Whether some and whether all pairs of each block are allowed, where ``some`` says what is known of the first.

    A block of which one pair is allowed and another is not is settled. Pairs at the corners mostly show that, or else some queries with
    all keys; all pairs are asked only where that does not help.
    """
    every = ~_is_cut(block, tiling)
    rows, columns = tiling.size
    for asked in ((2, 2), (2, columns), (8, columns), (rows, columns)):
        left = (every | ~some).nonzero()[:, 0]
        for part in left.split(max(1, ASKED_PAIRS // (asked[0] * asked[1]))):
            allowed = _ask(predicate, block[part], asked, tiling, head)
            some[part] |= allowed.flatten(1).any(1)
            every[part] &= allowed.flatten(1).all(1)
    return some, every & some


def _ask(
    predicate: Predicate, block: Int[Tensor, " n"], asked: tuple[int, int], tiling: Tiling, head: int
) -> Bool[Tensor, "n asked_queries asked_keys"]:
    """The predicate at so many queries and keys of each block, evenly spread; beyond the last token the last one is asked again."""
    b, q, k = tiling.split(block)
    steps = [
        torch.arange(n, device=block.device) * (size - 1) // max(n - 1, 1)
        for n, size in zip((min(n, size) for n, size in zip(asked, tiling.size, strict=True)), tiling.size, strict=True)
    ]
    q = (q[:, None] * tiling.size[0] + steps[0]).clamp(max=tiling.domain.num_tokens - 1)
    k = (k[:, None] * tiling.size[1] + steps[1]).clamp(max=tiling.keys.num_tokens - 1)
    h = torch.full_like(b, head)
    allowed = predicate(b[:, None, None], h[:, None, None], q[:, :, None], k[:, None, :])
    return allowed.expand(len(block), q.shape[1], k.shape[1])


# -- tables --------------------------------------------------------------------------------------------------------------


def _places(by_head: list[Int[Tensor, " _"]], shape: tuple[int, int, int, int]) -> Int[Tensor, " blocks"]:
    """Blocks as places in a tensor of ``shape`` (rows, heads, query blocks, key blocks), in rising order."""
    _, heads, query_blocks, key_blocks = shape
    area = max(query_blocks * key_blocks, 1)
    places = [(block // area * heads + head) * area + block % area for head, block in enumerate(by_head)]
    return places[0] if heads == 1 else torch.cat(places).sort().values


def transposed(places: Int[Tensor, " blocks"], shape: tuple[int, int, int, int]) -> Int[Tensor, " blocks"]:
    """The same blocks as places in a tensor of (rows, heads, key blocks, query blocks), in rising order."""
    *_, query_blocks, key_blocks = shape
    if places.numel() == 0:
        return places
    line, k = places // key_blocks, places % key_blocks
    return ((line // query_blocks * key_blocks + k) * query_blocks + line % query_blocks).sort().values


def tables(places: Int[Tensor, " blocks"], shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """How many blocks each line has, (B, H, lines), and which, (B, H, lines, columns).

    What stands behind the blocks of a line has no meaning, so lines of large tables overlap in memory: it takes as many entries as the
    longest line has blocks, not as many as there are columns. FlexAttention on the CPU insists on the full width of the shape.
    """
    *outer, lines, columns = shape
    total = outer[0] * outer[1] * lines
    line = places // max(columns, 1)
    counts = torch.bincount(line, minlength=total)
    # Small tables are plain ones: compiled code knows their strides from their shape, and serves all lengths.
    longest = columns if lines * columns <= PLAIN_ENTRIES else int(counts.max()) if total else 0
    slot = torch.arange(places.numel(), device=places.device) - (counts.cumsum(0) - counts)[line]
    memory = torch.zeros(total * longest + columns, dtype=torch.int32, device=places.device)
    memory[line * longest + slot] = (places % max(columns, 1)).int()
    strides = (outer[1] * lines * longest, lines * longest, longest, 1)
    return counts.int().view(shape[:3]), memory.as_strided(shape, strides)
