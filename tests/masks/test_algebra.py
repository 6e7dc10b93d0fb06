"""Masks as values: algebra, equality, hash, repr, pickle; what FlexAttention sees; errors."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from torch.nn.attention.flex_attention import create_mask

import xformerlib as xf
from tests.strategies import DOMAINS, ROWS, domain, randoms, tree
from xformerlib import masks
from xformerlib.masks import Axial, Causal, Dense, Dilated, Full, Global, Keys, Local, Prefix, Segments, Where, Windows

S = xf.Sequence


def full(mask, where):
    return mask.dense(where, batch_size=ROWS, heads=4).expand(ROWS, 4, where.num_tokens, where.num_tokens)


@given(rng=randoms)
def test_algebra_is_boolean_algebra_within_the_domain(rng):
    where = domain(rng)
    a, b = tree(rng, where), tree(rng, where)
    exists = full(Full(), where)
    assert torch.equal(full(a & b, where), full(a, where) & full(b, where))
    assert torch.equal(full(a | b, where), full(a, where) | full(b, where))
    assert torch.equal(full(~a, where), ~full(a, where) & exists)
    assert torch.equal(full(~(a & b), where), full(~a | ~b, where))


@given(rng=randoms)
def test_a_bound_mask_is_a_flex_attention_mask_mod(rng):
    where = domain(rng)
    if where.num_tokens == 0:
        return  # create_mask refuses it
    mask = tree(rng, where)
    seen_by_flex = create_mask(mask.bind(where), ROWS, 4, where.num_tokens, where.num_tokens, device="cpu")
    assert torch.equal(seen_by_flex, full(mask, where))


@given(rng=randoms)
def test_masks_without_tensors_are_values(rng):
    where = domain(rng)
    mask = tree(rng, where)
    names = {name: getattr(masks, name) for name in masks.__all__} if hasattr(masks, "__all__") else vars(masks)
    if "<" in repr(mask):
        assert mask == mask and hash(mask) == hash(mask)
        return
    assert eval(repr(mask), dict(names)) == mask
    assert hash(eval(repr(mask), dict(names))) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_equality_ignores_order_and_repetition():
    a, b = Causal() & Local(2), Local(2) & Causal() & Local(2)
    assert a == b and hash(a) == hash(b) and repr(b) == "Local(2) & Causal()"
    assert Local(2) != Local(3) and (Local(2) | Causal()) != a
    assert Local(2.0) == Local(2) and hash(Local(2.0)) == hash(Local(2))
    assert ~~a is a and (Full() & a) == a
    assert repr(~(a | Global([1, 0]))) == "~((Causal() & Local(2)) | Global([0, 1]))"
    assert len({a, b, Windows(4), Windows(4, 0)}) == 2


def test_leaves_that_hold_tensors_compare_by_identity_and_pickle():
    ids = torch.tensor([0, 0, 1])
    one, other = Segments(ids), Segments(ids)
    assert one == one and one != other and len({one, other, one}) == 2
    assert torch.equal(pickle.loads(pickle.dumps(one | Causal())).dense(S(3)), (one | Causal()).dense(S(3)))


def test_dense_has_rows_and_heads_only_where_it_varies():
    assert Causal().dense(S(3)).shape == (3, 3)
    assert Causal().dense(S.padded([1, 3])).shape == (2, 1, 3, 3)
    assert Dense(torch.ones(1, 4, 3, 3, dtype=torch.bool)).dense(S(3)).shape == (1, 4, 3, 3)
    assert (Keys(torch.ones(5, 3, dtype=torch.bool)) & Causal()).dense(S(3)).shape == (5, 1, 3, 3)
    assert Causal().dense(S(2), S(3)).shape == (2, 3)


def test_absolute_places_decide_between_unequal_lengths():
    assert Causal().dense(S(1, start=2), S(5)).tolist() == [[True, True, True, False, False]]
    assert Local(1).dense(S(1, start=3), S(5, start=1)).tolist() == [[False, True, True, True, False]]
    assert Global(1).dense(S(2, start=3), S(3, start=0)).tolist() == [[True, False, False]] * 2
    assert Prefix(2).dense(S(1, start=9), S(3, start=1)).tolist() == [[True, False, False]]


def test_no_truth_value():
    with pytest.raises(TypeError, match=r"use & \| ~"):
        bool(Causal() and Local(2))
    with pytest.raises(TypeError):
        Causal() & torch.ones(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Local(-1), "radius must be >= 0; got radius=-1"),
        (lambda: Local(float("nan")), "radius must be >= 0"),
        (lambda: Local("2"), "radius must be a number"),
        (lambda: Local(2, border="wrap"), "border must be"),
        (lambda: Dilated(1, 0), "step must be >= 1"),
        (lambda: Dilated(1.5, 1), "radius must be an integer"),
        (lambda: Windows(0), "size must be > 0"),
        (lambda: Windows(()), "one per axis"),
        (lambda: Axial("x"), "axis must be an integer"),
        (lambda: Axial(2).bind(xf.Grid(2, 2)), "axis must be one of the 2 axes"),
        (lambda: Axial(0).bind(S(3)), "Axial is defined on Grid"),
        (lambda: Causal().bind(xf.Points(torch.zeros(2, 2))), "Causal is defined on"),
        (lambda: Causal().bind(xf.Grid(2, 3), xf.Grid(3, 2)), "same rows"),
        (lambda: Local((1, 2)).bind(S(3)), "one per axis"),
        (lambda: Local(1.5, border="clamp").bind(S(3)), "whole radii"),
        (lambda: Local(1, border="clamp").bind(xf.Timeline([0.0, 1.0])), "have a rim"),
        (lambda: Local(1).bind(S(3), xf.Grid(3)), "same kind of domain"),
        (lambda: Dilated(1, 2).bind(xf.Timeline([0.0])), "Use Local"),
        (lambda: Global(-1), "tokens must be >= 0"),
        (lambda: Global([0, 7]).bind(S(3)), "tokens must be < num_tokens"),
        (lambda: Prefix(1.5), "n must be an integer"),
        (lambda: Segments(torch.tensor([0.5])), "ids must be a tensor of integers"),
        (lambda: Segments(torch.zeros(1, 2, 3, dtype=torch.long)), r"\(tokens,\) or \(batch, tokens\)"),
        (lambda: Segments(torch.tensor([0, 1])).bind(S(3)), "one entry per token"),
        (lambda: Segments(torch.tensor([0, 1])).bind(S(2), S(3)), "Give key_ids"),
        (lambda: Keys(torch.tensor([1, 0])), "valid must be bool"),
        (lambda: Keys(torch.ones(3, 4, dtype=torch.bool)).bind(S.padded([2, 4])), "one row per row"),
        (lambda: Dense(torch.ones(2, 2)), "allowed must be a bool tensor"),
        (lambda: Dense(torch.ones(2, 2, 2, dtype=torch.bool)), "Insert axes"),
        (lambda: Dense(torch.ones(2, 2, dtype=torch.bool)).bind(S(3)), "allowed must end in"),
        (lambda: Where(3), "fn must be a function"),
        (lambda: Where(lambda q, k: q == k), "four arguments"),
        (lambda: Where(lambda b, h, q, k: q - k).dense(S(2)), "must return a bool tensor"),
        (lambda: Causal().bind(5), "domain must be a domain"),
        (lambda: Causal().bind(S.packed([1, 2]), S.packed([3])), "same number of items"),
        (lambda: Causal().bind(S.padded([1, 2]), S.padded([1, 2, 3])), "same number of rows"),
        (
            lambda: (Dense(torch.ones(2, 1, 3, 3).bool()) & Dense(torch.ones(3, 1, 3, 3).bool())).dense(S(3)),
            "agree on batch",
        ),
    ],
)  # fmt: skip
def test_bad_masks_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("kind", DOMAINS)
def test_masks_on_nothing(kind):
    empty = {
        "Sequence": lambda: S(0), "Timeline": lambda: xf.Timeline(torch.zeros(0)), "Grid": lambda: xf.Grid(0, 3),
        "Graph": lambda: xf.Graph(torch.zeros(2, 0, dtype=torch.long), 0), "Points": lambda: xf.Points(torch.zeros(0, 3)),
        "Subset": lambda: S(3).subset(torch.zeros(0, dtype=torch.long)),
    }[kind]()  # fmt: skip
    for mask in (Full(), Local(1), Global(1) | Prefix(1), ~Local(1)):
        assert mask.dense(empty).shape == (0, 0)
    assert empty.coordinates.shape[-2] == 0


def test_a_mask_of_ones_own_says_what_it_allows() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nothing(masks.Mask):
        n: int = 1

    with pytest.raises(TypeError, match="abstract"):
        Nothing()  # type: ignore[abstract]
