"""Attention whose cost is linear in the nodes, computed for each graph by itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate, Size
from .._autograd import is_leaving, is_transformed
from .._dropout import Dropout
from .._inputs import check_values
from .._recorded import Recorded
from ..domains import Graph
from ._reset import reset

# Tokens in a block: small graphs are one block each, large ones several, and one graph alone a single one.
BLOCK_TOKENS = 32
# Added to exponentials of at most 1, so that no weights are all 0.
LEAST_FEATURE = 1e-6
Features = Literal["softmax", "relu"]


class _Blocks(NamedTuple):
    """Tokens laid out in blocks, each of one graph; what a graph leaves of its last block is 0.

    Attributes:
        place: of each token among the blocks' rows.
        graph: of each block.
        size: rows of a block.
    """

    place: Int[Tensor, " tokens"]
    graph: Int[Tensor, " blocks"]
    size: int

    @staticmethod
    def of(graph: Graph) -> _Blocks:
        """The blocks of a batch, found once for all layers."""
        return graph.fact(("blocks of tokens",), lambda: _Blocks._of(graph))

    @staticmethod
    def _of(graph: Graph) -> _Blocks:
        assert graph.offsets is not None
        lengths, device = graph.offsets.diff(), graph.offsets.device
        size = max(graph.num_tokens, 1) if graph.num_graphs == 1 else BLOCK_TOKENS
        counts = (lengths + size - 1).div(size, rounding_mode="floor")
        blocks = None
        if (
            torch.compiler.is_dynamo_compiling()
        ):  # a graph cannot read how many there are: the last graph gets what is left of the most
            blocks = graph.num_tokens // size + len(lengths)
            counts = torch.cat([counts[:-1], blocks - counts[:-1].sum()[None]])
        first = (counts.cumsum(0) - counts) * size - graph.offsets[:-1]
        graphs = torch.arange(len(lengths), device=device)
        item = torch.repeat_interleave(graphs, lengths, output_size=graph.num_tokens)
        place = torch.arange(graph.num_tokens, device=device) + first[item]
        return _Blocks(place, torch.repeat_interleave(graphs, counts, output_size=blocks), size)

    def spread(self, x: Float[Tensor, "tokens heads dim"]) -> Float[Tensor, "blocks heads rows dim"]:
        """Tokens by block."""
        rows = _spread(x, self.place, len(self.graph) * self.size)
        return rows.unflatten(0, (len(self.graph), self.size)).transpose(1, 2)

    def gathered(self, x: Float[Tensor, "blocks heads rows dim"]) -> Float[Tensor, "tokens heads dim"]:
        """Blocks by token."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return (
            rows.index_select(0, self.place) if is_transformed() or is_leaving(x) else _Gathered.apply(rows, self.place)
        )


def _spread(x: Float[Tensor, "rows *rest"], place: Int[Tensor, " rows"], count: int) -> Float[Tensor, "count *rest"]:
    if is_transformed() or is_leaving(x):
        return x.new_zeros(count, *x.shape[1:]).index_copy(0, place, x)
    spread: Tensor = _Spread.apply(x, place, count)
    return spread


class _Spread(torch.autograd.Function):
    """Rows in their places, 0 between: each place is taken once, so that the gradient need not be added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(grad, *ctx.saved_tensors), None, None


class _Gathered(torch.autograd.Function):
    """Rows fetched from their places, the reverse of ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _Spread.apply(grad, place, ctx.count), None


def linear_attention(
    query: Float[Tensor, "tokens heads features"],
    key: Float[Tensor, "tokens heads features"],
    value: Float[Tensor, "tokens heads dim"],
    graph: Graph,
) -> tuple[Float[Tensor, "tokens heads dim"], Float[Tensor, "tokens heads 1"]]:
    """``q_i . sum_j k_j v_j`` and ``q_i . sum_j k_j``, j over the tokens of i's graph; their ratio is attention with weights ``q_i . k_j``.

    Graphs are in blocks of tokens with rows of zeros at their ends, which add exactly nothing: no sum is over more than a graph, and the
    memory is linear in tokens. (Katharopoulos et al. 2020, arXiv:2006.16236.)
    """
    blocks = _Blocks.of(graph)
    value = torch.cat([value, value.new_ones(*value.shape[:2], 1)], -1)
    sums = blocks.spread(key).mT @ blocks.spread(value)
    if len(blocks.graph) > 1:
        by_graph = sums.new_zeros(graph.num_graphs, *sums.shape[1:]).index_add(0, blocks.graph, sums)
        sums = by_graph.index_select(0, blocks.graph)
    y = blocks.gathered(blocks.spread(query) @ sums)
    return y[..., :-1], y[..., -1:]


class _LinearAttention(Recorded, ABC):
    """Projections to queries, keys and values by head."""

    def __init__(self, channels: Size, heads: Size, head_channels: Size | None, qkv_bias: bool) -> None:
        super().__init__()
        if head_channels is None:
            head_channels, rest = divmod(channels, heads)
            if rest:
                raise ValueError(f"heads must divide channels={channels}, or head_channels be given; got heads={heads}")
        self.channels, self.heads, self.head_channels = channels, heads, head_channels
        self.qkv = nn.Linear(channels, 3 * heads * head_channels, bias=qkv_bias)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        reset(self)

    def projected(self, x: Float[Tensor, "tokens channels"], graph: Graph) -> tuple[Tensor, ...]:
        """Queries, keys and values, (tokens, heads, head_channels)."""
        check_values("x", x)
        if not isinstance(graph, Graph):
            raise TypeError(f"graph must be a Graph; got {type(graph).__name__}")
        if x.ndim != 2 or x.shape != (graph.num_tokens, self.channels):
            raise ValueError(
                f"x must be (tokens, channels) = {(graph.num_tokens, self.channels)} on {graph!r}; got {tuple(x.shape)}"
            )
        return self.qkv(x).unflatten(-1, (-1, self.heads, self.head_channels)).unbind(1)

    @abstractmethod
    def forward(self, x: Float[Tensor, "tokens channels"], graph: Graph) -> Float[Tensor, "tokens out"]:
        """Attend among all tokens of each graph."""

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, head_channels={self.head_channels}"


class SGFormerAttention(_LinearAttention):
    """The attention of SGFormer (Wu et al. 2023, arXiv:2306.10759), linear in nodes, within each graph of a batch.

        y_i = mean over heads of (n v_i + sum_j (q_i . k_j) v_j) / (n + sum_j q_i . k_j),   q, k of length 1,   n tokens in the graph

    Each query and key is divided by its own length, as in PyTorch Geometric; the paper divides by the Frobenius norm of all queries, or
    keys, of the graph. A query or key of exactly 0 stays 0.

    Args:
        channels: of a token.
        heads: whose outputs are averaged.
        head_channels: of a head, and of the output; ``channels / heads`` unless given.
        qkv_bias: whether the projections have biases.

    Example:
        >>> SGFormerAttention(16, head_channels=16)(torch.randn(3, 16), Graph(torch.tensor([[0, 1], [1, 2]]), 3)).shape
        torch.Size([3, 16])
    """

    def __init__(
        self, channels: Size, heads: Size = 1, head_channels: Size | None = None, *, qkv_bias: bool = False
    ) -> None:
        super().__init__(channels, heads, head_channels, qkv_bias)

    def forward(self, x: Float[Tensor, "tokens channels"], graph: Graph) -> Float[Tensor, "tokens head_channels"]:
        """Attend among all tokens of each graph."""
        q, k, value = self.projected(x, graph)
        total, weight = linear_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), value, graph)
        n = _tokens_of_graph(graph).to(value.dtype)[:, None, None]
        return ((total + n * value) / (weight + n)).mean(1)


class PerformerAttention(_LinearAttention):
    """Attention by random features (FAVOR+: Choromanski et al. 2020, arXiv:2009.14794), linear in nodes, within each graph of a batch.

        y_i = sum_j (f(q_i) . f(k_j)) v_j / sum_j f(q_i) . f(k_j)
        f(u) = exp(W u' - |u'|^2 / 2),  u' = u / d^(1/4)     ``"softmax"``: weights are those of softmax(q . k / sqrt(d)) in expectation
        f(u) = relu(W u) + 0.001                             ``"relu"``: the generalised attention that PyTorch Geometric has

    The rows of W are orthogonal in blocks of d. For softmax they have the lengths of Gaussian vectors, for relu length 1. A factor that is
    common to all keys of a graph cancels, which keeps the exponentials at most 1; 10^-6 is added to each (in the paper's code 10^-4).

    Args:
        channels, heads, head_channels, qkv_bias: as in ``SGFormerAttention``; heads are side by side, and projected to ``channels``.
        features: which of the two.
        count: rows of W; d ln d, rounded down, unless given.
        out_bias: whether the output projection has a bias.
        dropout: of the output, in training.

    Weights:
        ``projection`` is a buffer: it is drawn, not learned; ``redraw()`` draws it anew, as the paper does now and then in training.

    Example:
        >>> PerformerAttention(16, 2)(torch.randn(3, 16), Graph(torch.tensor([[0, 1], [1, 2]]), 3)).shape
        torch.Size([3, 16])
    """

    projection: Tensor

    def __init__(
        self,
        channels: Size,
        heads: Size = 1,
        head_channels: Size | None = None,
        *,
        features: Features = "softmax",
        count: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dropout: Rate = 0.0,
    ) -> None:
        super().__init__(channels, heads, head_channels, qkv_bias)
        if features not in get_args(Features):
            raise ValueError(f"features must be 'softmax' or 'relu'; got features={features!r}")
        self.features = features
        count = max(1, int(self.head_channels * math.log(self.head_channels))) if count is None else count
        if count < 1:
            raise ValueError(f"count must be >= 1; got count={count}")
        self.register_buffer("projection", torch.empty(count, self.head_channels))
        self.out = nn.Linear(heads * self.head_channels, channels, bias=out_bias)
        self.dropout: nn.Dropout = Dropout(dropout)
        self.redraw()

    def reset_parameters(self) -> None:
        """Draw the weights and the random features anew."""
        super().reset_parameters()
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw the random features anew."""
        count, dim = self.projection.shape
        q, r = torch.linalg.qr(torch.randn(-(-count // dim), dim, dim))
        # A decomposition fixes signs, by which some directions would never come: weights would be off in expectation.
        rows = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).flatten(0, 1)[:count]
        if self.features == "softmax":
            rows = rows * torch.randn(count, dim).norm(dim=1, keepdim=True)
        self.projection.copy_(rows)

    def forward(self, x: Float[Tensor, "tokens channels"], graph: Graph) -> Float[Tensor, "tokens channels"]:
        """Attend among all tokens of each graph."""
        q, k, value = self.projected(x, graph)
        if self.features == "relu":
            q, k = (F.relu(u @ self.projection.mT) + 1e-3 for u in (q, k))
        else:
            q, k = self._exponents(q), self._exponents(k)
            q = (q - q.amax(-1, keepdim=True).detach()).exp() + LEAST_FEATURE
            k = (k - _largest_of_graph(k.detach(), graph)).exp() + LEAST_FEATURE
        total, weight = linear_attention(q, k, value, graph)
        return self.dropout(self.out((total / weight).flatten(1)))

    def _exponents(self, u: Float[Tensor, "tokens heads dim"]) -> Float[Tensor, "tokens heads features"]:
        u = u * self.head_channels**-0.25
        return u @ self.projection.mT - u.square().sum(-1, keepdim=True) / 2


class PolynormerAttention(_LinearAttention):
    """The global attention of Polynormer (Deng et al. 2024, arXiv:2403.01232), linear in nodes, within each graph of a batch.

        y = relu(W_o (norm(a) * (W_h x + b_h + beta)) + b_o),   a_i = sum_j (q_i . k_j) v_j / sum_j q_i . k_j,   q, k = sigmoid(W x)

    Args:
        channels, heads, head_channels, qkv_bias: as in ``SGFormerAttention``; heads are side by side, so that the output has
            ``heads * head_channels``.
        beta: above.
        qk_shared: whether queries are the keys.
        dropout: of the output, in training.

    Example:
        >>> PolynormerAttention(16, 2)(torch.randn(3, 16), Graph(torch.tensor([[0, 1], [1, 2]]), 3)).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        channels: Size,
        heads: Size = 1,
        head_channels: Size | None = None,
        *,
        beta: float = 0.9,
        qkv_bias: bool = False,
        qk_shared: bool = True,
        dropout: Rate = 0.0,
    ) -> None:
        super().__init__(channels, heads, head_channels, qkv_bias)
        inner = heads * self.head_channels
        self.beta, self.qk_shared = beta, qk_shared
        if qk_shared:
            self.qkv = nn.Linear(channels, 2 * inner, bias=qkv_bias)
        self.gate, self.norm, self.out = nn.Linear(channels, inner), nn.LayerNorm(inner), nn.Linear(inner, inner)
        self.dropout: nn.Dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "tokens channels"], graph: Graph) -> Float[Tensor, "tokens inner"]:
        """Attend among all tokens of each graph."""
        *q_and_k, value = self.projected(x, graph)
        q, k = q_and_k[0].sigmoid(), q_and_k[-1].sigmoid()
        total, weight = linear_attention(q, k, value, graph)
        y = self.norm((total / (weight + 1e-6)).flatten(1)) * (self.gate(x) + self.beta)
        return self.dropout(F.relu(self.out(y)))


def _tokens_of_graph(graph: Graph) -> Int[Tensor, " tokens"]:
    """For each token the number of tokens of its graph."""

    def make() -> Tensor:
        assert graph.offsets is not None
        lengths = graph.offsets.diff()
        return torch.repeat_interleave(lengths, lengths, output_size=graph.num_tokens)

    return graph.fact("tokens of graph", make)


def _largest_of_graph(x: Float[Tensor, "tokens heads features"], graph: Graph) -> Float[Tensor, "#tokens heads 1"]:
    """For each token and head the largest entry among all tokens of its graph."""
    largest = x.amax(-1)
    if graph.items is None:
        return largest.amax(0, keepdim=True)[..., None] if len(x) else largest[..., None]
    item = graph.items[:, None].expand_as(largest)
    by_graph = largest.new_full((graph.num_graphs, x.shape[1]), -torch.inf).scatter_reduce(0, item, largest, "amax")
    return by_graph.index_select(0, graph.items)[..., None]
