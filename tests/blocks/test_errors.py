"""Bad options and bad input of blocks and stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import xformerlib as xf
from xformerlib import masks, positions


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: xf.FeedForward(8, activation="selu"), ValueError, "activation must be one of 'relu', .*got activation='selu'"),
        (lambda: xf.FeedForward(8, hidden=0), ValueError, "hidden must be >= 1; got hidden=0"),
        (lambda: xf.DropPath(1.0), ValueError, r"drop_path must be in \[0, 1\); got drop_path=1.0"),
        (lambda: xf.DropPath(-0.1), ValueError, "got drop_path=-0.1"),
        (lambda: xf.Block(8, 2, norm="middle"), ValueError, "norm must be one of 'pre', .*; got norm='middle'"),
        (lambda: xf.Block(8, 2, norm_layer="batch"), ValueError, "norm_layer must be 'layer', 'rms' or a callable.*got norm_layer='batch'"),
        (lambda: xf.Block(8, 3), ValueError, "dim must be divisible by heads; got dim=8 and heads=3"),
        (lambda: xf.Block(8, 2, colour="red"), TypeError, "colour"),
        (lambda: xf.Block(8, 2, mask=torch.ones(3, 3)), TypeError, "mask must be a mask.*got Tensor"),
        (lambda: xf.Encoder(8, 0, 2), ValueError, "depth must be a whole number >= 1; got depth=0"),
        (lambda: xf.Encoder(8, 2.0, 2), TypeError, "got depth=2.0"),
        (lambda: xf.Encoder(8, 2, 2, mask=[masks.Full()]), ValueError, "one for each of the 2 layers; got 1"),
        (lambda: xf.Encoder(8, 2, 2, mask=torch.ones(2)), TypeError, "mask must be a mask.*or a list.*got Tensor"),
        (lambda: xf.Encoder(8, 2, 2, mask=["causal", None]), TypeError, "mask must be a mask.*got str"),
        (lambda: xf.Encoder(8, 2, 2, position="rope"), TypeError, "position must be a position, a function.*got str"),
        (lambda: xf.Encoder(8, 2, 2, position=[positions.Rotary(4), "rope"]), TypeError, "or a list of these; got str"),
        (lambda: xf.Encoder(8, 2, 2, position=lambda: "rope"), TypeError, "makes a Position; got <lambda>, which makes .rope."),
        (lambda: xf.Encoder(8, 2, 2, position=lambda: positions.Sinusoidal(8)), ValueError, "Sinusoidal is added to the tokens once"),
        (lambda: xf.Encoder(8, 2, 2, position=positions.RelativeBias(4)), ValueError, "as many heads as the layer has, 2; got .* of 4"),
        (lambda: xf.Encoder(8, 2, 2, cross=True), ValueError, "cross is for a Decoder"),
        (lambda: xf.Encoder(8, 2, 2, drop_path=1.5), ValueError, "got drop_path=1.5"),
        (lambda: xf.Encoder(8, 2, 2, drop_path=[0.1]), ValueError, "drop_path must be one rate, or one for each of the 2 blocks; got 1"),
        (lambda: xf.EncoderDecoder(8, 2, norm="middle"), ValueError, "got norm='middle'"),
    ],
)  # fmt: skip
def test_bad_options(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


X, CONTEXT = torch.randn(2, 5, 8), torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: xf.Block(8, 2)(torch.randn(2, 5, 9)), ValueError, r"x must be \(batch, tokens, 8\) or \(tokens, 8\); got \(2, 5, 9\)"),
        (lambda: xf.Encoder(8, 1, 2)(torch.randn(5)), ValueError, r"got \(5,\)"),
        (lambda: xf.Encoder(8, 1, 2)(torch.ones(2, 5, 8, dtype=torch.long)), TypeError, "x must be a floating.*got torch.int64"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence(6)), ValueError, r"x must have as many tokens as its domain; got 5 and Sequence\(6\)"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence(5, prefix=1)), ValueError, "prefix=1 in front of each item included"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence.padded([5, 2, 1])), ValueError, "x must have one row for each of the 3 rows.*got 2"),
        (lambda: xf.Encoder(8, 1, 2)(X, "sequence"), TypeError, "the domain of x must be a domain.*got str"),
        (lambda: xf.Encoder(8, 1, 2)(X, mask=torch.ones(5, 5)), TypeError, "mask must be a mask.*got Tensor"),
        (lambda: xf.Encoder(8, 1, 2, mask=masks.Causal())(X, xf.Points(torch.randn(5, 2))), ValueError, "Causal is defined on"),
        (lambda: xf.Block(8, 2)(X, context=CONTEXT), ValueError, "context is for blocks with cross attention"),
        (lambda: xf.Block(8, 2)(X, context_domain=xf.Sequence(3)), ValueError, "context_domain is for blocks with cross attention"),
        (lambda: xf.Block(8, 2)(X, context_mask=masks.Full()), ValueError, "context_mask is for blocks with cross attention"),
        (lambda: xf.Block(8, 2, cross=True)(X), ValueError, "context must be given to a block with cross=True"),
        (lambda: xf.Decoder(8, 1, 2)(X), ValueError, "context must be given"),
        (lambda: xf.Decoder(8, 1, 2, cross=False)(X, context=CONTEXT), ValueError, "context is for blocks with cross attention"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT[..., :7]), ValueError, r"context must be \(batch, tokens, 8\).*got \(2, 3, 7\)"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT, context_domain=xf.Sequence(4)), ValueError, "context must have as many tokens"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT[:1]), ValueError, "same batch size"),
        (lambda: xf.Encoder(8, 1, 2, position=positions.Rotary(8))(X), ValueError, "head_dim=4; got Rotary"),
        (lambda: xf.Encoder(8, 1, 2, position=positions.Learned(8, 4))(X), ValueError, "Raise size"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
