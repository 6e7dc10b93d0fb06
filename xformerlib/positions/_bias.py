"""Positions that are added to attention scores: tables and small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._arguments import Positive, check_positive, check_size
from .._autograd import no_autocast
from .._projection import dtype_of, is_plain
from ..domains import Domain, Graph, Grid, Points
from ._base import Bias, at_least_fp32, in_steps, no_meaning, placed
from ._pairs import PairBias, PlacePair
from ._remembered import remembered
from ._tables import PREFIX_ENTRIES, HopPair, Offsets, StepPair, TablePair, largest_graph, row_in_table, rows_of_batch

# Pairs whose hidden layer is held at a time where each pair is evaluated by itself.
BLOCK_PAIRS = 2**15


class RelativeBias(Bias):
    """A learned score for each kind of offset and each head.

    Without ``size`` the table has ``buckets`` rows:

    - ``Sequence``: T5 buckets (Raffel et al. 2019, arXiv:1910.10683). Of n rows for one direction the first n/2 are for the distances
      0, 1, ..., n/2 - 1, the others for ranges that grow geometrically up to ``max_distance``; the last one is for all beyond.
    - ``Timeline``: the same buckets of the real gap, rounded down.
    - ``Points``: the same of the Euclidean distance, all rows for one direction.
    - ``Graph``: a row for each number of hops, the last but one for all that are more, the last for pairs without a path
      (Graphormer's spatial encoding, Ying et al. 2021, arXiv:2106.05234).

    With ``size`` the table has a row for each offset, 2 size - 1 on each axis: on a ``Grid`` that of Swin (Liu et al. 2021,
    arXiv:2103.14030) and BEiT (Bao et al. 2021, arXiv:2106.08254), on a ``Sequence`` Shaw et al. (2018, arXiv:1803.02155). Offsets
    beyond the table share its outermost row. The row of the offset d = query - key is the row-major place of d + size - 1.

    Args:
        heads: attention heads, of the queries.
        size: None, a number (Sequence), or one number for each axis (Grid).
        buckets: rows of a table without ``size``.
        max_distance: distance from which on all share a bucket, > buckets / 2. Hops have no buckets and do not use it.
        bidirectional: whether keys before and after a query have buckets of their own, half each; if not, all later keys are in bucket
            0. Of distances on Points and Graph, which have no direction, it says nothing.
        prefix: learn three scores for pairs with prefix tokens, as BEiT does: prefix query and ordinary key, ordinary query and prefix
            key, both prefix. If not, their score is 0.
        scale: what distances are multiplied by before they are put into buckets; hops are not.

    Weights:
        ``table`` (rows, heads) and ``prefix_table`` (3, heads), drawn from a truncated normal distribution of std 0.02.

    Raises:
        ValueError: an option out of range or without effect, or a domain that does not fit ``size``.

    Example:
        >>> bias = RelativeBias(4, size=(7, 7))
        >>> i = torch.arange(49)
        >>> bias.pair(Grid(7, 7)).at(i[:, None], i[None, :]).shape
        torch.Size([4, 49, 49])
    """

    def __init__(
        self,
        heads: int,
        *,
        size: int | SequenceOf[int] | None = None,
        buckets: int = 32,
        max_distance: float = 128,
        bidirectional: bool = True,
        prefix: bool = False,
        scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        self.size = _checked_size(size)
        if self.size is not None and (buckets, max_distance, bidirectional, scale) != (32, 128, True, 1.0):
            raise ValueError(
                "buckets, max_distance, bidirectional and scale make buckets; a table with size= has none. Leave them out."
            )
        if self.size is not None and not 1 <= len(self.size) <= 3:
            raise ValueError(f"size must be a number, or one to three for the axes of a Grid; got size={size}")
        self.buckets = check_size("buckets", buckets, least=4)
        if bidirectional and buckets % 2:
            raise ValueError(
                f"buckets must be even, half for each direction; got buckets={buckets}. Or give bidirectional=False."
            )
        self.max_distance = check_positive("max_distance", max_distance)
        if max_distance <= buckets // 2:
            raise ValueError(f"max_distance must be > buckets / 2 = {buckets // 2}; got max_distance={max_distance}")
        self.bidirectional = bidirectional
        self.scale = check_positive("scale", scale)
        rows = buckets if self.size is None else math.prod(2 * n - 1 for n in self.size)
        self.table = nn.Parameter(torch.empty(rows, heads))
        self.prefix_table = nn.Parameter(torch.empty(PREFIX_ENTRIES, heads)) if prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def is_pointwise(self, domain: Domain) -> bool:
        return True

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        table = self.table.to(at_least_fp32(dtype or self.table.dtype))
        if in_steps(domain):
            self._check_size(domain)
            offsets = Offsets(domain, keys)
            key = ("buckets", self._key(), offsets.low, offsets.counts, table.device)
            rows = domain.fact(key, lambda: self._rows_of(offsets.all(table.device)))
            # Many offsets share a row: their gradients are added in fp64.
            return StepPair(domain, keys, offsets, table.double()[rows].to(table.dtype), self.prefix_table)
        if self.size is not None:
            raise no_meaning(self, domain, "size= counts whole steps; leave it out for buckets of distances.")
        if isinstance(domain, Graph):
            return HopPair(domain, keys, table, self.prefix_table)
        return _BucketPair(self, domain, keys, table)

    def _check_size(self, domain: Domain) -> None:
        if self.size is None and isinstance(domain, Grid):
            raise no_meaning(
                self, domain, f"Give the size of its table: size={domain.sizes}. Or use ContinuousBias(heads)."
            )
        if self.size is not None and len(self.size) != domain.ndim:
            raise ValueError(f"size must have one number for each axis; got size={self.size} and {domain!r}")

    def _key(self) -> tuple[object, ...]:
        return self.size, self.buckets, self.max_distance, self.bidirectional, self.scale

    def _rows_of(self, offsets: Int[Tensor, "offsets ndim"]) -> Int[Tensor, " offsets"]:
        """The row of each offset of whole steps."""
        if self.size is None:
            return self.bucket(-self.scale * offsets[:, 0].double())
        return row_in_table(offsets, self.size)

    def bucket(self, ahead: Float64[Tensor, "..."], directed: bool = True) -> Int[Tensor, "..."]:
        """The T5 bucket of keys that are ``ahead`` of (negative: behind) the query, or (not ``directed``) that far from it."""
        if not directed:
            return _logarithmic(ahead, self.buckets, self.max_distance)
        if not self.bidirectional:
            return _logarithmic((-ahead).clamp(min=0), self.buckets, self.max_distance)
        half = self.buckets // 2
        return _logarithmic(ahead.abs(), half, self.max_distance) + half * (ahead > 0)

    def extra_repr(self) -> str:
        if self.size is not None:
            return f"{self.heads}, size={self.size}"
        return f"{self.heads}, buckets={self.buckets}, max_distance={self.max_distance:g}, bidirectional={self.bidirectional}"


class _BucketPair(TablePair):
    """A row for each bucket of real gaps or distances."""

    def __init__(self, bias: RelativeBias, domain: Domain, keys: Domain, table: Tensor) -> None:
        super().__init__(domain, keys, table, bias.prefix_table, batch_size=rows_of_batch(domain, keys))
        self.bias = bias

    def row(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        if isinstance(self.domain, Points):
            return self.bias.bucket(self.bias.scale * self.domain.distance(self.keys, b, q, k).double(), directed=False)
        return self.bias.bucket(-self.bias.scale * self.domain.offset(0, self.keys, b, q, k).double())


class ContinuousBias(Bias):
    """A small network that maps an offset to a score for each head: the log-spaced continuous bias of Swin v2 (Liu et al. 2021,
    arXiv:2111.09883),

        16 sigmoid(W2 relu(W1 u + b1)),   u_a = sign(d_a) log2(1 + |d_a|)   for the offset d_a = query - key on each axis a

    With ``bound=None`` it is W2 relu(W1 u + b1) + b2, as the paper's text has it; the sigmoid is its code's.

    - ``Sequence``, ``Timeline``, ``Grid``, ``Points``: d is the difference of positions, times or coordinates.
    - ``Graph``: u is log2(1 + hops) and 0, or 0 and 1 where there is no path.

    Pairs with prefix tokens score 0. Only as many columns of W1 are used as the domain has axes (a graph: two), so that one network
    serves all domains. On whole steps and graphs it is evaluated once for each distinct offset, not for each pair.

    Args:
        heads: attention heads, of the queries.
        hidden: width of the network.
        axes: columns of W1, the most axes that a domain may have.
        scale: what offsets are multiplied by first, one number or one for each axis. Swin v2 has 8 / (window - 1), and a factor 1/3
            around the logarithm, which is one on W1.
        size: of the windows in which tokens attend, one number for each axis: farther offsets, whose scores are not used there, share
            those at its rim, and the network is evaluated at 2 size - 1 offsets on each axis. For Sequence and Grid.
        bound: scores are between 0 and it. None: they are not bounded, and ``outer`` has a bias.

    Weights:
        ``inner`` (W1, b1) and ``outer`` (W2, b2), weights drawn from a truncated normal distribution of std 0.02, biases 0.

    Raises:
        ValueError: an option out of range, a domain with more axes.

    Example:
        >>> pair = ContinuousBias(4).pair(Points(torch.randn(10, 3)))
        >>> pair.at(torch.tensor([0, 1]), torch.tensor([5, 7])).shape  # just two pairs
        torch.Size([4, 2])
    """

    def __init__(
        self,
        heads: int,
        *,
        hidden: int = 512,
        axes: int = 3,
        scale: Positive | SequenceOf[float] = 1.0,
        size: int | SequenceOf[int] | None = None,
        bound: float | None = 16.0,
    ) -> None:
        super().__init__()
        self.size = _checked_size(size)
        self.heads = check_size("heads", heads)
        self.hidden = check_size("hidden", hidden)
        self.axes = check_size("axes", axes)
        one = isinstance(scale, (int, float))
        self.scale = tuple(check_positive("scale", s) for s in ((scale,) if one else scale))  # type: ignore[union-attr]
        if len(self.scale) not in (1, axes):
            raise ValueError(f"scale must be one number or one for each of the {axes} axes; got scale={scale}")
        self.bound = None if bound is None else check_positive("bound", bound)
        self.inner = nn.Linear(axes, hidden)
        self.outer = nn.Linear(hidden, heads, bias=bound is None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the network anew."""
        nn.init.trunc_normal_(self.inner.weight, std=0.02)
        nn.init.trunc_normal_(self.outer.weight, std=0.02)
        nn.init.zeros_(self.inner.bias)
        if self.outer.bias is not None:
            nn.init.zeros_(self.outer.bias)

    def is_pointwise(self, domain: Domain) -> bool:
        return in_steps(domain.whole) or isinstance(domain.whole, Graph)

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        columns = 2 if isinstance(domain, Graph) else domain.ndim
        if columns > self.axes:
            raise ValueError(f"ContinuousBias has axes={self.axes}, but {domain!r} needs {columns}. Raise axes.")
        dtype = at_least_fp32(dtype or dtype_of(self))
        network = Network.of(self.inner, self.outer, F.relu, dtype, self.bound)
        if in_steps(domain):
            offsets = Offsets(domain, keys)
            key = (offsets.low, offsets.counts, self.size, self.scale, self.bound)
            table = remembered(self, key, network.weights, lambda: self._table(domain, offsets, network))
            return StepPair(domain, keys, offsets, table)
        if self.size is not None:
            raise no_meaning(self, domain, "size= counts whole steps; leave it out.")
        if isinstance(domain, Graph):
            largest = largest_graph(domain)
            table = remembered(
                self,
                (largest, self.scale, self.bound),
                network.weights,
                lambda: network.scores(self._hop_features(largest, self._device)),
            )
            return HopPair(domain, keys, table, None)
        if network.weights:
            return _NetworkPair(self, domain, keys, network)
        q_places, k_places = placed(domain), placed(keys)
        return EveryPair(
            domain, keys, lambda b, q, k: network.scores(self._of_places(q_places, k_places, b, q, k)), self.heads
        )

    @property
    def _device(self) -> torch.device:
        """Where the network computes; offloaded and quantised weights do not tell, and are given features of the CPU."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def _of_places(
        self, domain: Domain, keys: Domain, b: Tensor, q: Tensor, k: Tensor
    ) -> Float64[Tensor, "*pairs ndim"]:
        """Log-spaced offsets of pairs at real coordinates."""
        offsets = [domain.offset(axis, keys, b, q, k).double() for axis in range(domain.ndim)]
        return self._features(torch.stack(offsets, -1))

    def _table(self, domain: Domain, offsets: Offsets, network: Network) -> Float[Tensor, "offsets heads"]:
        """The scores of all offsets."""
        device = self._device
        if self.size is None:
            return network.scores(self._features(offsets.all(device).double()))
        if len(self.size) != domain.ndim:
            raise ValueError(f"size must have one number for each axis; got size={self.size} and {domain!r}")
        axes = [torch.arange(1 - n, n, dtype=torch.float64, device=device) for n in self.size]
        table = network.scores(self._features(torch.cartesian_prod(*axes).view(-1, domain.ndim)))
        key = ("rows of a window", self.size, offsets.low, offsets.counts, device)
        rows = domain.fact(key, lambda: row_in_table(offsets.all(device), self.size or ()))
        return table.double()[rows].to(table.dtype)  # many share a row: their gradients are added in fp64

    def _features(self, offset: Float64[Tensor, "*pairs ndim"]) -> Float64[Tensor, "*pairs ndim"]:
        """Log-spaced offsets."""
        scale = offset.new_tensor(self.scale if len(self.scale) == 1 else self.scale[: offset.shape[-1]])
        offset = offset * scale
        return offset.sign() * torch.log2(1 + offset.abs())

    def _hop_features(self, largest: int, device: torch.device) -> Float64[Tensor, "rows 2"]:
        """A row for each number of hops below ``largest``, and one for no path."""
        hops = torch.zeros(max(largest, 1) + 1, 2, dtype=torch.float64, device=device)
        hops[:-1, 0] = torch.log2(1 + self.scale[0] * torch.arange(max(largest, 1), device=device).double())
        hops[-1, 1] = 1
        return hops

    def extra_repr(self) -> str:
        scale = self.scale[0] if len(self.scale) == 1 else self.scale
        options = ("" if scale == 1 else f", scale={scale}") + ("" if self.size is None else f", size={self.size}")
        options += "" if self.bound == 16 else f", bound={self.bound}"
        return f"{self.heads}, hidden={self.hidden}, axes={self.axes}{options}"


class _NetworkPair(PlacePair):
    """A network evaluated at each pair of real places."""

    def __init__(self, bias: ContinuousBias, domain: Domain, keys: Domain, network: Network) -> None:
        rows = rows_of_batch(domain, keys)
        super().__init__(domain, keys, network.weights, heads=bias.heads, batch_size=rows)
        self.bias, self.network = bias, network

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        features = self.bias._of_places(self.domain, self.keys, b, q, k)
        scores = self.network.using(self.weights).scores(features).movedim(-1, 0)
        prefix = self.domain.touches_prefix(self.keys, b, q, k)
        return scores if prefix is None else scores.masked_fill(prefix, 0)


@dataclass(frozen=True, eq=False)
class Network:
    """``outer(activation(inner(x)))``, bounded by ``bound * sigmoid``, never in less than fp32.

    Attributes:
        biased: whether each layer has a bias.
        weights: of both layers, in ``dtype``, where they are plain: kernels compute scores anew in their backward, and are told what
            these depend on. Empty where an adapter or a hook wants the layers called.
    """

    inner: nn.Module
    outer: nn.Module
    activation: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    bound: float | None
    weights: tuple[Tensor, ...]
    biased: tuple[bool, bool] = (True, True)

    @staticmethod
    def of(
        inner: nn.Module,
        outer: nn.Module,
        activation: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        bound: float | None = None,
    ) -> Network:
        """The network of two layers."""
        weights: tuple[Tensor, ...] = ()
        if is_plain(inner) and is_plain(outer):
            parts = [layer._parameters[name] for name in ("weight", "bias") for layer in (inner, outer)]
            weights = tuple(part.to(dtype) for part in parts if part is not None)
        biased = tuple(getattr(layer, "bias", None) is not None for layer in (inner, outer))
        return Network(inner, outer, activation, dtype, bound, weights, biased)  # type: ignore[arg-type]

    def using(self, weights: tuple[Tensor, ...]) -> Network:
        """The same with other weights."""
        return replace(self, weights=weights)

    def scores(self, features: Float[Tensor, "*pairs columns"]) -> Float[Tensor, "*pairs heads"]:
        """The scores; many pairs are taken in blocks, whose hidden layer is computed again in the backward."""
        rows = features.to(self.dtype).flatten(0, -2)
        if self.weights:
            scores = in_blocks(self._block, rows, self.weights)
        else:
            with no_autocast(rows.device):
                scores = self._bounded(self.outer(self.activation(self.inner(self._widened(rows))))).to(self.dtype)
        return scores.reshape(*features.shape[:-1], scores.shape[-1])

    def _block(self, rows: Tensor, inner: Tensor, outer: Tensor, *biases: Tensor) -> Tensor:
        rest = iter(biases)
        inner_bias, outer_bias = (next(rest) if there else None for there in self.biased)
        with no_autocast(rows.device):
            hidden = self.activation(F.linear(rows, inner[:, : rows.shape[-1]], inner_bias))
            return self._bounded(F.linear(hidden, outer, outer_bias))

    def _bounded(self, scores: Tensor) -> Tensor:
        return scores if self.bound is None else self.bound * torch.sigmoid(scores)

    def _widened(self, rows: Tensor) -> Tensor:
        """As many columns as the first layer takes, in its dtype; 0 on axes that there are not."""
        columns = getattr(self.inner, "in_features", rows.shape[-1])
        return F.pad(rows, (0, columns - rows.shape[-1])).to(dtype_of(self.inner))


class EveryPair(PairBias):
    """The scores of all pairs, computed at once: where layers must be called once, and not again for each tile and in each backward."""

    def __init__(
        self,
        domain: Domain,
        keys: Domain,
        make: Callable[[Tensor, Tensor, Tensor], Float[Tensor, "rows tq tk heads"]],
        heads: int,
    ) -> None:
        rows, device = rows_of_batch(domain, keys), domain.device
        b, q, k = (torch.arange(n, device=device) for n in (rows or 1, domain.num_tokens, keys.num_tokens))
        b, q = b[:, None, None], q[:, None]
        table = make(b, q, k).movedim(-1, 0)
        table = table if table.ndim == 4 else table[:, None]
        prefix = domain.touches_prefix(keys, b, q, k)
        table = table if prefix is None else table.masked_fill(prefix, 0)
        super().__init__(domain, keys, (table.expand(heads, len(b), len(q), len(k)),), heads=heads, batch_size=rows)

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.tensors[0][:, b if self.batch_size is not None else torch.zeros_like(q), q, k]


def in_blocks(
    block: Callable[..., Tensor], rows: Float[Tensor, "rows columns"], network: tuple[Tensor, ...]
) -> Float[Tensor, "rows heads"]:
    """``block(rows, *network)``, of many rows some at a time, what it holds being computed again in the backward."""
    if rows.shape[0] <= BLOCK_PAIRS:
        return block(rows, *network)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(block, part, *network, use_reentrant=False) for part in rows.split(BLOCK_PAIRS)])
    return torch.cat([block(part, *network) for part in rows.split(BLOCK_PAIRS)])


def _logarithmic(distance: Float64[Tensor, "..."], rows: int, max_distance: float) -> Int[Tensor, "..."]:
    """The bucket of a distance: one for each whole number below rows / 2, then growing geometrically."""
    exact = rows // 2
    # In fp32, as in the published models: where a boundary is a whole number, fp64 may round to the other side of it.
    ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (rows - exact)).long()).clamp(max=rows - 1)
    return torch.where(distance < exact, distance.long(), far)


def _checked_size(size: int | SequenceOf[int] | None) -> tuple[int, ...] | None:
    return None if size is None else tuple(check_size("size", n) for n in ((size,) if isinstance(size, int) else size))
