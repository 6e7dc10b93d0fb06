"""A layer moves tokens so that its windows are slices, and nobody sees it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

import xformerlib as xf
from tests.closeness import assert_close, largest
from xformerlib import masks, positions
from xformerlib._arranged import arrangement, moved
from xformerlib.kernels._tiles import Slices

CPU = torch.device("cpu")


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
)
def test_windows_stand_one_behind_the_other(
    sides: tuple[int, int], size: tuple[int, int], shift: tuple[int, int]
) -> None:
    domain, mask = xf.Grid(*sides), masks.Windows(size, shift=shift)
    there = arrangement(mask, domain, CPU)
    if there is None:
        return
    seen = mask.dense(there.domain)
    first = seen.int().argmax(-1)
    assert torch.equal(first, first.sort().values)
    assert torch.equal(seen.sum(-1), torch.stack([(first == f).sum() for f in first]))
    assert torch.equal(seen, mask.dense(domain)[there.order][:, there.order])


def test_what_is_moved_comes_back() -> None:
    there = arrangement(masks.Windows(3, shift=1), xf.Grid(6, 6), CPU)
    x = torch.randn(2, 36, 3, dtype=torch.float64, requires_grad=True)
    assert there is not None
    assert torch.equal(moved(x, there.order, there.back), x[:, there.order])
    assert torch.equal(moved(moved(x, there.order, there.back), there.back, there.order), x)
    assert torch.autograd.gradcheck(lambda x: moved(x, there.order, there.back), x)


@pytest.mark.parametrize(
    ("mask", "domain"),
    [
        (masks.Full(), xf.Grid(8, 8)),
        (masks.Windows(4), xf.Sequence(16)),
        (masks.Axial(1), xf.Grid(8, 8)),
        (masks.Windows(4), xf.Grid(8, 8, prefix=1)),
        (masks.Windows(4), xf.Grid.packed([(8, 8), (4, 4)])),
        (masks.Windows(4) & masks.Causal(), xf.Grid(8, 8)),
        (masks.Windows(4), xf.Grid(8, 8).subset(torch.arange(40))),
    ],
)
def test_what_is_not_arranged(mask: masks.Mask, domain: xf.Domain) -> None:
    assert arrangement(mask, domain, CPU) is None


OPTIONS = {
    "plain": {},
    "grouped": {"kv_heads": 2, "gate": True, "sinks": True, "out_norm": "rms"},
    "cosine": {"qk_norm": "cosine", "softcap": 3.0},
}


@pytest.mark.parametrize("mask", [masks.Windows(7), masks.Windows((7, 5), shift=(3, -1)), masks.Axial(0)], ids=repr)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_computes_the_same(mask: masks.Mask, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    domain, position = xf.Grid(40, 24), positions.RelativeBias(4, size=(7, 7)) + positions.Rotary(4)
    layer = xf.Attention(16, 4, mask=mask, position=position, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(3, domain.num_tokens, 16, dtype=torch.float64, requires_grad=True)
    there = layer._arranged(domain, batch=3)
    assert there is not None
    ((part, _),) = xf.explain(layer, domain, batch=3)[""]._run  # what is told is what is run
    assert all(isinstance(tiles, Slices) for tiles in part.calls)
    inputs, grad = (x, *layer.parameters()), torch.randn_like(x)
    ours = layer(x, domain)
    found = torch.autograd.grad(ours, inputs, grad)
    layer.kernel = "reference"
    expected = layer(x, domain)
    assert_close(ours, expected, condition=10)  # scores up to so large
    wanted = torch.autograd.grad(expected, inputs, grad)
    assert_close(found, wanted, "gradients", depth=2, condition=10, scale=largest(wanted))


def test_a_mask_and_a_position_of_one_call_are_heard() -> None:
    torch.manual_seed(0)
    layer, domain = xf.Attention(8, 2).double().eval(), xf.Grid(48, 48)
    x = torch.randn(domain.num_tokens, 8, dtype=torch.float64)
    shared = positions.RelativeBias(2, size=(6, 6)).double()
    mask = masks.Windows(6, shift=1)
    assert layer._arranged(domain, mask, shared) is not None
    ours = layer(x, domain, mask=mask, position=shared)
    layer.kernel = "chunked"
    assert_close(ours, layer(x, domain, mask=mask, position=shared))


def test_few_tokens_stay_where_they_are() -> None:
    layer = xf.Attention(8, 2, mask=masks.Windows(2))
    assert layer._plan(xf.Grid(4, 4)).kernel == "sdpa"
    assert layer._arranged(xf.Grid(4, 4)) is None
    layer.kernel = "blocks"
    assert layer._arranged(xf.Grid(4, 4)) is not None
    layer.kernel = "chunked"
    assert layer._arranged(xf.Grid(4, 4)) is None
