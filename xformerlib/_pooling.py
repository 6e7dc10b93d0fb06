"""One vector for each item of a domain: of its tokens, or of one token that stands for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ._arguments import Size
from ._autograd import is_compiling, is_jit_tracing, is_transformed, outside_graphs, twice_differentiable
from ._inputs import place
from ._options import PoolingOptions, QKNorm
from ._recorded import Recorded
from ._sublayers import Activation, FeedForward, NormLayer, norm_factory
from .attention import Attention
from .domains import Domain, Sequence
from .masks import Keys, Mask

if TYPE_CHECKING:
    from typing_extensions import Unpack

Pool = Literal["token", "mean", "sum", "max", "mean-max", "attention"]


class Pooling(Recorded):
    """One vector for each item: each row of a batch, or each packed item. Prefix tokens and padding are left out; 0 of no tokens.

        token      the first token (a class token, a virtual node)
        mean, sum, max, mean-max     over tokens, channel by channel; the last is half the sum of mean and maximum
        attention  ``MultiheadPooling``

    Args:
        dim: channels.
        pool: one of the above.
        **attention: arguments of ``MultiheadPooling``.

    Example:
        >>> Pooling(8, "mean")(torch.randn(5, 8), Sequence.packed([2, 3])).shape
        torch.Size([2, 8])
        >>> Pooling(8, "attention", heads=2)(torch.randn(4, 10, 8), Grid(3, 3, prefix=1)).shape
        torch.Size([4, 8])
    """

    def __init__(self, dim: Size, pool: Pool = "mean", **attention: Unpack[PoolingOptions]) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(map(repr, get_args(Pool)))}; got pool={pool!r}")
        if attention and pool != "attention":
            raise ValueError(f"{', '.join(attention)}: for pool='attention' only; got pool={pool!r}")
        self.dim, self.pool = dim, pool
        attention.setdefault("heads", 1)
        self.attention = MultiheadPooling(dim, **attention) if pool == "attention" else None

    def forward(
        self, x: Float[Tensor, "*batch tokens dim"], domain: Domain | None = None
    ) -> Float[Tensor, "items dim"]:
        """Pool ``x``, ``(B, T, dim)`` or packed ``(N, dim)``."""
        domain = place("x", x, self.dim, domain)
        if self.attention is not None:
            return self.attention(x, domain)
        if self.pool == "token":
            return first(x, domain)
        if self.pool == "mean-max":
            return (reduced(x, domain, "mean") + reduced(x, domain, "max")) / 2
        return reduced(x, domain, self.pool)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.pool!r}"


class MultiheadPooling(Recorded):
    """A learned query that attends to the tokens of each item, and a feed-forward layer.

        y = attention(latent, x, x);   pooled = y + f(norm(y))

    The multi-head attention pooling of Zhai et al. (2022, arXiv:2106.04560) and SigLIP; as the pooling by multi-head attention
    of the Set Transformer (Lee et al. 2019, arXiv:1810.00825), but for the residual around the query.

    Args:
        dim, heads: channels, attention heads.
        hidden: width of the feed-forward layer.
        norm_layer, activation, qk_norm: as in ``Block``.
        prefix: whether prefix tokens are attended to as well.

    Example:
        >>> MultiheadPooling(8, 2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        dim: Size,
        heads: Size,
        *,
        hidden: Size | None = None,
        norm_layer: NormLayer = "layer",
        activation: Activation = "gelu",
        qk_norm: QKNorm | None = None,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(dim))
        self.attention = Attention(dim, heads, qk_norm=qk_norm)
        self.norm = norm_factory(norm_layer)(dim)
        self.feed_forward = FeedForward(dim, hidden=hidden, activation=activation)
        self.prefix = prefix
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the query anew."""
        nn.init.normal_(self.latent, std=self.latent.numel() ** -0.5)

    def forward(
        self, x: Float[Tensor, "*batch tokens dim"], domain: Domain | None = None
    ) -> Float[Tensor, "items dim"]:
        """Pool ``x``, ``(B, T, dim)`` or packed ``(N, dim)``."""
        domain = place("x", x, self.latent.numel(), domain)
        context, keys, mask = (x, domain, None) if self.prefix else _without_prefix(x, domain)
        if x.ndim == 3:
            queries, latent = Sequence(1), self.latent.expand(x.shape[0], 1, -1)
        else:
            queries = _packed(torch.ones(domain.num_items, dtype=torch.long, device=x.device))
            latent = self.latent.expand(domain.num_items, -1)
        y = self.attention(latent, queries, context=context, context_domain=keys, mask=mask).reshape(-1, x.shape[-1])
        return y + self.feed_forward(self.norm(y))


def first(x: Float[Tensor, "*batch tokens dim"], domain: Domain) -> Float[Tensor, "items dim"]:
    """The first token of each item, which must be a prefix token."""
    if not domain.prefix:
        raise ValueError(f"pool='token' takes the first prefix token (a class token) of each item; got {domain!r}")
    if domain.offsets is None:
        return x[..., 0, :].reshape(-1, x.shape[-1])
    return _unbatched(x, domain).index_select(0, domain.offsets[:-1])


def reduced(x: Float[Tensor, "*batch tokens dim"], domain: Domain, how: str) -> Float[Tensor, "items dim"]:
    """Mean, sum or maximum of the ordinary tokens of each item."""
    if domain.offsets is not None:
        index, starts = ordinary(domain)
        rows = _unbatched(x, domain)
        if is_transformed():
            return _reduced_plainly(rows, index, starts, how)
        # Of all ways to reduce segments, this alone has a fast backward and no atomics.
        found = F.embedding_bag(index, rows, starts, mode=how)
        if is_compiling() or is_jit_tracing():
            return found
        return twice_differentiable((found,), lambda rows: (_reduced_plainly(rows, index, starts, how),), (rows,))[0]
    x = (x if x.ndim == 3 else x[None])[:, domain.prefix :]
    if x.shape[1] == 0:
        return x.sum(1)
    if domain.valid is None:
        return x.amax(1) if how == "max" else x.mean(1) if how == "mean" else x.sum(1)
    valid = domain.valid[:, domain.prefix :, None]
    if how == "max":
        return x.masked_fill(~valid, -torch.inf).amax(1).masked_fill(~valid.any(1), 0)
    total = x.masked_fill(~valid, 0).sum(1)
    return total if how == "sum" else total / valid.sum(1).clamp(min=1)


def _reduced_plainly(
    rows: Float[Tensor, "tokens dim"], index: Int[Tensor, " ordinary"], starts: Int[Tensor, " items"], how: str
) -> Float[Tensor, "items dim"]:
    """The same by operations that have derivatives of any order."""
    count = len(starts)
    lengths = torch.cat([starts[1:], starts.new_full((1,), len(index))]) - starts
    item = torch.repeat_interleave(torch.arange(count, device=index.device), lengths, output_size=len(index))
    each, nothing = rows.index_select(0, index), rows.new_zeros(count, rows.shape[1])
    if how != "max":
        total = nothing.index_add(0, item, each)
        return total if how == "sum" else total / lengths.clamp(min=1)[:, None]
    target, place = item[:, None].expand_as(each), torch.arange(len(index), device=index.device)[:, None]
    largest = (nothing - torch.inf).scatter_reduce(0, target, each.detach(), "amax").index_select(0, item)
    place = place.masked_fill(each.detach() < largest, len(index))
    first = torch.full_like(nothing, len(index), dtype=place.dtype).scatter_reduce(0, target, place, "amin")
    return torch.cat([each, each.new_zeros(1, each.shape[1])]).gather(0, first)


def ordinary(domain: Domain) -> tuple[Int[Tensor, " ordinary"], Int[Tensor, " items"]]:
    """The ordinary tokens of packed items, and where those of each item begin among them."""

    def make() -> tuple[Tensor, Tensor]:
        assert domain.offsets is not None
        starts = domain.offsets[:-1]
        tokens = torch.arange(domain.num_tokens, device=starts.device)
        prefix = domain.is_prefix(tokens.new_zeros(()), tokens)
        begin = starts - domain.prefix * torch.arange(len(starts), device=starts.device)
        return tokens if prefix is None else tokens[~prefix], begin

    return domain.fact("ordinary", make)


def _packed(lengths: Int[Tensor, " items"]) -> Sequence:
    return outside_graphs(Sequence.packed, "packed sequences are made by reading their lengths")(lengths)


def _without_prefix(x: Tensor, domain: Domain) -> tuple[Tensor, Domain, Mask | None]:
    """Ordinary tokens as a plain sequence, since a pooling query asks for no places, and what hides padding."""
    if not domain.prefix:
        return x, domain, None
    if domain.offsets is not None:
        lengths = domain.offsets.diff() - domain.prefix
        return _unbatched(x, domain).index_select(0, ordinary(domain)[0]), _packed(lengths), None
    mask = None if domain.valid is None else Keys(domain.valid[:, domain.prefix :])
    return x[..., domain.prefix :, :], Sequence(domain.num_tokens - domain.prefix), mask


def _unbatched(x: Tensor, domain: Domain) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, dim) on a packed domain such as {domain!r}; got {tuple(x.shape)}")
    return x
