"""Masks that every domain understands: by place in the item, by label, and given outright."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .._arguments import check_count, checked_names
from .._autograd import is_compiling
from ..domains import Domain
from ._algebra import Extent, Leaf, Mask, Predicate
from ._outline import Between, Outline, Tiling


@checked_names
@dataclass(frozen=True, init=False, repr=False)
class Global(Leaf):
    """Some tokens attend to all and are attended by all: query i or key j is one of them.

    ``Global(g)`` names the first ``g`` tokens of each item (prefix tokens count), ``Global([3, 17])`` tokens by index.

    Literature: Longformer and BigBird (arXiv:2004.05150, arXiv:2007.14062); virtual nodes (Gilmer et al. 2017).

    Raises:
        ValueError, TypeError: a count or an index that is negative or not an integer; when bound, an index beyond the tokens.

    Example:
        >>> Global(1).dense(Sequence(3)).int()
        tensor([[1, 1, 1],
                [1, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """

    tokens: int | tuple[int, ...]

    def __init__(self, tokens: int | Iterable[int] | Int[Tensor, " count"]) -> None:
        if isinstance(tokens, Tensor) and tokens.ndim:
            tokens = tokens.tolist()
        if isinstance(tokens, Iterable) and not (isinstance(tokens, Tensor) and tokens.ndim == 0):
            checked: int | tuple[int, ...] = tuple(sorted({check_count("tokens", token) for token in tokens}))
        else:
            checked = check_count("tokens", tokens)
        object.__setattr__(self, "tokens", checked)

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        if isinstance(self.tokens, tuple) and not domain.begins_with(keys):
            raise ValueError(
                f"tokens by index say nothing where queries and keys are different pieces of a sequence, whose indices begin anew; got "
                f"{self!r} on {domain!r} and {keys!r}. Name a count from the front, Global(g)."
            )
        for where in (domain, keys):
            if isinstance(self.tokens, tuple) and self.tokens and self.tokens[-1] >= where.num_tokens:
                raise ValueError(
                    f"tokens must be < num_tokens; got index {self.tokens[-1]} on {where!r} of {where.num_tokens} tokens"
                )

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        named = [self._named(where) for where in (domain, keys)]
        return lambda b, h, q, k: named[0](b, q) | named[1](b, k)

    def outline(self, tiling: Tiling) -> Outline:
        q, k = tiling.q, tiling.k
        if isinstance(self.tokens, tuple):
            q, k = tiling.every(tiling.domain), tiling.every(tiling.keys)
        query, key = self._named(tiling.domain)(tiling.b, q), self._named(tiling.keys)(tiling.b, k)
        return Outline.any_of([tiling.of_queries(query), tiling.of_keys(key)])

    def _named(self, where: Domain):  # type: ignore[no-untyped-def]
        tokens = self.tokens
        if isinstance(tokens, int):
            return lambda b, i: where.rank(b, i) < tokens

        def is_named(b: Tensor, i: Tensor) -> Tensor:
            result = i < 0
            for token in tokens:
                result = result | (i == token)
            return result

        return is_named

    def __repr__(self) -> str:
        return f"Global({list(self.tokens) if isinstance(self.tokens, tuple) else self.tokens})"


@checked_names
@dataclass(frozen=True)
class Prefix(Leaf):
    """Every query may attend to the first ``n`` keys of its item; ``Causal() | Prefix(n)`` is a prefix language model's mask (T5,
    arXiv:1910.10683).

    Example:
        >>> (Causal() | Prefix(2)).dense(Sequence(3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_count("n", self.n))

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        return lambda b, h, q, k: keys.rank(b, k) < self.n

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.of_keys(tiling.keys.rank(tiling.b, tiling.k) < self.n)


class _TensorLeaf(Leaf):
    """A leaf that holds a tensor: compared by identity, since comparing contents would read the device."""

    @property
    def device(self) -> torch.device:
        raise AssertionError("each leaf names its tensor")

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        for where in (domain, keys):
            if where.device is not None and where.device != self.device:
                raise ValueError(
                    f"{type(self).__name__} holds a tensor on {self.device}, the domain is on {where.device}; move one"
                )


@checked_names
@dataclass(frozen=True, eq=False, repr=False)
class Segments(_TensorLeaf):
    """A query may attend to the keys with the same label: ``ids[i] == ids[j]``; packed documents, objects, communities of a graph.

    Args:
        ids: ``(tokens,)`` or ``(batch, tokens)`` integers, of queries and, unless ``key_ids`` are given, of keys.
        key_ids: the labels of the keys where they are not the queries.

    Example:
        >>> Segments(torch.tensor([0, 0, 1])).dense(Sequence(3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """

    ids: Int[Tensor, "*batch tokens"]
    key_ids: Int[Tensor, "*batch keys"] | None = None

    def __post_init__(self) -> None:
        _check_table("ids", self.ids, "integers")
        if self.key_ids is not None:
            _check_table("key_ids", self.key_ids, "integers")

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        _check_length("ids", self.ids, domain, "Give key_ids too if keys are not the queries.")
        _check_length(
            "key_ids", self.ids if self.key_ids is None else self.key_ids, keys, "Give key_ids, the labels of the keys."
        )

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        ids, key_ids = self.ids, self.ids if self.key_ids is None else self.key_ids
        return lambda b, h, q, k: _look_up(ids, b, q) == _look_up(key_ids, b, k)

    def outline(self, tiling: Tiling) -> Outline:
        ids, key_ids = self.ids, self.ids if self.key_ids is None else self.key_ids
        return tiling.between(Between.equal(ids.long(), key_ids.long()))

    def extent(self) -> Extent:
        rows = [ids.shape[0] for ids in (self.ids, self.key_ids) if ids is not None and ids.ndim == 2]
        return Extent(max(rows)) if rows else Extent()

    def is_reflexive(self, domain: Domain) -> bool:
        return self.key_ids is None

    def without_keys(self, count: int) -> Mask:
        return self if self.key_ids is None else Segments(self.ids, self.key_ids[..., count:])

    def __repr__(self) -> str:
        return f"Segments(<{' x '.join(map(str, self.ids.shape))} ids>)"


@checked_names
@dataclass(frozen=True, eq=False, repr=False)
class Keys(_TensorLeaf):
    """Every query may attend to the keys where ``valid`` is True: ``valid[j]``.

    A mask, not padding: hidden keys are still tokens with an output of their own. Tokens that do not exist belong to the domain
    (``Sequence.padded``).

    Args:
        valid: ``(keys,)`` or ``(batch, keys)`` bool.

    Example:
        >>> Keys(torch.tensor([True, False, True])).dense(Sequence(1), Sequence(3)).int()
        tensor([[1, 0, 1]], dtype=torch.int32)
    """

    valid: Bool[Tensor, "*batch keys"]

    def __post_init__(self) -> None:
        _check_table("valid", self.valid, "bool")
        if self.valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, True where a key may be attended to; got {self.valid.dtype}")

    @property
    def device(self) -> torch.device:
        return self.valid.device

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        _check_length("valid", self.valid, keys, "Give one entry for each key.")

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        return lambda b, h, q, k: _look_up(self.valid, b, k)

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.of_keys(self.valid)

    def extent(self) -> Extent:
        return Extent(self.valid.shape[0]) if self.valid.ndim == 2 else Extent()

    def without_keys(self, count: int) -> Mask:
        return Keys(self.valid[..., count:])

    def __repr__(self) -> str:
        return f"Keys(<{' x '.join(map(str, self.valid.shape))} valid>)"


@checked_names
@dataclass(frozen=True, eq=False, repr=False)
class Dense(_TensorLeaf):
    """The mask as a tensor, where no rule describes it.

    Args:
        allowed: bool, True = may attend (as in ``scaled_dot_product_attention``; the opposite of ``nn.MultiheadAttention``);
            ``(Tq, Tk)``, or ``(B, H, Tq, Tk)`` where B and H may be 1.

    Example:
        >>> Dense(torch.eye(2, dtype=torch.bool)) & Causal()
        Dense(<2 x 2>) & Causal()
    """

    allowed: Bool[Tensor, "*batch_heads queries keys"]

    def __post_init__(self) -> None:
        if not isinstance(self.allowed, Tensor) or self.allowed.dtype != torch.bool:
            raise TypeError(f"allowed must be a bool tensor, True = may attend; got {type(self.allowed).__name__}")
        if self.allowed.ndim not in (2, 4):
            raise ValueError(
                f"allowed must be (Tq, Tk) or (B, H, Tq, Tk); got {tuple(self.allowed.shape)}. Insert axes of 1 where needed."
            )

    @property
    def device(self) -> torch.device:
        return self.allowed.device

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        if self.allowed.shape[-2:] != (domain.num_tokens, keys.num_tokens):
            raise ValueError(
                f"allowed must end in (Tq, Tk) = ({domain.num_tokens}, {keys.num_tokens}) of the domains; got {tuple(self.allowed.shape)}"
            )

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        if self.allowed.ndim == 2:
            return lambda b, h, q, k: self.allowed[q, k]
        rows, heads = self.allowed.shape[:2]
        return lambda b, h, q, k: self.allowed[b if rows > 1 else 0, h if heads > 1 else 0, q, k]

    def extent(self) -> Extent:
        return Extent(self.allowed.shape[0], self.allowed.shape[1]) if self.allowed.ndim == 4 else Extent()

    def without_keys(self, count: int) -> Mask:
        return Dense(self.allowed[..., count:])

    def __repr__(self) -> str:
        return f"Dense(<{' x '.join(map(str, self.allowed.shape))}>)"


@checked_names
@dataclass(frozen=True)
class Where(Leaf):
    """A predicate of your own, ``fn(b, h, q_index, k_index) -> bool``, as FlexAttention's ``mask_mod``.

    Nothing can be known about it, so it is evaluated pair by pair; describe what you can by other masks and combine: ``Local(8) &
    Where(fn)``. Compared by the function's identity; pickles if the function does.

    Example:
        >>> Where(lambda b, h, q, k: (q + k) % 2 == 0).dense(Sequence(2)).int()
        tensor([[1, 0],
                [0, 1]], dtype=torch.int32)
    """

    fn: Predicate

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function (b, h, q_index, k_index) -> bool; got {type(self.fn).__name__}")
        if is_compiling():
            return  # a signature cannot be traced; the function is checked when the graph runs
        try:
            inspect.signature(self.fn).bind(0, 0, 0, 0)
        except TypeError as error:
            raise TypeError(
                f"fn must take four arguments (b, h, q_index, k_index); got {inspect.signature(self.fn)}"
            ) from error

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        def checked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = self.fn(b, h, q, k)
            if not isinstance(result, Tensor) or result.dtype != torch.bool:
                raise TypeError(
                    f"fn must return a bool tensor; got {getattr(result, 'dtype', type(result).__name__)} from {self.fn!r}"
                )
            if not is_compiling():
                _check_shape(result, torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape), self.fn)
            return result

        return checked


def _check_shape(result: Tensor, shape: torch.Size, fn: Predicate) -> None:
    """Raise unless what a predicate returns broadcasts to the shape that its indices have together."""
    given = result.shape
    if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(reversed(given), reversed(shape), strict=False)):
        raise ValueError(
            f"fn must return a tensor that broadcasts to the shape of its indices, {tuple(shape)}; got {tuple(given)} from {fn!r}"
        )


def _check_table(name: str, table: Tensor, what: str) -> None:
    if not isinstance(table, Tensor) or table.is_floating_point() or table.is_complex():
        raise TypeError(f"{name} must be a tensor of {what}; got {getattr(table, 'dtype', type(table).__name__)}")
    if table.ndim not in (1, 2):
        raise ValueError(f"{name} must be (tokens,) or (batch, tokens); got {tuple(table.shape)}")


def _check_length(name: str, table: Shaped[Tensor, "*batch tokens"], where: Domain, hint: str) -> None:
    if table.shape[-1] != where.num_tokens:
        raise ValueError(
            f"{name} must have one entry per token of {where!r}, {where.num_tokens}; got {table.shape[-1]}. {hint}"
        )
    if table.ndim == 2 and where.batch_size is not None and table.shape[0] != where.batch_size:
        raise ValueError(f"{name} must have one row per row of {where!r}, {where.batch_size}; got {len(table)}")


def _look_up(table: Tensor, b: Tensor, i: Tensor) -> Tensor:
    return table[i] if table.ndim == 1 else table[b, i]
