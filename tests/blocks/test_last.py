"""What a stack says of its last tokens, asked for them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import xformerlib as xf
from tests.closeness import assert_close
from tests.test_cache import DIM, HEADS, ROWS, assert_equal, decoded, models, redrawn, tokens
from xformerlib import masks


@settings(max_examples=30)
@given(models, st.integers(1, 9), st.integers(0, 2), st.integers(0, 8), st.data())
def test_the_last_tokens_alone(
    make: Callable[[], xf.Encoder], length: int, prefix: int, start: int, data: st.DataObject
) -> None:
    model = make()
    last, x = (
        data.draw(st.integers(1, length)),
        tokens(prefix + length, next(model.parameters()).dtype).requires_grad_(),
    )
    domain = xf.Sequence(length, start=start, prefix=prefix)
    got, wanted = model(x, domain, last=last), model(x, domain)[:, -last:]
    assert_equal(got, wanted)
    direction = torch.randn_like(wanted)
    one, other = (torch.autograd.grad((y * direction).sum(), x) for y in (got, wanted))
    assert_close(one, other, "gradient", depth=2 * 3)


@settings(max_examples=20)
@given(models, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_with_a_cache(make: Callable[[], xf.Encoder], sizes: list[int], timeline: bool) -> None:
    model = make()
    count, dtype = sum(sizes), next(model.parameters()).dtype
    x, times = tokens(count, dtype), (torch.rand(count, dtype=torch.float64) + 0.1).cumsum(0)
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    domains: list[xf.Domain] = [xf.Sequence(n, start=start) for n, start in zip(sizes, starts, strict=True)]
    if timeline:
        domains = [xf.Timeline(part) for part in times.split(sizes)]
    with torch.no_grad():
        try:
            whole = decoded(model, x, domains)
        except (ValueError, TypeError):
            return  # the mask or the position has no meaning on a timeline
        got = decoded(model, x, domains, last=1)
    assert_equal(got, whole[:, torch.tensor(sizes).cumsum(0) - 1])


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich", "parallel"])
def test_a_decoder_beside_a_context(norm: str) -> None:
    decoder = redrawn(xf.Decoder(DIM, 2, HEADS, norm=norm, layer_scale=0.5))
    x, context = tokens(6), tokens(4)
    assert_equal(decoder(x, context=context, last=2), decoder(x, context=context)[:, -2:])
    one = decoder(x[0], context=context[0], last=2)  # without a batch
    assert_equal(one, decoder(x[0], context=context[0])[-2:])


@pytest.mark.parametrize("options", [{}, {"gate": True, "kv_heads": 2}])
def test_a_layer(options: dict[str, Any]) -> None:
    layer = redrawn(xf.Attention(DIM, HEADS, mask=masks.Local(2), **options))
    x, context = tokens(6), tokens(9)
    assert_equal(layer(x, last=3), layer(x)[:, 3:])
    assert_equal(layer(x, context=context, last=3), layer(x, context=context)[:, 3:])


def test_other_tokens_of_the_last_block_are_not_computed() -> None:
    model, counts = redrawn(xf.Encoder(DIM, 2, HEADS)), []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    model(tokens(7), last=2)
    assert counts == [7, 2]


@pytest.mark.parametrize("last", [0, 4, -1, True, 1.0])
def test_a_bad_number(last: Any) -> None:
    for module in (xf.Encoder(DIM, 1, HEADS), xf.Block(DIM, HEADS), xf.Attention(DIM, HEADS)):
        with pytest.raises(ValueError, match="last must be a whole number from 1 to the 3 tokens"):
            module(torch.randn(ROWS, 4, DIM), xf.Sequence(3, prefix=1), last=last)


@pytest.mark.parametrize(
    "domain",
    [
        xf.Sequence.padded([3, 2]), xf.Timeline(torch.zeros(ROWS, 3), valid=torch.tensor([[True, True, False]] * ROWS)),
        xf.Grid(3, 1), xf.Sequence.packed([1, 2]), xf.Timeline.packed(torch.arange(3.0), [1, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_other_domains_have_no_last_tokens(domain: xf.Domain) -> None:
    x = torch.randn(3, DIM) if domain.offsets is not None else torch.randn(ROWS, 3, DIM)
    with pytest.raises(
        ValueError, match="last needs a Sequence or Timeline in which every row has as many tokens; got"
    ):
        xf.Encoder(DIM, 1, HEADS)(x, domain, last=1)
