"""A part of a mask computed tile by tile: by torch's flash attention where that can, otherwise by its formulas."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..domains._base import both
from ..positions._base import PairBias
from . import _flash, _formulas
from ._merge import Gradients, Merged, Part
from ._problem import Problem
from ._scores import Pairs, Scores, without_hidden
from ._tiles import Tiles, joined, pairs_of_row

# Keys of tiles for which the formulas are faster than flash attention in the backward.
FEW_COLUMNS = 64

# What a part keeps between calls, of masks and of indices into tables.
KEPT_BYTES = 2**24


class TiledPart(Part):
    """A part whose kernel visits tiles; every allowed pair of the part is in one of them, once.

    Args:
        kernel, what: as in ``Part``.
        calls: tiles, in batches.
        exact: "full" or "causal" where the tiles' pairs are just those of the part, all of them or in order.
        keep: whether the mask says the same at each call, so that what it says of the tiles may be kept.
    """

    def __init__(
        self,
        kernel: str,
        what: str,
        calls: Iterable[Tiles],
        exact: str | None = None,
        keep: bool = False,
    ) -> None:
        self.kernel, self.what, self.calls = kernel, what, tuple(calls)
        self.exact, self.keep = exact, keep
        self.batch = self.calls[0].batch if self.calls else None
        self.pairs = pairs_of_row(self.calls) * (0.5 if exact == "causal" else 1)
        self._own = all(tiles.own for tiles in self.calls)
        self._kept: dict[Hashable, Tensor | None] = {}
        self._room = KEPT_BYTES

    def held(self, problem: Problem) -> int:
        flash = _flash.fits(problem.device, problem.softcap, problem.dropout_p)
        width, planes = max(4, problem.dtype.itemsize), problem.batch * problem.heads
        every, size = sum(tiles.size for tiles in self.calls), max((tiles.size for tiles in self.calls), default=0)
        scores = 0 if flash else _formulas.held(size * planes, width, problem.dropout_p)
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

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = lse = None
        vectors, nothing = self._ready(query, key, value), (None, None) if self._covers(query) else (0.0, float("-inf"))
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
        vectors, fill = self._ready(query, key, value), None if self._covers(query) else 0.0
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

    def _ready(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.calls or (self._own and joined((query, key, value)) is not None):
            return query, key, value
        ready = self.calls[0].ready
        return ready(query), ready(key), ready(value)

    def _covers(self, query: Tensor) -> bool:
        """Whether every token is in a tile."""
        everyone = query.shape[2] * (1 if self.batch is None else query.shape[0])
        return self._own and sum(tiles.placed for tiles in self.calls) == everyone

    def recall(self, name: Hashable, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What ``make`` gives, kept for the next call as long as there is room."""
        if name in self._kept:
            return self._kept[name]
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


class _Tile:
    """One call's tiles: their vectors ``(B, n, H, rows, D)``, which pairs count, and the two ways to compute with them."""

    def __init__(self, part: TiledPart, i: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.part, self.i, self.scores, self.tiles = part, i, scores, part.calls[i]
        self.batch, self.heads = query.shape[:2]
        self.query, self.key, self.value = self.tiles.vectors(query, key, value)
        self.flash = (
            _flash.fits(query.device.type, scores.softcap is not None, scores.dropout_p)
            and not torch.is_grad_enabled()  # it has no gradient of its log-sum-exp
            and self.query.numel() * self.key.numel() > 0
        )
        # In order without a mask: what is missing from a tile stands behind everything else.
        self.in_order = self.flash and part.exact == "causal" and not scores.biases
        self.fixed = part.keep and not any(isinstance(bias, Tensor) for bias in scores.biases)
        self.allowed = None
        if not self.in_order:
            self.allowed = part.recall(("mask", i), self._allowed) if self.fixed else self._allowed()
        if self.allowed is not None and not scores.clean:
            whole = self.allowed.expand(*self.allowed.shape[:3], self.tiles.rows, self.tiles.columns)
            self.query, self.key, self.value = without_hidden(self.query, self.key, self.value, whole)

    @cached_property
    def pairs(self) -> Pairs:
        """The indices of the tiles' pairs, broadcastable to ``(n, B, H, rows, columns)``."""
        return self.tiles.pairs(self.batch, self.heads)

    def _allowed(self) -> Bool[Tensor, "#batch #n #heads #rows #columns"] | None:
        """Which pairs count; None where all do."""
        queries, keys = self.tiles.query_there, self.tiles.key_there
        there = None if keys is None else keys[:, None, None, None, :]
        if self.part.exact == "full" and not any(isinstance(bias, Tensor) for bias in self.scores.biases):
            return None if there is None else there.transpose(0, 1)  # rows that are no tokens are left behind
        if queries is not None:
            there = both(there, queries[:, None, None, :, None])
        allowed = both(self.scores.allowed(self.pairs), there)
        return None if allowed is None else _by_row(allowed)

    @property
    def _has_empty_rows(self) -> bool:
        if self.allowed is None:
            return False
        return not self.scores.reflexive or self.tiles.query_there is not None

    def _bias(self, scores: Scores) -> tuple[Float[Tensor, "#batch #n #heads #rows #columns"] | None, bool]:
        """What the biases add, and whether that is minus infinity already where a pair does not count."""
        hidden = False

        def recall(bias: PairBias, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
            nonlocal hidden
            rows = self.part.recall(
                ("rows", self.i, bias.rows_key, self.fixed), lambda: self._hiding(bias, _once(make()))
            )
            assert rows is not None
            hides = self._hides(rows)
            hidden = hidden or hides
            return rows, hides

        bias = scores.bias_by(lambda: self.pairs, recall)
        return (None if bias is None else _by_row(bias)), hidden

    def _hides(self, rows: Tensor) -> bool:
        """Whether the rows of a table tell which pairs count, too: where that is the same at each call and makes them no more."""
        if not self.fixed or self.allowed is None or rows.ndim != 5:
            return False
        there = self.allowed.transpose(0, 1).shape
        return all(few in (1, many) for few, many in zip(there, rows.shape, strict=True))

    def _hiding(self, bias: PairBias, rows: Tensor) -> Tensor:
        """The rows of pairs, and behind the last row of the table those that do not count."""
        if self.allowed is None or not self._hides(rows):
            return rows
        return torch.where(self.allowed.transpose(0, 1), rows, len(bias.tensors[0]))

    def _additive(self, bias: Tensor | None, hidden: bool) -> Tensor | None:
        """Bias and mask as one tensor to add to the scores."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        bias = None if bias is None else bias.to(wide)
        if self.allowed is None or hidden:
            return bias
        bias = torch.zeros((), dtype=wide, device=self.allowed.device) if bias is None else bias
        return torch.where(self.allowed, bias, float("-inf"))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        mask = None if self.in_order else self._additive(*self._bias(self.scores))
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
        if not trained:
            mask = None if self.in_order else self._additive(*self._bias(self.scores))
            if by_flash:
                return _TileGradients(*_flash.backward(*vectors, mask, self.in_order, self.scores.scale, rows))
            return _TileGradients(*_formulas.backward(*vectors, self._parameters(mask), rows, None))
        every = self.scores.tensors
        leaves = {i: every[i].detach().requires_grad_() for i, total in enumerate(biases) if total is not None}
        with torch.enable_grad():
            bias, hidden = self._bias(self.scores.using(tuple(leaves.get(i, t) for i, t in enumerate(every))))
        assert bias is not None
        bias_grad = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        mask = self._additive(bias.detach(), hidden)
        grads = _formulas.backward(*vectors, self._parameters(mask), rows, bias_grad)
        found = torch.autograd.grad(bias, list(leaves.values()), bias_grad.to(bias.dtype), allow_unused=True)
        for i, grad in zip(leaves, found, strict=True):
            total = biases[i]
            if grad is not None and total is not None:
                total += grad
        return _TileGradients(*grads)

    def _parameters(self, mask: Tensor | None) -> _formulas.Parameters:
        scores = self.scores
        kept = (lambda: _by_row(scores.kept(self.pairs))) if scores.dropout_p else None
        return _formulas.Parameters(scores.scale, scores.softcap, mask, self._has_empty_rows, scores.dropout_p, kept)


def _by_row(x: Tensor) -> Shaped[Tensor, "#batch #n #heads #rows #columns"]:
    """What was asked of ``Pairs``, in the order of the tiles' vectors."""
    return x.reshape((1,) * (5 - x.ndim) + x.shape).transpose(0, 1)


def _once(index: Tensor) -> Tensor:
    """An index that is the same for all tiles, once."""
    if index.ndim == 5 and index.shape[0] > 1 and bool((index == index[:1]).all()):
        return index[:1].clone()
    return index
