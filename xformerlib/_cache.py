"""Keys and values of tokens that were seen before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .domains import Domain


@dataclass
class _Entry:
    """The tokens ``first`` to ``last`` of two buffers, and where these tokens live."""

    keys: Tensor
    values: Tensor
    first: int
    last: int
    domain: Domain


class Cache:
    """What attention layers keep between the steps of a decoder: each layer's keys and values, and where they live.

    Give the same cache to every call of a model (or of a single ``Attention``) on successive pieces of a sequence, each with its
    absolute place, ``Sequence(1, start=41)``. Layers whose mask reaches back only so far (``Causal() & Local(w)``) keep only so much, in
    a buffer that is reused. In cross attention the cache keeps the projected context, which need be given only once.

    Example:
        >>> layer, cache, x = Attention(8, 2, mask=masks.Causal()).eval(), Cache(), torch.randn(1, 3, 8)
        >>> steps = [layer(x[:, t : t + 1], Sequence(1, start=t), cache=cache) for t in range(3)]
        >>> torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-6)
        True
    """

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry] = {}
        self._contexts: dict[Any, tuple[Tensor, Tensor, Domain]] = {}

    def extend(
        self,
        layer: Any,
        key: Float[Tensor, "batch kv_heads tokens dim"],
        value: Float[Tensor, "batch kv_heads tokens value_dim"],
        domain: Domain,
        lookback: float | None = None,
    ) -> tuple[Tensor, Tensor, Domain, Domain]:
        """Append a layer's new keys and values.

        Returns all keys and values that the new queries may need, and where the queries and these keys live.
        """
        entry = self._entries.get(layer)
        if entry is None:
            domain.check_extendable()
            entry = _Entry(key, value, 0, key.shape[2], domain)
        else:
            if entry.keys.shape[0] != key.shape[0]:
                raise ValueError(
                    f"x must keep its batch size from step to step; got {key.shape[0]} after {entry.keys.shape[0]}"
                )
            entry, earlier = _reachable(entry, lookback), entry.domain
            entry, domain = _appended(entry, key, value, entry.domain.extended(domain)), domain.continuing(earlier)
        self._entries[layer] = entry
        return (
            entry.keys[:, :, entry.first : entry.last],
            entry.values[:, :, entry.first : entry.last],
            domain,
            entry.domain,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """A cache that goes on by itself from here, of the same layers: beams of a search share what came before."""
        other = Cache()
        other._entries = {layer: copy.deepcopy(entry, memo) for layer, entry in self._entries.items()}
        other._contexts = {layer: copy.deepcopy(context, memo) for layer, context in self._contexts.items()}
        return other

    def repeated(self, times: int) -> Cache:
        """A cache in which each row of earlier tokens stands ``times`` times, one after the other: samples with one beginning.

        Contexts stay as they are, one row for each item: samples can share them (see ``time_series.EncoderDecoderTransformer``).
        """
        other = Cache()
        for layer, entry in self._entries.items():
            if entry.domain.batch_size is not None:
                raise ValueError(f"repeated needs a domain that all rows share; got {entry.domain!r}")
            seen = slice(entry.first, entry.last)
            keys, values = (x[:, :, seen].repeat_interleave(times, 0) for x in (entry.keys, entry.values))
            other._entries[layer] = _Entry(keys, values, 0, entry.last - entry.first, entry.domain)
        other._contexts = dict(self._contexts)
        return other

    def holds_context(self, layer: Any) -> bool:
        """Whether the layer's context is here."""
        return layer in self._contexts

    def keep_context(self, layer: Any, key: Tensor, value: Tensor, domain: Domain) -> None:
        """Keep the projected context of a cross-attention layer."""
        self._contexts[layer] = (key, value, domain)

    def context(self, layer: Any) -> tuple[Tensor, Tensor, Domain]:
        """The projected context of a cross-attention layer."""
        return self._contexts[layer]


def _appended(entry: _Entry, key: Tensor, value: Tensor, domain: Domain) -> _Entry:
    """The entry with new tokens behind the old: written into the buffer where it has room, and into one twice as large otherwise."""
    kept, new = entry.last - entry.first, key.shape[2]
    if torch.is_grad_enabled() and (
        key.requires_grad or entry.keys.requires_grad
    ):  # a buffer cannot be written under autograd
        keys = torch.cat([entry.keys[:, :, entry.first : entry.last], key], 2)
        return _Entry(keys, torch.cat([entry.values[:, :, entry.first : entry.last], value], 2), 0, kept + new, domain)
    if entry.last + new > entry.keys.shape[2]:
        capacity = max(2 * (kept + new), 16)
        keys, values = (old.new_empty(*old.shape[:2], capacity, old.shape[3]) for old in (entry.keys, entry.values))
        keys[:, :, :kept] = entry.keys[:, :, entry.first : entry.last]
        values[:, :, :kept] = entry.values[:, :, entry.first : entry.last]
        entry = _Entry(keys, values, 0, kept, domain)
    entry.keys[:, :, entry.last : entry.last + new] = key
    entry.values[:, :, entry.last : entry.last + new] = value
    return _Entry(entry.keys, entry.values, entry.first, entry.last + new, domain)


def _reachable(entry: _Entry, lookback: float | None) -> _Entry:
    """The entry without the tokens that neither the next query nor any later one can reach."""
    if lookback is None or not entry.domain.counts_steps:
        return entry
    kept = int(min(entry.last - entry.first, lookback))
    return _Entry(entry.keys, entry.values, entry.last - kept, entry.last, entry.domain.last(kept))
