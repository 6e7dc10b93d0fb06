"""Some of the tokens of a domain, each where it is in the whole."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .._autograd import is_compiling
from ._base import Domain, offsets_of


class Subset(Domain):
    """Tokens that were kept of a domain: token i of row b is token ``index[b, i]`` of the whole. Made by ``Domain.subset``.

    Masks and positions mean what they mean on the whole: two kept tokens are as far apart as before, one precedes the other if it did,
    and the window, the rim and the number of a token are those of the whole. A mask that holds a tensor (``Segments``, ``Keys``,
    ``Dense``) or names tokens (``Global([3])``) speaks of the tokens of the whole. For patch dropout (FLIP, Li et al. 2022,
    arXiv:2212.00794) and masked autoencoders (He et al. 2021, arXiv:2111.06377), whose encoders see kept patches alone.

    Attributes:
        whole: the domain that tokens were kept of.
        index: (kept,) or (batch, kept).

    Example:
        >>> kept = Sequence(6).subset(torch.tensor([[0, 2, 3], [1, 4, 5]]))
        >>> Local(1).dense(kept).int()[1, 0]
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, whole: Domain, index: Int[Tensor, "*batch kept"]) -> None:
        if not isinstance(whole, Domain) or isinstance(whole, Subset):
            raise TypeError(
                f"whole must be a domain, and no subset; got whole={whole!r}. Of a subset, whole.subset(index) makes another."
            )
        self._begin_with(whole, checked_index(whole, index))

    @classmethod
    def of(cls, whole: Domain, index: Int[Tensor, "*batch kept"]) -> Subset:
        """The tokens ``index`` of ``whole``, not checked: for an index that was, or that was drawn."""
        made = cls.__new__(cls)
        made._begin_with(whole, index)
        return made

    def _begin_with(self, whole: Domain, index: Int[Tensor, "*batch kept"]) -> None:
        self.kind, self.continuous = whole.kind, whole.continuous
        self._whole, self.index = whole, index
        rows = whole.batch_size if index.ndim == 1 else len(index)
        super().__init__(
            num_tokens=index.shape[-1], ndim=whole.ndim, prefix=whole.prefix, batch_size=rows, device=index.device,
            offsets=None if whole.offsets is None else _offsets(whole, index),
            valid=None if whole.valid is None else _looked_up(whole.valid, index),
        )  # fmt: skip

    @property
    def whole(self) -> Domain:
        return self._whole

    @property
    def anchor(self) -> Subset:
        anchor = super().anchor
        anchor._whole = self._whole.anchor
        return anchor

    def token(self, b: Tensor, i: Tensor) -> Tensor:
        return self.index[i] if self.index.ndim == 1 else self.index[b, i]

    def take(self, table: Shaped[Tensor, "... tokens dim"], *, by_row: bool) -> Shaped[Tensor, "... kept dim"]:
        if self.index.ndim == 1:
            return table.index_select(-2, self.index)
        if not by_row:
            return table.index_select(-2, self.index.flatten()).unflatten(-2, self.index.shape).movedim(-3, 0)
        index = self.index.reshape(self.index.shape[0], *(1,) * (table.ndim - 3), -1, 1)
        return table.gather(-2, index.expand(*table.shape[:-2], -1, table.shape[-1]))

    # -- the vocabulary of domains: what is asked of tokens is asked of those that they are in the whole --------------------

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        return self.whole.coordinate(axis, b, self.token(b, i))

    def rank(self, b: Tensor, i: Tensor) -> Tensor:
        return self.whole.rank(b, self.token(b, i))

    def is_prefix(self, b: Tensor, i: Tensor) -> Tensor | None:
        return self.whole.is_prefix(b, self.token(b, i)) if self.prefix else None

    def extent(self, axis: int, b: Tensor, i: Tensor) -> tuple[Tensor | int, Tensor | int]:
        return self.whole.extent(axis, b, self.token(b, i))

    def check_related(self, keys: Domain, what: object) -> None:
        self.whole.check_related(keys.whole, what)

    def check_ordered(self) -> None:
        self.whole.check_ordered()

    def precedes(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.precedes(keys.whole, b, self.token(b, q), keys.token(b, k))

    def offset(self, axis: int, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.offset(axis, keys.whole, b, self.token(b, q), keys.token(b, k))

    def distance(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.distance(keys.whole, b, self.token(b, q), keys.token(b, k))

    def within(self, keys: Domain, radius: tuple[float, ...], b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.within(keys.whole, radius, b, self.token(b, q), keys.token(b, k))

    def begins_with(self, keys: Domain) -> bool:
        return self.whole.begins_with(keys.whole)

    def _given(self) -> dict[str, Any]:
        return {"whole": self.whole, "index": self.index}

    @classmethod
    def _made_of(cls, arguments: dict[str, Any]) -> Subset:
        whole: Any = arguments.get("whole")
        index: Any = arguments.get("index")
        if not isinstance(whole, Domain) or arguments.keys() != {"whole", "index"}:
            raise ValueError(f"config of a Subset must have whole, a domain, and index; got {', '.join(arguments)}")
        return cls(whole, index)

    def __repr__(self) -> str:
        return f"{self.whole!r}.subset(<{' x '.join(map(str, self.index.shape))} tokens>)"


def _looked_up(
    table: Shaped[Tensor, "batch tokens"], index: Int[Tensor, "*batch kept"]
) -> Shaped[Tensor, "batch kept"]:
    return table.gather(1, index.expand(len(table), -1))


def _offsets(whole: Domain, index: Int[Tensor, " kept"]) -> Int[Tensor, " bounds"]:
    item = torch.zeros_like(index) if whole.items is None else whole.items[index]
    return offsets_of(torch.zeros_like(whole.offsets[1:]).index_add(0, item, torch.ones_like(item)))  # type: ignore[index]


def checked_index(domain: Domain, index: Any) -> Int[Tensor, "*batch kept"]:
    """``index`` as int64, or an error that says what is wrong with it; in a compiled graph, which cannot read it, its shape alone."""
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        came = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be a tensor of integers; got {came}. Of a bool tensor: keep.nonzero()[:, 0].")
    if domain.device is not None and index.device != domain.device:
        raise ValueError(f"index must be on the device of the domain; got {index.device} and {domain.device}")
    if index.ndim not in (1, 2) or (index.ndim == 2 and domain.offsets is not None):
        rule = "(kept,) on packed items" if domain.offsets is not None else "(kept,) or (batch, kept)"
        raise ValueError(f"index must be {rule}; got {tuple(index.shape)} for {domain!r}")
    if index.ndim == 2 and domain.batch_size not in (None, len(index)):
        raise ValueError(
            f"index must have one row for each of the {domain.batch_size} rows of {domain!r}; got {len(index)}"
        )
    index = index.long()
    if is_compiling():
        return index
    tokens = domain.num_tokens
    if index.numel() and not bool(((index >= 0) & (index < tokens)).all()):
        raise ValueError(
            f"index must hold tokens from 0 to {tokens - 1} of {domain!r}; got {index.min()} to {index.max()}"
        )
    if bool((index.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ValueError("index must name no token twice in a row")
    _check_order(domain, index)
    return index


def _check_order(domain: Domain, index: Int[Tensor, "*batch kept"]) -> None:
    """Raise unless items stay behind each other, each with its prefix tokens in front."""
    place = torch.arange(index.shape[-1], device=index.device)
    if domain.items is not None:
        items = domain.items[index]
        if bool((items.diff() < 0).any()):
            raise ValueError(
                "index must keep the order of packed items: tokens of an item behind those of the item before"
            )
    if domain.offsets is not None:
        offsets = _offsets(domain, index)
        kept, place = offsets.diff(), place - (offsets[:1] if domain.items is None else offsets[:-1][items])
    else:
        kept = torch.tensor([len(place)], device=index.device)
    was = domain.place(index)
    in_front = torch.where(place < domain.prefix, was == place, was >= domain.prefix)
    if domain.prefix and not bool(in_front.all() & (kept >= domain.prefix).all()):
        front = "each item" if domain.items is not None else "the others"
        raise ValueError(
            f"index must keep the {domain.prefix} prefix tokens of {domain!r}, in front of {front} and in their order: tokens 0, 1, ..."
        )
