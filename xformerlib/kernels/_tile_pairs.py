"""The pairs of tiles: which of them count, and what biases add to their scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..domains._base import both
from ..positions import PairBias
from ._scores import Pairs, Scores, without_hidden

if TYPE_CHECKING:
    from ._tiled import TiledPart

Found = TypeVar("Found")


class TilePairs:
    """The pairs of one call's tiles: which of them count, and what biases add to their scores."""

    def __init__(self, part: TiledPart, i: int, scores: Scores, batch: int, heads: int) -> None:
        self.part, self.i, self.scores, self.tiles = part, i, scores, part.calls[i]
        self.batch, self.heads = batch, heads
        self.fixed = part.keep and not any(isinstance(bias, Tensor) for bias in scores.biases)

    @cached_property
    def pairs(self) -> Pairs:
        """The indices of the tiles' pairs, broadcastable to ``(n, B, H, rows, columns)``."""
        return self.tiles.pairs(self.batch, self.heads)

    @cached_property
    def allowed(self) -> Bool[Tensor, "#batch #n #heads #rows #columns"] | None:
        """Which pairs count; None where all do."""
        return self.part.recall(("mask", self.i), self._allowed) if self.fixed else self._allowed()

    def without_hidden(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tiles' vectors with 0 at tokens that are in no pair that counts, whatever stands there."""
        if self.allowed is None or self.scores.clean:
            return query, key, value
        whole = self.allowed.expand(*self.allowed.shape[:3], self.tiles.rows, self.tiles.columns)
        return without_hidden(query, key, value, whole)

    def _allowed(self) -> Bool[Tensor, "#batch #n #heads #rows #columns"] | None:
        queries, keys = self.tiles.query_there, self.tiles.key_there
        there = None if keys is None else keys[:, None, None, None, :]
        if self._is_full:
            return None if there is None else there.transpose(0, 1)  # rows that are no tokens are left behind
        if queries is not None:
            there = both(there, queries[:, None, None, :, None])
        allowed = both(self.scores.allowed(self.pairs), there)
        return None if allowed is None else by_row(allowed)

    @property
    def _is_full(self) -> bool:
        """Whether all tokens of a tile see each other."""
        return self.part.exact == "full" and not any(isinstance(bias, Tensor) for bias in self.scores.biases)

    @property
    def has_empty_rows(self) -> bool:
        """Whether a query may see nothing."""
        if self.allowed is None or self._is_full:
            return False
        return not self.scores.reflexive or self.tiles.query_there is not None

    def bias(self, scores: Scores) -> tuple[Float[Tensor, "#batch #n #heads #rows #columns"] | None, bool]:
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
        return (None if bias is None else by_row(bias)), hidden

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

    def additive(self, bias: Tensor | None, hidden: bool, wide: torch.dtype) -> Tensor | None:
        """Bias and mask as one tensor to add to the scores."""
        bias = None if bias is None else bias.to(wide)
        if self.allowed is None or hidden:
            return bias
        bias = torch.zeros((), dtype=wide, device=self.allowed.device) if bias is None else bias
        return torch.where(self.allowed, bias, float("-inf"))

    def with_bias_gradients(
        self, biases: list[Tensor | None], compute: Callable[[Tensor, bool, Tensor], Found]
    ) -> Found:
        """What ``compute(bias, hidden, bias_grad)`` gives, which adds the gradient of the bias; those of its tensors go to ``biases``."""
        every = self.scores.tensors
        leaves = {i: every[i].detach().requires_grad_() for i, total in enumerate(biases) if total is not None}
        with torch.enable_grad():
            bias, hidden = self.bias(self.scores.using(tuple(leaves.get(i, t) for i, t in enumerate(every))))
        assert bias is not None
        bias_grad = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        result = compute(bias.detach(), hidden, bias_grad)
        found = torch.autograd.grad(bias, list(leaves.values()), bias_grad.to(bias.dtype), allow_unused=True)
        for i, grad in zip(leaves, found, strict=True):
            total = biases[i]
            if grad is not None and total is not None:
                total += grad
        return result


def by_row(x: Tensor) -> Shaped[Tensor, "#batch #n #heads #rows #columns"]:
    """What was asked of ``Pairs``, in the order of the tiles' vectors."""
    return x.reshape((1,) * (5 - x.ndim) + x.shape).transpose(0, 1)


def _once(index: Tensor) -> Tensor:
    """An index that is the same for all tiles, once."""
    if index.ndim == 5 and index.shape[0] > 1 and bool((index == index[:1]).all()):
        return index[:1].clone()
    return index
