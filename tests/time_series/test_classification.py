"""SeriesClassifier: series of unequal length, packed, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, positions, time_series as ts

pytestmark = pytest.mark.usefixtures("double")

CHANNELS, CLASSES = 2, 5
POOLS = ["mean", "attention", "max"]


def small(**options: Any) -> ts.SeriesClassifier:
    model = ts.SeriesClassifier(CHANNELS, CLASSES, **{"dim": 8, "depth": 2, "heads": 2, "hidden": 16, **options})
    redraw(model)
    return model.eval()


def series(lengths: list[int]) -> list[Tensor]:
    return [torch.randn(n, CHANNELS) for n in lengths]


def padded(rows: list[Tensor], length: int, filling: float) -> Tensor:
    x = torch.full((len(rows), length, *rows[0].shape[1:]), filling)
    for at, row in enumerate(rows):
        x[at, : len(row)] = row
    return x


@pytest.mark.parametrize("pool", POOLS)
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=6),
    patch=st.integers(1, 5),
    static=st.integers(0, 2),
    timed=st.booleans(),
    share=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_every_series_is_as_if_alone_however_it_comes(
    pool: str, lengths: list[int], patch: int, static: int, timed: bool, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = small(patch=patch, pool=pool, static=static)
    rows, known = series(lengths), torch.randn(len(lengths), static) if static else None
    rows = [row.masked_fill(torch.rand(row.shape) < share, torch.nan) for row in rows]
    when = [torch.rand(n).cumsum(0) if timed else torch.arange(float(n)) for n in lengths]
    alone = torch.cat(
        [
            model(row[None], times=t if timed else None, static=None if known is None else known[i : i + 1])
            for i, (row, t) in enumerate(zip(rows, when, strict=True))
        ]
    )
    assert alone.shape == (len(lengths), CLASSES) and alone.isfinite().all()
    times = torch.cat(when) if timed else None
    assert_close(model(torch.cat(rows), lengths=lengths, times=times, static=known), alone)
    longest = max(lengths) + 3
    times = padded(when, longest, 0.0) if timed else None
    for filling in (torch.nan, 1e9):
        assert_close(
            model(padded(rows, longest, filling), lengths=torch.tensor(lengths), times=times, static=known), alone
        )
    assert_close(model(padded(rows, longest, torch.nan), times=times, static=known), alone)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mask", [None, masks.Local(3), masks.Causal()])
def test_it_is_its_formula_on_padded_rows(pool: str, mask: masks.Mask | None, precision: torch.dtype) -> None:
    """The same encoder on padded rows with a time line of its own, and pools written out."""
    lengths = [9, 1, 6]
    model, rows = small(pool=pool, mask=mask), series(lengths)
    x = padded(rows, 9, 0.0)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    tokens = model.embed(torch.cat([x, torch.zeros_like(x)], -1))
    h = model.encoder(tokens, xf.Timeline(torch.arange(9.0).expand(3, 9), valid=valid))
    if pool == "mean":
        pooled = h.sum(1) / valid.sum(1, keepdim=True)
    elif pool == "max":
        pooled = h.masked_fill(~valid[..., None], -torch.inf).amax(1)
    else:
        scores = (h @ model.pooling.theta).masked_fill(~valid, -torch.inf)
        pooled = (scores.softmax(1)[..., None] * h).sum(1)
    assert_close(model(torch.cat(rows), lengths=lengths), model.output(pooled))


def test_gradients_are_those_of_padded_rows(precision: torch.dtype) -> None:
    lengths = [9, 1, 6]
    model, rows = small().train(), series(lengths)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, valid = padded(rows, 9, 0.0), torch.arange(9) < torch.tensor(lengths)[:, None]
    h = model.encoder(model.embed(torch.cat([x, torch.zeros_like(x)], -1)), xf.Sequence.padded(lengths))
    want = torch.autograd.grad(
        model.output(h.sum(1) / valid.sum(1, keepdim=True)).square().sum(), list(model.parameters())
    )
    got = torch.autograd.grad(model(torch.cat(rows), lengths=lengths).square().sum(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_what_is_missing_changes_nothing_and_is_told() -> None:
    model, x = small(patch=3), torch.randn(2, 10, CHANNELS)
    observed = torch.rand(x.shape) > 0.3
    want = model(x, observed=observed)
    for filling in (torch.nan, torch.inf, 1e9):
        assert torch.equal(model(x.masked_fill(~observed, filling), observed=observed), want)
    assert torch.equal(model(x.masked_fill(~observed, torch.nan)), want)
    assert not torch.allclose(model(x.masked_fill(~observed, 0.0)), want)  # 0 is a value, missing is not


@pytest.mark.parametrize("pool", POOLS)
def test_nothing_observed_is_no_nan(pool: str) -> None:
    model, x = small(pool=pool), torch.randn(2, 6, CHANNELS)
    x[0] = torch.nan
    assert_close(model(x)[:1], model.output.bias[None])
    assert model(x * torch.nan).isfinite().all()
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_step_that_was_not_observed_takes_no_work_and_leaves_its_time_behind() -> None:
    model, x = small(), torch.randn(1, 8, CHANNELS)
    x[:, 3:5] = torch.nan
    there = torch.tensor([0, 1, 2, 5, 6, 7])
    assert_close(model(x), model(x[:, there], times=there))
    assert not torch.allclose(model(x), model(x[:, there]))
    counts: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    model(x)
    assert counts == [6]


@pytest.mark.parametrize("position", [None, positions.Sinusoidal(8), positions.DistanceDecay(2)])
def test_times_matter_and_regular_ones_are_steps(position: positions.Position | None) -> None:
    model, x = small(position=position), torch.randn(2, 9, CHANNELS)
    assert_close(model(x, times=torch.arange(9)), model(x))
    assert not torch.allclose(model(x, times=torch.arange(9.0) ** 1.5), model(x))
    rows = torch.rand(2, 9).cumsum(1)
    assert_close(model(x, times=rows)[1:], model(x[1:], times=rows[1]))


def test_a_window_is_a_span_of_time() -> None:
    """What is further away than a day is not attended to, however few steps that is."""
    model = small(mask=masks.Local(24.0), depth=1)
    hours = torch.tensor([0.0, 1.0, 30.0, 31.0])
    x = torch.randn(1, 4, CHANNELS)
    domain = xf.Timeline.packed(hours, [4])
    tokens = model.embed(torch.cat([x[0], torch.zeros(4, CHANNELS)], -1))
    weights = model.encoder.blocks[0].attention.weights(tokens, domain, position=model.encoder.position)
    assert (weights[0, :, :2, 2:] == 0).all() and (weights[0, :, :2, :2] > 0).all()


def test_every_declared_input_has_an_effect() -> None:
    model, x = small(static=2, patch=2), torch.randn(2, 7, CHANNELS)
    known = torch.randn(2, 2)
    before = model(x, static=known)
    assert before.shape == (2, CLASSES)
    assert not torch.allclose(model(x, static=known + 1), before)
    assert not torch.allclose(model(x, static=known, lengths=[7, 6])[1], before[1])
    for at in range(7):
        other = x.clone()
        other[:, at] += 1
        assert not torch.allclose(model(other, static=known), before)


def test_patches_are_steps_side_by_side() -> None:
    model, x = small(patch=3, position=positions.Sinusoidal(8)), torch.randn(1, 7, CHANNELS)
    steps = torch.cat([x[0], torch.full((2, CHANNELS), torch.nan)]).unflatten(0, (3, 3))
    tokens = model.embed(torch.cat([steps.nan_to_num(), steps.isnan().float()], -1).flatten(1))
    h = model.encoder(tokens, xf.Timeline(torch.tensor([0.0, 3.0, 6.0])))
    assert_close(model(x), model.output(h.mean(0, keepdim=True)))


def test_it_learns_which_wave_a_series_is() -> None:
    torch.manual_seed(0)
    model = ts.SeriesClassifier(1, 3, patch=4, dim=16, depth=1, heads=2, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths, labels = torch.randint(12, 40, (count,)), torch.randint(3, (count,))
        rows = [
            torch.sin(torch.arange(n) * (0.4 + 0.5 * c) + 6.3 * torch.rand(()))[:, None]
            for n, c in zip(lengths.tolist(), labels.tolist(), strict=True)
        ]
        return torch.cat(rows), lengths, labels

    for _ in range(60):
        x, lengths, labels = batch(32)
        loss = nn.functional.cross_entropy(model(x, lengths=lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, lengths, labels = batch(100)
    assert (model.eval()(x, lengths=lengths).argmax(1) == labels).double().mean() > 0.9


@torch.no_grad()  # under autograd Dynamo warns of itself at graph breaks
def test_compiled_models_agree() -> None:
    torch.compiler.reset()
    model = small(patch=2)
    compiled = torch.compile(model, backend="eager")
    for lengths in ([5, 9], [3, 3, 8]):
        x = torch.randn(sum(lengths), CHANNELS)
        assert_close(compiled(x, lengths=torch.tensor(lengths)), model(x, lengths=lengths))


def test_pooling_of_packed_states_is_that_of_padded_ones() -> None:
    pooling, lengths = ts.AttentionPooling(4), torch.tensor([3, 0, 5])
    h = torch.randn(3, 5, 4)
    valid = torch.arange(5) < lengths[:, None]
    assert_close(pooling(h[valid], lengths=lengths), pooling(h, valid))
    for wrong in ({"lengths": lengths, "valid": valid}, {}):
        with pytest.raises(ValueError, match=r"packed \(N, dim\) with lengths"):
            pooling(h[valid], **wrong)
    with pytest.raises(ValueError, match=r"h must be \(B, T, dim\)"):
        pooling(h, lengths=lengths)


def test_bad_inputs_are_refused() -> None:
    model, x = small(), torch.randn(2, 7, CHANNELS)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        model(x.long())
    with pytest.raises(ValueError, match=r"x must be \(series, steps, 2\), or packed \(steps, 2\); got \(2, 7, 3\)"):
        model(torch.randn(2, 7, 3))
    with pytest.raises(ValueError, match="lengths must say how many of the 7 steps"):
        model(x[0])
    with pytest.raises(ValueError, match="lengths must add up to the 7 steps of packed x; got a sum of 6"):
        model(x[0], lengths=[3, 3])
    with pytest.raises(ValueError, match="lengths must be 2 numbers <= 7"):
        model(x, lengths=[7, 8])
    with pytest.raises(ValueError, match="lengths must be 2 numbers <= 7"):
        model(x, lengths=[7])
    with pytest.raises(ValueError, match=r"times must be \(2, 7\) or \(7,\)"):
        model(x, times=torch.arange(14))
    with pytest.raises(ValueError, match="times must be known and finite"):
        model(x, times=torch.full((7,), torch.inf))
    with pytest.raises(ValueError, match="SeriesClassifier has no static covariates: leave static out"):
        model(x, static=torch.randn(2, 1))
    with pytest.raises(ValueError, match="SeriesClassifier was declared with static=1: static must be given"):
        small(static=1)(x)
    with pytest.raises(ValueError, match="pool must be one of 'mean', 'max', 'attention'; got pool='sum'"):
        small(pool="sum")
    with pytest.raises(ValueError, match="patch must be >= 1; got patch=0"):
        small(patch=0)
    with pytest.raises(TypeError, match="position must be a position"):
        small(position="rotary")
