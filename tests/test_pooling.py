"""One vector for each item, on every kind of domain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close

PLAIN = {
    "mean": lambda x: x.mean(0) if len(x) else x.sum(0),
    "sum": lambda x: x.sum(0),
    "max": lambda x: x.amax(0) if len(x) else x.sum(0),
    "mean-max": lambda x: (x.mean(0) + x.amax(0)) / 2 if len(x) else x.sum(0),
}


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2), st.sampled_from(list(PLAIN)), st.booleans()
)
def test_pooling_is_that_of_each_item_alone(lengths: list[int], prefix: int, pool: str, packed: bool) -> None:
    items = [torch.randn(prefix + n, 3, dtype=torch.float64) for n in lengths]
    wanted = torch.stack([PLAIN[pool](item[prefix:]) for item in items])
    if packed:
        x, domain = torch.cat(items), xf.Sequence.packed(lengths, prefix=prefix)
    else:
        domain = xf.Sequence.padded(lengths, prefix=prefix)
        x = torch.full((len(items), domain.num_tokens, 3), torch.nan, dtype=torch.float64)
        for row, item in zip(x, items, strict=True):
            row[: len(item)] = item
    assert_close(xf.Pooling(3, pool)(x, domain), wanted)
    if prefix:
        assert torch.equal(xf.Pooling(3, "token")(x, domain), torch.stack([item[0] for item in items]))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2), st.booleans())
def test_attention_pools_each_item_alone(lengths: list[int], prefix: int, with_prefix: bool) -> None:
    pool = xf.MultiheadPooling(6, 2, prefix=with_prefix).double()
    for parameter in pool.parameters():
        nn.init.uniform_(parameter, -1, 1)
    items = [torch.randn(prefix + n, 6, dtype=torch.float64) for n in lengths]

    def plain(item: Tensor) -> Tensor:
        q, (k, v) = pool.attention.qkv(pool.latent)[:6], pool.attention.qkv(item)[:, 6:].split(6, -1)
        heads = [torch.softmax(k[:, h] @ q[h] / 3**0.5, 0) @ v[:, h] for h in (slice(3), slice(3, 6))]
        y = pool.attention.out(torch.cat(heads))
        return y + pool.feed_forward(pool.norm(y))

    wanted = torch.stack([plain(item if with_prefix else item[prefix:]) for item in items])
    got = pool(torch.cat(items), xf.Sequence.packed(lengths, prefix=prefix))
    assert_close(got, wanted)
    alone = pool(items[0][None], xf.Sequence(lengths[0], prefix=prefix))
    assert_close(alone, wanted[:1])


@pytest.mark.usefixtures("precision")
def test_graphs_are_pooled_one_by_one() -> None:
    graphs = xf.Graph(torch.tensor([[0, 3], [1, 4]]), 5, batch=torch.tensor([0, 0, 1, 1, 1]), virtual_nodes=1)
    x = torch.randn(graphs.num_tokens, 4)
    offsets = graphs.offsets.tolist()
    wanted = torch.stack([x[a + 1 : b].mean(0) for a, b in zip(offsets, offsets[1:], strict=False)])
    assert_close(xf.Pooling(4)(x, graphs), wanted)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"pool must be one of 'token'.*got pool='median'"):
        xf.Pooling(4, "median")
    with pytest.raises(ValueError, match="heads: for pool='attention' only"):
        xf.Pooling(4, "mean", heads=2)
    with pytest.raises(ValueError, match="first prefix token"):
        xf.Pooling(4, "token")(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"x must be \(tokens, dim\) on a packed domain"):
        xf.Pooling(4)(torch.randn(1, 3, 4), xf.Sequence.packed([1, 2]))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("pool", ["mean", "sum", "max", "mean-max", "attention"])
def test_packed_items_have_the_derivatives_of_each_alone(pool: str) -> None:
    lengths = [4, 1, 3, 0]
    layer, domain, x, direction = (
        xf.Pooling(4, pool),
        xf.Sequence.packed(lengths),
        torch.randn(8, 4),
        torch.randn(8, 4),
    )

    def energy(x: Tensor) -> Tensor:
        return layer(x, domain).sin().sum()

    def alone(x: Tensor) -> Tensor:
        return torch.cat([layer(item[None]) for item in x.split(lengths)]).sin().sum()

    for f in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        assert_close(f(energy)(x), f(alone)(x), f.__name__, depth=10, scale=10.0)
    slopes = [torch.func.jvp(function, (x,), (direction,))[1] for function in (energy, alone)]
    assert_close(*slopes, "jvp", depth=10, scale=10.0)
    found = []
    for function in (energy, alone):
        leaf = x.clone().requires_grad_()
        (force,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        found.append([force.detach(), *torch.autograd.grad(force.square().sum(), leaf)])
    assert_close(*found, "forces and their derivative", depth=10, scale=10.0)
