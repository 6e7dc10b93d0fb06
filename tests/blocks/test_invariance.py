"""Whatever an encoder is given, padding, packing, batching and the future change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.blocks.formulas import DIM, HEADS, HIDDEN, NORMS, redrawn, tokens
from tests.closeness import assert_close, largest
from xformerlib import masks, positions

# -- padding, packing, batching --------------------------------------------------------------------------------------------

MASKS = [
    masks.Full(), masks.Causal(), masks.Local(2), masks.Causal() & masks.Local(1), masks.Local(1) | masks.Global(1),
    masks.Local(1, border="clamp"), masks.Dilated(1, 2), masks.Windows(3, shift=1), ~masks.Local(1), masks.Prefix(2) | masks.Local(0),
    masks.Expander(2, seed=0),
]  # fmt: skip
POSITIONS: list[Callable[[], positions.Position | None]] = [
    lambda: None,
    lambda: positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS),
    lambda: positions.Learned(DIM, 32) + positions.DistanceDecay(HEADS),
    lambda: positions.RelativeBias(HEADS) + positions.ContinuousBias(HEADS, hidden=8),
]
OPTIONS: list[dict[str, Any]] = [
    {}, {"qk_norm": "rms", "kv_heads": 2}, {"gate": True, "layer_scale": 0.5}, {"sinks": True, "softcap": 5.0},
]  # fmt: skip
# The model is made when it is called: what draws random numbers has no place in a strategy.
models = st.builds(
    lambda norm, norm_layer, mask, position, more: lambda: redrawn(
        xf.Encoder(DIM, 2, HEADS, norm=norm, norm_layer=norm_layer, mask=mask, position=position(), hidden=HIDDEN, **more)
    ),
    st.sampled_from(NORMS), st.sampled_from(["layer", "rms"]), st.sampled_from(MASKS), st.sampled_from(POSITIONS),
    st.sampled_from(OPTIONS),
)  # fmt: skip
LAYERS = 3  # depth of these models: two blocks and a norm
lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def gradients(model: nn.Module, out: Tensor, direction: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * direction).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@given(models, lengths, st.integers(0, 2), st.integers(0, 3))
def test_padding_changes_nothing(make: Callable[[], xf.Encoder], sizes: list[int], prefix: int, more: int) -> None:
    model = make()
    domain = xf.Sequence.padded(sizes, max(sizes) + more, prefix=prefix)
    items = [tokens(prefix + size) for size in sizes]
    x = torch.full((len(sizes), domain.num_tokens, DIM), torch.nan, dtype=torch.float64)
    for row, item in zip(x, items, strict=True):
        row[: len(item)] = item
    x.requires_grad_()
    out = model(x, domain)
    assert float(out.detach()[~domain.valid].abs().sum()) == 0
    direction = torch.randn_like(out)
    alone = [model(item, xf.Sequence(size, prefix=prefix)) for item, size in zip(items, sizes, strict=True)]
    for row, item in zip(out, alone, strict=True):
        assert_close(row[: len(item)], item, depth=LAYERS)
    (at_x,) = torch.autograd.grad((out * direction).sum(), x, retain_graph=True)
    assert bool(at_x.isfinite().all())
    assert float(at_x[~domain.valid].abs().sum()) == 0
    each = [gradients(model, item, along[: len(item)]) for item, along in zip(alone, direction, strict=True)]
    wanted = [sum(parts) for parts in zip(*each, strict=True)]
    # There and back. A table of relative positions has the sum of what its pairs have, which all but cancel.
    assert_close(gradients(model, out, direction), wanted, "gradients", depth=2 * LAYERS, scale=largest(wanted))


@given(models, lengths, st.integers(0, 2), st.sampled_from([torch.float64, torch.float32]))
def test_packing_changes_nothing(
    make: Callable[[], xf.Encoder], sizes: list[int], prefix: int, dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    domain = xf.Sequence.packed(sizes, prefix=prefix)
    items = [tokens(prefix + size, dtype=dtype) for size in sizes]
    out = model(torch.cat(items), domain)
    for got, item, size in zip(out.split([len(item) for item in items]), items, sizes, strict=True):
        assert_close(got, model(item, xf.Sequence(size, prefix=prefix)), depth=LAYERS)


@given(models, st.integers(1, 6))
def test_what_else_is_in_the_batch_changes_nothing(make: Callable[[], xf.Encoder], length: int) -> None:
    model = make()
    x = tokens(4, length)
    together = model(x)
    for i in range(4):
        assert_close(together[i], model(x[i]), depth=LAYERS)
    x[0] = torch.nan
    assert_close(model(x)[1:], together[1:], depth=LAYERS)
    assert_close(model(x[[2, 1]]), together[[2, 1]], depth=LAYERS)


def test_packed_grids_and_graphs_are_each_alone() -> None:
    mask, position = masks.Local(1) | masks.Global(1), positions.Rotary(DIM // 2)
    model = redrawn(xf.Encoder(DIM, 2, 2, mask=mask, position=position))
    sizes = [(2, 3), (4, 1), (3, 3)]
    items = [tokens(1 + h * w) for h, w in sizes]
    packed = model(torch.cat(items), xf.Grid.packed(sizes, prefix=1)).split([len(item) for item in items])
    for got, item, size in zip(packed, items, sizes, strict=True):
        assert_close(got, model(item, xf.Grid(*size, prefix=1)), depth=LAYERS)
    # Two graphs without symmetry, so that their spectra, which rotary positions take for coordinates, are unique.
    first, second = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 4, 3]]), torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]])
    batch = torch.tensor([0] * 5 + [1] * 4)
    x = tokens(9)
    both = model(x, xf.Graph(torch.cat([first, second + 5], 1), 9, batch=batch))
    assert_close(both[:5], model(x[:5], xf.Graph(first, 5)), depth=LAYERS)
    assert_close(both[5:], model(x[5:], xf.Graph(second, 4)), depth=LAYERS)


def test_padding_of_the_context_changes_nothing() -> None:
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1, position=positions.Sinusoidal(DIM)))
    source, target = tokens(2, 6), tokens(2, 5)
    source[0, 2:] = target[1, 3:] = torch.nan
    out = model(source, target, xf.Sequence.padded([2, 6]), xf.Sequence.padded([5, 3]))
    assert_close(out[:1], model(source[:1, :2], target[:1]), depth=LAYERS)
    assert_close(out[1:, :3], model(source[1:], target[1:, :3]), depth=LAYERS)
    assert float(out.detach()[1, 3:].abs().sum()) == 0
    packed = model(
        torch.cat([source[0, :2], source[1]]), torch.cat([target[0], target[1, :3]]), xf.Sequence.packed([2, 6]), xf.Sequence.packed([5, 3])
    )  # fmt: skip
    assert_close(packed, torch.cat([out[0], out[1, :3]]), depth=LAYERS)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), list(model.parameters())))


def test_no_tokens_and_no_rows() -> None:
    model = redrawn(xf.Encoder(DIM, 2, 2, mask=masks.Local(1), position=positions.Rotary(DIM // 2)))
    for shape in [(2, 0), (0, 5), (0, 0), (0,)]:
        assert model(tokens(*shape)).shape == (*shape, DIM)
    assert model(tokens(0), xf.Graph(torch.zeros(2, 0, dtype=torch.long), 0)).shape == (0, DIM)
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1))
    assert model(tokens(2, 0), tokens(2, 3)).isfinite().all()


# -- what came later, randomness, kinds of data --------------------------------------------------------------------------------


def causal_domains(length: int) -> list[xf.Domain]:
    times = torch.rand(length).cumsum(0)
    return [xf.Sequence(length), xf.Sequence(length - 1, prefix=1), xf.Timeline(times), xf.Grid(length // 2, 2)]


@given(
    st.sampled_from([masks.Causal(), masks.Causal() & masks.Local(2), masks.Causal() & (masks.Local(1) | masks.Global(1))]),
    st.sampled_from([POSITIONS[0], POSITIONS[1], lambda: positions.DistanceDecay(HEADS) + positions.ContinuousBias(HEADS, hidden=8)]),
    st.sampled_from(NORMS), st.integers(0, 3), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_the_future_never_leaks(
    mask: masks.Mask, position: Any, norm: Any, which: int, step: int, training: bool
) -> None:
    domain, x = causal_domains(10)[which], tokens(2, 10).float()
    model = xf.Decoder(
        DIM,
        2,
        HEADS,
        mask=mask,
        cross=False,
        position=position(),
        norm=norm,
        dropout=0.1,
        attention_dropout=0.1,
        drop_path=0.1,
    )
    model.train(training)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(x, domain)

    changed = x.clone()
    changed[:, step:] = 100 * torch.randn(2, 10 - step, DIM)
    out = run(x)
    assert torch.equal(out[:, :step], run(changed)[:, :step])
    changed[:, step:] = torch.nan
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(run(x)[:, :step].sum(), x)
    assert float(gradient[:, step:].abs().sum()) == 0


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "drop_path"])
def test_evaluation_is_deterministic_and_training_repeats_for_a_seed(option: str) -> None:
    model = xf.EncoderDecoder(DIM, HEADS, encoder_depth=2, decoder_depth=2, **{option: 0.3})
    source, target = torch.randn(2, 6, DIM), torch.randn(2, 5, DIM)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        out = model(source, target)
        return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not torch.equal(run(1)[0], run(2)[0])
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


def test_one_encoder_three_kinds_of_data() -> None:
    def encoder(kernel: str) -> xf.Encoder:
        return xf.Encoder(
            dim=32, depth=2, heads=4, mask=masks.Local(3) | masks.Global(1), position=positions.Rotary(8), kernel=kernel
        )  # fmt: skip

    model, oracle = encoder("auto"), encoder("reference").double()
    redrawn(oracle)
    model.load_state_dict(oracle.state_dict())
    edges = torch.randint(60, (2, 150))
    graph = xf.Graph(edges, 60)
    for domain in (xf.Grid(14, 14, prefix=1), xf.Sequence(300), graph):
        x = torch.randn(2, domain.num_tokens, 32)
        x = x[0] if domain is graph else x
        assert_close(model(x, domain), oracle(x.double(), domain), depth=LAYERS)
    # On each of them a token sees its neighbourhood and the global token, and no more.
    layer = redrawn(xf.Encoder(DIM, 1, HEADS, mask=masks.Local(1) | masks.Global(1)))
    for domain, far in (
        (xf.Grid(4, 4, prefix=1), 16),
        (xf.Sequence(9), 8),
        (xf.Graph(torch.tensor([[1, 2], [2, 3]]), 4), 1),
    ):
        x = tokens(domain.num_tokens)
        moved = x.clone()
        moved[far] = tokens(1)[0]
        same = (layer(x, domain) == layer(moved, domain)).all(-1)
        sees = (masks.Local(1) | masks.Global(1)).dense(domain)[:, far]
        assert torch.equal(same, ~sees)


def test_evaluation_in_inference_mode_does_not_spoil_training() -> None:
    position = positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS) + positions.RelativeBias(HEADS)
    model, domain = xf.Encoder(DIM, 1, HEADS, mask=masks.Local(2), position=position), xf.Sequence.packed([3, 4])
    x = torch.randn(7, DIM)
    with torch.inference_mode():
        model(x, domain)
        model(x)
    (model(x, domain).sum() + model(x).sum()).backward()
    assert model.position.terms[2].table.grad is not None


def test_mixed_precision_stays_close() -> None:
    model, x = (
        xf.Encoder(DIM, 2, HEADS, mask=masks.Causal(), position=positions.Rotary(DIM // HEADS)),
        torch.randn(2, 9, DIM),
    )
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert_close(got.bfloat16(), wanted, "under autocast", depth=LAYERS)
    assert_close(copy.deepcopy(model).bfloat16()(x.bfloat16()), wanted, "in half precision", depth=LAYERS)
