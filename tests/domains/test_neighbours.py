"""Sparse rows of keys: membership, transposition, expansion."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis.strategies import integers, lists, tuples

from tests.strategies import randoms
from xformerlib.domains._neighbours import Neighbours, expand_ranges, neighbours_of

ROWS, COLS = 5, 40


def made(pairs: list[tuple[int, int]]) -> Neighbours:
    row, col = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return neighbours_of(row, col, ROWS, COLS)


pairs = lists(tuples(integers(0, ROWS - 1), integers(0, COLS - 1)), max_size=60)


@given(pairs=pairs)
def test_membership_is_that_of_the_set_of_pairs(pairs):
    row, col = torch.arange(ROWS)[:, None], torch.arange(COLS)
    expected = torch.zeros(ROWS, COLS, dtype=torch.bool)
    for pair in pairs:
        expected[pair] = True
    neighbours = made(pairs)
    assert torch.equal(neighbours.contains(row, col), expected)
    assert torch.equal(neighbours.contains(row.int(), col.int()), expected)
    assert neighbours.contains(row[:0], col).shape == (0, COLS)


def test_long_rows_next_to_short_ones():
    row = torch.cat([torch.zeros(1000), torch.ones(1), torch.full((3,), 3)]).long()
    col = torch.cat([torch.arange(0, 2000, 2), torch.tensor([7]), torch.tensor([0, 5, 1999])])
    neighbours = neighbours_of(row, col, 4, 2000)
    found = neighbours.contains(torch.arange(4)[:, None], torch.arange(2000))
    assert found.nonzero().tolist() == torch.stack([row, col], 1).tolist()


@given(pairs=pairs)
def test_entries_are_sorted_and_know_their_origin(pairs):
    neighbours = made(pairs)
    entries = list(zip(neighbours.row.tolist(), neighbours.col.tolist(), strict=True))
    assert entries == sorted(pairs)
    assert [pairs[i] for i in neighbours.origin.tolist()] == entries
    # Parallel entries keep their order.
    order = list(zip(entries, neighbours.origin.tolist(), strict=True))
    assert order == sorted(order)


@given(pairs=pairs)
def test_transpose(pairs):
    neighbours = made(pairs)
    transpose = neighbours.transpose(COLS)
    assert transpose.num_rows == COLS
    assert sorted(zip(transpose.col.tolist(), transpose.row.tolist(), strict=True)) == sorted(pairs)
    assert torch.equal(neighbours.row[transpose.origin], transpose.col)
    assert torch.equal(neighbours.col[transpose.origin], transpose.row)
    back = transpose.transpose(ROWS)
    assert torch.equal(back.col, neighbours.col) and torch.equal(back.rowptr, neighbours.rowptr)


@given(rng=randoms)
def test_expansion(rng: Random):
    starts = [rng.randint(0, 9) for _ in range(rng.randint(0, 5))]
    counts = [rng.randint(0, 4) for _ in starts]
    which, member = expand_ranges(torch.tensor(starts, dtype=torch.long), torch.tensor(counts, dtype=torch.long))
    expected = [(r, s + i) for r, (s, c) in enumerate(zip(starts, counts, strict=True)) for i in range(c)]
    assert list(zip(which.tolist(), member.tolist(), strict=True)) == expected


def test_membership_of_scalars_under_vmap_and_compile():
    neighbours = made([(0, 3), (2, 1), (2, 5), (4, 39)])
    row, col = torch.arange(ROWS), torch.arange(COLS)
    expected = neighbours.contains(row[:, None], col)
    mapped = torch.vmap(torch.vmap(neighbours.contains, (None, 0)), (0, None))(row, col)
    assert torch.equal(mapped, expected)
    compiled = torch.compile(neighbours.contains, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(row[:, None], col), expected)
