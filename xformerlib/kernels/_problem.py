"""What there is to compute, without the tensors: all that a plan may depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..domains import Domain, Grid, Sequence
from ..masks import Causal, Full, Mask


@dataclass(frozen=True)
class Problem:
    """The shape of one attention: hashable, so that its plan is made once.

    Attributes:
        mask: who may attend to whom, besides the facts of the domains.
        domain, keys: where queries and keys live.
        bias: what kind of score bias there is: None, "fixed", "trained" where its gradient is asked for, or "dense" for a tensor.
        pointwise_bias: whether every bias is a tensor, a table or a formula (see ``positions.Bias.is_pointwise``).
    """

    mask: Mask
    domain: Domain
    keys: Domain
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    bias: str | None = None
    pointwise_bias: bool = True
    dropout_p: float = 0.0
    softcap: bool = False
    sinks: bool = False

    def anchored(self) -> Problem:
        """The same problem on the anchors of the domains, for what is kept with a domain."""
        other = object.__new__(Problem)  # at every call, where dataclasses.replace takes its time
        other.__dict__.update(self.__dict__, domain=self.domain.anchor, keys=self.keys.anchor)
        return other

    @property
    def num_queries(self) -> int:
        """Tq."""
        return self.domain.num_tokens

    @property
    def num_keys(self) -> int:
        """Tk."""
        return self.keys.num_tokens

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        facts = (self.domain.valid, self.keys.valid, self.domain.items)
        return (isinstance(self.mask, Full) or self._is_last) and all(fact is None for fact in facts)

    @property
    def _is_last(self) -> bool:
        """Whether causality hides nothing, since no key is later than any query: a step of a decoder."""
        queries, keys = self.domain, self.keys
        if self.mask != Causal() or queries == keys:
            return False
        if not isinstance(queries, Sequence) or not isinstance(keys, Sequence):
            return False
        one_row = queries.lengths is None and keys.lengths is None and queries.prefix == 0
        return one_row and queries.start >= keys.start + keys.length - 1

    @property
    def is_causal(self) -> bool:
        """Whether token i sees tokens 0 to i and no others, in the order of the tensors.

        Padding at the end of a row changes nothing for the tokens that exist.
        """
        if self.mask != Causal() or self.domain != self.keys or self.domain.items is not None:
            return False
        if isinstance(self.domain, Grid):
            return self.domain.valid is None  # holes may be anywhere
        return isinstance(self.domain, Sequence) and self.domain.offsets is None

    @property
    def is_reflexive(self) -> bool:
        """Whether every token attends at least to itself: no empty row, no key hidden from everybody."""
        no_padding = self.domain.valid is None
        return self.domain == self.keys and no_padding and self.mask.is_reflexive(self.domain)

    @property
    def is_clean(self) -> bool:
        """Whether every token that exists is seen by some query, and every query sees some key, so that nothing is hidden."""
        seen = self.domain == self.keys and self.mask.is_reflexive(self.domain)
        return seen or self.is_full or (isinstance(self.mask, Full) and self.domain.items is None)
