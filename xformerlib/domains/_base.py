"""What every domain can be asked: which tokens exist, where they are, and how two of them are related.

Masks and positions never look inside a domain. They ask it, for broadcastable tensors of batch and token indices:

    coordinate(axis, b, i)           where token i is on one axis
    rank(b, i)                       its place in its item, counted from the front, prefix tokens included
    is_prefix(b, i)                  whether it is a class, register or virtual token
    precedes(keys, b, q, k)          whether key k is not later than query q
    offset(axis, keys, b, q, k)      coordinate of q minus coordinate of k
    distance(keys, b, q, k)          the domain's own metric
    within(keys, radius, b, q, k)    whether the distance is at most a radius
    together(keys, b, q, k)          same item, and both tokens exist

The answers are elementwise in the indices (arithmetic, or one gather), so that the same code serves a tile of a kernel, a dense picture,
and a scalar under ``vmap`` in FlexAttention.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .._arguments import as_tensor, check_count
from .._config import Described
from ._kept import OF_ITS_OWN, Kept

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._subset import Subset


class Domain(Kept, Described, ABC):
    """Where tokens live. Immutable; expensive facts are computed when first asked for, and kept.

    Attributes:
        num_tokens: tokens of one row of the batch (dense, padded) or of all items together (packed), prefix tokens included.
        prefix: number of prefix tokens (class, register, virtual node) at the front of each item; they have no position.
        offsets: ``(items + 1,)`` boundaries of packed items, or None where a domain is not packed.
        valid: ``(batch, tokens)``, True where a token exists, or None where all do.
        ndim: number of coordinate axes.
    """

    kind: str  # the name used in messages
    # Whether coordinates are real numbers (time, space) or whole steps.
    continuous: bool = False

    def __init__(
        self,
        *,
        num_tokens: int,
        ndim: int,
        prefix: int = 0,
        offsets: Int[Tensor, " bounds"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.ndim = ndim
        self.prefix = prefix
        self.offsets = offsets
        self.valid = valid
        self._batch_size = batch_size
        self._device = device
        self._rank_offset = 0
        self._begin()

    # -- which tokens ------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        """The number of rows where each row of the batch has its own facts (lengths, times); None where all rows share them."""
        return self._batch_size

    @property
    def num_items(self) -> int:
        """Packed items, or 1."""
        return 1 if self.offsets is None else self.offsets.numel() - 1

    @property
    def device(self) -> torch.device | None:
        """Where the domain's tensors are; None if it holds none and so fits every device."""
        return self._device

    @property
    def items(self) -> Int[Tensor, " tokens"] | None:
        """The packed item of each token, or None where the domain has only one item."""
        if self.num_items == 1:
            return None
        return self.fact("items", self._make_items)

    def _make_items(self) -> Tensor:
        assert self.offsets is not None
        sizes = self.offsets.diff()
        return torch.repeat_interleave(
            torch.arange(sizes.numel(), device=sizes.device), sizes, output_size=self.num_tokens
        )

    def to(self, device: torch.device | str | None, *, non_blocking: bool = False) -> Self:
        """The same domain with its tensors, and the facts already computed, on ``device``; one copy per device.

        As of a tensor, nothing moves where ``device`` is None.
        """
        if device is None:
            return self
        target = torch.empty(0, device=device).device  # "cuda" means "cuda:0" here as it does for tensors
        if self.device is None or self.device == target:
            return self

        def move() -> Any:
            moved = copy.copy(self)
            moved.__dict__.update(
                {
                    name: _to_device(value, target, non_blocking)
                    for name, value in self.__dict__.items()
                    if name not in ("_facts", "_number", *OF_ITS_OWN)
                }
            )
            moved._device = target
            moved._facts = _to_device(self._own_facts(), target, non_blocking)
            return moved

        return self.fact(("to", target), move)

    # -- a part of the tokens ----------------------------------------------------------------------------------

    def subset(self, index: Int[Tensor, "*batch kept"]) -> Subset:
        """The tokens ``index`` alone, each where it is: masks and positions mean what they mean on the whole.

        Args:
            index: (kept,) tokens, the same in each row of the batch, or (batch, kept), in each row its own. No token comes twice, and
                prefix tokens stay in front. Of packed items: (kept,), those of an item behind those of the item before.

        Raises:
            ValueError, TypeError: an index that is no such list of tokens.

        Example:
            >>> kept = Grid(3, 3, prefix=1).subset(torch.tensor([0, 1, 5, 9]))
            >>> kept.coordinates.tolist()
            [[0, 0], [0, 0], [1, 1], [2, 2]]
        """
        from ._subset import Subset, checked_index

        index = checked_index(self, index)
        rows = torch.arange(self.batch_size or 1, device=index.device)[:, None]
        return Subset.of(self.whole, self.token(rows, index))

    @property
    def whole(self) -> Domain:
        """The domain that this one is a subset of; itself where it is none."""
        return self

    def token(self, b: Tensor, i: Tensor) -> Tensor:
        """The token of the whole that token ``i`` of row ``b`` is."""
        return i

    def take(self, table: Shaped[Tensor, "... tokens dim"], *, by_row: bool) -> Shaped[Tensor, "... kept dim"]:
        """Of a table of the tokens of the whole, those that are here; ``by_row`` says whether its first axis is the rows of the batch."""
        return table

    # -- where each token is -----------------------------------------------------------------------------------

    @abstractmethod
    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        """Coordinate of token ``i`` of row ``b`` on one axis; of no meaning for a prefix token."""

    # Coordinates of all tokens as they were given, where they require grad.
    learned: Tensor | None = None

    def at_places(self, coordinates: Tensor) -> Domain:
        """The same tokens at other coordinates, such as ``learned``: for functions of these that are to be differentiated."""
        raise AssertionError(f"places on a {self.kind} are no real numbers")

    @property
    def coordinates(self) -> Shaped[Tensor, "*batch tokens ndim"]:
        """Coordinates of all tokens, ``(tokens, ndim)`` or ``(batch, tokens, ndim)``; prefix tokens hold 0."""
        return self.fact("coordinates", self._make_coordinates)

    def _make_coordinates(self) -> Tensor:
        i = torch.arange(self.num_tokens, device=self.device)
        b = torch.arange(self.batch_size or 1, device=self.device)[:, None]
        axes = [self.coordinate(axis, b, i).expand(b.numel(), i.numel()) for axis in range(self.ndim)]
        table = torch.stack(axes, -1)
        prefix = self.is_prefix(b, i)
        if prefix is not None:
            table = table.masked_fill(prefix[..., None], 0)
        return table if self.batch_size is not None else table[0]

    def place(self, i: Tensor) -> Tensor:
        """Place of token ``i`` among the tokens of its item that are here, from 0, prefix tokens included."""
        if self.items is None:
            return i
        assert self.offsets is not None
        return i - self.offsets[self.items[i]]

    def rank(self, b: Tensor, i: Tensor) -> Tensor:
        """Place of token ``i`` in its whole item, from 0 at the front, prefix tokens included."""
        place = self.place(i)
        return place + self._rank_offset if self._rank_offset else place

    def is_prefix(self, b: Tensor, i: Tensor) -> Tensor | None:
        """Whether token ``i`` is a prefix token; None where the domain has none."""
        return self.place(i) < self.prefix if self.prefix else None

    # -- how two tokens are related ------------------------------------------------------------------------------

    def check_related(self, keys: Domain, what: object) -> None:
        """Raise unless positions on this domain and on ``keys`` can be compared."""
        if type(self) is not type(keys) or self.ndim != keys.ndim:
            raise ValueError(
                f"{what} compares positions of queries and keys, so both must live on the same kind of domain; got queries on "
                f"{self!r} and keys on {keys!r}. Use Full(), Keys(valid), Prefix(n) or Where(fn) between different kinds."
            )

    def check_ordered(self) -> None:
        """Raise unless one token can be said to be not later than another."""

    def precedes(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether key ``k`` is not later than query ``q`` (itself included), both ordinary tokens."""
        return keys.coordinate(0, b, k) <= self.coordinate(0, b, q)

    def offset(self, axis: int, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Coordinate of query ``q`` minus coordinate of key ``k`` on one axis."""
        return self.coordinate(axis, b, q) - keys.coordinate(axis, b, k)

    def distance(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The domain's metric; on one axis |q - k|."""
        return self.offset(0, keys, b, q, k).abs()

    def within(self, keys: Domain, radius: tuple[float, ...], b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether the distance is at most ``radius``: one number, or (on a grid) one for each axis."""
        return self.distance(keys, b, q, k) <= radius[0]

    def extent(self, axis: int, b: Tensor, i: Tensor) -> tuple[Tensor | int, Tensor | int]:
        """First and last coordinate on one axis of the item that token ``i`` is in; only domains of whole steps have one."""
        raise ValueError(f"{self.kind} has no rim")

    def touches_prefix(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """Whether query or key is a prefix token; None where neither domain has any."""
        return either(self.is_prefix(b, q), keys.is_prefix(b, k))

    def together(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """Whether both tokens exist and are in the same item; None where that is always so."""
        result = None
        if self.items is not None and keys.items is not None:
            result = self.items[q] == keys.items[k]
        if self.valid is not None:
            result = both(result, self.valid[b, q])
        if keys.valid is not None:
            result = both(result, keys.valid[b, k])
        return result

    def check_pairable(self, keys: Domain) -> None:
        """Raise unless a query on this domain may meet a key on ``keys`` at all: same number of items, same number of rows."""
        if self.num_items != keys.num_items:
            raise ValueError(
                f"queries and keys must be packed from the same number of items; got {self.num_items} items of queries and "
                f"{keys.num_items} of keys. Item i of the queries meets item i of the keys."
            )
        if self.batch_size is not None and keys.batch_size is not None and self.batch_size != keys.batch_size:
            raise ValueError(
                f"query and key domains must have the same number of rows; got {self.batch_size} and {keys.batch_size}"
            )

    def zero_padding(self, x: Shaped[Tensor, "*batch tokens dim"]) -> Shaped[Tensor, "*batch tokens dim"]:
        """``x`` with 0 at tokens that do not exist, whatever stood there (NaN included)."""
        return x if self.valid is None or x.is_meta else x.masked_fill(~self.valid[..., None], 0)

    # -- growing, for caches ---------------------------------------------------------------------------------------

    def check_extendable(self) -> None:
        """Raise unless later tokens can be appended to this domain."""
        raise ValueError(
            f"a cache holds the earlier tokens of a Sequence or Timeline shared by the whole batch; got {self!r}"
        )

    def extended(self, later: Domain) -> Domain:
        """This domain with the tokens of ``later`` appended, for caches."""
        self.check_extendable()
        raise AssertionError(f"{self.kind} says it can be extended, but not how")

    def continuing(self, earlier: Domain) -> Self:
        """This domain as what follows ``earlier``, from whose front ranks are then counted."""
        return self._ranked_from(earlier.num_tokens + earlier._rank_offset)

    def _ranked_from(self, offset: int) -> Self:
        if offset == 0:
            return self
        piece = copy.copy(self)
        piece._facts, piece._rank_offset = None, offset
        return piece

    def begins_with(self, keys: Domain) -> bool:
        """Whether indices of queries and of keys count from the same token, as far as that can be said."""
        return self._rank_offset == keys._rank_offset

    def out_of_reach(self, later: Domain, lookback: float) -> int:
        """How many tokens from the front are further than ``lookback`` from all of ``later``, and so from all that comes after it."""
        return 0

    def last(self, count: int) -> Domain:
        """The last ``count`` tokens, none of them a prefix token."""
        raise ValueError(f"last needs a Sequence or Timeline in which every row has as many tokens; got {self!r}")

    def repeated(self, times: int) -> Domain:
        """The domain of a batch in which each row stands ``times`` times, one after the other."""
        if self.batch_size is not None:
            raise AssertionError(f"{self.kind} is in no cache where its rows differ")
        return self

    # -- identity ------------------------------------------------------------------------------------------------

    def _value(self) -> Hashable:
        """What makes two domains equal; None where only the same object is."""
        return None

    def _described(self) -> dict[str, Any]:
        return {**self._given(), **({"rank_offset": self._rank_offset} if self._rank_offset else {})}

    def _given(self) -> dict[str, Any]:
        """What the domain is made with, by name; those of ``_rebuilt``."""
        return super()._described()

    @classmethod
    def _rebuilt(cls, arguments: dict[str, Any]) -> Self:
        arguments = dict(arguments)
        offset = check_count("rank_offset", arguments.pop("rank_offset", 0))
        return cls._made_of(arguments)._ranked_from(offset)

    @classmethod
    def _made_of(cls, arguments: dict[str, Any]) -> Self:
        """The domain made with these arguments, those of ``_given``."""
        return super()._rebuilt(arguments)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        value = self._value()
        return value is not None and type(self) is type(other) and value == other._value()

    def __hash__(self) -> int:
        value = self._value()
        return id(self) if value is None else hash((type(self), value))


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Logical and, where None stands for True."""
    return b if a is None else a if b is None else a & b


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Logical or, where None stands for False."""
    return b if a is None else a if b is None else a | b


def as_lengths(name: str, lengths: SequenceOf[int] | Tensor) -> Int[Tensor, " items"]:
    """Lengths of items as an int64 vector, checked."""
    tensor = as_tensor(name, lengths, "a vector of integers")
    if tensor.numel() == 0:
        tensor = tensor.reshape(0).long()
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a vector of integers; got shape {tuple(tensor.shape)} of {tensor.dtype}")
    if tensor.numel() and int(tensor.min()) < 0:
        raise ValueError(f"{name} must be >= 0; got {int(tensor.min())}")
    return tensor.long()


def offsets_of(sizes: Int[Tensor, " items"]) -> Int[Tensor, " bounds"]:
    """Boundaries of packed items from their sizes: ``[0, n0, n0 + n1, ...]``."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _to_device(value: Any, device: torch.device, non_blocking: bool) -> Any:
    """``value`` with every tensor inside it on ``device``."""
    if isinstance(value, (Tensor, Domain)):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {k: _to_device(v, device, non_blocking) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*(_to_device(v, device, non_blocking) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(v, device, non_blocking) for v in value)
    return value
