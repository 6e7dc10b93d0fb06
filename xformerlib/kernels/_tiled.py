"""A part of a mask computed tile by tile: by torch's flash attention where that can, otherwise by its formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .._autograd import keeping
from . import _flash, _formulas, _plain
from ._kept import KeptWeights
from ._merge import Gradients, Merged, Part
from ._problem import Problem
from ._scores import Scores
from ._tile_pairs import TilePairs, by_row
from ._tiles import Tiles, joined, pairs_of_row

# Keys of tiles for which the formulas are faster than flash attention: in the backward, and in both if the weights are kept.
FEW_COLUMNS = 64
# Keys of tiles, for each channel of a head, whose weights take no more than twice the memory of queries, keys, values and output.
FEW_PER_CHANNEL = 8

# What a part keeps between calls, of masks and of indices into tables.
KEPT_BYTES = 2**24


class TiledPart(Part):
    """A part whose kernel visits tiles; every allowed pair of the part is in one of them, once.

    Args:
        kernel, what: as in ``Part``.
        calls: tiles, in batches.
        exact: "full" or "causal" where the tiles' pairs are just those of the part, all of them or in order.
        keep: whether the mask says the same at each call, so that what it says of the tiles may be kept.
        whole: whether the part is all of the mask.
    """

    def __init__(
        self,
        kernel: str,
        what: str,
        calls: Iterable[Tiles],
        exact: str | None = None,
        keep: bool = False,
        whole: bool = True,
    ) -> None:
        self.kernel, self.what, self.calls = kernel, what, tuple(calls)
        self.exact, self.keep, self.whole = exact, keep, whole
        self.batch = self.calls[0].batch if self.calls else None
        self.isolates = exact == "full"
        self.pairs = pairs_of_row(self.calls) * (0.5 if exact == "causal" else 1)
        self._own = all(tiles.own for tiles in self.calls)
        self._kept: dict[Hashable, Tensor | None] = {}
        self._room = KEPT_BYTES

    def held(self, problem: Problem) -> int:
        tokens = problem.num_queries * (1 if self.batch is None else problem.batch)
        whole = self.whole and not problem.sinks
        keeps = whole and self._keeps_weights(problem.head_dim, problem.softcap, problem.dropout_p, tokens)
        flash = not keeps and _flash.fits(problem.device, problem.softcap, problem.dropout_p)
        width, planes = max(4, problem.dtype.itemsize), problem.batch * problem.heads
        every, size = sum(tiles.size for tiles in self.calls), max((tiles.size for tiles in self.calls), default=0)
        scores = 0 if flash else _formulas.held(size * planes, width, problem.dropout_p)
        if keeps:
            scores = (min(size * planes, 2 * _formulas.PIECE) + every * planes) * width
        in_order = flash and self.exact == "causal"
        if problem.bias is None and (in_order or self.exact == "full"):
            return scores
        extent = problem.mask.extent()
        of_mask = (problem.batch if extent.batch else 1) * (problem.heads if extent.heads else 1)
        kept = min(of_mask * (every if self.keep else size), max(of_mask * size, KEPT_BYTES))
        copies = 1 if self.keep and problem.bias != "dense" else 2  # rows of a table that are kept hide pairs, too
        added = of_mask if problem.bias is None else copies * problem.heads * (problem.batch if extent.batch else 1)
        if flash and problem.heads > problem.kv_heads and problem.bias is None and not extent.heads:
            added += of_mask * problem.heads // problem.kv_heads  # once more for the query heads that share a key head
        return scores + kept + added * size * width

    def alone(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        keeps = self._keeps_weights(query.shape[-1], scores.softcap is not None, scores.dropout_p, self._tokens(query))
        if not keeps or 0 in (query.numel(), value.numel()):
            return None
        return KeptWeights.apply(self, scores, torch.is_grad_enabled(), query, key, value, *scores.tensors)

    def calls_of(self, scores: Scores, query: Tensor) -> list[TilePairs]:
        """The pairs of each call."""
        return [TilePairs(self, i, scores, *query.shape[:2]) for i in range(len(self.calls))]

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = lse = None
        vectors = self.ready(query, key, value)
        nothing = (None, None) if self._covers(self._tokens(query)) else (0.0, float("-inf"))
        for i, tiles in enumerate(self.calls):
            o, log = _Tile(self, i, scores, *vectors).forward()
            out = tiles.put_queries(out, o, query.shape[2], nothing[0])
            lse = tiles.put_queries(lse, log[..., None], query.shape[2], nothing[1])
        if out is None or lse is None:
            wide = torch.promote_types(value.dtype, torch.float32)
            out = value.new_zeros(*query.shape[:3], value.shape[-1], dtype=wide)
            lse = query.new_full((*query.shape[:3], 1), float("-inf"), dtype=wide)
        return out, lse[..., 0]

    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        vectors, fill = self.ready(query, key, value), None if self._covers(self._tokens(query)) else 0.0
        if self.calls:
            ready = self.calls[0].ready
            merged = replace(merged, out=None if merged.out is None else ready(merged.out), grad=ready(merged.grad))
        found = Gradients(into.biases) if self._own else into
        for i, tiles in enumerate(self.calls):
            grads = _Tile(self, i, scores, *vectors).backward(merged, into.biases)
            if self._own:
                found.query, found.key, found.value = (
                    tiles.put_queries(x, grad, query.shape[2], fill)
                    for x, grad in zip((found.query, found.key, found.value), grads, strict=True)
                )
                continue
            into.query = tiles.add_queries(into.query, grads.query, query.shape[2])
            into.key = tiles.add_keys(into.key, grads.key, key.shape[2])
            into.value = tiles.add_keys(into.value, grads.value, key.shape[2])
        if self._own:
            into.add(found.query, found.key, found.value)

    def plain(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for pairs, tiles in zip(self.calls_of(scores, query), self.calls, strict=True):
            vectors = tiles.queries(query), tiles.keys(key), tiles.keys(value)
            kept = by_row(scores.kept(pairs.pairs)) if scores.dropout_p else None
            found.append(_plain.tile(*vectors, scores, pairs.allowed, pairs.bias(scores)[0], kept))
        if not found:
            wide = torch.promote_types(query.dtype, torch.float32)
            nothing = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=wide)
            return nothing, nothing.new_full(query.shape[:3], float("-inf"))
        index = self.recall(("places", query.shape[2]), lambda: self._places(query.shape[2]))
        assert index is not None
        out = _plain.gathered([o for o, _ in found], index, 0.0)
        return out, _plain.gathered([lse[..., None] for _, lse in found], index, float("-inf"))[..., 0]

    def settle(self, scores: Scores, batch: int, heads: int, tokens: int) -> None:
        """Compute beforehand which pairs count, and where everything stands, so that ``plain`` finds constants."""
        self.keep, self._room = True, 2**62
        self.recall(("places", tokens), lambda: self._places(tokens))
        for i in range(len(self.calls)):
            pairs = TilePairs(self, i, scores, batch, heads)
            _ = pairs.allowed
            if pairs.fixed:
                pairs.bias(scores)

    def _places(self, tokens: int) -> Int[Tensor, "#batch tokens"]:
        """The place of each token among those of all tiles, one call's behind the other; behind the last where it is in none."""
        table, count = None, 0
        for tiles in self.calls:
            numbers = torch.arange(count, count + tiles.n * tiles.rows, device=tiles.device, dtype=torch.float64)
            table = tiles.put_queries(table, numbers.view(1, tiles.n, 1, tiles.rows, 1), tokens, -1.0)
            count += numbers.numel()
        assert table is not None
        index = table[:, 0, :, 0].long()
        return torch.where(index < 0, count, index)

    def ready(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs in a layout from which tiles are fetched fast."""
        if not self.calls or (self._own and joined((query, key, value)) is not None):
            return query, key, value
        ready = self.calls[0].ready
        return ready(query), ready(key), ready(value)

    def _covers(self, tokens: int) -> bool:
        """Whether every token is in a tile."""
        return self._own and sum(tiles.placed for tiles in self.calls) == tokens

    def _tokens(self, query: Tensor) -> int:
        """Of one row, or of all where each has tiles of its own."""
        return query.shape[2] * (1 if self.batch is None else query.shape[0])

    def _keeps_weights(self, dim: int, capped: bool, dropout_p: float, tokens: int) -> bool:
        """Whether the weights of the forward are kept for the backward, where this part is all there is."""
        columns = max((tiles.columns for tiles in self.calls), default=0)
        few = 0 < columns <= min(FEW_COLUMNS, FEW_PER_CHANNEL * dim)
        return few and not capped and not dropout_p and self._covers(tokens)

    @cached_property
    def order(self) -> Int[Tensor, " tokens"] | None:
        """Where each token is among those of all tiles, one tile after the other; None where that is its own place."""
        found = [tiles.stood() for tiles in self.calls]
        *first, every = itertools.accumulate((tiles.n * tiles.rows for tiles in self.calls), initial=0)
        places = torch.cat([place + begin for (_, place), begin in zip(found, first, strict=True)])
        order = places[torch.cat([tokens for tokens, _ in found]).argsort()]
        return None if torch.equal(order, torch.arange(every, device=order.device)) else order

    def recall(self, name: Hashable, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What ``make`` gives, kept for the next call as long as there is room."""
        if name in self._kept:
            return self._kept[name]
        with keeping():
            x = make()
        size = 0 if x is None else x.numel() * x.element_size()
        if size <= self._room:
            self._kept[name] = x
            self._room -= size
        return x


class _TileGradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


class _Tile(TilePairs):
    """One call's tiles: their vectors ``(B, n, H, rows, D)``, and the two ways to compute with them."""

    def __init__(self, part: TiledPart, i: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__(part, i, scores, *query.shape[:2])
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = self.tiles.vectors(query, key, value)
        self.flash = (
            _flash.fits(query.device.type, scores.softcap is not None, scores.dropout_p)
            and not torch.is_grad_enabled()  # it has no gradient of its log-sum-exp
            and self.query.numel() * self.key.numel() > 0
        )
        # In order without a mask: what is missing from a tile stands behind everything else.
        self.in_order = self.flash and part.exact == "causal" and not scores.biases
        if self.in_order:
            self.allowed = None
        self.query, self.key, self.value = self.without_hidden(self.query, self.key, self.value)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        mask = self._mask()
        if not self.flash:
            return _formulas.forward(self.query, self.key, self.value, self._parameters(mask))
        out, lse = _flash.forward(self.query, self.key, self.value, mask, self.in_order, self.scores.scale)
        if self.allowed is not None and not self.scores.reflexive:
            lse = lse.masked_fill(~self.allowed.any(-1), float("-inf"))
        return out, lse

    def _rows(self, merged: Merged, output: bool) -> Merged:
        """What belongs to the tiles' queries, 0 in gradients of what stands for no token; the output only if it is needed."""
        fetch, there = self.tiles.queries, self.tiles.query_there
        lse, delta = (fetch(x[..., None])[..., 0] for x in (merged.lse, merged.delta))
        grad, out = fetch(merged.grad), fetch(merged.out) if output and merged.out is not None else None
        if there is not None:
            nowhere = ~there[:, None]
            grad, delta = grad.masked_fill(nowhere[..., None], 0), delta.masked_fill(nowhere, 0)
        return Merged(out, lse, grad, delta)

    def backward(self, merged: Merged, biases: list[Tensor | None]) -> _TileGradients:
        """Gradients of the tiles' vectors; those of the biases are added to ``biases``."""
        vectors, trained = (self.query, self.key, self.value), any(total is not None for total in biases)
        by_flash = self.flash and not trained and (self.in_order or self.tiles.columns > FEW_COLUMNS)
        rows = self._rows(merged, by_flash)
        if by_flash:
            return _TileGradients(*_flash.backward(*vectors, self._mask(), self.in_order, self.scores.scale, rows))
        if not trained:
            return _TileGradients(*_formulas.backward(*vectors, self._parameters(self._mask()), rows, None))

        def compute(bias: Tensor, hidden: bool, bias_grad: Tensor) -> _TileGradients:
            mask = self.additive(bias, hidden, self.wide)
            return _TileGradients(*_formulas.backward(*vectors, self._parameters(mask), rows, bias_grad))

        return self.with_bias_gradients(biases, compute)

    def _mask(self) -> Tensor | None:
        """What is added to the scores; nothing where tokens see each other in order."""
        return None if self.in_order else self.additive(*self.bias(self.scores), self.wide)

    def _parameters(self, mask: Tensor | None) -> _formulas.Parameters:
        scores = self.scores
        kept = (lambda: by_row(scores.kept(self.pairs))) if scores.dropout_p else None
        return _formulas.Parameters(scores.scale, scores.softcap, mask, self.has_empty_rows, scores.dropout_p, kept)
