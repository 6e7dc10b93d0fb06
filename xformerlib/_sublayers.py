"""The parts of a block beside attention: feed-forward layers, residual connections, stochastic depth, norms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._arguments import Rate, Size, Within, check_number, made_by, shown
from ._dropout import Dropout
from ._projection import check_dtype
from ._recorded import Recorded
from .domains import Domain

NormLayer = Literal["layer", "rms"] | Callable[[int], nn.Module]
Activation = str | nn.Module | Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu,
}  # fmt: skip
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": partial(F.gelu, approximate="tanh"), "reglu": F.relu,
}  # fmt: skip


class FeedForward(Recorded):
    """Two linear maps with a nonlinearity between, on each token alone.

        y = W_2 act(W_1 x + b_1) + b_2                   relu (arXiv:1706.03762), gelu (arXiv:1606.08415), or any module
        y = W_2 (act(W_g x + b_g) * (W_1 x + b_1)) + b_2  swiglu, geglu, reglu (Shazeer 2020, arXiv:2002.05202); rows of ``up``: gate first

    Args:
        dim: channels of input and output.
        hidden: channels between; ``4 * dim`` if not given, for gated units two thirds of that, rounded up to a multiple of 8.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` (its approximation by tanh), ``"silu"``; gated ``"swiglu"``, ``"geglu"``,
            ``"geglu_tanh"`` (T5 v1.1, Gemma), ``"reglu"``; or a module or function on the hidden channels.
        dropout: after the nonlinearity, in training.
        bias: whether the linear maps have biases.
        norm: a norm of the hidden channels, before the second map (sub-LN, Wang et al. 2022, arXiv:2210.06423); none if not given.

    Example:
        >>> FeedForward(64, activation="swiglu").hidden
        176
    """

    def __init__(
        self,
        dim: Size,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu",
        dropout: Rate = 0.0,
        bias: bool = True,
        norm: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in _ACTIVATIONS | _GATED:
            raise ValueError(
                f"activation must be one of {', '.join(map(repr, _ACTIVATIONS | _GATED))}, or a module; got activation={activation!r}"
            )
        gated = isinstance(activation, str) and activation in _GATED
        default = -(-8 * dim // 3 // 8) * 8 if gated else 4 * dim
        self.hidden = default if hidden is None else hidden
        if self.hidden < 1:
            raise ValueError(f"hidden must be >= 1; got hidden={hidden}")
        self.gated, self.activation = gated, activation
        self.up = nn.Linear(dim, self.hidden * (2 if gated else 1), bias=bias)
        self.dropout: nn.Dropout = Dropout(dropout)
        self.norm = nn.Identity() if norm is None else norm_factory(norm, "norm (hidden_norm of a block)")(self.hidden)
        self.down = nn.Linear(self.hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Map each token."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor; got {shown(x)}")
        if isinstance(self.up, nn.Linear) and (x.ndim == 0 or x.shape[-1] != self.up.in_features):
            raise ValueError(f"x must be (..., {self.up.in_features}); got {tuple(x.shape)}")
        check_dtype("x", x, self.up)
        return self.down(self.norm(self.dropout(self._activated(self.up(x)))))

    def _activated(self, h: Tensor) -> Tensor:
        if not isinstance(self.activation, str):
            return self.activation(h)
        if not self.gated:
            return _ACTIVATIONS[self.activation](h)
        gate, h = h.chunk(2, -1)
        return _GATED[self.activation](gate) * h

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, drops a residual branch for whole items.

    Each item (row of the batch, or packed item) is dropped with probability ``p`` and otherwise scaled by ``1 / (1 - p)``.

    Example:
        >>> DropPath(0.5).eval()(torch.ones(2, 3, 1), Sequence(3)).sum()
        tensor(6.)
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        check_number("drop_path", p, Within(0, 1))
        self.p = p

    def forward(self, x: Float[Tensor, "*batch tokens dim"], domain: Domain) -> Float[Tensor, "*batch tokens dim"]:
        """Drop the branch ``x`` of some items."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of tokens; got x={shown(x)}")
        if self.p == 0 or not self.training:
            return x
        items = domain.items
        kept = x.new_empty(*x.shape[:-2], domain.num_items if items is not None else 1).bernoulli_(1 - self.p) / (
            1 - self.p
        )
        return x * (kept if items is None else kept.index_select(-1, items))[..., None]

    def extra_repr(self) -> str:
        return f"{self.p}"


class Residual(nn.Module):
    """A branch around which the input is added: norm before, after, or both, layer scale, dropout and stochastic depth."""

    def __init__(
        self,
        dim: int,
        norm: str,
        make: Callable[[int], nn.Module],
        scale: float | None,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm_after_sum = norm == "post"
        self.norm = nn.Identity() if norm == "res-post" else make(dim)
        self.branch_norm = make(dim) if norm in ("sandwich", "res-post") else None
        self.scale = None if scale is None else nn.Parameter(torch.full((dim,), float(scale)))
        self.dropout, self.drop_path = Dropout(dropout), DropPath(drop_path)

    def forward(
        self, x: Tensor, branch: Callable[[Tensor], Tensor], domain: Domain, here: Domain | None = None
    ) -> Tensor:
        """The sum of ``x`` and its branch; of the tokens ``here`` at its end, if they are all that the branch has an output for."""
        y = branch(x if self.norm_after_sum else normed(self.norm, x, domain))
        if here is not None:
            x, domain = x[..., -here.num_tokens :, :], here
        y = y if self.branch_norm is None else normed(self.branch_norm, y, domain)
        y = self.dropout(y)
        y = y if self.scale is None else y * self.scale
        x = x + self.drop_path(y, domain)
        return normed(self.norm, x, domain) if self.norm_after_sum else x


class Cosine(nn.Module):
    """Queries or keys of length 1, so that scores are cosines; times a learned temperature for each head (Swin v2, arXiv:2111.09883).

        q' = sqrt(D) min(exp(t_h), 100) q / |q|,   k' = k / |k|

    so that the score, which is divided by sqrt(D), is cos(q, k) min(exp(t_h), 100). ``heads`` is None for keys.
    """

    def __init__(self, head_dim: int, heads: int | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.temperature = None if heads is None else nn.Parameter(torch.full((heads,), math.log(10.0)))

    def forward(
        self, x: Float[Tensor, "*batch heads tokens head_dim"]
    ) -> Float[Tensor, "*batch heads tokens head_dim"]:
        """Normalise."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # As F.normalize, whose backward takes more than twice the time.
        factor = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
        if self.temperature is not None:
            temperature = self.temperature.clamp(max=math.log(100.0)).exp()
            factor = factor * (math.sqrt(self.head_dim) * temperature).to(wide.dtype)[:, None, None]
        return (wide * factor).to(x.dtype)


class TokenNorm(nn.Module, ABC):
    """A norm whose statistics are over tokens, and that blocks therefore tell where these live: what does not exist must not count."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch dim"], domain: Domain | None = None) -> Float[Tensor, "*batch dim"]:
        """Normalise; in training by the tokens that exist."""


def normed(norm: nn.Module, x: Tensor, domain: Domain) -> Tensor:
    """``x`` through a norm of either kind: over the channels of each token, or over tokens."""
    return norm(x, domain) if isinstance(norm, TokenNorm) else norm(x)


def norm_factory(norm_layer: NormLayer, name: str = "norm_layer") -> Callable[[int], nn.Module]:
    """Return what makes a norm from a number of channels; ``name`` is the argument that it was given as."""
    if callable(norm_layer):
        return partial(made_by, name, norm_layer)
    if norm_layer not in ("layer", "rms"):
        raise ValueError(
            f"{name} must be 'layer', 'rms' or a callable that makes a module from dim; got {name}={norm_layer!r}"
        )
    return nn.LayerNorm if norm_layer == "layer" else nn.RMSNorm
