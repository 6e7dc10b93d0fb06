"""Masks as frozen expressions: leaves, and their combinations by ``&``, ``|`` and ``~``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from .._arguments import check_count, checked_names, shown
from .._config import Described
from ..domains import Domain
from ..domains._base import both
from ._block_mask import block_mask_of
from ._outline import Outline, Tiling

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import Self

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Extent(NamedTuple):
    """Over how many rows of the batch and heads a mask varies; None where it does not."""

    batch: int | None = None
    heads: int | None = None


class Mask(Described, ABC):
    """Which query may attend to which key: True = may attend.

    A mask is a value. It is written once, without reference to any length, printed, compared, hashed and pickled, and gets its meaning
    from the domain that it is bound to. Masks combine with ``&``, ``|`` and ``~``.

    Example:
        >>> window = Causal() & Local(2)
        >>> window
        Causal() & Local(2)
        >>> window.dense(Sequence(4)).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1]], dtype=torch.int32)
    """

    # Whether the mask relates places of queries to places of keys, which without domains exist only for Tq = Tk.
    relates_places: bool = False

    def __and__(self, other: Mask) -> Mask:
        return And.of(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or.of(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"a mask has no truth value, so 'and', 'or' and 'not' cannot combine masks: use & | ~ instead; got {self!r}"
        )

    # -- the meaning ---------------------------------------------------------------------------------------------

    @abstractmethod
    def check(self, domain: Domain, keys: Domain) -> None:
        """Raise unless the mask is defined for queries on ``domain`` and keys on ``keys``."""

    @abstractmethod
    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        """The bare predicate ``(b, h, q, k) -> bool``, without the domain's own facts; elementwise in broadcastable indices."""

    @abstractmethod
    def is_reflexive(self, domain: Domain) -> bool:
        """Whether every token may surely attend to itself, so that no key is masked for everybody."""

    def extent(self) -> Extent:
        """Over how many rows of the batch and heads the mask itself varies."""
        return Extent()

    def lookback(self) -> float | None:
        """How far back, as a distance, a query can reach at most; None if there is no bound."""
        return None

    def without_keys(self, count: int) -> Mask:
        """The mask where the first ``count`` keys are gone, as in a cache: what is said of each key is said of the others."""
        return self

    def bind(self, domain: Domain, key_domain: Domain | None = None) -> Predicate:
        """The mask over a domain as a function ``(b, h, q_index, k_index) -> bool``: a FlexAttention ``mask_mod`` as it is.

        Includes the domain's own facts: tokens of different packed items, and tokens that do not exist, are kept apart.

        Raises:
            ValueError: the mask is not defined on the domain.
        """
        keys = domain if key_domain is None else key_domain
        for name, value in (("domain", domain), ("key_domain", keys)):
            if not isinstance(value, Domain):
                raise TypeError(f"{name} must be a domain such as Sequence(length); got {type(value).__name__}")
        domain.check_pairable(keys)
        self.check(domain.whole, keys.whole)
        allows = self.allows_kept(domain, keys)

        def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            allowed = both(allows(b, h, q_index, k_index), domain.together(keys, b, q_index, k_index))
            assert allowed is not None
            return allowed

        return mask_mod

    def allows_kept(self, domain: Domain, keys: Domain) -> Predicate:
        """``allows``, where tokens of a subset are those that they are in the whole."""
        allows = self.allows(domain.whole, keys.whole)
        if domain.whole is domain and keys.whole is keys:
            return allows
        return lambda b, h, q, k: allows(b, h, domain.token(b, q), keys.token(b, k))

    def dense(
        self,
        domain: Domain,
        key_domain: Domain | None = None,
        *,
        batch_size: int | None = None,
        heads: int | None = None,
    ) -> Bool[Tensor, "*batch_heads queries keys"]:
        """The whole mask as a bool tensor ``(Tq, Tk)``, with leading ``(B, H)`` only where it varies over rows or heads.

        Memory is Tq x Tk: for pictures, tests and small inputs. ``batch_size`` and ``heads`` say over how many rows and heads to
        evaluate a ``Where``, which cannot know.
        """
        batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        heads = None if heads is None else check_count("heads", heads)
        keys = domain if key_domain is None else key_domain
        predicate = self.bind(domain, keys)
        extent = self.extent()
        rows = batch_size or extent.batch or domain.batch_size or keys.batch_size
        heads = heads or extent.heads
        device = domain.device or keys.device or getattr(self, "device", None)
        b = torch.arange(1 if rows is None else rows, device=device)[:, None, None, None]
        h = torch.arange(1 if heads is None else heads, device=device)[:, None, None]
        q = torch.arange(domain.num_tokens, device=device)[:, None]
        k = torch.arange(keys.num_tokens, device=device)
        allowed = predicate(b, h, q, k)
        allowed = allowed.expand(b.shape[0], h.shape[0], q.shape[0], k.shape[0])
        return (allowed if rows is not None or heads is not None else allowed[0, 0]).contiguous()

    def outline(self, tiling: Tiling) -> Outline:
        """What the mask's structure says of blocks of pairs; without structure nothing, and pairs must be asked."""
        return tiling.unknown()

    def to_block_mask(
        self,
        domain: Domain,
        key_domain: Domain | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
        batch_size: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask for ``torch.nn.attention.flex_attention``: the blocks of pairs that are allowed in part, and those allowed whole.

        They are the ones that ``create_block_mask(mask.bind(domain), B, H, Tq, Tk)`` finds, but found from the structure of the mask:
        only blocks that the structure leaves open are looked into. For a window on a million tokens that takes milliseconds and
        memory in proportion to the blocks found, where all pairs would be 10^12. ``Where`` and ``Dense`` have no structure: their
        pairs are asked, block by block, unless a mask that they are combined with by ``&`` rules them out.

        Args:
            domain: where queries live.
            key_domain: where keys live, if elsewhere.
            block_size: queries and keys of a block, >= 1; one number, or (queries, keys).
            batch_size, heads: over how many rows and heads to evaluate a ``Where``, which cannot know. Others vary as far as they must,
                and FlexAttention broadcasts the rest.
            device: where to put the tables; by default where the tensors of the domain and the mask are, or else the CPU.

        Raises:
            ValueError: the mask is not defined on the domain, or ``batch_size`` is not the number of rows that the mask or domain has.

        Example:
            >>> (Causal() & Local(127)).to_block_mask(Sequence(1024)).kv_num_blocks
            tensor([[[1, 2, 2, 2, 2, 2, 2, 2]]], dtype=torch.int32)
        """
        keys = domain if key_domain is None else key_domain
        if device is not None:
            domain, keys = domain.to(device), keys.to(device)
        predicate, extent = self.bind(domain, keys), self.extent()
        sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        rows = max((n for n in (extent.batch, domain.batch_size, keys.batch_size) if n is not None), default=None)
        for name, given, known in (("batch_size", batch_size, rows), ("heads", heads, extent.heads)):
            if given is not None and known not in (None, 1, check_count(name, given, least=1)):
                raise ValueError(f"{name} must be {known}, as {self!r} has on {domain!r}; got {name}={given}")
        tiling = Tiling(
            domain, keys, (check_count("block_size", sizes[0], least=1), check_count("block_size", sizes[1], least=1)),
            batch_size or rows or 1,
            torch.device(device or domain.device or keys.device or getattr(self, "device", None) or "cpu"),
        )  # fmt: skip
        return block_mask_of(predicate, tiling.outline_of(self), tiling, heads or extent.heads or 1)


class Leaf(Mask):
    """A mask that is not made of others. ``kinds`` names the domains that it is defined on, ``instead`` what to use elsewhere."""

    kinds: ClassVar[tuple[str, ...]] = ("Sequence", "Timeline", "Grid", "Graph", "Points")
    instead: ClassVar[str] = "Where(fn)"

    def check(self, domain: Domain, keys: Domain) -> None:
        for where in (domain, keys):
            if where.kind not in self.kinds:
                raise ValueError(
                    f"{type(self).__name__} is defined on {', '.join(self.kinds)}; got {where!r}. Use {self.instead} there instead."
                )
        if self.relates_places:
            domain.check_related(keys, self)

    def is_reflexive(self, domain: Domain) -> bool:
        return False


@checked_names
@dataclass(frozen=True)
class Full(Leaf):
    """Every query may attend to every key of its item that exists.

    Example:
        >>> Full().dense(Sequence.packed([1, 2])).int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        def everywhere(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= 0

        return everywhere

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.everywhere()

    def is_reflexive(self, domain: Domain) -> bool:
        return True


class _Combination(Mask):
    """Parts in the order written; equal whatever the order."""

    parts: tuple[Mask, ...]
    symbol: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (tuple, list)):
            raise TypeError(
                f"parts must be a tuple of masks; got parts={shown(self.parts)}. Combine masks with & and |."
            )
        if not self.parts:
            raise ValueError("parts must be a tuple of at least one mask; got parts=()")
        object.__setattr__(self, "parts", tuple(_check_part("each of parts", part) for part in self.parts))

    @classmethod
    def _flat(cls, masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
        flat: list[Mask] = []
        for mask in masks:
            flat += [part for part in (mask.parts if isinstance(mask, cls) else (mask,)) if part not in flat]
        return tuple(flat)

    @property
    def relates_places(self) -> bool:  # type: ignore[override]
        return any(part.relates_places for part in self.parts)

    @property
    def device(self) -> torch.device | None:
        return next((device for part in self.parts if (device := getattr(part, "device", None)) is not None), None)

    def __iter__(self) -> Iterator[Mask]:
        return iter(self.parts)

    def _described(self) -> dict[str, Any]:
        return {"parts": list(self.parts)}

    @classmethod
    def _rebuilt(cls, arguments: dict[str, Any]) -> Self:
        parts = arguments.get("parts")
        if arguments.keys() != {"parts"} or not isinstance(parts, list) or len(parts) < 2:
            raise ValueError(f"config of {cls.__name__} must have parts, a list of at least two masks; got {arguments}")
        return cls(tuple(parts))  # type: ignore[call-arg]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and set(self.parts) == set(other.parts)

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self.parts)))

    def check(self, domain: Domain, keys: Domain) -> None:
        for part in self.parts:
            part.check(domain, keys)

    def extent(self) -> Extent:
        extents = [part.extent() for part in self.parts]
        return Extent(
            _agreed("rows", [extent.batch for extent in extents], self),
            _agreed("heads", [extent.heads for extent in extents], self),
        )

    def without_keys(self, count: int) -> Mask:
        return type(self)(tuple(part.without_keys(count) for part in self.parts))  # type: ignore[call-arg]


def _check_part(name: str, part: object) -> Mask:
    if not isinstance(part, Mask):
        raise TypeError(f"{name} must be a mask, such as masks.Causal(); got {type(part).__name__}")
    return part


def _agreed(what: str, sizes: list[int | None], mask: Mask) -> int | None:
    """The one size other than 1 that parts have; 1 if they have only that, None if none varies."""
    varying = [size for size in sizes if size is not None]
    more = {size for size in varying if size != 1}
    if len(more) > 1:
        raise ValueError(f"the parts of a mask must agree on batch and heads; got {sorted(more)} {what} in {mask!r}")
    return max(varying) if varying else None


@checked_names
@dataclass(frozen=True, eq=False, repr=False)
class And(_Combination):
    """What all parts allow. Made by ``&``."""

    parts: tuple[Mask, ...]

    @staticmethod
    def of(*masks: Mask) -> Mask:
        """The conjunction in its shortest form: nested ones flattened, repeated parts and ``Full()`` dropped."""
        parts = tuple(part for part in And._flat(masks) if not isinstance(part, Full))
        return And(parts) if len(parts) > 1 else parts[0] if parts else Full()

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        predicates = [part.allows(domain, keys) for part in self.parts]

        def all_of(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = predicates[0](b, h, q, k)
            for predicate in predicates[1:]:
                result = result & predicate(b, h, q, k)
            return result

        return all_of

    def outline(self, tiling: Tiling) -> Outline:
        outlines: list[Outline] = []
        for part in self.parts:
            outlines.append(part.outline(tiling))
            tiling = tiling.among(outlines[-1].possible)
        return Outline.all_of(outlines)

    def is_reflexive(self, domain: Domain) -> bool:
        return all(part.is_reflexive(domain) for part in self.parts)

    def lookback(self) -> float | None:
        bounds = [bound for part in self.parts if (bound := part.lookback()) is not None]
        return min(bounds) if bounds else None

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)


@checked_names
@dataclass(frozen=True, eq=False, repr=False)
class Or(_Combination):
    """What any part allows. Made by ``|``."""

    parts: tuple[Mask, ...]

    @staticmethod
    def of(*masks: Mask) -> Mask:
        """The disjunction in its shortest form: nested ones flattened, repeated parts dropped."""
        parts = Or._flat(masks)
        return Or(parts) if len(parts) > 1 else parts[0]

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        predicates = [part.allows(domain, keys) for part in self.parts]

        def any_of(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = predicates[0](b, h, q, k)
            for predicate in predicates[1:]:
                result = result | predicate(b, h, q, k)
            return result

        return any_of

    def outline(self, tiling: Tiling) -> Outline:
        return Outline.any_of([part.outline(tiling) for part in self.parts])

    def is_reflexive(self, domain: Domain) -> bool:
        return any(part.is_reflexive(domain) for part in self.parts)

    def lookback(self) -> float | None:
        bounds = [part.lookback() for part in self.parts]
        return None if None in bounds else max(bound for bound in bounds if bound is not None)

    def __repr__(self) -> str:
        return " | ".join(f"({part!r})" if isinstance(part, And) else repr(part) for part in self.parts)


@checked_names
@dataclass(frozen=True, repr=False)
class Not(Mask):
    """What ``part`` forbids, among the pairs that the domain allows at all. Made by ``~``."""

    part: Mask

    def __post_init__(self) -> None:
        _check_part("part", self.part)

    def __invert__(self) -> Mask:
        return self.part

    @property
    def relates_places(self) -> bool:  # type: ignore[override]
        return self.part.relates_places

    @property
    def device(self) -> torch.device | None:
        return getattr(self.part, "device", None)

    def check(self, domain: Domain, keys: Domain) -> None:
        self.part.check(domain, keys)

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        predicate = self.part.allows(domain, keys)
        return lambda b, h, q, k: ~predicate(b, h, q, k)

    def outline(self, tiling: Tiling) -> Outline:
        return self.part.outline(tiling).negated()

    def extent(self) -> Extent:
        return self.part.extent()

    def is_reflexive(self, domain: Domain) -> bool:
        return False

    def without_keys(self, count: int) -> Mask:
        return Not(self.part.without_keys(count))

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, _Combination) else f"~{self.part!r}"
