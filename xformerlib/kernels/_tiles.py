"""Tiles: which queries meet which keys, and how their vectors are fetched and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence as SequenceOf

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .._autograd import is_transformed
from ._scores import Pairs


class Tiles(ABC):
    """``n`` tiles of ``rows`` queries by ``columns`` keys; each query of the tiles is in one tile only.

    Tensors of tokens are ``(B, H, T, D)``, tensors of tiles ``(B, n, H, rows, D)``. What is put or added goes into a tensor of tokens,
    or where that is None into a new one of so many tokens, which is returned.
    """

    n: int
    rows: int
    columns: int
    own = False  # whether the keys of the tiles are the queries, each in one tile only: then gradients of keys are put like queries
    placed = 0  # where they are their own: the tokens in the tiles
    device: torch.device
    batch: int | None = None  # where each row of the batch has tiles of its own: how many rows there are

    @property
    def size(self) -> int:
        """Pairs in the tiles."""
        return self.n * self.rows * self.columns

    def ready(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """``x`` in a layout from which tiles are fetched fast, once for all calls."""
        return x

    def vectors(
        self,
        query: Float[Tensor, "batch heads tokens dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
    ) -> tuple[
        Float[Tensor, "_ n heads rows dim"],
        Float[Tensor, "_ n kv_heads columns dim"],
        Float[Tensor, "_ n kv_heads columns value_dim"],
    ]:
        """The tiles' queries, keys and values; those that one projection left side by side in memory are fetched at once."""
        return self.queries(query), self.keys(key), self.keys(value)

    @abstractmethod
    def pairs(self, batch: int, heads: int) -> Pairs:
        """The indices of the tiles' pairs, all within the tokens, also where a tile is not full."""

    @property
    def query_there(self) -> Bool[Tensor, "n rows"] | None:
        """Which queries of a tile are tokens; None where all are."""
        return None

    @property
    def key_there(self) -> Bool[Tensor, "n columns"] | None:
        """Which keys of a tile are tokens; None where all are."""
        return None

    def stood(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """The tokens in the tiles, and where the vector of each is among all that the tiles hold, tile by tile. For tiles of their own."""
        raise AssertionError("keys of these tiles are not their queries")

    @abstractmethod
    def queries(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch n heads rows dim"]:
        """The tiles' queries."""

    @abstractmethod
    def keys(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch n heads columns dim"]:
        """The tiles' keys."""

    @abstractmethod
    def put_queries(
        self, x: Tensor | None, tile: Float[Tensor, "batch n heads rows dim"], tokens: int, fill: float | None = 0.0
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Write what was computed for the tiles' queries where they stand; a new tensor holds ``fill`` elsewhere, or anything
        (None)."""

    @abstractmethod
    def add_queries(
        self, x: Tensor | None, tile: Float[Tensor, "batch n heads rows dim"], tokens: int
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Add what was computed for the tiles' queries where they stand."""

    @abstractmethod
    def add_keys(
        self, x: Tensor | None, tile: Float[Tensor, "batch n heads columns dim"], tokens: int
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Add what was computed for the tiles' keys where they stand."""


class Block(Tiles):
    """One tile: a run or a list of queries by a run or a list of keys."""

    def __init__(
        self, queries: slice | Int[Tensor, " rows"], keys: slice | Int[Tensor, " columns"], device: torch.device
    ) -> None:
        self.q, self.k, self.device = queries, keys, device
        self.n, self.rows, self.columns = 1, _count(queries), _count(keys)

    def pairs(self, batch: int, heads: int) -> Pairs:
        q, k = (
            torch.arange(at.start, at.stop, device=self.device) if isinstance(at, slice) else at
            for at in (self.q, self.k)
        )
        return Pairs.of(batch, heads, q, k)

    def queries(self, x: Tensor) -> Tensor:
        return _fetch(x, self.q)[:, None]

    def keys(self, x: Tensor) -> Tensor:
        return _fetch(x, self.k)[:, None]

    def put_queries(self, x: Tensor | None, tile: Tensor, tokens: int, fill: float | None = 0.0) -> Tensor:
        if self.rows == tokens and isinstance(self.q, slice):
            return tile[:, 0]
        x = _new(tile, tokens, fill) if x is None else x
        if isinstance(self.q, slice):
            x[:, :, self.q] = tile[:, 0]
        else:
            x.index_copy_(2, self.q, tile[:, 0].to(x.dtype))
        return x

    def add_queries(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return _add(x, self.q, tile[:, 0], tokens)

    def add_keys(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return _add(x, self.k, tile[:, 0], tokens)


class _Listed:
    """The tokens of tiles, some of which may only fill a tile."""

    def __init__(self, index: Int[Tensor, "n width"], there: Bool[Tensor, "n width"] | None) -> None:
        self.index, self.shape = index, index.shape
        self.there = None if there is None or bool(there.all()) else there
        self._places = None if self.there is None else self.there.flatten().nonzero()[:, 0]
        self.targets = index.flatten() if self._places is None else index.flatten()[self._places]

    def fetch(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch n heads width dim"]:
        return _fetch(x, self.index.flatten()).unflatten(2, self.shape).transpose(1, 2)

    def places(self) -> Int[Tensor, " targets"]:
        """Where each of ``targets`` is among the tokens of all tiles."""
        return torch.arange(self.index.numel(), device=self.index.device) if self._places is None else self._places

    def flat(self, tile: Float[Tensor, "batch n heads width dim"]) -> Float[Tensor, "batch heads targets dim"]:
        """The vectors of a tensor of tiles one after the other, without those that only fill a tile."""
        return _flat(tile) if self._places is None else _fetch(_flat(tile), self._places)


class Gathered(Tiles):
    """Tiles of listed queries and keys. Queries are in one tile at most, keys in any number.

    Args:
        q_index, k_index: the tokens of each tile; the same tensor for groups of tokens, whose keys are in one tile at most, too.
        q_there, k_there: whether they belong there; others only fill a tile. None: all do.
        tokens, batch: where each row of the batch has tiles of its own, T and the number of rows: token i of row b is ``b * T + i`` here.
    """

    def __init__(
        self,
        q_index: Int[Tensor, "n rows"],
        k_index: Int[Tensor, "n columns"],
        q_there: Bool[Tensor, "n rows"] | None = None,
        k_there: Bool[Tensor, "n columns"] | None = None,
        tokens: int = 0,
        batch: int | None = None,
    ) -> None:
        (self.n, self.rows), self.columns = q_index.shape, k_index.shape[1]
        self.own, self.batch, self._tokens = q_index is k_index, batch, max(tokens, 1)
        self.device = q_index.device
        self._q = _Listed(q_index, q_there)
        self._k = self._q if self.own else _Listed(k_index, k_there)
        self.placed = self._q.targets.numel()

    def pairs(self, batch: int, heads: int) -> Pairs:
        pairs = Pairs.of(batch, heads, self._q.index, self._k.index)
        if self.batch is None:
            return pairs
        b = torch.div(pairs.q[..., :1, :], self._tokens, rounding_mode="floor")  # all of a tile are in one row
        return Pairs(b, pairs.h, pairs.q % self._tokens, pairs.k % self._tokens)

    def stood(self) -> tuple[Tensor, Tensor]:
        return self._q.targets, self._q.places()

    @property
    def query_there(self) -> Tensor | None:
        return self._q.there

    @property
    def key_there(self) -> Tensor | None:
        return self._k.there

    def ready(self, x: Tensor) -> Tensor:
        if self.batch is None and x.is_contiguous():
            return x
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def vectors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joint = joined((query, key, value)) if self.own else None
        if joint is None:
            return super().vectors(query, key, value)
        query, key, value = self.queries(joint).split([x.shape[1] for x in (query, key, value)], 2)
        return query, key, value

    def queries(self, x: Tensor) -> Tensor:
        return self._q.fetch(self._as_one(x))

    def keys(self, x: Tensor) -> Tensor:
        return self._k.fetch(self._as_one(x))

    def put_queries(self, x: Tensor | None, tile: Tensor, tokens: int, fill: float | None = 0.0) -> Tensor:
        x = self._new(tile, tokens, fill) if x is None else x
        self._by_token(x).index_copy_(1, self._q.targets, _side_by_side(self._q.flat(tile).to(x.dtype)))
        return x

    def add_queries(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return self._add(x, self._q, tile, tokens)

    def add_keys(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return self._add(x, self._k, tile, tokens)

    def _add(self, x: Tensor | None, listed: _Listed, tile: Tensor, tokens: int) -> Tensor:
        x = self._new(tile, tokens, 0.0) if x is None else x
        if self.batch is None:
            return _add(x, listed.targets, listed.flat(tile), tokens)
        self._by_token(x).index_add_(1, listed.targets, _side_by_side(listed.flat(tile).to(x.dtype)))
        return x

    def _new(self, tile: Tensor, tokens: int, fill: float | None) -> Tensor:
        return _new(tile, tokens, fill, self.batch)

    def _as_one(self, x: Tensor) -> Tensor:
        """The rows of the batch one behind the other, where each has tiles of its own."""
        return x if self.batch is None else x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)

    def _by_token(self, x: Tensor) -> Float[Tensor, "_ places channels"]:
        """The memory of a tensor that was made here."""
        x = x.transpose(1, 2)
        return x.view(x.shape[0], x.shape[1], -1) if self.batch is None else x.view(1, x.shape[0] * x.shape[1], -1)


class Band(Tiles):
    """Runs of ``rows`` queries by the keys from ``before`` tokens before the run to ``after`` tokens behind it, fetched as views."""

    def __init__(
        self, first: int, n: int, rows: int, before: int, after: int, tokens: int, device: torch.device
    ) -> None:
        self.first, self.n, self.rows, self.columns = first, n, rows, before + rows + after
        self.before, self.after, self.tokens, self.device = before, after, tokens, device

    def _tokens(self, before: int, width: int) -> Int[Tensor, "n width"]:
        start = self.first - before + self.rows * torch.arange(self.n, device=self.device)[:, None]
        return start + torch.arange(width, device=self.device)

    def pairs(self, batch: int, heads: int) -> Pairs:
        q, k = self._tokens(0, self.rows), self._tokens(self.before, self.columns)
        return Pairs.of(batch, heads, *(index.clamp(0, self.tokens - 1) for index in (q, k)))

    @property
    def query_there(self) -> Tensor | None:
        whole = self.first + self.n * self.rows <= self.tokens
        return None if whole else self._tokens(0, self.rows) < self.tokens

    @property
    def key_there(self) -> Tensor | None:
        _, _, left, right = self._around(self.before, self.after)
        if not left and not right:
            return None
        k = self._tokens(self.before, self.columns)
        return (k >= 0) & (k < self.tokens)

    def _around(self, before: int, after: int) -> tuple[int, int, int, int]:
        """The tokens from ``start`` to ``stop`` that the tiles reach, and how many are missing at either end."""
        start, stop = self.first - before, self.first + self.n * self.rows + after
        return max(start, 0), min(stop, self.tokens), max(-start, 0), max(stop - self.tokens, 0)

    def _runs(self, x: Tensor, before: int, after: int) -> Tensor:
        start, stop, left, right = self._around(before, after)
        x = x[:, :, start:stop]
        if left or right:
            x = F.pad(x, (0, 0, left, right))
        width = before + self.rows + after
        if is_transformed():  # torch has no batching rule for the derivative of unfold
            first = self.rows * torch.arange(self.n, device=x.device)[:, None]
            places = first + torch.arange(width, device=x.device)
            return x.index_select(2, places.flatten()).unflatten(2, places.shape).transpose(1, 2)
        return x.unfold(2, width, self.rows).transpose(1, 2).transpose(-2, -1)

    def queries(self, x: Tensor) -> Tensor:
        return self._runs(x, 0, 0)

    def keys(self, x: Tensor) -> Tensor:
        return self._runs(x, self.before, self.after)

    def put_queries(self, x: Tensor | None, tile: Tensor, tokens: int, fill: float | None = 0.0) -> Tensor:
        start, stop, _, _ = self._around(0, 0)
        runs = _flat(tile)[:, :, : stop - start]
        if stop - start == tokens:
            return runs
        x = _new(tile, tokens, fill) if x is None else x
        x[:, :, start:stop] = runs
        return x

    def add_queries(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        start, stop, _, _ = self._around(0, 0)
        return _add(x, slice(start, stop), _flat(tile)[:, :, : stop - start], tokens)

    def add_keys(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        # Each run's keys overlap the next one's: add them piece by piece, each piece of all runs at once.
        start, stop, left, right = self._around(self.before, self.after)
        length, width = left + stop - start + right, self.n * self.rows
        total = _new(tile, length + -length % self.rows, None)
        total[:, :, width:] = 0
        by_run = total.unflatten(2, (-1, self.rows))
        for i, first in enumerate(range(0, self.columns, self.rows)):
            piece = tile[..., first : first + self.rows, :].transpose(1, 2)
            runs = by_run[:, :, i : i + self.n, : piece.shape[-2]]
            if i:
                runs += piece
            else:
                runs.copy_(piece)
        found = total[:, :, left : left + stop - start]
        return found if x is None and stop - start == tokens else _add(x, slice(start, stop), found, tokens)


class Slices(Tiles):
    """Runs of ``width`` tokens, one behind the other from ``first`` on, each by itself."""

    own = True

    def __init__(self, first: int, n: int, width: int, device: torch.device) -> None:
        self.first, self.n, self.rows, self.columns, self.device = first, n, width, width, device
        self.placed = n * width

    def stood(self) -> tuple[Tensor, Tensor]:
        every = torch.arange(self.placed, device=self.device)
        return every + self.first, every

    @property
    def _all(self) -> slice:
        return slice(self.first, self.first + self.n * self.rows)

    def pairs(self, batch: int, heads: int) -> Pairs:
        index = torch.arange(self._all.start, self._all.stop, device=self.device).view(self.n, self.rows)
        return Pairs.of(batch, heads, index, index)

    def queries(self, x: Tensor) -> Tensor:
        return x[:, :, self._all].unflatten(2, (self.n, self.rows)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return self.queries(x)

    def put_queries(self, x: Tensor | None, tile: Tensor, tokens: int, fill: float | None = 0.0) -> Tensor:
        if self.n * self.rows == tokens:
            return _flat(tile)
        x = _new(tile, tokens, fill) if x is None else x
        self.queries(x).copy_(tile)
        return x

    def add_queries(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        if x is None:
            return self.put_queries(x, tile, tokens)
        self.queries(x).add_(tile)
        return x

    def add_keys(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return self.add_queries(x, tile, tokens)


def pairs_of_row(calls: Iterable[Tiles]) -> float:
    """Pairs in tiles, for each row of the batch."""
    return sum(tiles.size / (tiles.batch or 1) for tiles in calls)


def _count(at: slice | Tensor) -> int:
    return at.stop - at.start if isinstance(at, slice) else at.numel()


def _new(
    like: Tensor, tokens: int, fill: float | None, batch: int | None = None
) -> Float[Tensor, "batch heads tokens dim"]:
    """A tensor of tokens, the heads of a token side by side, as a model will want to merge them; ``fill=None`` leaves it as it comes."""
    shape = (like.shape[0] if batch is None else batch, tokens, like.shape[-3], like.shape[-1])
    return (like.new_empty(shape) if fill is None else like.new_full(shape, fill)).transpose(1, 2)


def _flat(tile: Float[Tensor, "batch n heads rows dim"]) -> Float[Tensor, "batch heads places dim"]:
    """The vectors of all tiles one after the other."""
    return tile.transpose(2, 3).flatten(1, 2).transpose(1, 2)


def _fetch(x: Float[Tensor, "batch heads tokens dim"], at: slice | Tensor) -> Float[Tensor, "batch heads places dim"]:
    """Some tokens. Whole runs of memory are copied many times as fast as rows of another stride."""
    if isinstance(at, slice):
        return x[:, :, at]
    if x.is_contiguous():
        return x.flatten(0, 1).index_select(1, at).unflatten(0, x.shape[:2])
    by_token = x.transpose(1, 2).contiguous()
    return by_token.flatten(2).index_select(1, at).unflatten(2, by_token.shape[2:]).transpose(1, 2)


def _side_by_side(x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch tokens channels"]:
    return x.transpose(1, 2).flatten(2)


def joined(tensors: SequenceOf[Tensor]) -> Float[Tensor, "batch all_heads tokens dim"] | None:
    """The tensor that others are the heads of, one after the other; None where they are not."""
    first, at = tensors[0], tensors[0].storage_offset()
    (batch, _, tokens, dim), strides = first.shape, first.stride()
    if strides[3] != 1 or strides[1] != dim:
        return None
    for x in tensors:
        same = (x.shape[0], x.shape[2], x.shape[3]) == (batch, tokens, dim) and x.stride() == strides
        if (
            not same
            or x.storage_offset() != at
            or x.data_ptr() - at * x.element_size()
            != first.data_ptr() - (first.storage_offset() * first.element_size())
        ):
            return None
        at += x.shape[1] * dim
    return first.as_strided((batch, sum(x.shape[1] for x in tensors), tokens, dim), strides)


def _add(x: Tensor | None, at: slice | Tensor, y: Tensor, tokens: int) -> Tensor:
    x = _new(y, tokens, 0.0) if x is None else x
    if isinstance(at, slice):
        x[:, :, at] += y
    else:
        x.transpose(1, 2).index_add_(1, at, y.transpose(1, 2).to(x.dtype))
    return x
