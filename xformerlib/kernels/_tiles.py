"""Tiles: which queries meet which keys, and how their vectors are fetched and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ._scores import Pairs


class Tiles(ABC):
    """``n`` tiles of ``rows`` queries by ``columns`` keys; each query of the tiles is in one tile only.

    Tensors of tokens are ``(B, H, T, D)``, tensors of tiles ``(B, n, H, rows, D)``. What is put or added goes into a tensor of tokens,
    or where that is None into a new one of so many tokens, which is returned.
    """

    n: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Pairs in the tiles."""
        return self.n * self.rows * self.columns

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


class Gathered(Tiles):
    """Tiles of listed queries and keys, -1 where a tile is not full. Queries are in one tile at most, keys in any number."""

    def __init__(self, q_index: Int[Tensor, "n rows"], k_index: Int[Tensor, "n columns"]) -> None:
        (self.n, self.rows), self.columns = q_index.shape, k_index.shape[1]
        self._q, self._k = q_index.clamp(min=0), k_index.clamp(min=0)
        self._q_there, self._k_there = (None if bool((i >= 0).all()) else i >= 0 for i in (q_index, k_index))
        self._q_places, self._q_targets = _places(q_index)
        self._k_places, self._k_targets = _places(k_index)

    def pairs(self, batch: int, heads: int) -> Pairs:
        return Pairs.of(batch, heads, self._q, self._k)

    @property
    def query_there(self) -> Tensor | None:
        return self._q_there

    @property
    def key_there(self) -> Tensor | None:
        return self._k_there

    def queries(self, x: Tensor) -> Tensor:
        return _fetch(x, self._q.flatten()).unflatten(2, (self.n, self.rows)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return _fetch(x, self._k.flatten()).unflatten(2, (self.n, self.columns)).transpose(1, 2)

    def put_queries(self, x: Tensor | None, tile: Tensor, tokens: int, fill: float | None = 0.0) -> Tensor:
        x = _new(tile, tokens, fill) if x is None else x
        return x.index_copy_(2, self._q_targets, self._listed(tile, self._q_places).to(x.dtype))

    def add_queries(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return _add(x, self._q_targets, self._listed(tile, self._q_places), tokens)

    def add_keys(self, x: Tensor | None, tile: Tensor, tokens: int) -> Tensor:
        return _add(x, self._k_targets, self._listed(tile, self._k_places), tokens)

    @staticmethod
    def _listed(tile: Tensor, places: Tensor | None) -> Tensor:
        """The vectors of a tensor of tiles one after the other, without those that stand for no token."""
        return _flat(tile) if places is None else _fetch(_flat(tile), places)


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
        return x.unfold(2, before + self.rows + after, self.rows).transpose(1, 2).transpose(-2, -1)

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

    def __init__(self, first: int, n: int, width: int, device: torch.device) -> None:
        self.first, self.n, self.rows, self.columns, self.device = first, n, width, width, device

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


class Arrangement:
    """The tokens in another order, in which the tiles of a part are runs.

    Args:
        index: the token at each place.
        there: whether it belongs there, each token at most at one place; elsewhere it only fills the place. None: everywhere.
        tokens: T.
        rows: where each row of the batch has an order of its own, their number: token i of row b is then ``b * T + i``, and arranged
            tensors have one row.
    """

    def __init__(
        self,
        index: Int[Tensor, " places"],
        there: Bool[Tensor, " places"] | None,
        tokens: int,
        rows: int | None = None,
    ) -> None:
        self.index, self.there, self.rows, self.tokens = index, there, rows, tokens
        places = torch.arange(index.numel(), device=index.device) if there is None else there.nonzero()[:, 0]
        everyone = tokens * (1 if rows is None else rows)
        home = index.new_full((everyone,), -1)
        home[index[places]] = places
        self._missing = None if places.numel() == everyone else home < 0
        self._home = home.clamp_(min=0)
        self._row = None if rows is None else torch.div(index, max(tokens, 1), rounding_mode="floor")
        self._token = index if rows is None else index % max(tokens, 1)

    @property
    def size(self) -> int:
        """The number of places."""
        return self.index.numel()

    def arrange(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "_ heads places dim"]:
        """A tensor of tokens, in the order of places; whatever where there is no token."""
        if self.rows is None:
            return _fetch(x, self.index)
        return _fetch(x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2), self.index)

    def arrange_all(
        self,
        query: Float[Tensor, "batch heads tokens _"],
        key: Float[Tensor, "batch kv_heads tokens _"],
        value: Float[Tensor, "batch kv_heads tokens _"],
    ) -> tuple[
        Float[Tensor, "_ heads places _"], Float[Tensor, "_ kv_heads places _"], Float[Tensor, "_ kv_heads places _"]
    ]:
        """``arrange`` for all three; those that one projection left side by side in memory are fetched at once."""
        joint = _joint((query, key, value))
        if joint is None:
            return self.arrange(query), self.arrange(key), self.arrange(value)
        query, key, value = self.arrange(joint).split([x.shape[1] for x in (query, key, value)], 1)
        return query, key, value

    def restore(
        self, x: Float[Tensor, "_ heads places dim"], fill: float = 0.0
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """The inverse of ``arrange``; ``fill`` for tokens that have no place."""
        x = _fetch(x, self._home)
        if self._missing is not None:
            x = x.masked_fill_(self._missing[:, None], fill)
        return x if self.rows is None else x[0].unflatten(1, (self.rows, self.tokens)).transpose(0, 1)

    def pairs(self, pairs: Pairs) -> Pairs:
        """The tokens of pairs of places."""
        # Every tile is in one row of the batch, that of its first query.
        b = pairs.b if self._row is None else self._row[pairs.q[..., :1, :]]
        return Pairs(b, pairs.h, self._token[pairs.q], self._token[pairs.k])


def _count(at: slice | Tensor) -> int:
    return at.stop - at.start if isinstance(at, slice) else at.numel()


def _new(like: Tensor, tokens: int, fill: float | None) -> Float[Tensor, "batch heads tokens dim"]:
    """A tensor of tokens, the heads of a token side by side, as a model will want to merge them; ``fill=None`` leaves it as it comes."""
    shape = (like.shape[0], tokens, like.shape[-3], like.shape[-1])
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


def _joint(tensors: SequenceOf[Tensor]) -> Float[Tensor, "batch all_heads tokens dim"] | None:
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


def _places(index: Tensor) -> tuple[Tensor | None, Tensor]:
    """Where in the flat list tokens stand (None: everywhere), and which ones."""
    flat = index.flatten()
    if bool((flat >= 0).all()):
        return None, flat
    places = (flat >= 0).nonzero()[:, 0]
    return places, flat[places]
