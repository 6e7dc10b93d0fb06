"""Linear maps of inference: the numbers of training, by another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import _linear

ACTIVATIONS: dict[Any, Any] = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu}


@given(
    st.lists(st.integers(0, 5), max_size=2), st.integers(1, 9), st.integers(1, 9), st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
)  # fmt: skip
def test_linear_is_its_formula(batch: list[int], inner: int, outer: int, activation: Any, bias: bool) -> None:
    x, weight = torch.randn(*batch, inner), torch.randn(outer, inner)
    b = torch.randn(outer) if bias else None
    wanted = ACTIVATIONS[activation](F.linear(x, weight, b))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "SMALL", 1)
        torch.testing.assert_close(_linear.linear(x, weight, b, activation), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(_linear.linear(x, weight, b, activation), wanted)  # with gradients nothing changes


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu"}, {"activation": nn.Tanh(), "norm": "layer"}], ids=str)
def test_a_feed_forward_layer_in_pieces_is_one_whole(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = xf.FeedForward(6, hidden=10, **options).eval(), torch.randn(3, 7, 6)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1)
    wanted = layer(x)
    monkeypatch.setattr(_linear, "SMALL", 1)
    for piece in (1, 45, 10_000):
        monkeypatch.setattr(_linear, "PIECE", piece)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_hooks_and_other_layers_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "SMALL", 1)
    block, x, seen = xf.Block(8, 2).eval(), torch.randn(1, 3, 8), []
    for layer in (block.feed_forward.up, block.feed_forward.down, block.attention.out):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(module) or output * 2)
    with torch.no_grad():
        twice = block(x)
    assert len(seen) == 3
    torch.testing.assert_close(twice, block(x), atol=1e-5, rtol=1e-5)

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    layer = xf.FeedForward(8, hidden=16).eval()
    layer.down = Adapted(16, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.down(F.gelu(layer.up(x))))


def test_autocast_and_fp64_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "SMALL", 1)
    layer, x = xf.FeedForward(8).eval(), torch.randn(2, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
