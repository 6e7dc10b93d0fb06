"""Block masks from structure, against those that torch finds by asking every pair."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import xformerlib as xf
from tests.closeness import assert_close
from tests.counting import Made
from tests.strategies import HEADS, LEAVES, ROWS, domain, leaf, tree
from xformerlib import masks
from xformerlib.masks import Causal, Dilated, Full, Global, Keys, Local, Mask, Prefix, Segments, Where, Windows
from xformerlib.masks._runs import Runs, held_by

# Domains of many tokens take more numbers than Hypothesis likes to draw one by one.
randoms = st.integers(0, 2**32).map(Random)


def listed(counts: torch.Tensor | None, indices: torch.Tensor | None) -> list[list[int]]:
    """The blocks of each line; what stands behind them has no meaning."""
    assert counts is not None
    assert indices is not None
    assert counts.dtype == indices.dtype == torch.int32
    lines = indices.flatten(0, -2) if indices.numel() else indices.new_empty(counts.numel(), 0)
    return [line[:n].tolist() for n, line in zip(counts.flatten().tolist(), lines, strict=True)]


def check_same(ours: BlockMask, theirs: BlockMask) -> None:
    assert ours.shape == theirs.shape
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = f"{name}_num_blocks", f"{name}_indices"
        assert getattr(ours, indices).shape == getattr(theirs, indices).shape
        assert listed(getattr(ours, counts), getattr(ours, indices)) == listed(
            getattr(theirs, counts), getattr(theirs, indices)
        ), name


def check(mask: Mask, where: xf.Domain, keys: xf.Domain | None = None, size: int | tuple[int, int] = 8) -> None:
    b, h = (ROWS if where.batch_size is None else where.batch_size), HEADS
    ours = mask.to_block_mask(where, keys, block_size=size, batch_size=b, heads=h)
    predicate, tokens = mask.bind(where, keys), (where if keys is None else keys).num_tokens
    check_same(ours, create_block_mask(predicate, b, h, where.num_tokens, tokens, device="cpu", BLOCK_SIZE=size))


def longer(rng: Random) -> xf.Domain:
    """A domain of more tokens than those of the other tests, so that blocks of every kind occur."""
    prefix = rng.choice([0, 0, 1, 3, 9])
    lengths = [rng.randint(0, 40) for _ in range(ROWS)]
    count = rng.randint(30, 70)
    times = torch.tensor([rng.uniform(0, 20) for _ in range(count)])
    offset = rng.choice([0.0, -40.0])
    edges = torch.tensor([sorted(rng.sample(range(count), 2)) for _ in range(40)]).T  # from smaller to larger: acyclic
    return rng.choice(
        [
            lambda: xf.Sequence(count, start=rng.choice([0, 5]), prefix=prefix),
            lambda: xf.Sequence.padded(lengths, 43, prefix=prefix),
            lambda: xf.Sequence.packed([*lengths, 20], prefix=rng.choice([0, 1])),
            lambda: xf.Timeline(times.sort().values + offset, prefix=prefix),
            lambda: xf.Timeline(times, prefix=prefix),
            lambda: xf.Timeline.packed(times, [count - 12, 12]),
            lambda: xf.Timeline(times.sort().values.expand(ROWS, -1), valid=torch.rand(ROWS, count) < 0.8),
            lambda: xf.Grid(rng.randint(3, 9), rng.randint(5, 9), prefix=prefix),
            lambda: xf.Grid(2, 4, rng.randint(5, 8)),
            lambda: xf.Grid(3, 40),
            lambda: xf.Grid.packed([(4, 6), (3, 11)], prefix=rng.choice([0, 1])),
            lambda: xf.Points(torch.rand(count, 2) * 4),
            lambda: xf.Graph(edges, count, virtual_nodes=rng.choice([0, 1])),
        ]
    )()


def wide(rng: Random, where: xf.Domain) -> Mask:
    """A leaf that reaches further than those of the other tests."""
    reach = rng.randint(0, 30)
    choices: list[Mask] = [Global(rng.randint(0, 20)), Prefix(rng.randint(0, 40)), Global([3, where.num_tokens - 1])]
    if where.kind != "Graph":
        choices += [Local(reach + 0.5 * where.continuous), Windows(reach + 1, shift=rng.randint(-3, 3))]
    if where.kind in ("Sequence", "Grid"):
        choices += [Local(reach, border="clamp"), Dilated(rng.randint(0, 3), step=rng.randint(1, 12))]
    choices += [
        Segments(torch.arange(where.num_tokens) // rng.choice([1, 7, 16])),
        Keys(torch.arange(where.num_tokens) < 30),
    ]
    return rng.choice(choices)


@settings(max_examples=60)
@given(randoms)
def test_small_domains_have_the_blocks_that_torch_finds(rng: Random) -> None:
    where = domain(rng)
    if where.num_tokens == 0:
        return  # torch refuses to look for blocks of no tokens
    check(tree(rng, where), where, size=rng.choice([1, 2, 3, 4, (2, 4), (16, 3)]))


@settings(max_examples=120)
@given(randoms)
def test_longer_domains_have_the_blocks_that_torch_finds(rng: Random) -> None:
    where = longer(rng)
    parts = [rng.choice([wide, leaf])(rng, where) for _ in range(rng.randint(1, 3))]
    mask = ~parts[0] if rng.random() < 0.3 else parts[0]
    for part in parts[1:]:
        mask = mask & part if rng.random() < 0.6 else mask | part
    check(mask, where, size=rng.choice([8, 16, 5, (8, 16)]))


@settings(max_examples=20)
@given(randoms)
@pytest.mark.parametrize("kind", LEAVES)
def test_every_leaf_has_the_blocks_that_torch_finds(kind: type[Mask], rng: Random) -> None:
    where = longer(rng)
    if where.kind in kind.kinds:
        check(LEAVES[kind](rng, where), where, size=8)


@settings(max_examples=40)
@given(randoms)
def test_keys_may_live_elsewhere(rng: Random) -> None:
    prefixes = [rng.choice([0, 1, 9]) for _ in range(2)]
    lengths = [[rng.randint(0, 30) for _ in range(ROWS)] for _ in range(2)]
    where, keys = rng.choice(
        [
            lambda i: xf.Sequence(20 + 17 * i, start=11 - 11 * i, prefix=prefixes[i]),
            lambda i: xf.Sequence.padded(lengths[i], 31, prefix=prefixes[i]),
            lambda i: xf.Sequence.packed([*lengths[i], 9], prefix=prefixes[i]),
            lambda i: xf.Timeline(torch.rand(25) * 30 - 15, prefix=prefixes[i]),
            lambda i: xf.Grid(4 + i, 7, prefix=prefixes[i]),
        ]
    ), None  # fmt: skip
    where, keys = where(0), where(1)
    spatial = [Causal(), Local(rng.randint(0, 20)), Windows(rng.randint(1, 20)), Prefix(rng.randint(0, 20)), Full()]
    if where.kind in ("Sequence", "Grid"):
        spatial += [Local(rng.randint(0, 9), border="clamp"), Dilated(2, step=rng.randint(1, 9))]
    mask = rng.choice(spatial)
    check(rng.choice([mask, ~mask, mask & rng.choice(spatial), mask | Global(2)]), where, keys)


def test_blocks_that_only_few_pairs_decide() -> None:
    where = xf.Sequence(300)
    for q, k in ((0, 0), (77, 200), (299, 13)):
        one = Where(lambda b, h, i, j, q=q, k=k: (i == q) & (j == k))
        check(one, where, size=64)
        check(~one, where, size=64)


def test_no_tokens_have_no_blocks() -> None:
    blocks = Causal().to_block_mask(xf.Sequence(0), xf.Sequence(5))
    assert blocks.kv_indices.shape == (1, 1, 0, 1)
    assert Full().to_block_mask(xf.Sequence(5), xf.Sequence(0)).kv_num_blocks.sum() == 0


def test_tables_vary_only_as_far_as_they_must() -> None:
    shared, rows = xf.Sequence(300), xf.Sequence.padded([100, 300, 200])
    assert Local(3).to_block_mask(shared).kv_num_blocks.shape == (1, 1, 3)
    assert Local(3).to_block_mask(rows).kv_num_blocks.shape == (3, 1, 3)
    dense = masks.Dense(torch.ones(1, HEADS, 300, 300, dtype=torch.bool))
    assert dense.to_block_mask(rows).kv_num_blocks.shape == (3, HEADS, 3)


def test_bad_arguments_are_refused() -> None:
    where = xf.Sequence.padded([3, 2])
    with pytest.raises(ValueError, match="batch_size must be 2, as Full"):
        Full().to_block_mask(where, batch_size=3)
    with pytest.raises(ValueError, match="block_size must be >= 1; got block_size=0"):
        Full().to_block_mask(where, block_size=0)
    with pytest.raises(TypeError, match="heads must be an integer"):
        Full().to_block_mask(where, heads=1.5)  # type: ignore[arg-type]


MILLION = xf.Sequence(1_000_000)


def test_a_window_on_a_million_tokens_is_made_of_few_numbers() -> None:
    mask, counts = Causal() & Local(127), []
    for where in (xf.Sequence(500_000), MILLION):
        with Made() as count:
            blocks = mask.to_block_mask(where)
        counts.append(count)
    assert counts[1].operators < 1500 and counts[1].bytes < 2.1 * counts[0].bytes
    assert counts[1].bytes < 8 * 1000 * 7813  # a thousand numbers for each line of blocks, all operators together
    # The block before the queries' own, and their own.
    assert listed(blocks.kv_num_blocks, blocks.kv_indices) == [[max(i - 1, 0), i][i == 0 :] for i in range(7813)]
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_num_blocks.sum() == 0
    assert blocks.kv_indices.shape == (1, 1, 7813, 7813)
    assert blocks.kv_indices.untyped_storage().nbytes() < 1e6


@pytest.mark.parametrize(
    "mask", [Local(300), Local(64) | Global([0, 5]), Windows(256, shift=3), Dilated(2, step=1000)], ids=repr
)
def test_a_million_tokens_hold_the_blocks_of_fewer(mask: Mask) -> None:
    many, few = mask.to_block_mask(MILLION), mask.to_block_mask(xf.Sequence(16_000))
    for name in ("kv", "full_kv"):
        long, short = (
            listed(getattr(blocks, f"{name}_num_blocks"), getattr(blocks, f"{name}_indices")) for blocks in (many, few)
        )
        assert long[1:60] == short[1:60]


def test_runs_are_sets() -> None:
    generator = Random(0)
    for _ in range(50):
        sets = [{n for n in range(30) if generator.random() < 0.5} for _ in range(3)]
        runs = [Runs.of_numbers(torch.tensor(sorted(numbers), dtype=torch.long), 30) for numbers in sets]

        def members(runs: Runs) -> set[int]:
            return {int(n) for part in runs.numbers(7) for n in part}

        assert [members(r) for r in runs] == sets
        assert members(runs[0].complement()) == set(range(30)) - sets[0]
        for least in (1, 2, 3):
            assert members(held_by(runs, least)) == {n for n in range(30) if sum(n in s for s in sets) >= least}


CASES = [
    (Causal() & Local(40), xf.Sequence(300)),
    (Local(30) | Global(3), xf.Sequence(300, prefix=2)),
    (Causal(), xf.Sequence.packed([100, 150, 50])),
    (Local(3), xf.Grid(12, 25)),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("mask", "where"), CASES, ids=repr)
def test_flex_attention_takes_it(mask: Mask, where: xf.Domain) -> None:
    query, key, value = torch.randn(3, 1, 2, where.num_tokens, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = xf.attention(query, key, value, mask=mask, domain=where)
        result = flex_attention(query, key, value, block_mask=mask.to_block_mask(where))
    assert isinstance(result, torch.Tensor)
    assert_close(result, expected)


def test_compiled_flex_attention_takes_the_overlapping_tables() -> None:
    # torch has kernels of FlexAttention for AVX2 and better, not for any CPU.
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    compiled = torch.compile(flex_attention, fullgraph=True, backend="inductor" if wide else "aot_eager")
    for tokens in (2000, 1500):
        mask, where = Causal() & Local(200), xf.Sequence(tokens)
        query, key, value = torch.randn(3, 1, 2, tokens, 16)
        with torch.no_grad():
            result = compiled(query, key, value, block_mask=mask.to_block_mask(where))
            expected = xf.attention(query, key, value, mask=mask, domain=where)
        assert_close(result, expected)
