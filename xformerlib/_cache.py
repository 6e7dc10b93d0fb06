"""Keys and values of tokens that were seen before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .domains import Domain


@dataclass
class _Entry:
    """The tokens ``first`` to ``last`` of two buffers, where these tokens live, and how many earlier ones are kept no more."""

    keys: Tensor
    values: Tensor
    first: int
    last: int
    domain: Domain
    gone: int = 0


class _Joined(NamedTuple):
    """New queries behind cached keys: where they live, where the keys that are still within reach and the new ones live, and how many
    keys are not."""

    queries: Domain
    keys: Domain
    gone: int


class Cache:
    """What attention layers keep between the steps of a decoder: each layer's keys and values, and where they live.

    Give the same cache to every call of a model (or of a single ``Attention``) on successive pieces of a sequence, each with its
    absolute place: ``Sequence(1, start=41)``, or ``Timeline(times)`` with times later than all before. Layers whose mask reaches back
    only so far (``Causal() & Local(w)``, in steps or units of time) keep only so much, in a buffer that is reused. In cross attention
    the cache keeps the projected context, which need be given only once.

    Example:
        >>> layer, cache, x = Attention(8, 2, mask=masks.Causal()).eval(), Cache(), torch.randn(1, 3, 8)
        >>> steps = [layer(x[:, t : t + 1], Sequence(1, start=t), cache=cache) for t in range(3)]
        >>> torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-6)
        True
    """

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry] = {}
        self._contexts: dict[Any, tuple[Tensor, Tensor, Domain]] = {}
        self._latest: Domain | None = None
        self._joined: dict[tuple[Domain, float | None], _Joined] = {}

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
            joined = self._join(entry.domain, domain, lookback)
            entry, domain = _appended(entry, key, value, joined), joined.queries
        self._entries[layer] = entry
        return (
            entry.keys[:, :, entry.first : entry.last],
            entry.values[:, :, entry.first : entry.last],
            domain,
            entry.domain,
        )

    def _join(self, earlier: Domain, later: Domain, lookback: float | None) -> _Joined:
        """The same for all layers of a step, so that what attention knows of its domains is found out once."""
        if later is not self._latest:
            self._latest, self._joined = later, {}
        known = self._joined.get((earlier, lookback))
        if known is None:
            keys = earlier.extended(later)
            gone = 0 if lookback is None else earlier.out_of_reach(later, lookback)
            keys = keys.last(keys.num_tokens - gone) if gone else keys
            known = self._joined[earlier, lookback] = _Joined(later.continuing(earlier), keys, gone)
        return known

    def forgotten(self, layer: Any) -> int:
        """How many tokens the layer let go of, since it can reach them no more."""
        entry = self._entries.get(layer)
        return 0 if entry is None else entry.gone

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
        domains: dict[Domain, Domain] = {}
        for layer, entry in self._entries.items():
            if entry.domain not in domains:
                domains[entry.domain] = entry.domain.repeated(times)
            seen = slice(entry.first, entry.last)
            keys, values = (x[:, :, seen].repeat_interleave(times, 0) for x in (entry.keys, entry.values))
            kept = entry.last - entry.first
            other._entries[layer] = _Entry(keys, values, 0, kept, domains[entry.domain], entry.gone)
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


def _appended(entry: _Entry, key: Tensor, value: Tensor, joined: _Joined) -> _Entry:
    """The entry with new tokens behind the old: written into the buffer where it has room, and into a larger one otherwise."""
    first, last, new = entry.first + joined.gone, entry.last, key.shape[2]
    kept, gone = last - first, entry.gone + joined.gone
    if torch.is_grad_enabled() and (
        key.requires_grad or entry.keys.requires_grad
    ):  # a buffer cannot be written under autograd
        keys, values = (
            torch.cat([old[:, :, first:last], x], 2) for old, x in ((entry.keys, key), (entry.values, value))
        )
        return _Entry(keys, values, 0, kept + new, joined.keys, gone)
    buffers = entry.keys, entry.values
    if last + new > entry.keys.shape[2]:
        # A quarter more: copying is rare beside the reading of each step, and rows that lie close together are read faster.
        capacity = kept + new + max((kept + new) // 4, 16)
        grown = tuple(old.new_empty(*old.shape[:2], capacity, old.shape[3]) for old in buffers)
        for buffer, old in zip(grown, buffers, strict=True):
            buffer[:, :, :kept] = old[:, :, first:last]
        (keys, values), first, last = grown, 0, kept
    else:
        keys, values = buffers
    keys[:, :, last : last + new] = key
    values[:, :, last : last + new] = value
    return _Entry(keys, values, first, last + new, joined.keys, gone)
