"""MaskedPatches: what is hidden has no influence, only it counts, and the model's own encoder learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import time_series as ts

pytestmark = pytest.mark.usefixtures("double")

PATCH = 4


def small(lookback: int = 24, share: float = 0.4, **options: object) -> ts.MaskedPatches:
    sizes = {"patch": PATCH, "stride": PATCH, "dim": 8, "depth": 2, "heads": 2, "hidden": 16, "dropout": 0.0}
    pretraining = ts.MaskedPatches(ts.PatchTST(2, lookback, 6, **{**sizes, **options}), share=share)
    redraw(pretraining)
    return pretraining.eval()


@settings(max_examples=15)
@given(lookback=st.integers(4, 27), share=st.floats(0.05, 0.95), missing=st.floats(0, 0.9), seed=st.integers(0, 1000))
def test_whole_patches_that_exist_are_hidden_as_many_as_asked(
    lookback: int, share: float, missing: float, seed: int
) -> None:
    torch.manual_seed(seed)
    pretraining = small(lookback, share)
    observed = torch.rand(3, lookback, 2) >= missing
    observed[0, : lookback // 2] = False
    hidden = pretraining.hidden(observed)
    assert hidden.shape == observed.shape
    for b in range(3):
        for c in range(2):
            cut = [hidden[b, start : start + PATCH, c] for start in range(0, lookback, PATCH)]
            exists = [bool(observed[b, start : start + PATCH, c].any()) for start in range(0, lookback, PATCH)]
            assert all(piece.all() or not piece.any() for piece in cut)
            assert all(there or not piece.any() for piece, there in zip(cut, exists, strict=True))
            assert sum(bool(piece.any()) for piece in cut) == round(sum(exists) * share)


def test_patches_are_drawn_evenly_and_for_each_channel_anew() -> None:
    pretraining = small()
    hidden = torch.stack([pretraining.hidden(torch.ones(64, 24, 2, dtype=torch.bool)) for _ in range(8)])
    often = hidden.double().mean((0, 1))
    # round(6 * 0.4) of 6 patches, within six standard errors of 8 * 64 draws
    assert (often - 2 / 6).abs().max() < 6 * (2 / 6 * 4 / 6 / 512) ** 0.5
    assert not torch.equal(hidden[..., 0], hidden[..., 1])


@pytest.mark.parametrize("lookback", [24, 27])  # patches that fit, and a last one that is cut
@pytest.mark.parametrize("filling", [torch.nan, 1e9, -3.0])
def test_what_is_hidden_has_no_influence(lookback: int, filling: float) -> None:
    pretraining = small(lookback)
    x = torch.randn(2, lookback, 2)
    for last in (False, True):
        hidden = torch.zeros(2, lookback, 2, dtype=torch.bool)
        hidden[0, 4:12, 0] = True
        hidden[1, 20:, 1] = last
        restored = pretraining.restored(x, hidden)
        # NaN that stands for "missing" would say that the patch does not exist: those that are hidden do.
        other = x.masked_fill(hidden, 0.0 if filling != filling else filling)
        assert torch.equal(pretraining.restored(other, hidden), restored)
        assert not torch.allclose(pretraining.restored(x, ~hidden), restored)


def test_missing_values_are_neither_shown_nor_asked_for() -> None:
    pretraining, x = small(), torch.randn(2, 24, 2)
    observed = torch.rand(x.shape) > 0.3
    observed[0, 4:8, 0] = False  # a patch that does not exist
    losses = []
    for filling in (torch.nan, 1e9, 0.0):
        torch.manual_seed(3)
        losses.append(pretraining(x.masked_fill(~observed, filling), observed=observed))
    assert losses[0] == losses[1] == losses[2] > 0
    torch.manual_seed(3)
    assert pretraining(x.masked_fill(~observed, torch.nan)) == losses[0]


@pytest.mark.parametrize("lookback", [24, 27])
def test_the_loss_is_its_formula_over_hidden_patches_alone(lookback: int, precision: torch.dtype) -> None:
    pretraining, x = small(lookback), torch.randn(2, lookback, 2)
    x[0, 5:7, 1] = torch.nan
    torch.manual_seed(5)
    hidden = pretraining.hidden(~x.isnan())
    torch.manual_seed(5)
    loss = pretraining(x)
    restored = pretraining.restored(x, hidden)
    total, count = torch.zeros(()), 0
    for b in range(2):
        for c in range(2):
            seen = ~x[b, :, c].isnan()
            scale = (x[b, seen, c].var(correction=0) + 1e-5).sqrt()
            asked = hidden[b, :, c] & seen
            total += ((restored - x)[b, asked, c] / scale).square().sum()
            count += int(asked.sum())
    assert_close(loss, total / count)


def test_restored_values_stand_where_they_were() -> None:
    """A map from each token to its own patch: with an encoder that is the identity, the values come back."""
    pretraining = small(dim=PATCH, block={"norm_layer": lambda _: torch.nn.Identity()})
    with torch.no_grad():
        for parameter in pretraining.model.parameters():
            parameter.zero_()
        for weight in (pretraining.model.embed.weight, pretraining.restore.weight):
            weight.copy_(torch.eye(PATCH))
        pretraining.restore.bias.zero_()
    x, nothing = torch.randn(3, 24, 2), torch.zeros(3, 24, 2, dtype=torch.bool)
    assert_close(pretraining.restored(x, nothing), x)


def waves(count: int) -> Tensor:
    t = torch.arange(30)[:, None] + 12 * torch.rand(count, 1, 2)
    return 5 + torch.sin(2 * torch.pi * t / 8)


def test_pre_training_lowers_the_loss_of_the_models_own_encoder_which_then_forecasts() -> None:
    pretraining = small(dim=16, hidden=32).train()
    for module in pretraining.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = pretraining.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(pretraining.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = pretraining(waves(32)[:, :24])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("project")}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x = waves(32)
    first = last = model.head.loss(model(x[:, :24]), x[:, 24:])
    for _ in range(20):
        optimizer.zero_grad()
        last = model.head.loss(model(x[:, :24]), x[:, 24:])
        last.backward()
        optimizer.step()
    assert last < 0.5 * first


def test_weights_are_those_of_the_model() -> None:
    pretraining = small()
    assert {id(p) for p in pretraining.model.parameters()} < {id(p) for p in pretraining.parameters()}
    assert set(dict(pretraining.named_parameters())) - {f"model.{n}" for n, _ in pretraining.model.named_parameters()} == {
        "restore.weight", "restore.bias"
    }  # fmt: skip


def test_nothing_observed_is_no_nan() -> None:
    pretraining, x = small(), torch.randn(2, 24, 2)
    x[0] = torch.nan
    loss = pretraining(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in pretraining.parameters())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride == patch, .* got patch=4 and stride=2"):
        ts.MaskedPatches(ts.PatchTST(2, 24, 6, patch=4, stride=2))
    with pytest.raises(TypeError, match="model must be a PatchTST; got model=DLinear"):
        ts.MaskedPatches(ts.DLinear(2, 24, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\); got share=0"):
        small(share=0.0)
    with pytest.raises(ValueError, match="x must hold the 24 steps"):
        small()(torch.randn(2, 23, 2))
