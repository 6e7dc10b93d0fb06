"""ProbSparse attention against loops, and what it must never do: scramble heads, mix rows, look ahead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import masks
from xformerlib.time_series import prob_sparse_attention

pytestmark = pytest.mark.usefixtures("double")


def tensors(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (2 * torch.randn(*shape, 5) for _ in range(3))
    return query, key, value


def some_visible(batch: int, keys: int) -> Tensor:
    visible = torch.rand(batch, keys) < 0.7
    visible[:, keys // 2] = True
    return visible


def by_loops(query: Tensor, key: Tensor, value: Tensor, factor: float, causal: bool, visible: Tensor) -> Tensor:
    """The definition, one token at a time."""
    batch, heads, tokens, dim = query.shape
    count = math.ceil(factor * math.log(tokens))
    out = torch.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            sees = [[j for j in range(i + 1 if causal else tokens) if visible[b, j]] for i in range(tokens)]
            measure = [-math.inf] * tokens
            for i in visible[b].nonzero()[:, 0].tolist():
                shares = [math.modf((i * count + s) * (math.sqrt(5) - 1) / 2)[0] for s in range(count)]
                scores = [float(query[b, h, i] @ key[b, h, sees[i][int(r * len(sees[i]))]]) for r in shares]
                measure[i] = max(scores) - sum(scores) / len(scores)
            for i in range(tokens):
                larger = sum(m >= measure[i] for m in measure[:i])
                larger += 0 if causal else sum(m > measure[i] for m in measure[i:])
                if visible[b, i] and larger < count:
                    weights = torch.softmax(key[b, h, sees[i]] @ query[b, h, i] / math.sqrt(dim), 0)
                    out[b, h, i] = weights @ value[b, h, sees[i]]
                elif sees[i]:
                    out[b, h, i] = value[b, h, sees[i]].mean(0)
    return out


@settings(max_examples=20)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), tokens=st.integers(4, 18),
    factor=st.sampled_from([0.4, 0.7, 1.0]), causal=st.booleans(), hide=st.booleans(),
)  # fmt: skip
def test_it_is_its_definition(batch: int, heads: int, tokens: int, factor: float, causal: bool, hide: bool) -> None:
    query, key, value = (x.double().round() for x in tensors(batch, heads, tokens))  # so that M is exact
    visible = some_visible(batch, tokens) if hide else torch.ones(batch, tokens, dtype=torch.bool)
    out = prob_sparse_attention(query, key, value, factor=factor, causal=causal, visible=visible if hide else None)
    assert_close(out, by_loops(query, key, value, factor, causal, visible))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hide", [False, True])
def test_it_is_full_attention_where_every_query_is_chosen(causal: bool, hide: bool, precision: torch.dtype) -> None:
    query, key, value = tensors(3, 4, 30)
    visible = some_visible(3, 30) if hide else torch.ones(3, 30, dtype=torch.bool)
    out = prob_sparse_attention(query, key, value, factor=30 / math.log(30), causal=causal, visible=visible)
    mask = masks.Keys(visible) & masks.Causal() if causal else masks.Keys(visible)
    assert_close(out, xf.attention(query, key, value, mask=mask))
    fewer = prob_sparse_attention(query, key, value, factor=1.0, causal=causal, visible=visible)
    assert not torch.allclose(fewer, out)


def test_queries_with_a_peak_are_the_ones_that_attend() -> None:
    query, key, value = tensors(1, 1, 64)
    query *= 0.01
    query[0, 0, [5, 40]] *= 300
    out = prob_sparse_attention(query, key, value, factor=0.4)  # two of them
    mean = value.mean(2)[0, 0]
    attends = [i for i in range(64) if not torch.allclose(out[0, 0, i], mean)]
    assert attends == [5, 40]


@given(seed=st.integers(0, 1000), step=st.integers(1, 39), hide=st.booleans())
def test_no_step_sees_a_later_one(seed: int, step: int, hide: bool) -> None:
    torch.manual_seed(seed)
    before = tensors(2, 2, 40)
    visible = some_visible(2, 40) if hide else None
    after = tuple(torch.cat([x[:, :, :step], 5 * torch.randn_like(x[:, :, step:])], 2) for x in before)
    out, changed = (prob_sparse_attention(*x, factor=1.0, causal=True, visible=visible) for x in (before, after))
    assert_close(changed[:, :, :step], out[:, :, :step])
    assert not torch.allclose(changed[:, :, step:], out[:, :, step:])


def test_no_gradient_comes_from_a_later_step() -> None:
    given_ = [x.requires_grad_() for x in tensors(2, 2, 40)]
    prob_sparse_attention(*given_, factor=1.0, causal=True)[:, :, :25].square().sum().backward()
    for x in given_:
        assert x.grad is not None and (x.grad[:, :, 25:] == 0).all() and (x.grad[:, :, :25] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
def test_rows_and_heads_are_by_themselves(causal: bool) -> None:
    query, key, value = tensors(3, 4, 40)
    out = prob_sparse_attention(query, key, value, factor=1.0, causal=causal)
    for b in range(3):
        for h in range(4):
            alone = prob_sparse_attention(
                *(x[b : b + 1, h : h + 1] for x in (query, key, value)), factor=1.0, causal=causal
            )
            assert_close(out[b, h], alone[0, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_hidden_reaches_nothing(causal: bool) -> None:
    query, key, value = tensors(3, 2, 40)
    visible = some_visible(3, 40)
    visible[2] = False  # a row that sees nothing
    out = prob_sparse_attention(query, key, value, factor=1.0, causal=causal, visible=visible)
    assert (out[2] == 0).all()
    hidden = ~visible[:, None, :, None]
    key, value = (x.masked_fill(hidden, torch.nan).requires_grad_() for x in (key, value))
    again = prob_sparse_attention(query, key, value, factor=1.0, causal=causal, visible=visible)
    assert_close(again, out)
    again.square().sum().backward()
    for x in (key, value):
        assert x.grad is not None and (x.grad.masked_select(hidden) == 0).all() and x.grad.isfinite().all()


def test_what_is_hidden_does_not_compete() -> None:
    query, key, value = tensors(3, 2, 40)
    visible = some_visible(3, 40)
    out = prob_sparse_attention(query, key, value, factor=1.0, visible=visible)
    loud = torch.where(visible[:, None, :, None], query, 100 * query)
    again = prob_sparse_attention(loud, key, value, factor=1.0, visible=visible)
    assert_close(again, out)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_hidden_gets_the_mean(causal: bool) -> None:
    query, key, value = tensors(1, 1, 40)
    visible = torch.arange(40)[None] % 20 < 2  # fewer than may attend
    out = prob_sparse_attention(query, key, value, factor=2.0, causal=causal, visible=visible)
    among = value[0, 0, :2] if causal else value[0, 0, visible[0]]
    assert_close(out[0, 0, 2], among.mean(0))
    assert not torch.allclose(out[0, 0, 1], among.mean(0))


def test_keys_are_drawn_anew_only_where_that_is_asked_for() -> None:
    given_ = tensors(2, 2, 60)
    assert torch.equal(prob_sparse_attention(*given_, factor=1.0), prob_sparse_attention(*given_, factor=1.0))
    drawn = [prob_sparse_attention(*given_, factor=1.0, random=True) for _ in range(3)]
    assert not torch.allclose(drawn[0], drawn[1]) or not torch.allclose(drawn[1], drawn[2])


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize(("causal", "share"), [(False, 40), (True, 8)])
def test_no_tensor_has_a_place_for_every_pair(causal: bool, share: int) -> None:
    query, key, value = tensors(1, 1, 2048)
    with _Largest() as largest:
        prob_sparse_attention(query, key, value, causal=causal)
    assert largest.most < 2048**2 / share


def test_half_precision() -> None:
    given_ = tuple(x.round() for x in tensors(2, 2, 40))  # so that M is exact, and the same queries attend
    exact = prob_sparse_attention(*given_, factor=3.0, causal=True)
    low = prob_sparse_attention(*(x.bfloat16() for x in given_), factor=3.0, causal=True)
    assert low.dtype == torch.bfloat16
    assert_close(low, exact, dtype=torch.bfloat16)


def test_bad_inputs_are_refused() -> None:
    query, key, value = tensors(2, 2, 10)
    with pytest.raises(ValueError, match="factor must be a finite number > 0; got factor=0"):
        prob_sparse_attention(query, key, value, factor=0)
    with pytest.raises(ValueError, match="query, key and value must have the same rows, heads and tokens"):
        prob_sparse_attention(query[:, :, 1:], key, value)
    with pytest.raises(ValueError, match=r"visible must be \(batch, tokens\), \(2, 10\)"):
        prob_sparse_attention(query, key, value, visible=torch.ones(2, 9, dtype=torch.bool))
