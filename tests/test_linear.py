"""Linear maps: the numbers of torch's, by another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import xformerlib as xf
from tests.closeness import assert_close, largest
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
    assert torch.equal(_linear.linear(x, weight, b, activation), wanted)  # so few numbers are left alone
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "SMALL", 1)
        # The sum before a ReLU, which may leave next to nothing of it.
        assert_close(_linear.linear(x, weight, b, activation), wanted, scale=max(1.0, largest(wanted)))


@pytest.fixture(autouse=True)
def _with_onednn() -> Iterator[None]:
    """Also where the whole run is without."""
    before = torch.backends.mkldnn.set_flags(True)[0]
    yield
    torch.backends.mkldnn.set_flags(before)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the numbers are."""
    monkeypatch.setattr(_linear, "SMALL", 1)
    monkeypatch.setattr(_linear, "SMALL_PRODUCT", 1)


def derivatives(linear: Callable[..., Tensor], inputs: list[Tensor | None], activation: str | None) -> list[Tensor]:
    """An output, its gradients, and the gradients of a function of these."""
    y = linear(*inputs, activation)
    wanted = [value for value in inputs if value is not None and value.requires_grad]
    first = torch.autograd.grad(y.cos().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(value.square().sum() for value in first), wanted, allow_unused=True)
    plain = torch.autograd.grad(
        linear(*inputs, activation).sum(), wanted
    )  # the gradient that comes is a number, expanded
    return [y, *first, *(value for value in second if value is not None), *plain]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("learned", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1), (1, 1, None)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_gradients_are_those_of_torch(shape: tuple[int, ...], learned: tuple[int | None, ...], activation: Any) -> None:
    sizes = (shape, (4, 5), (4,))
    inputs = [
        None if own is None else torch.randn(size, requires_grad=bool(own))
        for size, own in zip(sizes, learned, strict=True)
    ]
    got, wanted = (derivatives(linear, inputs, activation) for linear in (_linear.linear, plain))
    assert type(_linear.linear(*inputs).grad_fn).__name__ == "_LinearBackward"
    assert_close(got, wanted, depth=3, scale=largest(wanted))


@pytest.mark.usefixtures("by_onednn")
def test_rows_in_any_layout(generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, generator=generator, requires_grad=True)
    for x in (
        torch.randn(6, 5).T,
        torch.randn(3, 7, 6)[:, ::2],
        torch.randn(1, 6).expand(5, 6),
        torch.randn(6, 2, 3).permute(1, 2, 0),
    ):
        got, wanted = (derivatives(way, [x, weight, None], None) for way in (_linear.linear, plain))
        assert_close(got, wanted, depth=3, scale=largest(wanted))


@pytest.mark.usefixtures("by_onednn")
def test_who_counts_or_transforms_operations_sees_those_of_torch() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        _linear.linear(x, weight).sum().backward()
    assert counted.get_total_flops() == 2 * 2 * 3 * 5 * 4
    mapped = torch.func.vmap(lambda one: _linear.linear(x, one))(weight.detach()[None])
    assert_close(mapped[0], x @ weight.detach().T)
    value, change = torch.func.jvp(lambda one: _linear.linear(one, weight.detach()), (x,), (x,))
    assert_close(value, change)
    with fwAD.dual_level():
        dual = _linear.linear(fwAD.make_dual(x, x), weight)
        assert_close(fwAD.unpack_dual(dual).tangent, x @ weight.T)


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
            assert_close(layer(x), wanted)


HIDDEN: dict[str, dict[str, Any]] = {
    "gelu": {}, "relu": {"activation": "relu"}, "no biases": {"bias": False}, "swiglu": {"activation": "swiglu"},
    "geglu, no biases": {"activation": "geglu", "bias": False},
}  # fmt: skip


def by_hidden(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_HiddenBackward"


def learned(layer: xf.FeedForward, x: Tensor) -> list[Tensor]:
    """An output, its gradients, and those of a function of these."""
    wanted = [value for value in (x, *layer.parameters()) if value.requires_grad]
    y = layer(x)
    plain = torch.autograd.grad(y, wanted, y.detach().cos(), retain_graph=True)
    first = torch.autograd.grad(y.cos().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(value.square().sum() for value in first), wanted)
    return [y, *plain, *first, *second]


@pytest.mark.parametrize("options", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("frozen", ["", "up", "down", "up.bias", "x"])
def test_a_feed_forward_layer_learns_in_pieces(options: dict[str, Any], frozen: str, monkeypatch: Any) -> None:
    layer, x = xf.FeedForward(6, hidden=10, **options), torch.randn(3, 7, 6, requires_grad=frozen != "x")
    for name, parameter in layer.named_parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    wanted = learned(layer, x)
    monkeypatch.setattr(_linear, "LARGE", 1)
    assert by_hidden(layer(x))
    for piece in (1, 45, 10_000):
        monkeypatch.setattr(_linear, "LEARNED_PIECE", piece)
        assert_close(learned(layer, x), wanted, depth=3, scale=largest(wanted))


@pytest.mark.parametrize(
    "layer", [xf.FeedForward(8, dropout=0.5), xf.FeedForward(8, norm="layer"), xf.FeedForward(8, activation=nn.PReLU())]
)
def test_what_has_more_between_its_maps_does_not_learn_in_pieces(layer: xf.FeedForward, monkeypatch: Any) -> None:
    monkeypatch.setattr(_linear, "LARGE", 1)
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    y = layer(x)
    assert not by_hidden(y)
    assert torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert by_hidden(layer.eval()(x)) == (layer.dropout.p > 0)  # which there is none of


def test_hidden_channels_are_kept_once(monkeypatch: Any) -> None:
    layer, x = xf.FeedForward(8, hidden=32), torch.randn(64, 8, requires_grad=True)

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(x)
        return sum(sizes)

    whole = kept()
    monkeypatch.setattr(_linear, "LARGE", 1)
    assert kept() == whole - 64 * 32 + 32 + 8  # the biases are kept, too


def test_hooks_and_other_layers_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "SMALL", 1)
    monkeypatch.setattr(_linear, "LARGE", 1)
    block, x, seen = xf.Block(8, 2).eval(), torch.randn(1, 3, 8), []
    for layer in (block.feed_forward.up, block.feed_forward.down, block.attention.out):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(module) or output * 2)
    with torch.no_grad():
        twice = block(x)
    assert len(seen) == 3
    assert_close(twice, block(x))

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    layer = xf.FeedForward(8, hidden=16).eval()
    layer.down = Adapted(16, 8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_close(layer(x), layer.down(F.gelu(layer.up(x))))


def test_autocast_and_fp64_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "SMALL", 1)
    monkeypatch.setattr(_linear, "SMALL_PRODUCT", 1)
    layer, x = xf.FeedForward(8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
