"""Attention along listed edges, which may have features: what layers on graphs ask of the kernels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ._autograd import no_autocast
from .kernels import kernel_in_use
from .kernels._pattern import Pattern as Pattern
from .kernels._scores import Scores
from .kernels._sparse import edge_attention


def along_edges(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    pattern: Pattern,
    *,
    bias: Float[Tensor, "1 heads 1 keys"] | None = None,
    dropout_p: float = 0.0,
    edge_query: Float[Tensor, "batch heads queries features"] | None = None,
    edge_attr: Float[Tensor, "entries features"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries features"] | None]:
    """``p = softmax((q . k + u . e) / sqrt(dim) + bias)`` over the edges into each query, and the two sums ``p v`` and ``p e``.

    Args:
        pattern: the edges; parallel ones count apart. What a mask cannot say of pairs, as each of two edges is a thing of its own.
        bias: added to the scores.
        dropout_p: probability with which each weight is dropped.
        edge_query: u, for each query and head.
        edge_attr: e, for each entry of the pattern, in its order. Without features the second sum is None.
    """
    seed = torch.randint(1 << 31, (), device=query.device) if dropout_p else None
    biases = () if bias is None else (bias,)
    scores = Scores(None, biases, 1 / math.sqrt(query.shape[-1]), dropout_p=dropout_p, seed=seed)
    with no_autocast(query.device):
        return edge_attention(
            query, key, value, pattern, scores, edge_query, edge_attr, reference=kernel_in_use("auto") == "reference"
        )
