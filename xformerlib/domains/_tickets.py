"""Domains in compiled graphs.

A compiled graph cannot hold a domain, whose facts are found by reading data. It holds whole numbers, the domain's ticket, and operators
that look the domain up when the graph runs: sizes that may vary, or the number of a domain that is alive.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from ._base import Domain
from ._grid import Grid
from ._kept import ANCHORS, LIVING
from ._made_once import made_once
from ._sequence import Sequence


def domain_of(ticket: SequenceOf[int], tensors: SequenceOf[Tensor] = ()) -> Domain:
    """The domain with this ticket, or one equal to it, which shares its facts; of a graph that is made in a graph, with its tensors."""
    kind, *numbers = ticket
    if kind == 3:
        return _graph_of(tensors, *numbers)
    if kind == 1:
        length, start, prefix, rank_offset = numbers
        return Sequence(length, start=start, prefix=prefix)._ranked_from(rank_offset)
    if kind == 2:
        prefix, *sizes = numbers
        return Grid(*sizes, prefix=prefix)
    domain = LIVING.get(numbers[0]) or ANCHORS.get(numbers[0])
    if domain is None:
        raise RuntimeError(
            "a compiled call needs a domain that is no longer there: make domains of tensors outside of the compiled function, and keep "
            "them until the backward pass is done"
        )
    return domain


def tickets_of(*domains: Domain) -> tuple[list[list[int]], list[Tensor]]:
    """The tickets of domains, and the tensors that go with them."""
    return [domain.ticket() for domain in domains], [x for domain in domains for x in domain.ticket_tensors()]


def domains_of(tickets: SequenceOf[SequenceOf[int]], tensors: SequenceOf[Tensor]) -> list[Domain]:
    """The inverse of ``tickets_of``."""
    found: list[Domain] = []
    rest = list(tensors)
    for ticket in tickets:
        if found and ticket == tickets[0] and not rest:
            found.append(found[0])
            continue
        count = ticket[-1] if ticket[0] == 3 else 0
        found.append(domain_of(ticket, rest[:count]))
        rest = rest[count:]
    return found


def _graph_of(tensors: SequenceOf[Tensor], num_nodes: int, prefix: int, num_graphs: int, _: int) -> Domain:
    from ._graph import Graph

    edge_index, batch = tensors[0], tensors[1] if len(tensors) > 1 else None
    count = None if num_graphs < 0 else num_graphs

    def make() -> Domain:
        # Another object: what is kept beside a tensor must not hold on to it.
        return Graph(edge_index.detach(), num_nodes, batch=batch, virtual_nodes=prefix, num_graphs=count)

    return made_once(("graph", num_nodes, prefix, num_graphs), [edge_index, batch], make)


@torch.library.custom_op("xformerlib::domain_fact", mutates_args=())
def domain_fact(
    ticket: SequenceOf[int],
    tensors: SequenceOf[Tensor],
    name: str,
    argument: int | None,
    shape: SequenceOf[int],
    dtype: torch.dtype,
    like: Tensor,
) -> Tensor:
    """A fact of the domain, found when the graph runs: the attribute ``name``, or the result of the method for ``argument``.

    It is a tensor of the given shape and dtype, which the compiler must know beforehand, on the device of ``like``.
    """
    fact = getattr(domain_of(ticket, tensors), name)
    return (fact if argument is None else fact(argument)).to(like.device, dtype, copy=True)


@domain_fact.register_fake
def _(
    ticket: SequenceOf[int],
    tensors: SequenceOf[Tensor],
    name: str,
    argument: int | None,
    shape: SequenceOf[int],
    dtype: torch.dtype,
    like: Tensor,
) -> Tensor:
    return like.new_empty(tuple(shape), dtype=dtype)
