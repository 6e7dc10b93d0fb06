"""What every position owes on every domain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import Domain, Graph, Grid, Points, Sequence, Timeline
from xformerlib.positions import Bias, PairBias, Position, Sum
from xformerlib.positions._base import in_steps

from .cases import DIM, DOMAINS, HEADS, biases, domain, embeddings, redrawn, rotations

on_every_domain = pytest.mark.parametrize("name", DOMAINS)


def grid_of(on: Domain) -> tuple[Tensor, Tensor, Tensor]:
    """Row, query and key of every pair."""
    i = torch.arange(on.num_tokens)
    return torch.arange(on.batch_size or 1)[:, None, None], i[:, None], i[None, :]


def whole(pair: PairBias, on: Domain) -> Tensor:
    """Scores of all pairs, (heads, rows, queries, keys)."""
    b, q, k = grid_of(on)
    return pair.at(q, k, b)


def tokens(on: Domain, width: int = DIM, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (on.num_tokens, width) if on.batch_size is None else (on.batch_size, on.num_tokens, width)
    return torch.randn(shape, dtype=dtype)


def heads(on: Domain, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(on.batch_size or 2, HEADS, on.num_tokens, DIM, dtype=dtype)


# -- biases ----------------------------------------------------------------------------------------------------------


@on_every_domain
def test_scores_of_chosen_pairs_are_those_of_all_pairs(name: str) -> None:
    on = domain(name)
    rows, n = on.batch_size or 1, on.num_tokens
    for bias in biases(on):
        pair = bias.double().pair(on)
        every = whole(pair, on)
        assert every.shape == (HEADS, rows, n, n)
        assert every.isfinite().all()
        b, q, k = (torch.randint(0, high, (40,)) for high in (rows, n, n))
        assert_close(pair.at(q, k, b), every[:, b, q, k])
        tile = pair.at(torch.arange(1, n)[:, None], torch.arange(0, n - 1)[None, :], torch.arange(rows)[:, None, None])
        assert_close(tile, every[:, :, 1:, :-1])
        if pair.batch_size is None:
            assert_close(pair.at(q, k), every[:, 0, q, k])
        else:
            assert pair.batch_size == on.batch_size
            with pytest.raises(ValueError, match="b_index is needed"):
                pair.at(q, k)


@on_every_domain
def test_gradient_of_scores_in_parameters(name: str) -> None:
    on = domain(name)
    b, q, k = (torch.randint(0, high, (12,)) for high in (on.batch_size or 1, on.num_tokens, on.num_tokens))
    for bias in biases(on):
        parameters = dict(bias.double().named_parameters(prefix="bias"))

        def scores(*values: Tensor, bias: Bias = bias, names: tuple[str, ...] = tuple(parameters)) -> Tensor:
            replaced = dict(zip(names, values, strict=True))
            return torch.func.functional_call(_Bound(bias), replaced, (on, q, k, b)).square()

        if parameters:
            assert torch.autograd.gradcheck(scores, tuple(parameters.values()), fast_mode=True)
            assert torch.autograd.gradgradcheck(scores, tuple(parameters.values()), fast_mode=True)


class _Bound(torch.nn.Module):
    """A bias whose parameters can be replaced by ``functional_call``."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, on: Domain, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        return self.bias.pair(on).at(q, k, b)


@on_every_domain
def test_scores_can_be_evaluated_again_with_other_tensors(name: str) -> None:
    on = domain(name)
    for bias in biases(on):
        pair = bias.pair(on)
        again = tuple(tensor.detach().clone().requires_grad_() for tensor in pair.tensors)
        scores = whole(pair.using(again), on)
        assert torch.equal(scores, whole(pair, on))
        parameters = list(bias.parameters())
        weight = torch.randn_like(scores)
        if parameters:  # the chain of the two gradients is the gradient
            inner = torch.autograd.grad((scores * weight).sum(), again, allow_unused=True)
            chained = torch.autograd.grad(
                [t for t, g in zip(pair.tensors, inner, strict=True) if g is not None], parameters,
                [g for g in inner if g is not None], allow_unused=True,
            )  # fmt: skip
            direct = torch.autograd.grad((whole(bias.pair(on), on) * weight).sum(), parameters, allow_unused=True)
            assert_close(chained, direct)


@on_every_domain
def test_pairs_with_a_prefix_token_score_zero_or_an_entry_of_their_own(name: str) -> None:
    on = domain(name)
    prefix = on.is_prefix(torch.tensor(0), torch.arange(on.num_tokens))
    if prefix is None:
        return
    for bias in biases(on):
        scores = whole(bias.pair(on), on)
        entries = getattr(bias, "prefix_table", None)
        expected = torch.zeros(3, HEADS) if entries is None else entries
        for row, (query, key) in enumerate([(prefix, ~prefix), (~prefix, prefix), (prefix, prefix)]):
            part = scores[:, :, query][:, :, :, key]
            assert torch.equal(part, expected[row][:, None, None, None].expand_as(part))
        assert (scores[:, :, ~prefix][:, :, :, ~prefix] != 0).any()


@on_every_domain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_computed_in_fp32_or_better(name: str, dtype: torch.dtype) -> None:
    on = domain(name)
    for bias in biases(on):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                bias.to(dtype)
                scores = whole(bias.pair(on, dtype=dtype), on)
            assert scores.dtype == torch.promote_types(dtype, torch.float32)
            exact = whole(bias.double().pair(on, dtype=torch.float64), on)
            bias.to(dtype)
            assert_close(scores, exact)


@on_every_domain
def test_biases_add(name: str) -> None:
    on = domain(name)
    several = biases(on)[:3]
    total = several[0] + (several[1] + several[2])
    assert total.biases == tuple(several)
    expected = sum(whole(bias.pair(on), on) for bias in several)
    pair = total.pair(on)
    assert_close(whole(pair, on), expected)
    fresh = tuple(torch.randn_like(tensor) for tensor in pair.tensors)
    other = whole(pair.using(fresh), on)
    assert not torch.allclose(other, expected.to(other.dtype))


@on_every_domain
def test_where_places_are_steps_biases_depend_on_offsets_alone(name: str) -> None:
    on = domain(name)
    if not in_steps(on):
        return
    i = torch.arange(on.num_tokens)
    b = torch.tensor(0)
    prefix = on.is_prefix(b, i)
    ordinary = i if prefix is None else i[~prefix]
    for bias in biases(on):
        pair = bias.pair(on)
        scores = pair.at(ordinary[:, None], ordinary[None, :], b)
        offsets = torch.stack(
            [on.offset(axis, on, b, ordinary[:, None], ordinary[None, :]) for axis in range(on.ndim)], -1
        )
        for kind in torch.unique(offsets.flatten(0, 1), dim=0):
            same = scores[:, (offsets == kind).all(-1)]
            assert_close(same, same[:, :1].expand_as(same))


# -- embeddings --------------------------------------------------------------------------------------------------------


@on_every_domain
def test_an_embedding_is_added_to_the_tokens(name: str) -> None:
    on = domain(name)
    for embedding in embeddings(on):
        width = embedding.dim
        embedding.double().eval()
        x = tokens(on, width)
        added = embedding(x, on) - x
        assert added.abs().amax() > 1e-3
        assert_close(embedding(torch.zeros_like(x), on), added)
        assert_close(embedding(2 * x, on), 2 * x + added)
        prefix = on.is_prefix(torch.tensor(0), torch.arange(on.num_tokens))
        own = getattr(embedding, "prefix_table", None)
        if prefix is not None and own is None:
            assert (added[..., prefix, :] == 0).all()
        elif prefix is not None:
            count = int(prefix.sum()) // on.prefix
            assert_close(
                added[..., prefix, :].reshape(-1, width), own.repeat(added[..., prefix, 0].numel() // on.prefix, 1)
            )
            assert count >= 1


@on_every_domain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_keep_their_dtype_and_shape(name: str, dtype: torch.dtype) -> None:
    on = domain(name)
    for embedding in embeddings(on):
        x = tokens(on, embedding.dim, dtype)
        result = embedding.to(dtype).eval()(x, on)
        exact = embedding.double()(x.double(), on)
        assert (result.dtype, result.shape) == (x.dtype, x.shape)
        assert_close(result, exact)
    for rotation in rotations(on):
        q = heads(on, dtype)
        result = rotation.rotate_one(q, on)
        exact = rotation.rotate_one(q.double(), on)
        assert (result.dtype, result.shape) == (q.dtype, q.shape)
        assert_close(result, exact)


@on_every_domain
def test_autocast_changes_no_angle(name: str) -> None:
    on = domain(name)
    for rotation in rotations(on):
        q = heads(on, torch.float32)
        plain = rotation.rotate_one(q, domain(name))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rotation.rotate_one(q, on), plain)


@on_every_domain
def test_gradients_of_embeddings_and_rotations(name: str) -> None:
    on = domain(name)
    for position in [*embeddings(on), *rotations(on)]:
        position.double().eval()
        is_rotation = position in position.rotations
        x = (heads(on) if is_rotation else tokens(on, position.dim)).requires_grad_()

        def apply(*inputs: Tensor, position: Position = position, is_rotation: bool = is_rotation) -> Tensor:
            result = position.rotate_one(inputs[0], on) if is_rotation else position(inputs[0], on)
            return result.square()

        assert torch.autograd.gradcheck(apply, (x, *position.parameters()), fast_mode=True)


# -- all ---------------------------------------------------------------------------------------------------------------


def everything(on: Domain) -> list[Position]:
    return [*embeddings(on), *rotations(on), *biases(on)]


def inputs(position: Position, on: Domain) -> Tensor:
    """Tokens, or queries, that a position takes."""
    return heads(on) if position.rotations else tokens(on, getattr(position, "dim", DIM))


def applied(position: Position, x: Tensor, on: Domain) -> Tensor:
    """What a position does: to tokens, to queries, or as the scores of all pairs."""
    if position.biases:
        return whole(position.pair(on), on)
    return position.rotate_one(x, on) if position.rotations else position(x, on)


def outcome(position: Position, on: Domain) -> Tensor:
    torch.manual_seed(1)
    return applied(position, inputs(position, on), on)


@on_every_domain
def test_every_parameter_matters_and_is_drawn_again_by_reset_parameters(name: str) -> None:
    on = domain(name)
    for position in everything(on):
        before = outcome(position.eval(), on)
        for parameter in position.parameters():
            old = parameter.detach().clone()
            torch.nn.init.normal_(parameter)
            changed = outcome(position, on)
            assert not torch.equal(changed, before), f"{position} does not depend on one of its parameters"
            with torch.no_grad():
                parameter.fill_(7.0)
            position.reset_parameters()
            assert not (parameter == 7.0).any()
            with torch.no_grad():
                parameter.copy_(old)
        torch.manual_seed(3)
        position.reset_parameters()
        first = [parameter.detach().clone() for parameter in position.parameters()]
        torch.manual_seed(3)
        position.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(first, position.parameters(), strict=True))


@on_every_domain
def test_what_is_kept_from_inference_can_be_trained_with(name: str) -> None:
    on = domain(name)
    for position in everything(on):
        x = inputs(position, on).requires_grad_()
        with torch.inference_mode():
            applied(position.eval(), x, on)
        result = applied(position, x, on)
        if result.requires_grad:
            result.square().sum().backward()


@pytest.mark.parametrize(
    "on",
    [
        Sequence(0),
        Sequence(0, prefix=1),
        Sequence.packed([0, 2]),
        Sequence.padded([0, 2]),
        Timeline(torch.empty(0)),
        Timeline(torch.empty(2, 0)),
        Grid(0),
        Grid(0, 3, prefix=1),
        Grid.packed([(0, 2), (1, 2)], prefix=1),
        Points(torch.empty(0, 2)),
        Points(torch.empty(2, 0, 3)),
        Graph(torch.empty(2, 0).long(), 0),
        Graph(torch.empty(2, 0).long(), 2, virtual_nodes=1),
    ],
    ids=str,
)
def test_domains_of_few_tokens_or_none(on: Domain) -> None:
    for position in everything(on):
        result = outcome(position, on)
        assert result.isfinite().all()
        if result.requires_grad:
            result.sum().backward()


@on_every_domain
@pytest.mark.cuda
def test_a_gpu_computes_the_same(name: str) -> None:
    on = domain(name)
    moved = on.to("cuda")
    for position in everything(on):
        x = inputs(position.eval().double(), on)
        expected = applied(position, x, on)
        position.cuda()
        if position.biases:
            b, q, k = (index.cuda() for index in grid_of(on))
            result = position.pair(moved).at(q, k, b)
        else:
            result = applied(position, x.cuda(), moved)
        assert result.is_cuda
        assert_close(result, expected)


@pytest.mark.parametrize("name", ["padded sequences", "packed grids", "timelines", "points", "graphs"])
def test_compiled_code_has_no_breaks_once_facts_are_known(name: str) -> None:
    on = domain(name)
    added = [embedding for embedding in embeddings(on) if embedding.dim == DIM]
    total = Sum(*added, *rotations(on)[-2:], *biases(on)[-3:]).eval()

    def run(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return total(x, on), total.rotate_one(q, on), whole(total.pair(on), on)

    x, q = tokens(on), heads(on)
    expected = run(x, q)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for _ in range(2):
        assert_close(compiled(x, q), expected)


@on_every_domain
def test_nothing_is_lost_in_a_state_dict(name: str) -> None:
    on = domain(name)
    for position, other in zip(everything(on), everything(on), strict=True):
        redrawn(other).load_state_dict(position.state_dict())
        assert torch.equal(outcome(other.eval(), on), outcome(position.eval(), on))


@on_every_domain
def test_a_packed_item_is_as_it_is_alone(name: str) -> None:
    on = domain(name)
    if on.offsets is None or not isinstance(on, (Points, Timeline)):
        return
    bounds = on.offsets.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        alone = Timeline(on.times[first:last]) if isinstance(on, Timeline) else Points(on.places[first:last])
        here = torch.arange(first, last)
        for position in everything(on):
            position.double().eval()
            if position.biases:
                together = position.pair(on).at(here[:, None], here[None, :])
                assert_close(together, position.pair(alone).at(here[:, None] - first, here[None, :] - first))
            elif position.rotations:
                x = heads(on)
                assert_close(
                    position.rotate_one(x, on)[:, :, first:last], position.rotate_one(x[:, :, first:last], alone)
                )
            else:
                x = tokens(on, position.dim)
                assert_close(position(x, on)[first:last], position(x[first:last], alone))


@given(seed=st.integers(0, 2**16), name=st.sampled_from(["points", "packed points", "timeline", "sets of points"]))
def test_the_order_of_tokens_says_nothing_where_they_have_places(seed: int, name: str) -> None:
    on = domain(name)
    draw = torch.Generator().manual_seed(seed)
    where = on.times if isinstance(on, Timeline) else on.places
    axis = -1 if isinstance(on, Timeline) else -2
    order = torch.randperm(on.num_tokens, generator=draw)
    if name == "packed points":  # within items only
        order = torch.cat([torch.randperm(2, generator=draw), 2 + torch.randperm(4, generator=draw)])
    moved = where.index_select(axis, order)
    if isinstance(on, Timeline):
        other: Domain = Timeline(moved)
    else:
        other = Points(moved, batch=None if on.items is None else on.items)
    for position in everything(on):
        position.double().eval()
        if position.biases:
            assert_close(whole(position.pair(other), other), whole(position.pair(on), on)[:, :, order][..., order])
        elif position.rotations:
            x = heads(on)
            assert_close(position.rotate_one(x[:, :, order], other), position.rotate_one(x, on)[:, :, order])
        else:
            x = tokens(on, position.dim)
            assert_close(position(x[..., order, :], other), position(x, on)[..., order, :])
