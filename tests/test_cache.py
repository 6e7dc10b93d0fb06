"""Decoding piece by piece with a cache gives what one pass over everything gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close, largest
from xformerlib import masks, positions

DIM, HEADS, ROWS = 16, 4, 2
DTYPES = [torch.float32, torch.float64]
assert_equal = partial(assert_close, depth=3)  # no model here has more than two blocks and a norm


def redrawn(module: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The module with every parameter drawn anew, so that norms, biases and tables count."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.to(dtype)


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, count, DIM, dtype=dtype)


def pieces(sizes: list[int], prefix: int = 0) -> list[xf.Domain]:
    """A sequence in pieces of so many tokens; the prefix is in the first one."""
    starts = list(accumulate(sizes, initial=0))
    return [
        xf.Sequence(n, start=start, prefix=prefix if i == 0 else 0)
        for i, (start, n) in enumerate(zip(starts, sizes, strict=False))
    ]


def decoded(
    model: nn.Module, x: Tensor, domains: list[xf.Domain], cache: xf.Cache | None = None, **given_to_all: Any
) -> Tensor:
    """The outputs of a model that is given ``x`` piece by piece."""
    cache = xf.Cache() if cache is None else cache
    parts = x.split([domain.num_tokens for domain in domains], -2)
    return torch.cat(
        [model(part, domain, cache=cache, **given_to_all) for part, domain in zip(parts, domains, strict=True)], -2
    )


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=6)
grad = st.booleans()

# Masks whose queries see nothing that is later than their piece. ``Causal() | Prefix(n)`` is among them where the first piece holds
# the prefix; ``Causal() | Global(n)`` is not, since its global queries see everything.
MASKS = [
    masks.Causal(), masks.Causal() & masks.Local(2), masks.Causal() & masks.Local(0), masks.Local(3) & masks.Causal() & ~masks.Local(0),
    masks.Causal() & masks.Dilated(1, 3), masks.Causal() & masks.Windows(3, shift=1), masks.Causal() & (masks.Local(1) | masks.Global(2)),
    masks.Causal() & masks.Where(lambda b, h, q, k: (h + b) % 2 == 0) | masks.Local(1) & masks.Causal(),
    masks.Causal() | masks.Prefix(1), masks.Causal() & masks.Local(1) | masks.Prefix(1),
]  # fmt: skip
POSITIONS: list[Callable[[], Any]] = [
    lambda: None,
    lambda: positions.Rotary(DIM // HEADS),
    lambda: positions.Rotary(DIM // HEADS, scaling=positions.YaRN(4.0, original_length=8)) + positions.Sinusoidal(DIM),
    lambda: positions.RelativeBias(HEADS, buckets=8, max_distance=10),
    lambda: positions.DistanceDecay(HEADS, learned=True) + positions.Learned(DIM, 64),
    lambda: lambda: positions.ContinuousBias(HEADS, hidden=8),
]
OPTIONS: list[dict[str, Any]] = [
    {}, {"kv_heads": 2, "qk_norm": "rms"}, {"kv_heads": 1, "gate": True, "norm": "post"}, {"sinks": True, "softcap": 3.0},
    {"norm": "parallel", "norm_layer": "rms"},
]  # fmt: skip
models = st.builds(
    lambda mask, position, options, dtype: lambda: redrawn(xf.Encoder(DIM, 2, HEADS, mask=mask, position=position(), **options), dtype),
    st.sampled_from(MASKS), st.sampled_from(POSITIONS), st.sampled_from(OPTIONS), st.sampled_from(DTYPES),
)  # fmt: skip


# -- equal to one pass -------------------------------------------------------------------------------------------------------


@given(models, sizes, grad)
def test_pieces_of_a_sequence(make: Callable[[], xf.Encoder], sizes: list[int], with_gradients: bool) -> None:
    model = make()
    x = tokens(sum(sizes), next(model.parameters()).dtype)
    with torch.set_grad_enabled(with_gradients):
        assert_equal(decoded(model, x, pieces(sizes)), model(x))


@given(models, sizes, st.integers(1, 3))
def test_prefix_tokens_come_with_the_first_piece(make: Callable[[], xf.Encoder], sizes: list[int], prefix: int) -> None:
    model = make()
    x = tokens(prefix + sum(sizes), next(model.parameters()).dtype)
    with torch.no_grad():
        assert_equal(decoded(model, x, pieces(sizes, prefix)), model(x, xf.Sequence(sum(sizes), prefix=prefix)))


@given(
    st.sampled_from([masks.Causal(), masks.Causal() & masks.Local(1.5), masks.Causal() & (masks.Local(0.5) | masks.Global(1))]),
    st.sampled_from([
        lambda: positions.Rotary(DIM // HEADS) + positions.Sinusoidal(DIM), lambda: positions.DistanceDecay(HEADS),
        lambda: positions.RelativeBias(HEADS), lambda: positions.ContinuousBias(HEADS, hidden=8),
    ]),
    sizes, st.booleans(), st.integers(0, 1),
)  # fmt: skip
def test_pieces_of_a_timeline(mask: masks.Mask, position: Any, sizes: list[int], each_row: bool, prefix: int) -> None:
    model = redrawn(xf.Encoder(DIM, 2, HEADS, mask=mask, position=position()))
    times = (torch.rand(ROWS, sum(sizes), dtype=torch.float64) + 0.01).cumsum(-1)
    times = times if each_row else times[0]
    x = tokens(prefix + sum(sizes))
    domains = [xf.Timeline(part, prefix=prefix if i == 0 else 0) for i, part in enumerate(times.split(sizes, -1))]
    with torch.no_grad():
        assert_equal(decoded(model, x, domains), model(x, xf.Timeline(times, prefix=prefix)))


@given(
    st.sampled_from([masks.Causal(), masks.Causal() & masks.Local(2), masks.Local(1) & masks.Causal() | masks.Local(0)]),
    st.booleans(), st.sampled_from(DTYPES), sizes, grad, st.integers(0, 2**16),
)  # fmt: skip
def test_hidden_keys_and_what_is_out_of_reach(
    mask: masks.Mask, timeline: bool, dtype: torch.dtype, sizes: list[int], with_gradients: bool, seed: int
) -> None:
    """What a mask says of each key is said of all tokens so far, those among them that are kept no more."""
    torch.manual_seed(seed)
    count, position = sum(sizes), positions.Rotary(DIM // HEADS) + positions.DistanceDecay(HEADS)
    model = redrawn(xf.Encoder(DIM, 2, HEADS, mask=mask, position=position), dtype)
    x, seen = tokens(count, dtype), torch.rand(ROWS, count) < 0.7
    times = (torch.rand(ROWS, count, dtype=torch.float64) + 0.1).cumsum(-1)
    domains = [xf.Timeline(part) for part in times.split(sizes, -1)] if timeline else pieces(sizes)
    cache, parts, end = xf.Cache(), [], 0
    with torch.set_grad_enabled(with_gradients):
        for domain in domains:
            end += domain.num_tokens
            part = x[:, end - domain.num_tokens : end]
            parts.append(model(part, domain, mask=masks.Keys(seen[:, :end]), cache=cache))
        whole = xf.Timeline(times) if timeline else xf.Sequence(count)
        assert_equal(torch.cat(parts, 1), model(x, whole, mask=masks.Keys(seen)))


@pytest.mark.parametrize(
    "hide",
    [
        lambda allowed: masks.Dense(allowed),
        lambda allowed: ~masks.Dense(~allowed),
        lambda allowed: masks.Keys(allowed[0]) & masks.Full() | masks.Keys(allowed[0]) & masks.Local(1),
        lambda allowed: masks.Segments(torch.ones(1, dtype=torch.long), allowed[0].long()),
    ],
)
def test_every_mask_that_names_keys(hide: Callable[[Tensor], masks.Mask]) -> None:
    layer, x, cache = redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal() & masks.Local(2))), tokens(9), xf.Cache()
    allowed = torch.tensor([[True, False, True, True, False, True, True, False, True]])
    with torch.no_grad():
        decoded(layer, x[:, :8], pieces([1] * 8), cache)
        got = layer(x[:, 8:], xf.Sequence(1, start=8), mask=hide(allowed), cache=cache)
        assert_equal(got, layer(x, mask=masks.Keys(allowed[0]))[:, 8:])
    with pytest.raises(ValueError, match="one entry for each key"):
        layer(x[:, 8:], xf.Sequence(1, start=9), mask=masks.Keys(allowed[0]), cache=cache)


@given(sizes, st.booleans(), st.sampled_from([None, [3, 5]]), grad)
def test_the_context_is_given_once(
    sizes: list[int], again: bool, lengths: list[int] | None, with_gradients: bool
) -> None:
    position = positions.Sinusoidal(DIM) + positions.RelativeBias(HEADS)
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=2, position=position, qk_norm="rms"))
    source, target = tokens(5), tokens(sum(sizes))
    source_domain = None if lengths is None else xf.Sequence.padded(lengths)
    with torch.set_grad_enabled(with_gradients):
        wanted = model(source, target, source_domain)
        cross: dict[str, Any] = {"context": model.encoder(source, source_domain), "context_domain": source_domain}
        cache, parts = xf.Cache(), []
        for part, domain in zip(target.split(sizes, 1), pieces(sizes), strict=True):
            parts.append(model.decoder(part, domain, cache=cache, **cross))
            cross = cross if again else {}
        assert_equal(torch.cat(parts, 1), wanted)


def test_cross_attention_turns_queries_and_keys_by_their_own_places() -> None:
    layer = redrawn(xf.Attention(DIM, HEADS, position=positions.Rotary(DIM // HEADS), mask=masks.Local(2)))
    x, context, cache = tokens(6), tokens(8), xf.Cache()
    wanted = layer(x, xf.Sequence(6, start=3), context=context)
    parts = [
        layer(x[:, t : t + 1], xf.Sequence(1, start=3 + t), context=context if t == 0 else None, cache=cache)
        for t in range(6)
    ]
    assert_equal(torch.cat(parts, 1), wanted)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Local(2)])
def test_gradients_flow_through_the_cache(mask: masks.Mask) -> None:
    model, x = (
        redrawn(xf.Encoder(DIM, 2, HEADS, mask=mask, position=positions.RelativeBias(HEADS))),
        tokens(9).requires_grad_(),
    )
    direction = tokens(9)
    wanted = torch.autograd.grad((model(x) * direction).sum(), [x, *model.parameters()])
    got = torch.autograd.grad((decoded(model, x, pieces([4, 1, 1, 3])) * direction).sum(), [x, *model.parameters()])
    assert_close(got, wanted, "gradients", depth=2 * 3, scale=largest(wanted))


def test_one_item_without_a_batch() -> None:
    model, x = redrawn(xf.Encoder(DIM, 2, HEADS, mask=masks.Causal())), tokens(6)[0]
    assert_equal(decoded(model, x, pieces([2, 3, 1])), model(x))


def test_caches_do_not_meet() -> None:
    model, x, y = redrawn(xf.Encoder(DIM, 2, HEADS, mask=masks.Causal())), tokens(4), tokens(4)
    first, second, steps = xf.Cache(), xf.Cache(), []
    with torch.no_grad():
        for t in range(4):
            at = xf.Sequence(1, start=t)
            steps.append([model(z[:, t : t + 1], at, cache=cache) for z, cache in ((x, first), (y, second))])
        for part, whole in zip(zip(*steps, strict=True), (x, y), strict=True):
            assert_equal(torch.cat(part, 1), model(whole))


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Local(3)])
def test_a_copy_goes_on_by_itself(mask: masks.Mask) -> None:
    """As the beams of a search do, after one prompt."""
    model = redrawn(xf.Decoder(DIM, 2, HEADS, mask=mask))
    x, y, context, cache = tokens(8), tokens(8), tokens(3), xf.Cache()
    y[:, :5] = x[:, :5]
    with torch.no_grad():
        decoded(model, x[:, :5], pieces([4, 1]), cache, context=context)
        branches = [(x, cache), (y, copy.deepcopy(cache))]
        steps = [
            [model(z[:, t : t + 1], xf.Sequence(1, start=t), cache=branch) for z, branch in branches] for t in (5, 6, 7)
        ]
        for part, (whole, _) in zip(zip(*steps, strict=True), branches, strict=True):
            assert_equal(torch.cat(part, 1), model(whole, context=context)[:, 5:])


def test_a_mask_of_one_call_hides_nothing_from_the_next() -> None:
    layer, x, cache = redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal())), tokens(6), xf.Cache()
    with torch.no_grad():
        decoded(layer, x[:, :3], pieces([3]), cache)
        near = layer(x[:, 3:4], xf.Sequence(1, start=3), cache=cache, mask=masks.Local(1))
        assert_equal(near, layer(x[:, :4], mask=masks.Local(1))[:, 3:])
        for t in (4, 5):
            far = layer(x[:, t : t + 1], xf.Sequence(1, start=t), cache=cache)
            assert_equal(far, layer(x)[:, t : t + 1])


def test_in_inference_mode() -> None:
    model, x = (
        redrawn(xf.Encoder(DIM, 2, HEADS, mask=masks.Causal() & masks.Local(2), position=positions.Rotary(4))),
        tokens(20),
    )
    with torch.inference_mode():
        assert_equal(decoded(model, x, pieces([1] * 20)), model(x))


# -- what it keeps -----------------------------------------------------------------------------------------------------------


def room_for(count: int) -> int:
    """A quarter more than so many tokens, or 16."""
    return count + max(count // 4, 16)


def held(cache: xf.Cache) -> int:
    """Tokens that the buffers of each layer have room for."""
    (room,) = {entry.keys.untyped_storage().nbytes() // (8 * ROWS * DIM) for entry in cache._entries.values()}
    return room


@settings(max_examples=8)
@given(st.integers(0, 10), st.integers(0, 3), st.integers(1, 60))
def test_a_window_keeps_only_its_reach(reach: int, more: int, prompt: int) -> None:
    mask = masks.Causal() & masks.Local(reach) & masks.Local(reach + more)
    layer, cache, x = redrawn(xf.Attention(DIM, HEADS, mask=mask)), xf.Cache(), tokens(prompt + 30)
    with torch.no_grad():
        out = [layer(x[:, :prompt], cache=cache)]
        for t in range(prompt, prompt + 30):
            out.append(layer(x[:, t : t + 1], xf.Sequence(1, start=t), cache=cache))
            assert held(cache) <= max(room_for(reach + 1), prompt if t == prompt else 0)
        assert_equal(torch.cat(out, 1), layer(x))


@settings(max_examples=8)
@given(st.floats(0, 5), st.booleans(), st.integers(0, 2**16))
def test_a_window_of_time_keeps_only_its_reach(reach: float, each_row: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, cache, x = (
        redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal() & masks.Local(reach))),
        xf.Cache(),
        tokens(60),
    )
    times = (torch.rand(ROWS, 60, dtype=torch.float64) + 0.5).cumsum(-1)
    times = times if each_row else times[0]
    with torch.no_grad():
        out = decoded(layer, x, [xf.Timeline(part) for part in times.split(1, -1)], cache)
        assert_equal(out, layer(x, xf.Timeline(times)))
    kept = cache._entries[layer].domain
    assert torch.equal(kept.times, times[..., 60 - kept.num_tokens :])  # type: ignore[attr-defined]
    near = (times[..., -1:] - times <= reach).reshape(-1, 60).any(0)
    assert kept.num_tokens == int(near.sum()) and held(cache) <= room_for(int(2 * reach + 2))


def test_ranks_count_what_is_kept_no_more() -> None:
    """The first token is the first of all, not the first that is still there."""
    layer, x, times = (
        redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal() & masks.Local(2.0))),
        tokens(8),
        torch.arange(8.0),
    )
    cache = xf.Cache()
    with torch.no_grad():
        decoded(layer, x[:, :7], [xf.Timeline(part) for part in times[:7].split(1)], cache)
        got = layer(x[:, 7:], xf.Timeline(times[7:]), mask=~masks.Prefix(1), cache=cache)
        assert_equal(got, layer(x, xf.Timeline(times))[:, 7:])


def test_layers_share_what_is_known_of_their_domains() -> None:
    model, cache = redrawn(xf.Encoder(DIM, 3, HEADS, mask=masks.Causal())), xf.Cache()
    decoded(model, tokens(3), [xf.Timeline(part) for part in torch.arange(3.0).split(1)], cache)
    assert len({id(entry.domain) for entry in cache._entries.values()}) == 1


def test_a_cache_without_bound_grows_seldom() -> None:
    layer, cache, rooms = redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal())), xf.Cache(), []
    with torch.no_grad():
        for t in range(200):
            layer(tokens(1), xf.Sequence(1, start=t), cache=cache)
            rooms.append(held(cache))
    assert len(set(rooms)) <= 10
    assert all(t < room <= room_for(t + 1) for t, room in enumerate(rooms))


def test_grouped_keys_are_kept_once() -> None:
    layer, cache = redrawn(xf.Attention(DIM, HEADS, kv_heads=1, mask=masks.Causal())), xf.Cache()
    layer(tokens(5), cache=cache)
    assert cache._entries[layer].keys.shape == (ROWS, 1, 5, DIM // HEADS)


# -- bad input ---------------------------------------------------------------------------------------------------------------


def after(first: xf.Domain, second: xf.Domain | None, rows: int = ROWS) -> Callable[[], Tensor]:
    """Two calls with one cache, of which the second is wrong."""

    def call() -> Tensor:
        layer, cache = redrawn(xf.Attention(DIM, HEADS)), xf.Cache()
        layer(tokens(first.num_tokens), first, cache=cache)
        count = 1 if second is None else second.num_tokens
        return layer(tokens(count)[:1].expand(rows, -1, -1), second, cache=cache)

    return call


TIMES = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (after(xf.Sequence(3), xf.Sequence(1, start=4)), r"the cached ones ended: Sequence\(n, start=3\); got Sequence\(1, start=4\)"),
        (after(xf.Sequence(3), xf.Sequence(1, start=2)), r"Sequence\(n, start=3\); got Sequence\(1, start=2\)"),
        (after(xf.Sequence(3, start=2), xf.Sequence(1, start=3)), r"Sequence\(n, start=5\)"),
        (after(xf.Sequence(3), None), r"Sequence\(n, start=3\); got Sequence\(1\)"),
        (after(xf.Sequence(3), xf.Sequence(1, start=3, prefix=1)), r"got Sequence\(1, start=3, prefix=1\)"),
        (after(xf.Sequence(3), xf.Timeline(TIMES)), "got Timeline"),
        (after(xf.Sequence(3), xf.Sequence.padded([1, 1], start=3)), "got Sequence.padded"),
        (after(xf.Timeline(TIMES), xf.Sequence(1, start=2)), r"a Timeline of as many rows, without a prefix; got Sequence\(1, start=2\)"),
        (after(xf.Timeline(TIMES), xf.Timeline(TIMES.expand(2, 2) + 2)), "a Timeline of as many rows"),
        (after(xf.Timeline(TIMES), xf.Timeline(TIMES + 2, prefix=1)), "without a prefix"),
        (after(xf.Timeline(TIMES), xf.Timeline(TIMES + 1)), "times must be later than those in the cache.*got 1 after 1"),
        (after(xf.Timeline(torch.stack([TIMES, TIMES + 5])), xf.Timeline(torch.stack([TIMES + 6, TIMES + 5]))), "got 5 after 6"),
        (after(xf.Sequence(3), xf.Sequence(1, start=3), rows=3), "x must keep its batch size from step to step; got 3 after 2"),
        (after(xf.Sequence.padded([3, 2]), None), "a cache holds .* a Sequence or Timeline shared by the whole batch; got Sequence.padded"),
        (after(xf.Sequence.packed([3, 2]), None), "got Sequence.packed"),
        (after(xf.Timeline(TIMES.expand(ROWS, 2), valid=torch.tensor([[True, False]] * ROWS)), None), "got Timeline"),
        (after(xf.Grid(2, 2), None), r"got Grid\(2, 2\)"),
        (after(xf.Graph(torch.zeros(2, 0, dtype=torch.long), 2), None), "got Graph"),
    ],
)  # fmt: skip
def test_bad_pieces(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_context() -> None:
    model, cache = xf.Decoder(DIM, 1, HEADS), xf.Cache()
    x, context = torch.randn(ROWS, 1, DIM), torch.randn(ROWS, 3, DIM)
    with pytest.raises(
        ValueError, match="context must be given to a block with cross=True, at least at the first call"
    ):
        model(x, cache=cache)
    model(x, context=context, cache=xf.Cache())
    with pytest.raises(ValueError, match="context_domain says where context lives, but no context came"):
        model.blocks[0].cross_attention(x, context_domain=xf.Sequence(3))


@pytest.mark.parametrize("domains", [pieces([3, 1]), [xf.Timeline(TIMES), xf.Timeline(TIMES + 2)]], ids=str)
def test_global_tokens_by_index_say_nothing_on_a_later_piece(domains: list[xf.Domain]) -> None:
    layer = redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal() & (masks.Local(1) | masks.Global([0]))))
    with pytest.raises(ValueError, match=r"whose indices begin anew; got Global\(\[0\]\)"):
        decoded(layer, tokens(4), domains)


def test_a_call_that_was_refused_leaves_the_cache_as_it_was() -> None:
    layer, x, cache = redrawn(xf.Attention(DIM, HEADS, mask=masks.Causal())), tokens(4), xf.Cache()
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
        with pytest.raises(ValueError, match="start"):
            layer(x[:, 2:], xf.Sequence(2, start=3), cache=cache)
        assert_equal(layer(x[:, 2:], xf.Sequence(2, start=2), cache=cache), layer(x)[:, 2:])


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Local(2)], ids=str)
def test_samples_go_on_from_one_beginning(mask: masks.Mask) -> None:
    layer, x, cache = redrawn(xf.Attention(DIM, HEADS, mask=mask)), tokens(4), xf.Cache()
    later = torch.randn(3 * ROWS, 2, DIM, dtype=x.dtype)
    with torch.no_grad():
        layer(x, cache=cache)
        samples = cache.repeated(3)
        whole = layer(torch.cat([x.repeat_interleave(3, 0), later], 1))
        assert_equal(layer(later, xf.Sequence(2, start=4), cache=samples), whole[:, 4:])
        assert_equal(layer(later[::3], xf.Sequence(2, start=4), cache=cache), whole[::3, 4:])  # which is as it was


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Local(1.5)], ids=str)
def test_samples_keep_the_times_of_their_row(mask: masks.Mask) -> None:
    layer, x, cache = redrawn(xf.Attention(DIM, HEADS, mask=mask, position=positions.Rotary(4))), tokens(4), xf.Cache()
    times = (torch.rand(ROWS, 6, dtype=torch.float64) + 0.1).cumsum(-1).repeat_interleave(3, 0)
    later = torch.randn(3 * ROWS, 2, DIM, dtype=x.dtype)
    with torch.no_grad():
        decoded(layer, x, [xf.Timeline(part) for part in times[::3, :4].split(1, -1)], cache)
        whole = layer(torch.cat([x.repeat_interleave(3, 0), later], 1), xf.Timeline(times))
        assert_equal(layer(later, xf.Timeline(times[:, 4:]), cache=cache.repeated(3)), whole[:, 4:])
