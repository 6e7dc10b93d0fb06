"""What a position is: up to three hooks into a Transformer, and their sum.

An ``Embedding`` is added to the tokens, a ``Rotation`` turns queries and keys, a ``Bias`` is added to the attention scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from itertools import count
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._autograd import is_compiling
from .._recorded import Recorded
from ..domains import Domain, Grid, Sequence
from ._pairs import PairBias, SubsetPair, SumPair

Fact = TypeVar("Fact")


class Position(Recorded):
    """Where tokens are, told to a Transformer. The root of every position; positions combine with ``+``.

    Example:
        >>> both = positions.Sinusoidal(64) + positions.DistanceDecay(4)
        >>> len(both.embeddings), len(both.rotations), len(both.biases)
        (1, 0, 1)
    """

    @property
    def parts(self) -> tuple[Position, ...]:
        """The positions that this one is the sum of; itself where it is not a sum."""
        return (self,)

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """The parts that are added to the tokens."""
        return tuple(part for part in self.parts if isinstance(part, Embedding))

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """The parts that turn queries and keys."""
        return tuple(part for part in self.parts if isinstance(part, Rotation))

    @property
    def biases(self) -> tuple[Bias, ...]:
        """The parts that are added to the attention scores."""
        return tuple(part for part in self.parts if isinstance(part, Bias))

    def __add__(self, other: Position) -> Sum:
        if not isinstance(other, Position):
            return NotImplemented
        return Sum(self, other)

    def reset_parameters(self) -> None:
        """Draw every parameter anew; a position without parameters has nothing to do."""


class Embedding(Position, ABC):
    """A position that is added to the tokens, once, before the first layer.

    Attributes:
        dim: channels of a token.
    """

    dim: int

    def forward(self, x: Float[Tensor, "*batch tokens dim"], domain: Domain) -> Float[Tensor, "*batch tokens dim"]:
        """``x`` plus the embedding of each token's position, in the dtype of ``x``; a prefix token gets 0, or a row of its own."""
        check_tokens(self, x, domain, self.dim, "dim")
        rows = self.rows(domain.whole, x)
        return x + domain.take(rows, by_row=rows.ndim == 3).to(x.dtype)

    @abstractmethod
    def rows(self, domain: Domain, x: Tensor) -> Float[Tensor, "*batch tokens dim"]:
        """The embedding of every token of a domain (which is no subset), on the device of ``x`` and for its dtype."""


class Rotation(Position, ABC):
    """A position that turns queries and keys, so that their product depends on where they are relative to each other."""

    @abstractmethod
    def rotate_one(self, x: Float[Tensor, "*batch heads tokens head_dim"], domain: Domain) -> Tensor:
        """Queries or keys turned by their positions on ``domain``; a cache that keeps turned keys turns only the new ones."""

    def rotate(
        self,
        q: Float[Tensor, "*batch heads queries head_dim"],
        k: Float[Tensor, "*batch kv_heads keys head_dim"],
        domain: Domain,
        key_domain: Domain | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned; with grouped queries the keys have fewer heads than the queries. As calling the module."""
        found: tuple[Tensor, Tensor] = self(q, k, domain, key_domain)
        return found

    def forward(self, q: Tensor, k: Tensor, domain: Domain, key_domain: Domain | None = None) -> tuple[Tensor, Tensor]:
        """Turn queries and keys, as ``rotate`` does."""
        keys = domain if key_domain is None else key_domain
        if keys is not domain:
            domain.whole.check_related(keys.whole, type(self).__name__)
        return self.rotate_one(q, domain), self.rotate_one(k, keys)


class Bias(Position, ABC):
    """A position that is added to the attention scores.

    Attributes:
        heads: attention heads, of the queries.
    """

    heads: int

    def __init__(self) -> None:
        super().__init__()
        self._number = _enlisted(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = _enlisted(self)  # of a copy

    def pair(self, domain: Domain, key_domain: Domain | None = None, *, dtype: torch.dtype | None = None) -> PairBias:
        """The bias between queries on ``domain`` and keys on ``key_domain`` (default: the same).

        ``dtype`` is the dtype of the scores, fp32 or fp64; by default the parameters', and at least fp32.
        """
        keys = domain if key_domain is None else key_domain
        if keys is not domain:
            domain.whole.check_related(keys.whole, type(self).__name__)
            domain.check_pairable(keys)
        pair: PairBias = self(domain.whole, keys.whole, dtype)
        return pair if domain.whole is domain and keys.whole is keys else SubsetPair(pair, domain, keys)

    def forward(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        """``between``, as a call of the module, so that offloading and hooks act on it."""
        return self.between(domain, keys, dtype)

    @abstractmethod
    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        """``pair`` for domains that are no subsets, and that can be compared."""

    def is_pointwise(self, domain: Domain) -> bool:
        """Whether the score of a pair is an entry of a table or a formula there, and ``PairBias.of_head`` computes just that."""
        return False


# What a compiled graph holds of a bias is its number, a constant, by which it is found when the graph runs.
BIASES: WeakValueDictionary[int, Bias] = WeakValueDictionary()
_COUNT = count()


def _enlisted(bias: Bias) -> int | None:
    """A number of its own; None for what is made in a graph, which is gone when the graph runs."""
    if is_compiling():
        return None
    number = next(_COUNT)
    BIASES[number] = bias
    return number


class Sum(Position):
    """Positions used together; ``a + b`` makes one. Sums in sums are flattened.

    Raises:
        ValueError: biases of different numbers of heads.

    Example:
        >>> [type(part).__name__ for part in positions.Sinusoidal(64) + positions.Rotary(16) + positions.DistanceDecay(4)]
        ['Sinusoidal', 'Rotary', 'DistanceDecay']
    """

    def __init__(self, *positions: Position) -> None:
        super().__init__()
        wrong = [position for position in positions if not isinstance(position, Position)]
        if not positions:
            raise ValueError("positions must be at least one position; got none. Leave the position out, or give None.")
        if wrong:
            raise TypeError(f"Sum takes positions; got {type(wrong[0]).__name__}")
        self.terms = nn.ModuleList(part for position in positions for part in position.parts)
        heads = {bias.heads for bias in self.biases} - {1}
        if len(heads) > 1:
            raise ValueError(f"biases that are added must have the same number of heads; got {sorted(heads)}")

    @property
    def parts(self) -> tuple[Position, ...]:
        return cast("tuple[Position, ...]", tuple(self.terms))

    def __iter__(self) -> Iterator[Position]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.terms)

    def reset_parameters(self) -> None:
        for part in self.parts:
            part.reset_parameters()

    def forward(self, x: Float[Tensor, "*batch tokens dim"], domain: Domain) -> Tensor:
        """``x`` plus every embedding of the sum."""
        for embedding in self.embeddings:
            x = embedding(x, domain)
        return x

    def rotate_one(self, x: Float[Tensor, "*batch heads tokens head_dim"], domain: Domain) -> Tensor:
        """Queries or keys turned by every rotation of the sum."""
        for rotation in self.rotations:
            x = rotation.rotate_one(x, domain)
        return x

    def rotate(self, q: Tensor, k: Tensor, domain: Domain, key_domain: Domain | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by every rotation of the sum."""
        for rotation in self.rotations:
            q, k = rotation.rotate(q, k, domain, key_domain)
        return q, k

    def pair(self, domain: Domain, key_domain: Domain | None = None, *, dtype: torch.dtype | None = None) -> PairBias:
        """The sum of the biases, bound to the domains of queries and keys."""
        if not self.biases:
            raise ValueError(
                f"this sum has no bias to evaluate; its parts are {', '.join(type(part).__name__ for part in self.parts)}"
            )
        return SumPair(tuple(bias.pair(domain, key_domain, dtype=dtype) for bias in self.biases))


def together(*parts: Position | None) -> Position | None:
    """The sum of those that are there; None where there is none, and itself where there is one."""
    present = [part for part in parts if part is not None]
    return Sum(*present) if len(present) > 1 else present[0] if present else None


def no_meaning(position: Position, domain: Domain, instead: str) -> ValueError:
    """The error of a position that is not defined on a domain."""
    return ValueError(f"{type(position).__name__} is not defined on a {domain.kind}; got {domain!r}. {instead}")


def check_tokens(position: Position, x: Tensor, domain: Domain, width: int, name: str) -> None:
    """Raise unless ``x`` is ``(..., tokens, width)`` for the tokens of ``domain``, and on its device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a floating-point tensor; got {type(x).__name__}")
    if x.ndim < 2 or x.shape[-2] != domain.num_tokens or x.shape[-1] != width:
        raise ValueError(
            f"{type(position).__name__} takes x of shape (..., {domain.num_tokens}, {width}), the tokens of {domain!r} and {name}={width}; "
            f"got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype; got {x.dtype}")
    check_device(domain, x.device)
    rows = domain.batch_size
    if rows is not None and (x.shape[0] != rows or x.ndim < 3):
        raise ValueError(f"x must have the {rows} rows of {domain!r}; got shape {tuple(x.shape)}")


def check_device(domain: Domain, device: torch.device) -> None:
    """Raise where the domain's tensors are on another device."""
    if domain.device is not None and domain.device != device and device.type != "meta":
        raise ValueError(
            f"tokens and domain must be on the same device; got {device} and {domain.device}. Use domain.to({str(device)!r})."
        )


def in_steps(domain: Domain) -> bool:
    """Whether coordinates are whole steps that every row of a batch shares."""
    return isinstance(domain, (Sequence, Grid))


def places(domain: Domain, device: torch.device) -> Float[Tensor, "*batch tokens ndim"]:
    """Coordinates of all tokens in fp64, ``(tokens, ndim)`` or ``(batch, tokens, ndim)``; prefix tokens hold 0."""
    if not in_steps(domain):
        where = domain.coordinates if domain.learned is None else domain.learned
        return where.to(device, torch.float64)
    i = torch.arange(domain.num_tokens, device=device)
    axes = [domain.coordinate(axis, i.new_zeros(()), i).expand(i.shape) for axis in range(domain.ndim)]
    table = torch.stack(axes, -1).double()
    prefix = domain.is_prefix(i.new_zeros(()), i)
    return table if prefix is None else table.masked_fill(prefix[:, None], 0)


def placed(domain: Domain) -> Domain:
    """The domain at the coordinates that were given, for functions that are to be differentiated in these."""
    return domain if domain.learned is None else domain.at_places(domain.learned)


def kept(domain: Domain, key: Hashable, make: Callable[[], Fact]) -> Fact:
    """A table that positions make of a domain's coordinates, kept on the domain; made anew where these want a gradient."""
    return domain.fact(key, make) if domain.whole.learned is None else make()


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or fp32 where it is narrower."""
    return torch.promote_types(dtype, torch.float32)
