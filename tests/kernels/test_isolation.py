"""One item never changes another, whatever the kernel: neither its output nor its gradients. A NaN is seen by those who may see it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import graph, masks, positions
from xformerlib.kernels._masked import masked_sums

pytestmark = pytest.mark.usefixtures("double")

BATCH = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
EDGES = torch.tensor([[0, 1, 2, 3, 5, 6, 7, 9, 10], [1, 2, 3, 4, 6, 7, 8, 10, 11]])
DOMAINS: dict[str, xf.Domain] = {
    "sequence": xf.Sequence.packed([5, 4, 3]),
    "grid": xf.Grid.packed([(1, 5), (2, 2), (3, 1)]),
    "graph": xf.Graph(EDGES, 12, batch=BATCH),
    "points": xf.Points(torch.arange(36.0).view(12, 3) % 7, batch=BATCH),
    "timeline": xf.Timeline.packed(torch.arange(12.0) % 5, [5, 4, 3]),
}
MASKS: dict[str, masks.Mask] = {
    "full": masks.Full(), "local": masks.Local(2), "causal": masks.Causal(), "window | global": masks.Local(1) | masks.Global(1),
    "hidden keys": masks.Keys(torch.arange(12) % 4 != 2),
}  # fmt: skip
KERNELS = ("auto", "sdpa", "packed", "windowed", "sparse", "chunked", "reference")
BAD = (float("nan"), float("inf"))


def _cells() -> list[tuple[str, str, str]]:
    """Every domain, mask and kernel that can compute it."""
    found = []
    for (where, domain), (what, mask), kernel in itertools.product(DOMAINS.items(), MASKS.items(), KERNELS):
        if what == "causal" and where == "points":
            continue
        try:
            xf.plan(mask, domain, heads=2, head_dim=4, kernel=kernel)
        except ValueError:
            continue
        found.append((where, what, kernel))
    return found


def test_most_cells_exist() -> None:
    assert len(_cells()) > 80
    assert {kernel for *_, kernel in _cells()} == set(KERNELS)


@pytest.mark.parametrize(("where", "what", "kernel"), _cells())
def test_a_bad_item_stays_by_itself(where: str, what: str, kernel: str) -> None:
    """Each of query, key, value and the gradient of the output is spoilt in turn, in each item."""
    domain, mask = DOMAINS[where], MASKS[what]
    clean = [torch.randn(1, 2, 12, 4) for _ in range(4)]
    want = _found(clean, mask, domain, kernel)
    for item, which, bad in itertools.product(range(3), range(4), BAD):
        spoilt = [x.clone() for x in clean]
        token = int((item == BATCH).nonzero()[0])
        spoilt[which][:, :, token] = bad
        got = _found(spoilt, mask, domain, kernel)
        others = item != BATCH
        for name, a, b in zip(("output", "query", "key", "value"), got, want, strict=True):
            assert_close(
                a[:, :, others], b[:, :, others], f"{name} beside item {item}, {'qkvg'[which]} spoilt by {bad}"
            )
        first = got[0][:, :, token]
        sees_itself = bool(mask.dense(domain)[token, token]) if where != "graph" else what != "hidden keys"
        if which in (1, 2) and sees_itself:
            assert not bool(first.isfinite().all()), f"{'qk'[which - 1]} of the token itself is hidden from it"


def _found(tensors: list[Tensor], mask: masks.Mask, domain: xf.Domain, kernel: str) -> list[Tensor]:
    *inputs, direction = tensors
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = xf.attention(*leaves, mask=mask, domain=domain, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("kernel", ["windowed", "chunked", "sparse", "sdpa", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_a_masked_number_is_hidden_within_an_item(kernel: str, bad: float) -> None:
    domain = (
        xf.Sequence(64) if kernel != "sparse" else xf.Graph(torch.tensor([list(range(63)), list(range(1, 64))]), 64)
    )
    mask = masks.Edges(self_loops=True) if kernel == "sparse" else masks.Causal() & masks.Local(3)
    q, k, v = (torch.randn(1, 2, 64, 4, requires_grad=True) for _ in range(3))
    want = xf.attention(q, k, v, mask=mask, domain=domain, kernel=kernel)
    for which in (1, 2):
        spoilt = [q, k.clone(), v.clone()]
        spoilt[which][:, :, 20] = bad
        got = xf.attention(*spoilt, mask=mask, domain=domain, kernel=kernel)
        sees = mask.dense(domain)[:, 20]
        assert_close(got[:, :, ~sees], want[:, :, ~sees], "queries that may not see it")
        if which == 2 or bad != bad:  # a key of infinities may score minus infinity
            assert not bool(got[:, :, sees].isfinite().all(-1).any())


@pytest.mark.parametrize("kernel", ["auto", "chunked", "reference", "sdpa"])
def test_a_nan_bias_is_seen(kernel: str) -> None:
    q = torch.randn(1, 2, 20, 4)
    bias = torch.zeros(20, 20)
    bias[3, 4], bias[5, 6] = torch.nan, -torch.inf
    out = xf.attention(q, q, q, bias=bias, kernel=kernel)
    assert bool(out[:, :, 3].isnan().all())
    others = torch.arange(20) != 3
    assert bool(out[:, :, others].isfinite().all())
    causal = xf.attention(q, q, q, bias=bias, mask=masks.Causal(), kernel=kernel)
    assert bool(causal.isfinite().all())  # query 3 may not see key 4


MODELS: dict[str, Any] = {
    "GraphTransformer": lambda: graph.GraphTransformer(
        4, 8, 3, num_layers=2, heads=2, position=positions.RelativeBias(2)
    ),
    "GPS": lambda: graph.GPS(4, 8, 3, num_layers=2, heads=2, norm="layer"),
    "Exphormer": lambda: graph.Exphormer(4, 8, 3, num_layers=1, heads=2, norm="layer"),
    "Graphormer": lambda: graph.Graphormer(4, 8, 3, num_layers=1, heads=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_graph_of_a_batch_stays_by_itself(name: str) -> None:
    model = MODELS[name]().eval()
    x = torch.randn(12, 4)
    want = model(x, EDGES, batch=BATCH)
    for item in range(3):
        spoilt = x.clone()
        spoilt[int((item == BATCH).nonzero()[0])] = torch.nan
        got = model(spoilt, EDGES, batch=BATCH)
        of = BATCH if len(got) == len(BATCH) else torch.arange(3)  # of nodes, or of graphs
        assert_close(got[of != item], want[of != item], f"{name}, graphs beside {item}", depth=2)
        assert bool(got[of == item].isnan().any())


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(kernel, {}) for kernel in ("auto", "sdpa", "chunked", "windowed", "packed")]
    + [(kernel, {"softcap": 2.0}) for kernel in ("auto", "chunked", "windowed", "packed")],
)
@pytest.mark.parametrize(("which", "bad"), [(0, -torch.inf), (1, -torch.inf), (1, torch.inf)])
def test_an_infinity_that_leaves_outputs_finite_stays_by_itself(
    kernel: str, options: dict[str, Any], which: int, bad: float
) -> None:
    domain, mask = xf.Sequence.packed([6, 5]), masks.Local(2) if kernel == "windowed" else None
    clean = [torch.rand(1, 2, 11, 4) + 0.1 for _ in range(3)]

    def found(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = xf.attention(*leaves, domain=domain, mask=mask, kernel=kernel, **options)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    spoilt = [x.clone() for x in clean]
    spoilt[which][:, :, 8, 0] = bad
    for name, a, b in zip(("output", "query", "key", "value"), found(spoilt), found(clean), strict=True):
        assert_close(a[:, :, :6], b[:, :, :6], name, scale=1.0)


@given(st.integers(0, 2**31))
def test_masked_products_are_products_of_what_counts(seed: int) -> None:
    """Beside infinities and NaN, in fp64: each sum over the allowed pairs alone, as IEEE has it."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        which = torch.rand(*shape, generator=generator)
        return (
            x.masked_fill(which < 0.1, torch.inf)
            .masked_fill(which > 0.9, -torch.inf)
            .masked_fill((which - 0.5).abs() < 0.03, torch.nan)
        )

    allowed = torch.rand(5, 6, generator=generator) < 0.7
    weights, columns = torch.randn(5, 6, generator=generator, dtype=torch.float64), some(6, 3)
    sums = masked_sums(weights.masked_fill(~allowed, 0), columns, allowed)
    for i, j in itertools.product(range(5), range(3)):
        kept = allowed[i]
        want = (weights[i, kept] * columns[kept, j]).sum()
        assert_close(sums[i, j], want, f"row {i}, column {j}", scale=10.0)
