"""Edge attention: attention along listed edges, which may have features. The entry point of layers on graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._autograd import no_autocast, within_operator
from .kernels import kernel_in_use
from .kernels._pattern import Pattern as Pattern
from .kernels._scores import Scores
from .kernels._sparse import edge_attention


class Listed(NamedTuple):
    """Edges in a graph of ``torch.compile``: a ``Pattern`` that is made when the graph runs, since that reads the edges."""

    row: Int[Tensor, " entries"]
    col: Int[Tensor, " entries"]
    num_queries: int
    num_keys: int


def pattern_of(row: Int[Tensor, " entries"], col: Int[Tensor, " entries"], queries: int, keys: int) -> Pattern | Listed:
    """Edges from keys ``col`` to queries ``row``, in rising order of queries."""
    kind = Listed if torch.compiler.is_dynamo_compiling() else Pattern
    return kind(row, col, queries, keys)


def along_edges(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    pattern: Pattern | Listed,
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
    kernel = kernel_in_use("auto")
    if isinstance(pattern, Listed):
        out, sums = _attend_edges(query, key, value, bias, edge_query, edge_attr, seed, *pattern, dropout_p, kernel)
        return out, None if edge_attr is None else sums
    return _run(query, key, value, bias, edge_query, edge_attr, seed, pattern, dropout_p, kernel)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    edge_query: Tensor | None,
    edge_attr: Tensor | None,
    seed: Tensor | None,
    pattern: Pattern,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor | None]:
    biases = () if bias is None else (bias,)
    scores = Scores(None, biases, 1 / math.sqrt(query.shape[-1]), dropout_p=dropout_p, seed=seed)
    with no_autocast(query.device):
        return edge_attention(
            query, key, value, pattern, scores, edge_query, edge_attr, reference=kernel == "reference"
        )


# -- in compiled graphs ------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? edge_query, Tensor? edge_attr"
_ARGUMENTS = (
    f"{_DIFFERENTIABLE}, Tensor? seed, Tensor row, Tensor col, SymInt queries, SymInt keys, float dropout_p, str kernel"
)


@torch.library.custom_op("xformerlib::attend_edges", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _attend_edges(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The two sums; the second is empty where edges have no features."""
    out, sums = _work(*arguments)
    return out.contiguous(), out.new_empty(0) if sums is None else sums.contiguous()


def _work(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    row, col, queries, keys, dropout_p, kernel = arguments[7:]
    for name, index, count in (("sources", col, keys), ("targets", row, queries)):
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < count):
            raise ValueError(
                f"edge_index must index the {count} {name}; got indices from {index.min()} to {index.max()}"
            )
    query, key, value, bias, edge_query, edge_attr, seed = arguments[:7]
    pattern = Pattern(row, col, queries, keys)
    return _run(query, key, value, bias, edge_query, edge_attr, seed, pattern, dropout_p, kernel)


@_attend_edges.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Any, u: Any, e: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    out = value.new_empty(*query.shape[:3], value.shape[-1])
    return out, value.new_empty(0) if e is None else value.new_empty(*query.shape[:3], e.shape[-1])


@torch.library.custom_op(
    "xformerlib::attend_edges_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor sums_grad, bool[] needed, {_ARGUMENTS}) -> Tensor[]",
)
def _attend_edges_backward(grad: Tensor, sums_grad: Tensor, needed: SequenceOf[bool], *arguments: Any) -> list[Tensor]:
    """Gradients of the six differentiable arguments, empty where none is needed: of a forward that is computed again."""
    with within_operator(), torch.enable_grad():
        leaves = [
            x if x is None else x.detach().requires_grad_(need) for x, need in zip(arguments[:6], needed, strict=True)
        ]
        out, sums = _work(*leaves, *arguments[6:])
    outputs, directions = ([out], [grad]) if sums is None else ([out, sums], [grad, sums_grad])
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    with within_operator():
        found = iter(torch.autograd.grad(outputs, wanted, directions, allow_unused=True, materialize_grads=True))
    return [next(found).contiguous() if x is not None and x.requires_grad else grad.new_empty(0) for x in leaves]


@_attend_edges_backward.register_fake
def _(grad: Tensor, sums_grad: Tensor, needed: SequenceOf[bool], *arguments: Any) -> list[Tensor]:
    return [
        x.new_empty(x.shape) if need and x is not None else grad.new_empty(0)
        for x, need in zip(arguments[:6], needed, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.queries, ctx.keys, ctx.dropout_p, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor, sums_grad: Tensor) -> tuple[Any, ...]:
    needed = [bool(need) for need in ctx.needs_input_grad[:6]]
    found = _attend_edges_backward(
        grad, sums_grad, needed, *ctx.saved_tensors, ctx.queries, ctx.keys, ctx.dropout_p, ctx.kernel
    )
    return *(g if need else None for g, need in zip(found, needed, strict=True)), *[None] * 7


_attend_edges.register_autograd(_backward, setup_context=_setup)
