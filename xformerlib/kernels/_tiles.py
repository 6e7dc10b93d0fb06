"""Tiles: which queries meet which keys, and how their vectors are fetched and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ._scores import Pairs


class Tiles(ABC):
    """``n`` tiles of ``rows`` queries by ``columns`` keys; each query of the tiles is in one tile only.

    Tensors of tokens are ``(B, H, T, D)``, tensors of tiles ``(n, B, H, rows, D)``.
    """

    n: int
    rows: int
    columns: int
    share: float = 1.0  # of the rows of the batch, that the tiles are for

    @property
    def size(self) -> float:
        """Pairs in the tiles, for each row of the batch."""
        return self.n * self.rows * self.columns * self.share

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
    def queries(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "n tile_batch heads rows dim"]:
        """The tiles' queries."""

    @abstractmethod
    def keys(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "n tile_batch heads columns dim"]:
        """The tiles' keys."""

    @abstractmethod
    def put_queries(
        self, x: Float[Tensor, "batch heads tokens dim"], tile: Float[Tensor, "n tile_batch heads rows dim"]
    ) -> None:
        """Write what was computed for the tiles' queries where they stand in ``x``."""

    @abstractmethod
    def add_queries(
        self, x: Float[Tensor, "batch heads tokens dim"], tile: Float[Tensor, "n tile_batch heads rows dim"]
    ) -> None:
        """Add what was computed for the tiles' queries where they stand in ``x``."""

    @abstractmethod
    def add_keys(
        self, x: Float[Tensor, "batch heads tokens dim"], tile: Float[Tensor, "n tile_batch heads columns dim"]
    ) -> None:
        """Add what was computed for the tiles' keys where they stand in ``x``."""


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
        return _fetch(x, self.q)[None]

    def keys(self, x: Tensor) -> Tensor:
        return _fetch(x, self.k)[None]

    def put_queries(self, x: Tensor, tile: Tensor) -> None:
        if isinstance(self.q, slice):
            x[:, :, self.q] = tile[0]
        else:
            x.index_copy_(2, self.q, tile[0].to(x.dtype))

    def add_queries(self, x: Tensor, tile: Tensor) -> None:
        _add(x, self.q, tile[0])

    def add_keys(self, x: Tensor, tile: Tensor) -> None:
        _add(x, self.k, tile[0])


class Gathered(Tiles):
    """Tiles of listed queries and keys, -1 where a tile is not full; with ``row``, each tile in one row of a batch of ``batch``.

    Queries are in one tile at most, keys in any number.
    """

    def __init__(
        self,
        q_index: Int[Tensor, "n rows"],
        k_index: Int[Tensor, "n columns"],
        row: Int[Tensor, " n"] | None = None,
        batch: int = 1,
    ) -> None:
        (self.n, self.rows), self.columns = q_index.shape, k_index.shape[1]
        self.row, self.share = row, 1 / batch
        self._q, self._k = q_index.clamp(min=0), k_index.clamp(min=0)
        self._q_there, self._k_there = (None if bool((i >= 0).all()) else i >= 0 for i in (q_index, k_index))
        self._q_places, self._q_targets = _places(q_index)
        self._k_places, self._k_targets = _places(k_index)

    def pairs(self, batch: int, heads: int) -> Pairs:
        pairs = Pairs.of(batch, heads, self._q, self._k)
        return pairs if self.row is None else pairs._replace(b=self.row[:, None, None, None, None])

    @property
    def query_there(self) -> Tensor | None:
        return self._q_there

    @property
    def key_there(self) -> Tensor | None:
        return self._k_there

    def _index(self, index: Tensor, tokens: int) -> Tensor:
        return index.flatten() if self.row is None else (index + tokens * self.row[:, None]).flatten()

    def _flat(self, x: Tensor) -> Tensor:
        """(B, H, T, D), or with rows (1, H, B * T, D)."""
        return x if self.row is None else x.transpose(0, 1).flatten(1, 2)[None]

    def queries(self, x: Tensor) -> Tensor:
        picked = self._flat(x).index_select(2, self._index(self._q, x.shape[2]))
        return picked.unflatten(2, (self.n, self.rows)).movedim(2, 0)

    def keys(self, x: Tensor) -> Tensor:
        picked = self._flat(x).index_select(2, self._index(self._k, x.shape[2]))
        return picked.unflatten(2, (self.n, self.columns)).movedim(2, 0)

    def put_queries(self, x: Tensor, tile: Tensor) -> None:
        self._into(x, tile, self._q, self._q_places, self._q_targets, add=False)

    def add_queries(self, x: Tensor, tile: Tensor) -> None:
        self._into(x, tile, self._q, self._q_places, self._q_targets, add=True)

    def add_keys(self, x: Tensor, tile: Tensor) -> None:
        self._into(x, tile, self._k, self._k_places, self._k_targets, add=True)

    def _into(
        self, x: Tensor, tile: Tensor, index: Tensor, places: Tensor | None, targets: Tensor, *, add: bool
    ) -> None:
        flat = tile.movedim(0, 2).flatten(2, 3)
        if places is not None:  # leave out what stands for no token
            flat = flat.index_select(2, places)
        if self.row is None:
            _write(x, targets, flat, add)
            return
        row = self.row.repeat_interleave(index.shape[1])
        row = row if places is None else row[places]
        whole = x.transpose(0, 1).flatten(1, 2).contiguous()[None]
        _write(whole, targets + row * x.shape[2], flat, add)
        x.copy_(whole[0].unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1))


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
        return x.unfold(2, before + self.rows + after, self.rows).movedim(2, 0).transpose(-2, -1)

    def queries(self, x: Tensor) -> Tensor:
        return self._runs(x, 0, 0)

    def keys(self, x: Tensor) -> Tensor:
        return self._runs(x, self.before, self.after)

    def put_queries(self, x: Tensor, tile: Tensor) -> None:
        start, stop, _, _ = self._around(0, 0)
        x[:, :, start:stop] = tile.movedim(0, 2).flatten(2, 3)[:, :, : stop - start]

    def add_queries(self, x: Tensor, tile: Tensor) -> None:
        start, stop, _, _ = self._around(0, 0)
        x[:, :, start:stop] += tile.movedim(0, 2).flatten(2, 3)[:, :, : stop - start]

    def add_keys(self, x: Tensor, tile: Tensor) -> None:
        # Each run's keys overlap the next one's: add them piece by piece, each piece of all runs at once.
        start, stop, left, right = self._around(self.before, self.after)
        total = x.new_zeros(*x.shape[:2], left + stop - start + right, x.shape[3])
        moved = tile.movedim(0, 2)
        for piece in range(0, self.columns, self.rows):
            width = min(self.rows, self.columns - piece)
            runs = total[:, :, piece : piece + self.n * self.rows]
            short = self.n * self.rows - runs.shape[2]
            if short:  # the last run's piece is not whole
                whole = runs[:, :, : (self.n - 1) * self.rows].unflatten(2, (self.n - 1, self.rows))
                whole[..., :width, :] += moved[:, :, :-1, piece : piece + width]
                runs[:, :, (self.n - 1) * self.rows :][:, :, :width] += moved[:, :, -1, piece : piece + width]
            else:
                runs.unflatten(2, (self.n, self.rows))[..., :width, :] += moved[:, :, :, piece : piece + width]
        x[:, :, start:stop] += total[:, :, left : left + stop - start]


def _count(at: slice | Tensor) -> int:
    return at.stop - at.start if isinstance(at, slice) else at.numel()


def _fetch(x: Tensor, at: slice | Tensor) -> Tensor:
    return x[:, :, at] if isinstance(at, slice) else x.index_select(2, at)


def _add(x: Tensor, at: slice | Tensor, y: Tensor) -> None:
    if isinstance(at, slice):
        x[:, :, at] += y
    else:
        x.index_add_(2, at, y.to(x.dtype))


def _write(x: Tensor, at: Tensor, y: Tensor, add: bool) -> None:
    if add:
        x.index_add_(2, at, y.to(x.dtype))
    else:
        x.index_copy_(2, at, y.to(x.dtype))


def _places(index: Tensor) -> tuple[Tensor | None, Tensor]:
    """Where in the flat list tokens stand (None: everywhere), and which ones."""
    flat = index.flatten()
    if bool((flat >= 0).all()):
        return None, flat
    places = (flat >= 0).nonzero()[:, 0]
    return places, flat[places]
