"""Tokens kept of a domain: all that is said of them is what is said of them in the whole."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import xformerlib as xf
from tests.closeness import assert_close
from tests.strategies import HEADS, ROWS, domain, leaf, position, randoms, tree
from xformerlib import masks, positions
from xformerlib.domains import Subset


def kept_of(where: Subset) -> Tensor:
    """The tokens of the whole that are kept, for each row of a batch."""
    return where.index.expand(ROWS, -1)


def rows_of(table: Tensor, where: Subset) -> Tensor:
    """(ROWS, ..., tokens of the whole, dim) at the kept tokens."""
    return torch.stack([table[row][..., kept, :] for row, kept in enumerate(kept_of(where))])


def pairs_of(table: Tensor, where: Subset) -> Tensor:
    """(ROWS, heads, queries, keys) of the whole at the kept tokens."""
    return torch.stack([table[row][:, kept][:, :, kept] for row, kept in enumerate(kept_of(where))])


def drawn(rng: Random) -> Subset:
    where = domain(rng, "Subset")
    assert isinstance(where, Subset)
    return where


@given(rng=randoms)
@settings(max_examples=100)
def test_a_mask_says_of_kept_tokens_what_it_says_of_them_in_the_whole(rng):
    where = drawn(rng)
    mask = tree(rng, where) if rng.random() < 0.5 else leaf(rng, where)
    whole = mask.dense(where.whole, batch_size=ROWS, heads=HEADS).expand(ROWS, HEADS, -1, -1)
    assert torch.equal(mask.dense(where, batch_size=ROWS, heads=HEADS), pairs_of(whole, where)), (
        f"{mask!r} on {where!r}"
    )


@given(rng=randoms)
@settings(max_examples=60)
def test_blocks_of_a_mask_are_those_of_its_pairs(rng):
    where = drawn(rng)
    mask = tree(rng, where)
    dense = mask.dense(where, batch_size=ROWS, heads=HEADS)
    blocks = mask.to_block_mask(where, block_size=2, batch_size=ROWS, heads=HEADS).to_dense().bool()
    padded = torch.nn.functional.pad(dense, (0, dense.shape[-1] % 2, 0, dense.shape[-2] % 2))
    rows, columns = (n // 2 for n in padded.shape[-2:])
    expected = padded.reshape(ROWS, HEADS, rows, 2, columns, 2).any(-1).any(3)
    assert torch.equal(blocks.expand_as(expected), expected), f"{mask!r} on {where!r}"


@given(rng=randoms)
@settings(max_examples=60)
def test_what_is_asked_of_tokens_is_asked_of_them_in_the_whole(rng):
    where = drawn(rng)
    whole, n = where.whole, where.num_tokens
    b, q, k = torch.arange(ROWS)[:, None, None], torch.arange(n)[:, None], torch.arange(n)
    bq, bk = (b, where.token(b, q), where.token(b, k)), where.token(b, k)
    shape = (ROWS, n, n)
    for axis in range(where.ndim):
        assert torch.equal(
            where.offset(axis, where, b, q, k).expand(shape), whole.offset(axis, whole, *bq).expand(shape)
        )
    assert torch.equal(where.distance(where, b, q, k).expand(shape), whole.distance(whole, *bq).expand(shape))
    assert torch.equal(where.within(where, (1,), b, q, k).expand(shape), whole.within(whole, (1,), *bq).expand(shape))
    assert torch.equal(where.rank(b, k).expand(ROWS, 1, n), whole.rank(b, bk).expand(ROWS, 1, n))
    if where.kind in ("Sequence", "Timeline", "Grid"):
        assert torch.equal(where.precedes(where, b, q, k).expand(shape), whole.precedes(whole, *bq).expand(shape))
    coordinates = where.coordinates.expand(ROWS, n, -1)
    assert torch.equal(coordinates, rows_of(whole.coordinates.expand(ROWS, -1, -1), where))
    if where.offsets is not None:
        assert torch.equal(
            where.offsets.diff(), torch.bincount(items_of(whole)[where.index], minlength=whole.num_items)
        )


def items_of(where: xf.Domain) -> Tensor:
    return torch.zeros(where.num_tokens, dtype=torch.long) if where.items is None else where.items


@given(rng=randoms)
@settings(max_examples=150)
def test_positions_give_kept_tokens_what_they_give_them_in_the_whole(rng):
    where, dim = drawn(rng), 24
    given_position = position(rng, HEADS, dim, where)
    if given_position is None:
        return
    for parameter in given_position.double().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    given_position.eval()
    whole = where.whole
    x = torch.randn(ROWS, whole.num_tokens, dim, dtype=torch.float64)
    for embedding in given_position.embeddings:
        assert_close(embedding(rows_of(x, where), where), rows_of(embedding(x, whole), where))
    q = torch.randn(ROWS, HEADS, whole.num_tokens, dim // HEADS, dtype=torch.float64)
    for rotation in given_position.rotations:
        turned = rotation.rotate_one(rows_of(q, where), where)
        assert_close(turned, rows_of(rotation.rotate_one(q, whole), where))
    b = torch.arange(ROWS)[:, None, None]
    for bias in given_position.biases:
        few, many = (
            bias.pair(on).at(torch.arange(on.num_tokens)[:, None], torch.arange(on.num_tokens), b).transpose(0, 1)
            for on in (where, whole)
        )
        assert_close(few, pairs_of(many, where))


@given(rng=randoms)
@settings(max_examples=40)
def test_attention_among_kept_tokens_is_attention_to_them_in_the_whole(rng):
    """The same layer on the whole, where only the kept tokens may be seen."""
    where = drawn(rng)
    whole, mask, terms = where.whole, tree(rng, where, 1), position(rng, HEADS, 24, where)
    layer = xf.Encoder(24, 1, HEADS, mask=mask, position=terms).double().eval()
    x = torch.randn(ROWS, whole.num_tokens, 24, dtype=torch.float64)
    seen = torch.zeros(ROWS, whole.num_tokens, dtype=torch.bool).scatter_(1, kept_of(where), True)
    few, many = layer(rows_of(x, where), where), layer(x, whole, mask=masks.Keys(seen))
    assert_close(few, rows_of(many, where), depth=2)


def test_between_kept_tokens_and_the_whole():
    whole = xf.Grid(3, 3, prefix=1)
    kept = whole.subset(torch.tensor([0, 2, 6]))
    every, mask = torch.arange(10), masks.Local(1) | masks.Causal()
    assert torch.equal(mask.dense(kept, whole), mask.dense(whole)[kept.index])
    assert torch.equal(mask.dense(whole, kept), mask.dense(whole)[:, kept.index])
    bias = positions.RelativeBias(2, size=(3, 3), prefix=True)
    between = bias.pair(kept, whole).at(torch.arange(3)[:, None], every)
    assert torch.equal(between, bias.pair(whole).at(kept.index[:, None], every))


def test_subsets_of_subsets():
    whole = xf.Grid(3, 3, prefix=1)
    once = whole.subset(torch.tensor([[0, 1, 4, 9], [0, 5, 3, 2]]))
    twice = once.subset(torch.tensor([0, 3, 1]))
    assert twice.whole is whole and twice.index.tolist() == [[0, 9, 1], [0, 2, 5]]
    assert once.subset(torch.tensor([[0, 1], [0, 3]])).index.tolist() == [[0, 1], [0, 2]]
    assert whole.subset(torch.tensor([0, 4, 9])).subset(torch.tensor([[0, 2], [0, 1]])).index.tolist() == [
        [0, 9],
        [0, 4],
    ]


def test_everything_is_one_dense_call_and_items_are_packed():
    kept = xf.Grid(14, 14, prefix=1).subset(torch.arange(100).expand(4, -1))
    assert xf.plan(None, kept).kernel == "sdpa"
    packed = xf.Grid.packed([(16, 16)] * 20)
    few = packed.subset(torch.arange(0, packed.num_tokens, 2))
    assert xf.plan(None, few).kernel in ("blocks", "packed")
    assert xf.plan(masks.Windows(4), xf.Grid(64, 64).subset(torch.randperm(4096)[:2048])).kernel in ("blocks", "packed")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xf.Sequence(3).subset([0, 1]), "index must be a tensor of integers; got list"),
        (lambda: xf.Sequence(3).subset(torch.tensor([True, False, True])), "integers; got torch.bool"),
        (lambda: xf.Sequence(3).subset(torch.tensor([0, 3])), "tokens from 0 to 2 .*; got 0 to 3"),
        (lambda: xf.Sequence(3).subset(torch.tensor([-1])), "tokens from 0 to 2"),
        (lambda: xf.Sequence(3).subset(torch.tensor([1, 2, 1])), "no token twice"),
        (lambda: xf.Sequence(3).subset(torch.zeros(1, 1, 1).long()), r"\(kept,\) or \(batch, kept\)"),
        (lambda: xf.Sequence.padded([2, 3]).subset(torch.zeros(3, 1).long()), "one row for each of the 2 rows"),
        (lambda: xf.Grid(2, 2, prefix=1).subset(torch.tensor([1, 2])), "keep the 1 prefix tokens .* in front"),
        (lambda: xf.Grid(2, 2, prefix=2).subset(torch.tensor([1, 0, 2])), "in their order"),
        (lambda: xf.Grid(2, 2, prefix=1).subset(torch.tensor([[0, 1], [1, 0]])), "prefix tokens"),
        (lambda: xf.Grid(2, 2, prefix=2).subset(torch.tensor([0])), "prefix tokens"),
        (lambda: xf.Sequence.packed([2, 2]).subset(torch.zeros(2, 1).long()), r"\(kept,\) on packed items"),
        (lambda: xf.Sequence.packed([2, 2]).subset(torch.tensor([2, 0])), "keep the order of packed items"),
        (lambda: xf.Sequence.packed([2, 2], prefix=1).subset(torch.tensor([0, 1, 4])), "in front of each item"),
        (lambda: xf.Sequence.packed([2, 2], prefix=1).subset(torch.tensor([0, 1])), "in front of each item"),
    ],
)  # fmt: skip
def test_bad_indices_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
