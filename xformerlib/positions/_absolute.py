"""Positions that are added to the tokens: sinusoids, and tables that are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Positive, check_positive, check_size
from .._autograd import is_compiling
from ..domains import Domain, Graph, Grid, Sequence, Timeline
from ._base import Embedding, at_least_fp32, kept, no_meaning, places
from ._graph import on_nodes, random_signs, spectral_axes
from ._scaling import frequencies


class Sinusoidal(Embedding):
    """Fixed sines and cosines of the position, at frequencies from 1 down to about 1 / theta.

    - ``Sequence``: with p the position, as in Vaswani et al. (2017, arXiv:1706.03762),

          PE[2i] = sin(p / theta^(2i / dim)),   PE[2i + 1] = cos(p / theta^(2i / dim))

    - ``Timeline``: the same formula at real times.
    - ``Grid``: each axis has its share of the channels, a block of sines and a block of cosines, the last axis first; for two axes
      this is the layout of MAE (He et al. 2021, arXiv:2111.06377): column, then row.
    - ``Points``: each axis likewise, in order, at the coordinates: Fourier features (Tancik et al. 2020, arXiv:2006.10739).
    - ``Graph``: each of the ``eigenvectors`` lowest nontrivial eigenvectors of the graph's Laplacian is an axis, its coordinates being
      the eigenvector's entries times the square root of the number of nodes (Dwivedi and Bresson 2020, arXiv:2012.09699). The sign of
      an eigenvector means nothing: in training each graph's signs are drawn anew at every call, in evaluation they are those
      that the domain chose, which do not depend on the order of nodes unless the graph is symmetric.

    Channels that cannot be shared out evenly are 0, and so is the embedding of a prefix token.

    Args:
        dim: channels of a token.
        theta: ratio of the longest wavelength to the shortest (one step beyond the longest, to be exact).
        scale: what coordinates are multiplied by, the highest frequency in radians per unit of time or space.
        eigenvectors: how many eigenvectors a ``Graph`` is asked for. Default: 8, or as many as there are pairs of channels.

    Shapes:
        ``forward(x, domain)``: x (B, T, dim) or (T, dim), returned in the same shape and dtype.

    Raises:
        ValueError: fewer than two channels for each axis, an option out of range, tokens that do not fit.

    Example:
        >>> Sinusoidal(4)(torch.zeros(1, 4), Sequence(1, start=2)) - torch.tensor([2.0, 2.0, 0.02, 0.02])[None].sin()
        tensor([[ 0.0000, -1.3254,  0.0000,  0.9798]])
    """

    def __init__(
        self, dim: int, *, theta: Positive = 10_000.0, scale: Positive = 1.0, eigenvectors: int | None = None
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, least=2)
        self.theta = check_positive("theta", theta)
        self.scale = check_positive("scale", scale)
        self.eigenvectors = min(8, dim // 2) if eigenvectors is None else check_size("eigenvectors", eigenvectors)

    def rows(self, domain: Domain, x: Tensor) -> Float[Tensor, "*batch tokens dim"]:
        if isinstance(domain, Graph) and self.training:
            return self._of_graph(domain, random_signs(domain, self.eigenvectors))
        dtype = at_least_fp32(x.dtype)
        key = ("sinusoidal", self.dim, self.theta, self.scale, self.eigenvectors, dtype, x.device)
        return kept(domain, key, lambda: self._table(domain, x).to(dtype))

    def _table(self, domain: Domain, x: Tensor) -> Float64[Tensor, "*batch tokens dim"]:
        """The embedding of every token."""
        if isinstance(domain, Graph):
            return self._of_graph(domain, None)
        where = places(domain, x.device) * self.scale
        if isinstance(domain, (Sequence, Timeline)):
            # Packed items begin anew: most places occur many times, and sines in fp64 take their time.
            again = None
            if domain.offsets is not None and not where.requires_grad and not is_compiling():
                times, again = where[:, 0].unique(return_inverse=True)
                where = times[:, None]
            angles = where * frequencies(self.theta, self.dim / 2).to(x.device)
            table = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : self.dim]
            table = table if again is None else table[again]
        else:
            table = self._blocks(where.flip(-1) if isinstance(domain, Grid) else where)
        i = torch.arange(domain.num_tokens, device=x.device)
        prefix = domain.is_prefix(i.new_zeros(()), i)
        return table if prefix is None else table.masked_fill(prefix[:, None], 0)

    def _blocks(self, where: Float64[Tensor, "*batch tokens axes"]) -> Float64[Tensor, "*batch tokens dim"]:
        """For each axis a block of sines and a block of cosines; leftover channels are 0."""
        bands = self.dim // (2 * where.shape[-1])
        if bands == 0:
            raise ValueError(
                f"dim must be at least 2 channels for each of the {where.shape[-1]} axes; got dim={self.dim}"
            )
        angles = where[..., None] * frequencies(self.theta, bands).to(where.device)
        blocks = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
        return F.pad(blocks, (0, self.dim - blocks.shape[-1]))

    def _of_graph(self, domain: Graph, signs: Tensor | None) -> Float64[Tensor, "tokens dim"]:
        axes = spectral_axes(domain, self.eigenvectors) * self.scale
        return on_nodes(domain, self._blocks(axes if signs is None else axes * signs))

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta:g}" + (f", scale={self.scale:g}" if self.scale != 1 else "")


class Learned(Embedding):
    """A learned embedding for each place.

    - ``Sequence``: with ``size`` a number, a row for each position (BERT, Devlin et al. 2018, arXiv:1810.04805).
    - ``Grid``: with ``size`` a tuple, one number for each axis, a row for each place (ViT, Dosovitskiy et al. 2020, arXiv:2010.11929).
      A grid of another size gets the table resampled to it, bicubic with antialiasing along each axis; of packed grids each its own.
    - ``Graph``: with ``size`` a number, a row for each in-degree, the last one for all from ``size - 1`` on: centrality encoding
      (Graphormer, Ying et al. 2021, arXiv:2106.05234). With ``directed=True`` a second table for the out-degree is added.

    Args:
        dim: channels of a token.
        size: rows of the table: a number (Sequence, Graph) or a tuple (Grid).
        prefix: rows for prefix tokens, whose number must then agree with the domain's; with 0 their embedding is 0.
        directed: add a table for out-degrees; then only a ``Graph`` is possible.

    Weights:
        ``table`` (rows, dim), ``prefix_table`` (prefix, dim), ``out_table`` (rows, dim), drawn from a normal distribution of std 0.02.

    Raises:
        ValueError: a position beyond the table, a domain that does not fit ``size``, a Timeline or Points.

    Example:
        >>> Learned(8, (14, 14), prefix=1)(torch.zeros(1, 1 + 10 * 20, 8), Grid(10, 20, prefix=1)).shape
        torch.Size([1, 201, 8])
    """

    def __init__(self, dim: int, size: int | SequenceOf[int], *, prefix: int = 0, directed: bool = False) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.size = check_size("size", size) if isinstance(size, int) else tuple(check_size("size", n) for n in size)
        if isinstance(self.size, tuple) and not 1 <= len(self.size) <= 3:
            raise ValueError(f"size must be a number, or one to three for the axes of a Grid; got size={size}")
        if directed and isinstance(self.size, tuple):
            raise ValueError(f"directed=True is for the degrees of a Graph, whose size is one number; got size={size}")
        self.prefix = check_size("prefix", prefix, least=0)
        rows = self.size if isinstance(self.size, int) else math.prod(self.size)
        self.table = nn.Parameter(torch.empty(rows, dim))
        self.prefix_table = nn.Parameter(torch.empty(prefix, dim)) if prefix else None
        self.out_table = nn.Parameter(torch.empty(rows, dim)) if directed else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        for table in self.parameters():
            nn.init.normal_(table, std=0.02)

    def rows(self, domain: Domain, x: Tensor) -> Float[Tensor, "tokens dim"]:
        if self.prefix and domain.prefix != self.prefix:
            raise ValueError(f"prefix={self.prefix} rows are for domains with that many prefix tokens; got {domain!r}")
        if isinstance(domain, Graph) and isinstance(self.size, int):
            return self._of_graph(domain, self.size)
        if self.out_table is not None:
            raise no_meaning(
                self, domain, "directed=True embeds in- and out-degrees; use a Graph, or leave directed out."
            )
        if isinstance(domain, Sequence) and isinstance(self.size, int):
            return self._of_sequence(domain, self.size)
        if isinstance(domain, Grid) and isinstance(self.size, tuple):
            return self._of_grid(domain, self.size)
        if isinstance(domain, (Sequence, Graph)):
            raise no_meaning(
                self, domain, f"With size={self.size} it is defined on a Grid; give one number, e.g. size=512."
            )
        if isinstance(domain, Grid):
            raise no_meaning(
                self, domain, f"With size={self.size} it is defined on a Sequence or Graph; give a size for each axis."
            )
        raise no_meaning(
            self,
            domain,
            "Real coordinates have no table; use Sinusoidal(dim), Rotary(head_dim) or ContinuousBias(heads).",
        )

    def _of_sequence(self, domain: Sequence, size: int) -> Tensor:
        last = _last_position(domain)
        if last >= size:
            raise ValueError(
                f"Learned has a table of size={size} positions; got {domain!r}, which reaches position {last}. Raise size."
            )
        if domain.lengths is None:
            return self._with_prefix(self.table[domain.start : domain.start + domain.length], domain, front=True)
        i = torch.arange(domain.num_tokens, device=self.table.device)
        # Padding may reach beyond the table; nobody attends to it.
        place = domain.coordinate(0, i.new_zeros(()), i).clamp(0, size - 1)
        return self._with_prefix(self.table[place], domain)

    def _of_grid(self, domain: Grid, size: tuple[int, ...]) -> Tensor:
        if len(size) != domain.ndim:
            raise ValueError(f"size must have one number for each axis; got size={size} and {domain!r}")
        table = self.table.reshape(*size, self.dim)
        if domain.item_sizes is None:
            return self._with_prefix(_resample(table, domain.sizes).flatten(0, -2), domain, front=True)
        sizes = domain.size_of_items
        resampled = {item: _resample(table, item).flatten(0, -2) for item in dict.fromkeys(sizes)}
        front = self._prefix_rows(domain)
        return torch.cat([part for item in sizes for part in (front, resampled[item])]) if sizes else front[:0]

    def _of_graph(self, domain: Graph, size: int) -> Tensor:
        in_degree, out_degree = domain.degrees
        rows = self.table[in_degree.clamp(max=size - 1)]
        if self.out_table is not None:
            rows = rows + self.out_table[out_degree.clamp(max=size - 1)]
        return self._with_prefix(on_nodes(domain, rows), domain)

    def _prefix_rows(self, domain: Domain) -> Tensor:
        return self.table.new_zeros(domain.prefix, self.dim) if self.prefix_table is None else self.prefix_table

    def _with_prefix(self, rows: Tensor, domain: Domain, front: bool = False) -> Tensor:
        """``rows`` with those of prefix tokens in their places, or (``front``) in front of them."""
        if domain.prefix == 0:
            return rows
        if front:
            return torch.cat([self._prefix_rows(domain), rows])
        i = torch.arange(domain.num_tokens, device=rows.device)
        place = domain.place(i)
        own = self._prefix_rows(domain)[place.clamp(max=domain.prefix - 1)]
        return torch.where((place < domain.prefix)[:, None], own, rows)

    def extra_repr(self) -> str:
        options = [f"{self.dim}", f"size={self.size}"]
        if self.prefix:
            options.append(f"prefix={self.prefix}")
        if self.out_table is not None:
            options.append("directed=True")
        return ", ".join(options)


def _last_position(domain: Sequence) -> int:
    """The largest position of a token that exists; -1 where there is none."""
    return domain.start + domain.longest - 1 if domain.longest else -1


def _resample(table: Float[Tensor, "*size dim"], size: tuple[int, ...]) -> Float[Tensor, "*new dim"]:
    """A table of one to three axes resampled to another size, bicubic with antialiasing along each axis.

    Not by ``F.interpolate``: it knows no such thing for three axes, and on the CPU its result is wrong where the new width is 1.
    """
    resampled = table
    for axis, (old, new) in enumerate(zip(table.shape[:-1], size, strict=True)):
        # A graph for all sizes must not ask: resampled to its own size a table stays as it is.
        if not isinstance(new, int) or old != new:
            weights = _bicubic(old, new).to(table.device)
            resampled = (resampled.double().movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return resampled.to(table.dtype)


def _bicubic(old: int, new: int) -> Float64[Tensor, "new old"]:
    """Weights of the old places at the new ones: Keys' cubic kernel with a = -1/2, widened where the new places are fewer."""
    places = torch.arange(new)
    scale = old / places.new_full((), new).double().clamp(min=1)  # a tensor, since the size may be symbolic
    centres = scale * (places + 0.5)
    x = (torch.arange(old, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / scale.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)
