"""Which tokens with real coordinates are within a radius of each, without asking all pairs."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ._base import Domain
from ._neighbours import Neighbours, expand_ranges, neighbours_of

# Candidates that are worth listing, and that are compared at a time.
MOST_CANDIDATES, COMPARED = 2**26, 2**22


def within_ball(domain: Domain, radius: float) -> Neighbours | None:
    """For each token at least those within ``radius`` of it in its item, and a few more that rounding might let in.

    Tokens are sorted into cells as wide as the radius, and looked for in their own and the adjacent ones. Where each row of the batch has
    coordinates of its own, token i of row b is ``b * num_tokens + i`` as a row, and i as a key. None where so many are near each other
    that a list is no use.
    """
    places = domain.coordinates.double()
    rows, tokens = (places.shape[0], places.shape[1]) if places.ndim == 3 else (1, places.shape[0])
    places = places.reshape(rows * tokens, domain.ndim)
    there = torch.ones(rows * tokens, dtype=torch.bool, device=places.device)
    if domain.valid is not None:
        there = domain.valid.expand(rows, tokens).reshape(-1)
    token = there.nonzero()[:, 0]
    # Coordinates are rounded when they are subtracted, which the mask that is asked of the pairs may do in a lower precision.
    largest = float(places[token].abs().max()) if token.numel() else 0.0
    radius = radius * (1 + 1e-5) + largest * 4 * torch.finfo(domain.coordinates.dtype).eps
    group = token // max(tokens, 1)
    if domain.items is not None:
        group = domain.items[token]
    if radius == 0 or token.numel() == 0:
        return None
    cells = torch.cat([group[:, None], (places[token] / radius).floor().clamp(-(2**40), 2**40).long()], 1)
    found = _adjacent(cells, places[token], radius)
    if found is None:
        return None
    row, col = found
    return neighbours_of(token[row], token[col] % max(tokens, 1), rows * tokens, max(tokens, 1))


def _adjacent(cells: Tensor, places: Tensor, radius: float) -> tuple[Tensor, Tensor] | None:
    """The pairs of tokens within the radius, of cells that touch."""
    low = cells.amin(0) - 1
    counts = (cells.amax(0) - low + 2).tolist()
    strides = [1] * len(counts)
    for axis in reversed(range(len(counts) - 1)):
        strides[axis] = strides[axis + 1] * counts[axis + 1]
    if strides[0] * counts[0] >= 2**62:
        return None
    code = ((cells - low) * cells.new_tensor(strides)).sum(1)
    order = torch.argsort(code, stable=True)
    filled, sizes = torch.unique_consecutive(code[order], return_counts=True)
    first = sizes.cumsum(0) - sizes
    steps = [
        sum(n * s for n, s in zip(step, strides[1:], strict=True))
        for step in product((-1, 0, 1), repeat=len(strides) - 1)
    ]
    ranges, candidates = [], 0
    for step in steps:
        at = torch.searchsorted(filled, code + step).clamp(max=filled.numel() - 1)
        count = torch.where(filled[at] == code + step, sizes[at], 0)
        candidates += int(count.sum())
        if candidates > min(MOST_CANDIDATES, places.shape[0] ** 2 // 2):
            return None
        ranges.append((first[at], count))
    pairs = [_near(start, count, order, places, radius) for start, count in ranges]
    return torch.cat([row for row, _ in pairs]), torch.cat([col for _, col in pairs])


def _near(start: Tensor, count: Tensor, order: Tensor, places: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Of the tokens ``order[start], ...``, ``count`` of them for each token, those within the radius."""
    rows, cols = [], []
    pieces = max(1, int(count.sum()) // COMPARED)
    for tokens in torch.arange(count.numel(), device=count.device).tensor_split(pieces):
        row, at = expand_ranges(start[tokens], count[tokens])
        row, col = tokens[row], order[at]
        near = (places[row] - places[col]).square().sum(1) <= radius**2
        rows.append(row[near])
        cols.append(col[near])
    return torch.cat(rows), torch.cat(cols)
