"""Rotary positions: queries and keys turned by angles proportional to where they are."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence as SequenceOf
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._arguments import Positive, check_positive, check_size
from ..domains import Domain, Grid
from ._base import Rotation, at_least_fp32, check_tokens, kept, places
from ._scaling import Scaling, frequencies


class Rotary(Rotation):
    """Rotary position embedding, RoPE (Su et al. 2021, arXiv:2104.09864).

    The head's channels are taken in pairs (a, b), and pair i of a token at coordinates x is turned by the angle phi_i = f_i . x:

        a' = a cos(phi_i) - b sin(phi_i),   b' = b cos(phi_i) + a sin(phi_i)

    so that the product of a query and a key depends only on the difference of their coordinates. The P pairs are shared out evenly
    among the axes of the domain, in their order, n = P // ndim each with the frequencies theta^(-i / n); pairs left over do not turn.

    - ``Sequence``: RoPE at the positions. ``Timeline``: at the real times. ``Points``: at the coordinates. ``Graph``: at the three
      spectral coordinates of the nodes.
    - ``Grid``: axial RoPE, as in EVA-02 (Fang et al. 2023, arXiv:2303.11331) or DINOv3 (Siméoni et al. 2025, arXiv:2508.10104), see
      ``coordinates``.
    - ``mixed=True``: RoPE-Mixed (Heo et al. 2024, arXiv:2403.13298): each head learns a frequency per pair and axis.

    A prefix token is not turned. Angles are computed in fp64, whatever the dtype of the model, so that they are right at position 10^6;
    what does not depend on parameters is kept on the domain.

    Args:
        head_dim: channels of a head, even.
        theta: ratio of the highest frequency to the lowest (one step beyond the last, to be exact). RoPE-Mixed uses 10, DINOv3 100.
        layout: which channels are a pair: ``"half"``, i and i + R/2 (GPT-NeoX, Llama, DINOv3), or ``"interleaved"``, 2i and 2i + 1 (the
            original, EVA-02), of the R channels that turn.
        fraction: the share of channels that turn, the first R = fraction * head_dim rounded down to an even number.
        scaling: ``Interpolation``, ``NTK`` or ``YaRN``, for sequences longer than those of training. YaRN's temperature multiplies whole
            queries and keys, of prefix tokens too.
        mixed: learn the frequencies. Drawn as in the paper: pairs of perpendicular directions in the plane of the first two axes, turned
            by a random angle per head, with the lengths theta^(-i / (P/2)); the third axis like the first, with an angle of its own.
        heads: sets of mixed frequencies. Consecutive heads share a set, and so do a query and its key: with grouped queries, ``heads``
            must divide the number of key heads.
        coordinates: on a ``Grid``, ``"index"`` is the place i on each axis, ``"resized"`` is i / size * reference (EVA-02), and
            ``"normalized"`` is 2 pi (2 (i + 1/2) / size - 1) (DINOv3). The last two exist only on a Grid.
        reference: the grid size of training, one number or one for each axis; with ``coordinates="resized"``. Default 16.
        offset: added to the places first. Among themselves tokens do not notice, but it tells them from prefix tokens, which stay at 0:
            1 in Perception Encoders (Bolya et al. 2025, arXiv:2504.13181).
        scale: what coordinates are multiplied by: the highest frequency, in radians per unit of time or space. ``2 * math.pi / 24`` turns
            the fastest pair once a day, if times are in hours.

    Shapes:
        ``rotate(q, k, domain, key_domain)``: q (B, H, Tq, D), k (B, Hkv, Tk, D), returned in the same shapes and dtypes.

    Raises:
        ValueError: an odd ``head_dim``, an option out of range or without effect, fewer pairs than axes, tensors that do not fit.

    Example:
        >>> q = k = torch.ones(1, 1, 3, 2)
        >>> q, k = Rotary(2).rotate(q, k, Sequence(3))
        >>> scores = (q @ k.transpose(-2, -1))[0, 0] / 2  # the cosine of the offset
        >>> torch.allclose(scores[0], torch.tensor([0.0, 1.0, 2.0]).cos())
        True
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: Positive = 10_000.0,
        layout: Literal["half", "interleaved"] = "half",
        fraction: float = 1.0,
        scaling: Scaling | None = None,
        mixed: bool = False,
        heads: int = 1,
        coordinates: Literal["index", "resized", "normalized"] = "index",
        reference: int | SequenceOf[int] | None = None,
        offset: float = 0.0,
        scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim = check_size("head_dim", head_dim, least=2)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, channels turn in pairs; got head_dim={head_dim}")
        self.theta = check_positive("theta", theta)
        if theta <= 1:
            raise ValueError(f"theta must be > 1; got theta={theta}")
        self.layout = _check_choice("layout", layout, ("half", "interleaved"))
        self.pairs = _check_pairs(head_dim, fraction)
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(f"scaling must be Interpolation, NTK or YaRN; got {scaling!r}")
        if scaling is not None and mixed:
            raise ValueError(
                "scaling changes the frequencies of theta, but mixed=True learns them; leave out one of the two"
            )
        self.scaling = scaling
        self.heads = check_size("heads", heads)
        if heads != 1 and not mixed:
            raise ValueError(
                f"heads counts the sets of mixed frequencies and needs mixed=True; got heads={heads} without it"
            )
        self.coordinates = _check_choice("coordinates", coordinates, ("index", "resized", "normalized"))
        self.reference = _check_reference(coordinates, reference)
        if not math.isfinite(offset):
            raise ValueError(f"offset must be a finite number; got offset={offset}")
        self.offset = float(offset)
        self.scale = check_positive("scale", scale)
        self.frequencies = nn.Parameter(torch.empty(heads, 3, self.pairs)) if mixed else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw mixed frequencies anew, each head with its own directions."""
        if self.frequencies is None:
            return
        half = (self.pairs + 1) // 2
        lengths = frequencies(self.theta, half)
        angles = 2 * math.pi * torch.rand(2, self.heads, 1, dtype=torch.float64)
        plane, third = angles.unbind()

        def component(angle: Tensor) -> Tensor:
            both = torch.cat([lengths * torch.cos(angle), lengths * torch.cos(angle + math.pi / 2)], -1)
            return both[:, : self.pairs]

        # sin(a) = cos(a - pi/2): the second axis is the first, seen a quarter turn later.
        rows = torch.stack([component(plane), component(plane - math.pi / 2), component(third)], 1)
        with torch.no_grad():
            self.frequencies.copy_(rows)

    def rotate_one(self, x: Float[Tensor, "*batch heads tokens head_dim"], domain: Domain) -> Tensor:
        """Queries or keys ``x`` of any number of heads, turned by their positions on ``domain``."""
        check_tokens(self, x, domain, self.head_dim, "head_dim")
        cos, sin = self._cos_sin(x, domain) if domain.whole is domain else self._of_subset(x, domain)
        if self.frequencies is not None and self.heads > 1:
            count = x.shape[-3]
            if count % self.heads:
                raise ValueError(
                    f"each set of mixed frequencies serves as many consecutive heads as the others: {self.heads} sets must divide the "
                    f"number of heads of queries and of keys; got {count} heads. With grouped queries give heads=kv_heads."
                )
            cos, sin = (part.repeat_interleave(count // self.heads, -3) for part in (cos, sin))
        turned = _turn(x.to(cos.dtype), cos, sin, self.layout)
        if self.scaling is not None:
            turned = turned * self.scaling.temperature
        return turned.to(x.dtype)

    def _of_subset(self, x: Tensor, domain: Domain) -> tuple[Tensor, Tensor]:
        """Of the cosines and sines of the whole those of the tokens kept; which may differ by row of the batch."""

        def make() -> tuple[Tensor, Tensor]:
            whole = self._cos_sin(x, domain.whole)
            cos, sin = (domain.take(part, by_row=part.ndim == 4) for part in whole)
            # All heads turn alike.
            return (cos[:, None], sin[:, None]) if whole[0].ndim < cos.ndim == 3 else (cos, sin)

        if self.frequencies is not None:
            return make()
        return kept(domain, ("rotary", *self._key(), at_least_fp32(x.dtype), x.device), make)

    def _cos_sin(self, x: Tensor, domain: Domain) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, ``(tokens, pairs)`` or with axes of batch and heads in front, at least in fp32."""
        dtype = at_least_fp32(x.dtype)
        if self.frequencies is not None:
            table = self.frequencies[:, : self._check_axes(domain)].double()
            where = self._where(domain, x.device)
            angles = (where[:, None] if where.ndim == 3 else where) @ table
            return angles.cos().to(dtype), angles.sin().to(dtype)

        def make() -> tuple[Tensor, Tensor]:
            angles = self._where(domain, x.device) @ self._table(self._check_axes(domain)).to(x.device)
            angles = angles[:, None] if angles.ndim == 3 else angles
            return angles.cos().to(dtype), angles.sin().to(dtype)

        return kept(domain, ("rotary", *self._key(), dtype, x.device), make)

    def _key(self) -> tuple[Hashable, ...]:
        return self.theta, self.pairs, self.scaling, self.coordinates, self.reference, self.offset, self.scale

    def _table(self, ndim: int) -> Float[Tensor, "ndim pairs"]:
        """The frequency of each pair on each axis."""
        bands = self.pairs // ndim
        row = frequencies(self.theta, bands) if self.scaling is None else self.scaling.frequencies(self.theta, bands)
        table = torch.zeros(ndim, self.pairs, dtype=torch.float64)
        for axis in range(ndim):
            table[axis, axis * bands : (axis + 1) * bands] = row
        return table

    def _check_axes(self, domain: Domain) -> int:
        most = self.pairs if self.frequencies is None else self.frequencies.shape[1]
        if domain.ndim > most:
            what = (
                f"{self.pairs} pairs of channels to turn"
                if self.frequencies is None
                else "mixed frequencies for 3 axes"
            )
            raise ValueError(f"Rotary has {what}, fewer than the {domain.ndim} axes of {domain!r}")
        return domain.ndim

    def _where(self, domain: Domain, device: torch.device) -> Float[Tensor, "*batch tokens ndim"]:
        """The coordinates that angles are proportional to; 0 for prefix tokens."""
        where = places(domain, device) + self.offset
        if self.coordinates != "index":
            where = self._relative_to_size(where, domain)
        i = torch.arange(domain.num_tokens, device=device)
        prefix = domain.is_prefix(i.new_zeros(()), i)
        where = where if prefix is None else where.masked_fill(prefix[:, None], 0)
        return where * self.scale

    def _relative_to_size(self, where: Tensor, domain: Domain) -> Float[Tensor, "tokens ndim"]:
        if not isinstance(domain, Grid):
            raise ValueError(
                f"coordinates={self.coordinates!r} need the size of a Grid; got {domain!r}. Use coordinates='index'."
            )
        if isinstance(self.reference, tuple) and len(self.reference) != domain.ndim:
            raise ValueError(
                f"reference must be one size or one for each axis; got reference={self.reference} for {domain!r}"
            )
        sizes = _sizes(domain, where.device)
        if self.coordinates == "resized":
            return where / sizes * torch.tensor(self.reference, dtype=torch.float64, device=where.device)
        return 2 * math.pi * (2 * (where + 0.5) / sizes - 1)

    def extra_repr(self) -> str:
        options = [f"{self.head_dim}", f"theta={self.theta:g}", f"layout={self.layout!r}"]
        if 2 * self.pairs != self.head_dim:
            options.append(f"channels={2 * self.pairs}")
        if self.scaling is not None:
            options.append(f"scaling={self.scaling}")
        if self.frequencies is not None:
            options.append(f"mixed=True, heads={self.heads}")
        if self.coordinates != "index":
            options.append(f"coordinates={self.coordinates!r}")
        if self.reference is not None:
            options.append(f"reference={self.reference}")
        if self.offset:
            options.append(f"offset={self.offset:g}")
        if self.scale != 1:
            options.append(f"scale={self.scale:g}")
        return ", ".join(options)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The first channels of ``x`` turned, the others as they are."""
    width = 2 * cos.shape[-1]
    turning, still = x[..., :width], x[..., width:]
    if layout == "half":
        a, b = turning.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, still], -1)
    a, b = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, still], -1) if still.shape[-1] else turned


def _sizes(domain: Grid, device: torch.device) -> Float[Tensor, "#tokens ndim"]:
    """The size of the grid that each token is in, at least 1."""
    i = torch.arange(domain.num_tokens, device=device)
    zero = i.new_zeros(())
    ends = [domain.extent(axis, zero, i)[1] for axis in range(domain.ndim)]
    # (torch.as_tensor would make a constant of a symbolic size.)
    last = [end.expand(i.shape) if isinstance(end, Tensor) else i.new_full(i.shape, end) for end in ends]
    return (torch.stack(last, -1) + 1).clamp(min=1).double()


def _check_pairs(head_dim: int, fraction: float) -> int:
    """How many pairs of channels turn."""
    pairs = int(head_dim * fraction / 2 + 1e-9) if 0 < fraction <= 1 else 0
    if pairs == 0:
        raise ValueError(
            f"fraction must be in (0, 1] and leave at least one pair of channels to turn; got fraction={fraction} of head_dim={head_dim}"
        )
    return pairs


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {name}={value!r}")
    return value


def _check_reference(coordinates: str, reference: int | SequenceOf[int] | None) -> int | tuple[int, ...] | None:
    if coordinates != "resized":
        if reference is not None:
            raise ValueError(
                f"reference is used by coordinates='resized' only; got reference={reference} and coordinates={coordinates!r}"
            )
        return None
    if reference is None:
        return 16
    sizes = (reference,) if isinstance(reference, int) else tuple(reference)
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"reference must be one size >= 1, or one for each axis; got reference={reference}")
    return reference if isinstance(reference, int) else sizes
