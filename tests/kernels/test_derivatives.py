"""Derivatives that kernels do not have themselves: second ones, those of ``torch.func``, those in coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import graph, masks, positions

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of scatter_reduce
]

GRID, GRAPH = xf.Grid(3, 4), xf.Graph(torch.tensor([[0, 1, 2, 3, 5, 7, 9, 11, 4], [1, 2, 3, 4, 6, 8, 10, 0, 4]]), 12)
PACKED = xf.Sequence.packed([5, 7])
# A mask on a domain, and the kernel that computes it.
WAYS: dict[str, tuple[masks.Mask, xf.Domain, str]] = {
    "full, sdpa": (masks.Full(), xf.Sequence(12), "sdpa"),
    "causal, sdpa": (masks.Causal(), xf.Sequence(12), "sdpa"),
    "holes, sdpa": (masks.Local(3, border="clamp"), GRID, "sdpa"),
    "window, windowed": (masks.Causal() & masks.Local(2), xf.Sequence(12), "windowed"),
    "window | global": (masks.Local(1) | masks.Global(1), xf.Sequence(12), "windowed"),
    "rows, blocks": (masks.Axial(1), GRID, "blocks"),
    "shifted windows, packed": (masks.Windows(2, shift=1), GRID, "packed"),
    "items, packed": (masks.Full(), PACKED, "packed"),
    "edges, sparse": (masks.Edges(self_loops=True), GRAPH, "sparse"),
    "edges or global, sparse": (masks.Edges() | masks.Global(1), GRAPH, "sparse"),
    "anything, chunked": (masks.Where(lambda b, h, q, k: (q * k + h) % 3 != 1), xf.Sequence(12), "chunked"),
    "padded, windowed": (masks.Local(2), xf.Sequence.padded([12, 9]), "windowed"),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "sinks": {"sinks": True}, "softcap": {"softcap": 2.0}, "bias": {"bias": True}, "dropout": {"dropout_p": 0.3},
    "grouped": {"kv_heads": 1},
}  # fmt: skip
CELLS = [
    (way, option)
    for way, (*_, kernel) in WAYS.items()
    for option in OPTIONS
    if not (kernel == "sdpa" and option in ("sinks", "softcap", "dropout"))  # which it refuses, or draws by torch
]


def _function(way: str, option: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of tensors and the kernel's name, which gives one number, and tensors for it."""
    mask, domain, _ = WAYS[way]
    asked = dict(OPTIONS[option])
    heads = asked.pop("kv_heads", 2)
    batch = domain.batch_size or 1
    tensors = [torch.randn(batch, h, 12, 3) for h in (2, heads, heads)] + [torch.randn(2), torch.randn(2)]
    decay = positions.DistanceDecay(2, learned=True)
    uses_sinks, uses_bias = asked.pop("sinks", False), asked.pop("bias", False)

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor, *, kernel: str) -> Tensor:
        torch.manual_seed(3)  # dropout draws the same
        options = {"sinks": sinks} if uses_sinks else {"bias": decay} if uses_bias else {}

        def run() -> Tensor:
            return xf.attention(q, k, v, mask=mask, domain=domain, kernel=kernel, **asked, **options)  # type: ignore[arg-type]

        out = functional_call(_Called(decay, run), {"bias.log_slopes": slopes}) if uses_bias else run()
        return (out.tanh() * torch.linspace(-1, 1, out.numel()).view_as(out)).pow(2).sum()

    return function, tensors


class _Called(torch.nn.Module):
    def __init__(self, bias: torch.nn.Module, run: Callable[[], Tensor]) -> None:
        super().__init__()
        self.bias, self.run = bias, run

    def forward(self) -> Tensor:
        return self.run()


def _both(way: str, option: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """By the kernel of the cell, and by the reference."""
    function, tensors = _function(way, option)
    kernel = WAYS[way][2]
    return (lambda *x: function(*x, kernel=kernel)), (lambda *x: function(*x, kernel="reference")), tensors


@pytest.mark.parametrize(("way", "option"), CELLS)
def test_second_derivatives_are_those_of_the_reference(way: str, option: str) -> None:
    ours, oracle, tensors = _both(way, option)
    found = []
    for function in (ours, oracle):
        leaves = [x.clone().requires_grad_() for x in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True, allow_unused=True)
        penalty = sum((x.sin() * torch.arange(x.numel()).view_as(x)).sum() for x in first if x is not None)
        assert isinstance(penalty, Tensor)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        found.append([x for x in (*first, *second) if x is not None])
    assert_close(found[0], found[1], "first and second derivatives", depth=100)


@pytest.mark.parametrize(("way", "option"), CELLS)
def test_transforms_give_what_the_reference_gives(way: str, option: str) -> None:
    ours, oracle, tensors = _both(way, option)
    directions = [torch.randn_like(x) for x in tensors]
    every = tuple(range(len(tensors)))
    for f in (grad, jacrev):
        assert_close(f(ours, argnums=every)(*tensors), f(oracle, argnums=every)(*tensors), f.__name__, depth=10)
    pairs = [jvp(function, tuple(tensors), tuple(directions))[1] for function in (ours, oracle)]
    assert_close(*pairs, "jvp", depth=10, scale=10.0)


# torch asks for randomness= under vmap, and hessians are made by it.
@pytest.mark.parametrize(("way", "option"), [cell for cell in CELLS if cell[1] != "dropout"])
def test_batched_transforms_give_what_the_reference_gives(way: str, option: str) -> None:
    ours, oracle, tensors = _both(way, option)
    stacked = [torch.stack([x, x.flip(-1)]) for x in tensors]
    rows = [vmap(grad(function))(*stacked) for function in (ours, oracle)]
    assert_close(*rows, "vmap of grad", depth=10)
    squares = [hessian(lambda s, f=function: f(*tensors[:3], s, tensors[4]))(tensors[3]) for function in (ours, oracle)]
    assert_close(*squares, "hessian in the sinks", depth=10, scale=1.0)


@pytest.mark.parametrize("edge_dim", [None, 3])
def test_edge_attention_has_all_derivatives(edge_dim: int | None) -> None:
    layer = graph.EdgeAttention(6, 4, heads=2, edge_dim=edge_dim, beta=True)
    x, e = torch.randn(12, 6), None if edge_dim is None else torch.randn(9, edge_dim)
    weights = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x, GRAPH.edge_index, e)).tanh().square().sum()

    def forces(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return grad(loss, argnums=1)(weights, x).square().sum()

    def forces_by_backward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(weights, x), x, create_graph=True)[0].square().sum()

    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    by_backward = torch.autograd.grad(forces_by_backward(leaves, x), list(leaves.values()))
    assert_close([*grad(forces)(weights, x).values()], by_backward, "forces in weights", depth=10)
    step, name = 1e-6, "query.weight"
    direction = torch.randn_like(weights[name])
    ahead, behind = (forces({**weights, name: weights[name] + sign * step * direction}, x) for sign in (1, -1))
    slope = (by_backward[list(weights).index(name)] * direction).sum()
    scale = float(forces(weights, x)) / step  # what is subtracted, over the step
    assert_close(slope, (ahead - behind) / (2 * step), "finite differences", scale=scale)


PLACED: dict[str, Callable[[], positions.Position]] = {
    "continuous": lambda: positions.ContinuousBias(2, hidden=8),
    "gaussian": lambda: graph.GaussianBias(2, 8),
    "decay": lambda: positions.DistanceDecay(2, learned=True),
    "rotary": lambda: positions.Rotary(6),
    "sinusoidal": lambda: positions.Sinusoidal(12),
}


@pytest.mark.parametrize("mask", [None, masks.Local(3.0)], ids=["full", "ball"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        (name, where)
        for name in PLACED
        for where in ("points", "packed points", "times", "subset")
        if (name, where) != ("gaussian", "times")  # Gaussians are of distances in space
    ],
)
def test_coordinates_get_gradients(name: str, where: str, mask: masks.Mask | None) -> None:
    model = xf.Encoder(12, 1, 2, position=PLACED[name](), mask=mask)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    x = torch.randn(6, 12)

    def energy(places: Tensor) -> Tensor:
        if where == "times":
            domain: xf.Domain = xf.Timeline(places[:, 0])
        elif where == "packed points":
            domain = xf.Points(places, batch=torch.tensor([0, 0, 0, 1, 1, 1]))
        else:
            domain = xf.Points(places)
        if where == "subset":
            return model(x[:4], domain.subset(torch.tensor([0, 2, 3, 5]))).square().sum()
        return model(x, domain).square().sum()

    places = (torch.randn(6, 3) / 2).requires_grad_()
    (force,) = torch.autograd.grad(energy(places), places)
    assert force.abs().max() > 1e-6
    step, direction = 1e-6, torch.randn(6, 3)
    slope = (energy(places + step * direction) - energy(places - step * direction)) / (2 * step)
    scale = float(energy(places).detach()) / step  # what is subtracted, over the step
    assert_close((force * direction).sum(), slope, "finite differences of the energy", scale=scale)
    assert_close(
        torch.autograd.grad(energy(places), places)[0], force, "the same again"
    )  # nothing of the first graph was kept


def test_a_second_derivative_that_torch_cannot_draw_again_is_refused() -> None:
    q = torch.randn(1, 2, 12, 4, requires_grad=True)
    out = xf.attention(q, q, q, dropout_p=0.5, kernel="sdpa")
    (first,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert bool(first.any())
    with pytest.raises(RuntimeError, match="Use kernel='reference'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_a_structured_attention_is_twice_differentiable_in_linear_memory() -> None:
    tokens = 4096
    q = torch.randn(1, 1, tokens, 4, requires_grad=True)
    out = xf.attention(q, q, q, mask=masks.Local(2), domain=xf.Sequence(tokens))
    with _Largest() as largest:
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(first.square().sum(), q)
    assert largest.numel < tokens * tokens / 16


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return out


def test_a_whole_model_by_the_reference() -> None:
    model = xf.Encoder(8, 2, 2, mask=masks.Local(2), sinks=True, kernel="windowed")
    x = torch.randn(1, 30, 8, requires_grad=True)
    seen = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        seen.append(out)

    with xf.using(kernel="reference"):
        assert xf.plan(masks.Local(2), xf.Sequence(30)).kernel == "reference"
        exact = model(x)
    assert xf.plan(masks.Local(2), xf.Sequence(3000)).kernel == "windowed"
    assert_close(model(x), exact, "by the oracle", depth=2)
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of"), xf.using(kernel="refrence"):
        pass


def _first_and_second(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(function(), leaves, create_graph=True)
    plain = torch.autograd.grad(function(), leaves)
    assert_close(first, plain, "the same with create_graph", depth=10)
    return [*first, *torch.autograd.grad(sum((x.square().sum() for x in first), torch.zeros(())), leaves)]


@pytest.mark.parametrize(
    "position",
    [
        lambda: positions.ContinuousBias(2, hidden=8) + positions.DistanceDecay(2, learned=True),
        lambda: positions.Rotary(6) + positions.DistanceDecay(2, learned=True),
        lambda: positions.ContinuousBias(2, hidden=8),
    ],
    ids=["two biases", "rotation and bias", "one bias"],
)
@pytest.mark.parametrize("watched", [False, True])
def test_forces_of_several_layers_can_be_trained_on(position: Callable[[], positions.Position], watched: bool) -> None:
    """Layers share coordinates and biases, and the inputs of a layer depend on the layer before."""
    model = xf.Encoder(12, 2, 2, position=position())
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    for part in model.modules():
        if watched and isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda *_: None)
    x, places = torch.randn(6, 12), (torch.randn(6, 3) / 2).requires_grad_()
    leaves = [places, *model.parameters()]
    ours = _first_and_second(lambda: model(x, xf.Points(places)).square().sum(), leaves)
    with xf.using(kernel="reference"):
        wanted = _first_and_second(lambda: model(x, xf.Points(places)).square().sum(), leaves)
    assert float(wanted[0].detach().abs().max()) > 1e-6
    scale = max(float(x.detach().abs().max()) for x in wanted)
    assert_close(ours, wanted, "forces and their derivatives", depth=100, scale=scale)


@pytest.mark.parametrize("kernel", ["sdpa", "windowed", "chunked"])
def test_queries_may_be_keys_and_values(kernel: str) -> None:
    x = torch.randn(1, 2, 40, 4, requires_grad=True)
    domain, mask = xf.Sequence(40), masks.Local(3)

    def found(kernel: str) -> list[Tensor]:
        return _first_and_second(
            lambda: xf.attention(x, x, x, mask=mask, domain=domain, kernel=kernel).sin().sum(), [x]
        )

    assert_close(found(kernel), found("reference"), "derivatives", depth=10)


def test_edges_may_share_their_features() -> None:
    first, second = graph.EdgeAttention(8, 4, heads=2, edge_dim=3), graph.EdgeAttention(8, 4, heads=2, edge_dim=3)
    x, places = torch.randn(12, 8), torch.randn(12, 3, requires_grad=True)
    source, target = GRAPH.edge_index

    def energy() -> Tensor:
        e = places[source] - places[target]
        return second(first(x, GRAPH.edge_index, e).tanh(), GRAPH.edge_index, e).square().sum()

    ours = _first_and_second(energy, [places])
    with xf.using(kernel="reference"):
        assert_close(ours, _first_and_second(energy, [places]), "derivatives", depth=100)


@pytest.mark.parametrize("mask", [None, masks.Local(2), masks.Windows(4)], ids=repr)
def test_nested_forward_mode(mask: masks.Mask | None) -> None:
    layer, x, one = xf.Attention(8, 2, mask=mask), torch.randn(1, 12, 8), torch.ones(())

    def f(s: Tensor) -> Tensor:
        return layer(x * s).square().sum()

    twice = torch.func.jacfwd(torch.func.jacfwd(f))(one)
    assert_close(
        twice, torch.func.jacfwd(jacrev(f))(one), "forward over forward", depth=10, scale=float(f(one).detach())
    )
    step = 1e-4
    wanted = (f(one + step) - 2 * f(one) + f(one - step)) / step**2
    assert_close(twice, wanted.detach(), "finite differences", condition=1e6, scale=float(f(one).detach()))


def test_coordinates_in_forward_mode() -> None:
    model = xf.Encoder(12, 1, 2, position=positions.ContinuousBias(2, hidden=8))
    x, places, direction = torch.randn(6, 12), torch.randn(6, 3), torch.randn(6, 3)

    def energy(places: Tensor) -> Tensor:
        return model(x, xf.Points(places)).square().sum()

    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    slope = jvp(energy, (places,), (direction,))[1]
    assert_close(slope, (grad(energy)(places) * direction).sum(), "jvp in coordinates", depth=10, scale=1.0)


def test_kept_tables_belong_to_no_transform() -> None:
    """A table that is first asked for within a transform serves calls after it, and eager ones."""
    x, one, bias = torch.randn(1, 2, 53, 4), torch.ones(()), positions.RelativeBias(2)

    def f(s: Tensor) -> Tensor:
        return xf.attention(x * s, x, x, bias=bias, domain=xf.Sequence(53)).square().sum()

    first = hessian(f)(one)
    assert_close(hessian(f)(one), first, "again", scale=float(f(one).detach()))
    assert_close(grad(f)(one), jacrev(f)(one), "gradient", scale=float(f(one).detach()))
    expander = masks.Expander(4, seed=0)
    rows = vmap(lambda x: xf.attention(x[None], x[None], x[None], mask=expander, domain=xf.Sequence(61)))
    q = torch.randn(2, 2, 61, 4)
    assert_close(rows(q)[:, 0], xf.attention(q, q, q, mask=expander, domain=xf.Sequence(61)), "an expander under vmap")


def test_tables_of_inference_can_be_trained_with() -> None:
    layer, domain, x = (
        xf.Attention(8, 2, mask=masks.Local(3)),
        xf.Sequence(301),
        torch.randn(1, 301, 8, requires_grad=True),
    )
    with torch.inference_mode():
        layer(x, domain)
    torch.autograd.grad(layer(x, domain).sum(), x, create_graph=True)


@pytest.mark.parametrize("mask", [masks.Local(2), masks.Causal() & masks.Local(2), masks.Expander(4, 0)], ids=repr)
def test_batched_gradients(mask: masks.Mask) -> None:
    layer, x = xf.Attention(4, 2, mask=mask), torch.randn(1, 9, 4)
    run = torch.autograd.functional.jacobian
    assert_close(run(layer, x, vectorize=True), run(layer, x), "jacobian")


def test_a_backward_under_autocast_is_computed_as_without() -> None:
    x = torch.randn(1, 2, 300, 8, dtype=torch.float32, requires_grad=True)
    for mask in (masks.Windows(4), masks.Local(3), masks.Causal() & masks.Local(3)):
        (wanted,) = torch.autograd.grad(xf.attention(x, x, x, mask=mask, domain=xf.Sequence(300)).square().sum(), x)
        with torch.autocast("cpu", torch.bfloat16):
            out = xf.attention(x, x, x, mask=mask, domain=xf.Sequence(300)).square().sum()
            (got,) = torch.autograd.grad(out, x)
        assert_close(got, wanted, repr(mask), dtype=torch.float32)


def test_contexts_of_kernels_end_where_they_began() -> None:
    with xf.using(kernel="reference"), xf.using(kernel="chunked"):
        with xf.using(kernel="reference"):
            pass
        assert xf.plan(None, xf.Sequence(5)).kernel == "chunked"


@pytest.mark.parametrize("kernel", ["auto", "windowed", "chunked", "reference"])
def test_a_scale_can_be_learned(kernel: str) -> None:
    q, scale, domain = (
        torch.randn(1, 2, 30, 4, requires_grad=True),
        torch.tensor(0.7, requires_grad=True),
        xf.Sequence(30),
    )

    def found(kernel: str) -> list[Tensor]:
        out = xf.attention(q, q, q, mask=masks.Local(2), domain=domain, scale=scale, kernel=kernel)
        return [out, *torch.autograd.grad(out.square().sum(), (q, scale))]

    plain = xf.attention(q, q, q, mask=masks.Local(2), domain=domain, scale=0.7, kernel=kernel)
    ours = found(kernel)
    assert_close(ours, found("reference"), "output and gradients", depth=4)
    assert_close(ours[0], plain, "the same number")
    with pytest.raises(ValueError, match="scale must be one floating-point number"):
        xf.attention(q, q, q, scale=torch.ones(2))


def test_paths_of_a_graphormer_have_all_derivatives() -> None:
    model = graph.Graphormer(8, 8, 3, 1, 2, edge_dim=3).eval()
    x, e = torch.randn(12, 8), torch.randn(9, 3)

    def energy(e: Tensor) -> Tensor:
        return model(x, GRAPH.edge_index, e).sin().sum()

    leaf = e.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf), leaf)
    assert_close(grad(energy)(e), slope, "grad", depth=20)
    assert_close(hessian(energy)(e), torch.autograd.functional.hessian(energy, e), "hessian", depth=40, scale=1.0)


@pytest.mark.parametrize("make", [xf.Points, lambda c: xf.Timeline(c[:, 0])], ids=["points", "times"])
def test_batched_coordinates_are_refused(make: Callable[[Tensor], xf.Domain]) -> None:
    model = xf.Encoder(12, 1, 2, position=positions.ContinuousBias(2, hidden=6))

    def energy(places: Tensor) -> Tensor:
        return model(torch.ones(7, 12), make(places)).sum()

    for function in (energy, grad(energy)):
        with pytest.raises(ValueError, match="must not be batched by"):
            vmap(function)(torch.randn(2, 7, 3))
