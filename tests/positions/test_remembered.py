"""Tables of networks that are kept between calls without gradients."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import Domain, Graph, Grid, Sequence
from xformerlib.positions import ContinuousBias, _bias, _remembered

RING = Graph(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), 4)


def scores(bias: ContinuousBias, domain: Domain) -> Tensor:
    index = torch.arange(domain.num_tokens)
    return bias.pair(domain).at(index[:, None], index)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a network is evaluated."""
    found: list[int] = []
    plain = _bias.Network.scores

    def counted(network: _bias.Network, features: Tensor) -> Tensor:
        found.append(1)
        return plain(network, features)

    monkeypatch.setattr(_bias.Network, "scores", counted)
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("domain", [Sequence(5), Grid(3, 4), RING], ids=str)
def test_a_network_is_evaluated_once(domain: Domain, mode: Callable[[], object], calls: list[int]) -> None:
    bias = ContinuousBias(2, hidden=8)
    wanted = scores(bias, domain)
    with mode():  # type: ignore[attr-defined]
        for _ in range(3):
            assert_close(scores(bias, domain), wanted, depth=2)  # a map, and another
    assert len(calls) == 2
    again = scores(bias, domain)
    assert torch.equal(again, wanted) and again.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda bias: bias.reset_parameters(),
        lambda bias: bias.inner.weight.data.add_(1),  # which leaves no trace in the version of a tensor
        lambda bias: bias.load_state_dict(ContinuousBias(2, hidden=8).state_dict()),
        lambda bias: bias.load_state_dict(ContinuousBias(2, hidden=8).state_dict(), assign=True),
        lambda bias: setattr(bias, "scale", (2.0,)),
        lambda bias: setattr(bias, "bound", 3.0),
        lambda bias: bias.double(),
    ],
)
@torch.no_grad()
def test_other_weights_give_other_scores(change: Callable[[ContinuousBias], object]) -> None:
    bias, domain = ContinuousBias(2, hidden=8), Grid(3, 4)
    bias.outer.weight.normal_()
    before = scores(bias, domain)
    change(bias)
    after = scores(bias, domain)
    assert after.dtype != before.dtype or not torch.equal(after, before)
    fresh = ContinuousBias(2, hidden=8).to(after.dtype)
    fresh.load_state_dict(bias.state_dict())
    fresh.scale, fresh.bound = bias.scale, bias.bound
    assert torch.equal(after, scores(fresh, domain))


@torch.no_grad()
def test_what_is_kept_is_bounded_and_goes_with_the_network() -> None:
    bias = ContinuousBias(2, hidden=8)
    for length in range(1, 10):
        scores(bias, Sequence(length))
    assert len(_remembered._TABLES[bias]) == _remembered.MOST_TABLES
    for other in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert other not in _remembered._TABLES
        assert torch.equal(scores(other, Sequence(9)), scores(bias, Sequence(9)))
    count = len(_remembered._TABLES)
    del bias, other
    gc.collect()
    assert len(_remembered._TABLES) <= count - 2


@torch.no_grad()
def test_large_tables_are_not_kept(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(_remembered, "MOST_NUMBERS", 10)
    bias = ContinuousBias(2, hidden=8)
    for _ in range(2):
        scores(bias, Sequence(9))
    assert len(calls) == 2


def test_tangents_of_weights_are_not_forgotten() -> None:
    bias, domain = ContinuousBias(2, hidden=8), Sequence(5)
    with torch.no_grad(), fwAD.dual_level():
        assert fwAD.unpack_dual(scores(bias, domain)).tangent is None
        weights = {name: fwAD.make_dual(weight, torch.ones_like(weight)) for name, weight in bias.named_parameters()}
        with torch.nn.utils.stateless._reparametrize_module(bias, weights):
            tangent = fwAD.unpack_dual(scores(bias, domain)).tangent
    assert tangent is not None and tangent.any()
