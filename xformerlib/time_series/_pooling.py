"""One vector for many tokens: attention with one learned query."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._arguments import Size, check_size, shown
from .._inputs import check_values
from .._recorded import Recorded
from ..attention import attention
from ..domains import Sequence
from ..masks import Keys


class AttentionPooling(Recorded):
    """The mean of many states, weighted by how well each fits a learned direction:

        w = softmax_t(theta' h_t),   pooled = sum_t w_t h_t

    Attention with a single learned query (Yang et al. 2016, "Hierarchical attention networks", without their hidden layer): whatever
    its age, every state is one step away.

    Args:
        dim: channels of a state.

    Shapes:
        ``forward(h, valid)``: h (B, T, dim), valid (B, T) bool, True where a state exists (all if not given); returns (B, dim), which
        is 0 where no state exists.
        ``forward(h, lengths=lengths)``: h (N, dim), series of ``lengths`` states one behind the other; one row for each.

    Example:
        >>> pooling = AttentionPooling(2)
        >>> _ = torch.nn.init.zeros_(pooling.theta)
        >>> pooling(torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]))
        tensor([[2., 1.]], grad_fn=...)
    """

    def __init__(self, dim: Size) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(check_size("dim", dim)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw theta anew, so that the scores of states of unit variance have unit variance."""
        nn.init.normal_(self.theta, std=len(self.theta) ** -0.5)

    def forward(
        self,
        h: Float[Tensor, "*batch steps dim"],
        valid: Bool[Tensor, "batch steps"] | None = None,
        *,
        lengths: Int[Tensor, " series"] | None = None,
    ) -> Float[Tensor, "series dim"]:
        """Pool states."""
        check_values("h", h)
        if h.ndim == 0 or h.shape[-1] != len(self.theta):
            raise ValueError(f"h must have dim={len(self.theta)} channels on its last axis; got {tuple(h.shape)}")
        for name, given in (("valid", valid), ("lengths", lengths)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor; got {name}={shown(given)}")
        if (lengths is None) == (h.ndim == 2) or (lengths is not None and valid is not None):
            raise ValueError(
                "h must be (B, T, dim), with valid or without, or packed (N, dim) with lengths and without valid; "
                f"got {tuple(h.shape)}, valid={valid is not None}, lengths={lengths is not None}"
            )
        query = self.theta.to(h.dtype)
        if lengths is not None:
            queries, states = query.expand(1, 1, len(lengths), -1), h[None, None]
            each, all_of = Sequence.packed(torch.ones_like(lengths)), Sequence.packed(lengths)
            return attention(queries, states, states, domain=each, key_domain=all_of, scale=1.0)[0, 0]
        states, mask = h[:, None], None if valid is None else Keys(valid)
        domain, keys = Sequence(1), Sequence(h.shape[1])
        query = query.expand(len(h), 1, 1, -1)
        return attention(query, states, states, mask=mask, domain=domain, key_domain=keys, scale=1.0)[:, 0, 0]

    @torch.no_grad()
    def weights(
        self, h: Float[Tensor, "batch steps dim"], valid: Bool[Tensor, "batch steps"] | None = None
    ) -> Float[Tensor, "batch steps"]:
        """w of the formula: each row sums to 1, or to 0 where no state exists."""
        if valid is None:
            return (h @ self.theta.to(h.dtype)).softmax(-1)
        scores = (h.masked_fill(~valid[..., None], 0) @ self.theta.to(h.dtype)).masked_fill(~valid, float("-inf"))
        return scores.softmax(-1).masked_fill(~valid, 0)  # a row of nothing is NaN before
