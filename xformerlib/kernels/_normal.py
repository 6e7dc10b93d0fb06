"""The normal form of a mask over a domain: disjoint terms, each a conjunction, in which structure can be recognised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from ..domains import Domain
from ..masks import And, Edges, Expander, Full, Global, Mask, Not, Or
from ..masks._algebra import Leaf, Predicate
from ..masks._outline import Outline, Tiling
from ..masks._sequence import SpatialLeaf

# More terms than this are not worth taking apart.
MOST_TERMS = 8

Term = tuple[Mask, ...]


@dataclass(frozen=True)
class NamedKeys(Leaf):
    """The half of ``Global`` that concerns keys: key j is named."""

    whole: Global

    def check(self, domain: Domain, keys: Domain) -> None:
        self.whole.check(domain, keys)

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        named = self.whole._named(keys)
        return lambda b, h, q, k: named(b, k)

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.of_keys(self.whole._named(tiling.keys)(tiling.b, tiling.every(tiling.keys)))


@dataclass(frozen=True)
class NamedQueries(Leaf):
    """The half of ``Global`` that concerns queries: query i is named."""

    whole: Global

    def check(self, domain: Domain, keys: Domain) -> None:
        self.whole.check(domain, keys)

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        named = self.whole._named(domain)
        return lambda b, h, q, k: named(b, q)

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.of_queries(self.whole._named(tiling.domain)(tiling.b, tiling.every(tiling.domain)))


@dataclass(frozen=True)
class PrefixKeys(Leaf):
    """Key j is a prefix token."""

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        return lambda b, h, q, k: _or_nothing(keys.is_prefix(b, k), k)

    def outline(self, tiling: Tiling) -> Outline:
        k = tiling.every(tiling.keys)
        return tiling.of_keys(_or_nothing(tiling.keys.is_prefix(tiling.b, k), k))


@dataclass(frozen=True)
class PrefixQueries(Leaf):
    """Query i is a prefix token."""

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        return lambda b, h, q, k: _or_nothing(domain.is_prefix(b, q), q)

    def outline(self, tiling: Tiling) -> Outline:
        q = tiling.every(tiling.domain)
        return tiling.of_queries(_or_nothing(tiling.domain.is_prefix(tiling.b, q), q))


def _or_nothing(prefix: Tensor | None, index: Tensor) -> Tensor:
    return index < 0 if prefix is None else prefix


def disjoint_terms(mask: Mask, domain: Domain, keys: Domain) -> list[tuple[Term, Mask]] | None:
    """The mask as conjunctions, and for each the mask of the pairs that are its own: allowed by it and by none before.

    None where there are too many.
    """
    terms = _terms(mask, False, domain.prefix > 0 or keys.prefix > 0)
    if terms is None:
        return None
    result: list[tuple[Term, Mask]] = []
    for i, term in enumerate(terms):
        own = And.of(*term)
        result.append((term, And.of(own, Not(Or.of(*(And.of(*other) for other in terms[:i])))) if i else own))
    return result


def _terms(mask: Mask, negated: bool, prefixes: bool) -> list[Term] | None:
    """Disjunctive normal form; a literal is a leaf or the negation of one."""
    if isinstance(mask, Not):
        return _terms(mask.part, not negated, prefixes)
    if isinstance(mask, (And, Or)):
        parts = [_terms(part, negated, prefixes) for part in mask.parts]
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        if isinstance(mask, And) == negated:
            return _few(term for part in found for term in part)
        return _few(tuple(dict.fromkeys(literal for term in choice for literal in term)) for choice in product(*found))
    if negated:
        return [] if isinstance(mask, Full) else [(Not(mask),)]
    if isinstance(mask, Global):
        return [(NamedKeys(mask),), (NamedQueries(mask),)]
    if prefixes and isinstance(mask, (SpatialLeaf, Edges, Expander)):
        # Pairs with a prefix token are unconstrained: full columns and rows of their own.
        return [(PrefixKeys(),), (PrefixQueries(),), (mask, Not(PrefixKeys()), Not(PrefixQueries()))]
    return [(mask,)]


def _few(terms: Iterator[Term]) -> list[Term] | None:
    result: list[Term] = []
    for term in terms:
        if term not in result:
            result.append(term)
        if len(result) > MOST_TERMS:
            return None
    return result
