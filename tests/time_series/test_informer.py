"""Informer beyond the contract; its attention is tested by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def small(**options: Any) -> ts.Informer:
    model = ts.Informer(3, 24, 6, **{"dim": 8, "heads": 2, "hidden": 16, "dropout": 0.0, **options})
    redraw(model)
    return model.eval()


def test_forecasts_move_with_level_and_scale() -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(), 1e6 * torch.randn(2, 24, 3)
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_where_every_query_attends_its_blocks_are_those_of_the_core(precision: torch.dtype) -> None:
    model, x, context = small(factor=100.0), torch.randn(2, 24, 8), torch.randn(2, 12, 8)
    encoder, decoder = model.encoder[0], model.decoder[0]
    assert_close(model._run(encoder, x, None, causal=False), encoder(x))
    seen, other = torch.rand(2, 24) < 0.7, torch.rand(2, 12) < 0.7
    assert_close(
        model._run(decoder, x, seen, causal=True, context=context, context_mask=masks.Keys(other)),
        decoder(x, mask=masks.Causal() & masks.Keys(seen), context=context, context_mask=masks.Keys(other)),
    )
    sparse = small(factor=1.0)
    assert not torch.allclose(sparse._run(encoder, x, None, causal=False), encoder(x))


def test_steps_are_halved_between_blocks_of_the_encoder() -> None:
    x, seen = torch.randn(2, 25, 8), torch.ones(2, 25, dtype=torch.bool)
    seen[0, :12] = False
    for depth, steps in ((1, 25), (2, 13), (3, 7)):
        context, still = small(depth=depth)._encode(x, seen)
        assert still is not None and context.shape == (2, steps, 8) and still.shape == (2, steps)
        assert still[1].all() and still[0, -1] and not still[0, 0]
    assert small(depth=3, distil=False)._encode(x, None)[0].shape == (2, 25, 8)


def test_keys_are_drawn_at_random_in_training_alone() -> None:
    model, x = small(factor=1.0), torch.randn(2, 24, 3)
    assert torch.equal(model(x), model(x))
    model.train()
    forecasts = [model(x) for _ in range(4)]
    assert any(not torch.allclose(forecasts[0], other) for other in forecasts[1:])


def test_a_step_of_the_horizon_is_not_decoded_from_later_ones() -> None:
    model = small(future=1)
    x, future = torch.randn(2, 24, 3), torch.randn(2, 30, 1)
    before = model(x, future=future)
    future[:, 27:] += torch.randn(2, 3, 1)
    after = model(x, future=future)
    assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


def test_the_decoder_begins_with_the_label() -> None:
    x = torch.randn(2, 24, 3)
    for label in (0, 5, 24):
        assert small(label=label)(x).shape == (2, 6, 3)
    model, other = small(label=4), small(label=8)
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), other(x))
    with pytest.raises(ValueError, match="label must be <= lookback; got label=25 and lookback=24"):
        small(label=25)
    with pytest.raises(ValueError, match="factor must be > 0; got factor=-1"):
        small(factor=-1)


def test_steps_without_values_are_not_attended_to() -> None:
    model, x = small(distil=False), torch.randn(1, 24, 3)
    tokens, seen = torch.randn(1, 24, 8), torch.ones(1, 24, dtype=torch.bool)
    seen[:, 5:9] = False
    before, _ = model._encode(tokens, seen)
    tokens[:, 5:9] += torch.randn(1, 4, 8)
    after, _ = model._encode(tokens, seen)
    assert_close(after[:, 9:], before[:, 9:])
    x[:, 5:9] = torch.nan
    assert model(x).isfinite().all()


@torch.no_grad()  # under autograd Dynamo warns of itself at graph breaks
def test_a_compiled_model_agrees() -> None:
    torch.compiler.reset()
    model, x = small(), torch.randn(2, 24, 3)
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(x), model(x))
    x[0, :12] = torch.nan
    assert_close(compiled(x), model(x))
