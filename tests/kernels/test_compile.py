"""Layers in torch.compile: one graph, the same numbers.

Plans and the facts of a domain read data, so they are made by one call before compiling, as the documentation says.
"""

from __future__ import annotations

import pytest
import torch

import xformerlib as xf
from xformerlib import masks, positions

CASES = {
    "windowed": (masks.Causal() & masks.Local(20), positions.Rotary(8), xf.Sequence(512)),
    "windowed with a trained bias": (masks.Local(20), positions.RelativeBias(4), xf.Sequence(512)),
    "blocks": (masks.Windows(7), positions.RelativeBias(4, size=(7, 7)), xf.Grid(28, 28)),
    "packed": (masks.Causal(), None, xf.Sequence.packed([100, 200, 150])),
    "chunked": (masks.Where(lambda b, h, q, k: (q + k) % 3 == 0), None, xf.Sequence(1100)),
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_layers_compile_to_one_graph(name: str) -> None:
    mask, position, domain = CASES[name]
    kernel = (
        name.split()[0] if name.split()[0] in ("sdpa", "windowed", "blocks", "packed", "sparse", "chunked") else "auto"
    )
    layer = xf.Attention(32, 4, mask=mask, position=position, kernel="auto" if " " in name else kernel)
    x = torch.randn(1, domain.num_tokens, 32)
    want = layer(x, domain)
    want.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, domain)
    got.square().sum().backward()
    assert torch.allclose(got, want, atol=1e-5)
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
