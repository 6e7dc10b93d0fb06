"""A part of a mask computed tile by tile: by torch's flash attention where that can, otherwise by its formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..domains._base import both
from ._merge import Gradients, Merged, Part
from ._scores import Scores, without_hidden
from ._tiles import Tiles

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Pairs of a part whose mask is kept between calls: 16 MiB.
KEPT_PAIRS = 2**24


class TiledPart(Part):
    """A part whose kernel visits tiles; every allowed pair of the part is in one of them, once."""

    def __init__(
        self, kernel: str, what: str, calls: Iterable[Tiles], exact: str | None = None, keep: bool = False
    ) -> None:
        self.kernel, self.what, self.calls, self.exact = kernel, what, tuple(calls), exact
        self.pairs = sum(tiles.size for tiles in self.calls) * (0.5 if exact == "causal" else 1)
        # Which pairs of each call count, once known: with ``keep``, for masks that say the same at each call.
        self._masks: dict[int, Tensor | None] | None = {} if keep and self.pairs <= KEPT_PAIRS else None

    def _tile(self, i: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> _Tile:
        def allowed(make: Callable[[], Tensor | None]) -> Tensor | None:
            if self._masks is None or any(isinstance(bias, Tensor) for bias in scores.biases):
                return make()
            if i not in self._masks:
                if torch.compiler.is_compiling():  # a traced call must not leave anything behind
                    return make()
                self._masks[i] = make()
            return self._masks[i]

        return _Tile(self.calls[i], scores, query, key, value, self.exact, allowed)

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(value.dtype, torch.float32)
        out = value.new_zeros(*query.shape[:3], value.shape[-1], dtype=wide)
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=wide)
        for i, tiles in enumerate(self.calls):
            o, log = self._tile(i, scores, query, key, value).forward()
            tiles.put_queries(out, o)
            tiles.put_queries(lse[..., None], log[..., None])
        return out, lse

    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        for i, tiles in enumerate(self.calls):
            rows = Merged(
                tiles.queries(merged.out), tiles.queries(merged.lse[..., None])[..., 0], tiles.queries(merged.grad),
                tiles.queries(merged.delta[..., None])[..., 0],
            )  # fmt: skip
            if tiles.query_there is not None:  # what stands for no token has no gradient
                absent = ~tiles.query_there[:, None, None]
                rows = Merged(
                    rows.out, rows.lse, rows.grad.masked_fill(absent[..., None], 0), rows.delta.masked_fill(absent, 0)
                )
            grads = self._tile(i, scores, query, key, value).backward(rows, into.biases)
            tiles.add_queries(into.query, grads.query)
            tiles.add_keys(into.key, grads.key)
            tiles.add_keys(into.value, grads.value)


class _TileGradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


class _Tile:
    """One call's tiles: their vectors ``(n, B, H, rows, D)``, which pairs count, and the two ways to compute with them."""

    def __init__(
        self,
        tiles: Tiles,
        scores: Scores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        exact: str | None,
        known: Callable[[Callable[[], Tensor | None]], Tensor | None],
    ) -> None:
        self.scores = scores
        self.pairs = tiles.pairs(*query.shape[:2])
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = tiles.queries(query), tiles.keys(key), tiles.keys(value)
        self.group = query.shape[1] // key.shape[1]
        self.flash = (
            query.device.type == "cpu"
            and not torch.is_grad_enabled()  # flash has no gradient of its log-sum-exp
            and scores.softcap is None
            and not scores.dropout_p
            and self.query.numel() * self.key.numel() > 0
        )
        # In order without a mask: what is missing from a tile stands behind everything else.
        self.in_order = exact == "causal" and self.flash and not scores.biases and self.group == 1
        self.allowed = None if self.in_order else known(lambda: self._allowed(tiles, exact))
        if self.allowed is not None and not scores.clean:
            whole = self.allowed.expand(*self.allowed.shape[:3], tiles.rows, tiles.columns)
            self.query, self.key, self.value = without_hidden(self.query, self.key, self.value, whole)

    def _allowed(self, tiles: Tiles, exact: str | None) -> Tensor | None:
        there = None if tiles.key_there is None else tiles.key_there[:, None, None, None, :]
        if exact == "full" and not any(isinstance(bias, Tensor) for bias in self.scores.biases):
            return there  # rows that are no tokens are computed and left behind
        if tiles.query_there is not None:
            there = both(there, tiles.query_there[:, None, None, :, None])
        allowed = both(self.scores.allowed(self.pairs), there)
        return None if allowed is None else _ranked(allowed, 5)

    # -- flash ---------------------------------------------------------------------------------------------------

    def _additive(self) -> Tensor | None:
        """Bias and mask as one tensor to add to the scores."""
        bias = self.scores.bias(self.pairs)
        if bias is not None:
            bias = _ranked(bias, 5).to(self.wide)
        if self.allowed is None:
            return bias
        if bias is None:
            bias = torch.zeros((), dtype=self.wide, device=self.allowed.device)
        return torch.where(self.allowed, bias, float("-inf"))

    def _flash_inputs(self) -> tuple[list[Tensor], dict[str, Any]]:
        dim = max(self.query.shape[-1], self.value.shape[-1])
        vectors = [_folded(_widened(x, dim), g) for x, g in ((self.query, self.group), (self.key, 1), (self.value, 1))]
        mask = None if self.in_order else _folded_mask(self._additive(), self.query, self.group)
        return vectors, {"attn_mask": mask, "scale": self.scores.scale}

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        if not self.flash:
            return self._forward_by_formula()
        vectors, options = self._flash_inputs()
        out, lse = _FLASH(*vectors, 0.0, self.in_order, **options)
        out = _unfolded(out, self.query)[..., : self.value.shape[-1]].to(self.wide)
        lse = _unfolded(lse[..., None], self.query)[..., 0].to(self.wide)
        if self.allowed is not None and not self.scores.reflexive:
            lse = lse.masked_fill(~self.allowed.any(-1), float("-inf"))
        return out, lse

    def backward(self, rows: Merged, biases: list[Tensor | None]) -> _TileGradients:
        """Gradients of the tiles' vectors; those of the biases are added to ``biases``."""
        if not self.flash or any(bias is not None for bias in biases):
            return self._backward_by_formula(rows, biases)
        vectors, options = self._flash_inputs()
        dim = vectors[0].shape[-1]
        grad, out = (_folded(_widened(x.to(self.query.dtype), dim), self.group) for x in (rows.grad, rows.out))
        lse = _folded(rows.lse[..., None], self.group)[..., 0]
        dq, dk, dv = _FLASH_BACKWARD(grad, *vectors, out, lse, 0.0, self.in_order, **options)
        return self._gradients(dq, dk, dv)

    def _gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> _TileGradients:
        return _TileGradients(
            _unfolded(dq, self.query)[..., : self.query.shape[-1]],
            dk.unflatten(1, self.key.shape[1:3])[..., : self.key.shape[-1]],
            dv.unflatten(1, self.key.shape[1:3])[..., : self.value.shape[-1]],
        )

    # -- formulas ------------------------------------------------------------------------------------------------

    def _scored(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores, minus infinity where a pair does not count, and the tanh of the soft cap."""
        query, key = self.query.to(self.wide), self.key.to(self.wide)
        s = (_folded(query, self.group) @ _folded(key, 1).transpose(-2, -1)).mul_(self.scores.scale)
        s = s.reshape(*query.shape[:4], key.shape[3])
        tanh = None
        if self.scores.softcap is not None:
            tanh = torch.tanh(s / self.scores.softcap)
            s = self.scores.softcap * tanh
        if bias is not None:
            s = s + bias.to(self.wide)
        return (s if self.allowed is None else s.masked_fill_(~self.allowed, float("-inf"))), tanh

    def _forward_by_formula(self) -> tuple[Tensor, Tensor]:
        s, _ = self._scored(self.scores.bias(self.pairs))
        if s.shape[-1] == 0:
            return s.new_zeros(*s.shape[:-1], self.value.shape[-1]), s.new_full(s.shape[:-1], float("-inf"))
        lse = torch.logsumexp(s, -1)
        e = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0)[..., None])
        if self.scores.dropout_p:
            e = e * self.scores.kept(self.pairs) / (1 - self.scores.dropout_p)
        return _unfolded(_folded(e, self.group) @ _folded(self.value.to(self.wide), 1), self.query), lse

    def _backward_by_formula(self, rows: Merged, biases: list[Tensor | None]) -> _TileGradients:
        grad = _folded(rows.grad.to(self.wide), self.group)
        leaves, bias = self._bias_with_grad(biases)
        s, tanh = self._scored(None if bias is None else bias.detach())
        p = s.sub_(rows.lse[..., None]).exp_()
        dp = (grad @ _folded(self.value.to(self.wide), 1).transpose(-2, -1)).reshape(p.shape)
        dropped = p
        if self.scores.dropout_p:
            kept = self.scores.kept(self.pairs) / (1 - self.scores.dropout_p)
            dropped, dp = p * kept, dp * kept
        dv = _folded(dropped, self.group).transpose(-2, -1) @ grad
        ds = dp.sub_(rows.delta[..., None]).mul_(p)
        if bias is not None and leaves:
            self._add_bias_gradients(bias, leaves, ds, biases)
        if tanh is not None:
            ds = ds * (1 - tanh**2)
        ds = _folded(ds.mul_(self.scores.scale), self.group)
        dk = ds.transpose(-2, -1) @ _folded(self.query.to(self.wide), self.group)
        return self._gradients(ds @ _folded(self.key.to(self.wide), 1), dk, dv)

    def _bias_with_grad(self, biases: list[Tensor | None]) -> tuple[dict[int, Tensor], Tensor | None]:
        """The tiles' bias, and the tensors whose gradients are wanted as leaves of its graph."""
        every = self.scores.tensors
        leaves = {i: every[i].detach().requires_grad_() for i, into in enumerate(biases) if into is not None}
        scores = self.scores.using(tuple(leaves.get(i, t) for i, t in enumerate(every)))
        with torch.enable_grad():
            return leaves, scores.bias(self.pairs)

    def _add_bias_gradients(
        self, bias: Tensor, leaves: dict[int, Tensor], ds: Tensor, into: list[Tensor | None]
    ) -> None:
        summed = ds.sum_to_size(_ranked(bias, ds.ndim).shape).reshape(bias.shape).to(bias.dtype)
        for i, grad in zip(
            leaves, torch.autograd.grad(bias, list(leaves.values()), summed, allow_unused=True), strict=True
        ):
            if grad is not None:
                total = into[i]
                assert total is not None
                total += grad


def _ranked(x: Tensor, rank: int) -> Tensor:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _widened(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def _folded(x: Float[Tensor, "n batch heads rows dim"], group: int) -> Float[Tensor, "n kv_batch_heads group_rows dim"]:
    """Rows of the batch and key heads as one axis, a group's query heads as further rows: what key and value are shared by."""
    n, batch, heads, rows, dim = x.shape
    return x.reshape(n, batch * (heads // group), group * rows, dim)


def _unfolded(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_folded``."""
    return x.reshape(*like.shape[:4], x.shape[-1])


def _folded_mask(mask: Tensor | None, query: Tensor, group: int) -> Tensor | None:
    if mask is None:
        return None
    n, batch, heads, rows, _ = query.shape
    mask = mask.expand(mask.shape[0], *mask.shape[1:3], rows, mask.shape[-1])
    if mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, :, 0]
        return (mask if group == 1 else mask.repeat(1, 1, group, 1)).expand(n, -1, -1, -1)
    return _folded(mask.expand(n, batch, heads, rows, mask.shape[-1]), group)
