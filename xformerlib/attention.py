"""The operation, ``attention``, and the layer around it, ``Attention``."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import kernels
from ._arguments import Count, Positive, Rate, Size, as_tensor, check_device, checked, made_by
from ._autograd import constants, is_compiling, is_jit_tracing, is_leaving, no_autocast
from ._cache import Cache
from ._compiled import Inputs, run_in_graph
from ._inputs import (
    BiasLike,
    are_pointwise,
    bias_kind,
    bias_terms,
    check_heads,
    check_inputs,
    check_is_position,
    check_last,
    check_mask,
    check_position,
    place,
    resolve_domains,
)
from ._options import QKNorm
from ._planned import bound_biases, check_extent, planned, scores_of, without_padding
from ._portable import run_portably, shape_of
from ._projection import check_dtype, columns_of, dtype_of
from ._recorded import Recorded
from ._sublayers import Cosine, NormLayer, norm_factory
from .domains import Domain
from .kernels import Plan, Problem
from .kernels._chunked import rows_per_block
from .kernels._scores import probabilities
from .masks import Full, Mask
from .positions import Bias, Position, Rotation


def attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    mask: Mask | None = None,
    bias: BiasLike | SequenceOf[BiasLike] | None = None,
    domain: Domain | None = None,
    key_domain: Domain | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) under a mask and biases, over a domain.

        s_ij = c tanh(scale q_i . k_j / c) + bias_ij          (the soft cap c only if given: Gemma 2, arXiv:2408.00118)
        o_i  = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij)),   j over the keys that i may attend to

    A query that may see nothing gets exactly 0 and no gradient. Keys and values that nobody may see do not reach the output, even if
    they are NaN.

    Args:
        query, key, value: query head h uses key head ``h // (heads // kv_heads)`` (grouped queries: Ainslie et al. 2023,
            arXiv:2305.13245).
        mask: who may attend to whom; everybody to everybody if not given.
        bias: added to the scores: a ``positions.Bias``, a tensor that broadcasts to ``(B, H, Tq, Tk)``, or several of these.
        domain, key_domain: where queries and keys live; ``Sequence(T)`` if not given, and the keys where the queries do.
        scale: factor of the dot products; ``1 / sqrt(dim)`` if not given. A tensor of one number may be learned.
        dropout_p: probability with which each attention weight is dropped.
        softcap: c above, > 0.
        sinks: one logit per head that takes a share of each softmax without having a value (arXiv:2309.17453).
        kernel: ``"auto"``, or the name of a kernel, which is then used or refused, never replaced.

    Raises:
        ValueError, TypeError: inputs that do not fit each other, the domains or the kernel; a mask or bias that relates places where
            Tq != Tk and no domains say which places those are.

    Example:
        >>> q = torch.randn(1, 4, 10, 8)
        >>> kv = torch.randn(1, 2, 10, 8)
        >>> attention(q, kv, kv, mask=masks.Causal() & masks.Local(3)).shape
        torch.Size([1, 4, 10, 8])
    """
    check_inputs(query, key, value, sinks, dropout_p, softcap, scale)
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be 'auto' or the name of a kernel; got kernel={kernel!r}")
    kernel = kernels.kernel_in_use(kernel)
    mask = Full() if mask is None else check_mask(mask)
    terms = bias_terms(bias)
    domain, key_domain = resolve_domains(query, key, mask, terms, domain, key_domain)
    batch, heads, kv_heads, head_dim, value_dim = _sizes(query, key, value)
    problem = Problem(
        mask=mask, domain=domain, keys=key_domain, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        value_dim=value_dim, dtype=query.dtype, device=query.device.type,
        bias=bias_kind(terms, domain, key_domain),
        pointwise_bias=are_pointwise(terms, domain), dropout_p=dropout_p, softcap=softcap is not None, sinks=sinks is not None,
    )  # fmt: skip
    check_extent(problem)
    if query.is_meta:
        return shape_of(problem, kernel, query, key, value)
    leaving = is_leaving(query)
    plan = None if leaving or is_compiling() else planned(problem, kernel, query.device)
    biases = bound_biases(problem, terms, query.device)
    if isinstance(scale, Tensor):
        query, scale = query * scale.reshape(()).to(query.dtype), 1.0
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    seed = torch.randint(1 << 31, (), device=query.device) if dropout_p else None
    inputs = Inputs(*without_padding(problem, query, key, value), sinks)
    if plan is None and not leaving:
        return run_in_graph(problem, kernel, terms, biases, inputs, scale, softcap, seed)
    with no_autocast(query.device):
        if plan is None:
            return run_portably(problem, kernel, scores_of(problem, None, biases, scale, softcap, seed), inputs)
        return plan.run(problem, scores_of(problem, plan.predicate, biases, scale, softcap, seed), *inputs)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int]:
    """Batch, heads, key heads, and channels of keys and values; numbers also where ``torch.jit.trace`` makes tensors of sizes."""
    if is_jit_tracing():
        with constants():
            return query.shape[0], query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    return query.shape[0], query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]


@checked
def plan(
    mask: Mask | None,
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    batch: Count = 1,
    heads: Size = 1,
    kv_heads: Size | None = None,
    head_dim: Size = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: BiasLike | SequenceOf[BiasLike] | None = None,
    dropout_p: Rate = 0.0,
    softcap: Positive | None = None,
    sinks: bool = False,
    kernel: str = "auto",
) -> Plan:
    """How ``attention`` would compute a mask over a domain, without computing it: the kernel, why each faster one was refused, the cost.

    Example:
        >>> print(plan(masks.Causal(), Sequence(4096), heads=8))  # doctest: +ELLIPSIS
        kernel     sdpa
        ...
    """
    kernel = kernels.kernel_in_use(kernel)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, that of queries; got dtype={dtype}")
    if heads % (kv_heads or heads):
        raise ValueError(f"heads must be divisible by kv_heads; got heads={heads} and kv_heads={kv_heads}")
    mask = Full() if mask is None else check_mask(mask)
    key_domain = domain if key_domain is None else key_domain
    mask.bind(domain, key_domain)  # says what is not defined
    problem = Problem(
        mask=mask, domain=domain, keys=key_domain, batch=domain.batch_size or batch, heads=heads, kv_heads=kv_heads or heads,
        head_dim=head_dim, value_dim=head_dim, dtype=dtype, device=check_device(device).type, bias=bias_kind(bias_terms(bias)),
        pointwise_bias=are_pointwise(bias_terms(bias), domain), dropout_p=dropout_p, softcap=softcap is not None, sinks=sinks,
    )  # fmt: skip
    return planned(problem, kernel, torch.device(device))


class Attention(Recorded):
    """Multi-head attention over a domain, as a layer.

        q, k, v = split(x W_qkv + b);  o = attention(q, k, v);  y = (o * sigmoid(x W_g)) W_o + b   (the gate only with ``gate=True``)

    Args:
        dim: channels of input and output.
        heads: query heads; ``dim`` must be divisible by it unless ``head_dim`` is given.
        kv_heads: key and value heads, a divisor of ``heads``; ``heads`` if not given.
        head_dim: channels of one head; ``dim // heads`` if not given.
        mask: who may attend to whom; everybody to everybody if not given.
        position: rotations and score biases, combined with ``+``. Embeddings are added once, by the model.
        qk_norm: ``"rms"`` or ``"layer"`` normalises queries and keys per head (arXiv:2010.04245, arXiv:2302.05442); ``"cosine"`` makes
            each score a cosine times a learned temperature per head, at most 100 (Swin v2, arXiv:2111.09883); or a callable that makes a
            module from ``head_dim``.
        out_norm: ``"layer"``, ``"rms"`` or a callable that makes a module: a norm of the merged heads, before the output projection
            (sub-LN, arXiv:2210.06423).
        qkv_bias, out_bias: biases of the projections.
        gate: scales each channel of the heads by a sigmoid of the input (gated attention, arXiv:2505.06708).
        sinks: one learned logit per head that takes a share of each softmax (arXiv:2309.17453, as in gpt-oss).
        softcap: soft cap of the scores.
        dropout: of attention weights, in training.
        kernel: as in ``attention``.

    Example:
        >>> layer = Attention(64, 4, kv_heads=2, mask=masks.Local(2), position=positions.Rotary(16))
        >>> layer(torch.randn(2, 49, 64), Grid(7, 7)).shape
        torch.Size([2, 49, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        position: Position | None = None,
        qk_norm: QKNorm | None = None,
        out_norm: NormLayer | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        gate: bool = False,
        sinks: bool = False,
        softcap: Positive | None = None,
        dropout: Rate = 0.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.kv_heads = dim, heads, heads if kv_heads is None else kv_heads
        check_heads(dim, heads, self.kv_heads, head_dim)
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.mask = None if mask is None else check_mask(mask)
        check_position(position, self.heads, self.head_dim)
        self.position = position
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=qkv_bias)
        self.query_norm, self.key_norm = (_qk_norm(qk_norm, self.head_dim, count) for count in (heads, None))
        self.out_norm = (
            nn.Identity() if out_norm is None else norm_factory(out_norm, "out_norm")(self.heads * self.head_dim)
        )
        self.gate = nn.Linear(dim, self.heads * self.head_dim) if gate else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sinks else None
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=out_bias)
        if kernel != "auto" and kernel not in kernels.KERNELS:
            raise ValueError(
                f"kernel must be 'auto' or one of {', '.join(map(repr, kernels.KERNELS))}; got kernel={kernel!r}"
            )
        self.softcap, self.dropout, self.kernel = softcap, dropout, kernel

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        domain: Domain | None = None,
        context: Float[Tensor, "*batch keys dim"] | None = None,
        context_domain: Domain | None = None,
        mask: Mask | None = None,
        position: Position | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "*batch last dim"]:
        """Attend from ``x`` to itself, or to ``context``.

        Args:
            x: ``(B, T, C)``, or ``(N, C)`` for packed domains and single items.
            domain: where the tokens live; ``Sequence(T)`` if not given.
            context, context_domain: other tokens to take keys and values from, and where they live.
            mask: further restricts the layer's own mask, for this call. With a cache, what it says of each key (``Keys``) it says of all
                tokens so far.
            position: adds rotations and biases to the layer's own, for this call (a model that shares one position among its layers);
                embeddings in it are the model's to add.
            cache: keys and values of earlier tokens of the same sequence, which this call extends; of the context in cross attention,
                which need then be given only at the first call.
            last: attend from only so many tokens at the end of ``x``, to all as before; the output is theirs. For sequences and timelines.
        """
        q, key, value, domain, keys = self._project(x, domain, context, context_domain, position, cache, last)
        x = x if last is None else x[..., -last:, :]
        if mask is not None and cache is not None and (gone := cache.forgotten(self)):
            mask = check_mask(mask).without_keys(gone)
        heads = attention(
            q, key, value, mask=self._mask(mask), bias=self._biases(position), domain=domain, key_domain=keys,
            dropout_p=self.dropout if self.training else 0.0, softcap=self.softcap, sinks=self.sinks, kernel=self.kernel,
        )  # fmt: skip
        by_token = heads.transpose(1, 2)
        if is_leaving(x):  # the strides of a trace are not those of the graph in which exporters decompose operations
            by_token = by_token.clone(memory_format=torch.contiguous_format)
        merged = by_token.flatten(2)
        merged = merged if x.ndim == 3 else merged[0]
        if self.gate is not None:
            merged = merged * torch.sigmoid(self.gate(domain.zero_padding(x)))
        merged = self.out_norm(merged)
        return domain.zero_padding(self.out(merged))

    @torch.no_grad()
    def weights(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        domain: Domain | None = None,
        rows: Int[Tensor, " rows"] | SequenceOf[int] | None = None,
        *,
        context: Float[Tensor, "*batch keys dim"] | None = None,
        context_domain: Domain | None = None,
        mask: Mask | None = None,
        position: Position | None = None,
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The attention weights of the queries ``rows`` (all if not given), whatever kernel computes the output.

        Each row sums to 1, to less where sinks take a share, and to 0 where a query sees nothing. Computed block by block of rows, so
        that beside the result no Tq x Tk tensor is held.
        """
        q, key, _, domain, keys = self._project(x, domain, context, context_domain, position, None)
        own = self._mask(mask)
        full = Full() if own is None else own
        terms = bias_terms(self._biases(position))
        domain, keys = resolve_domains(q, key, full, terms, domain, keys)
        problem = Problem(
            full, domain, keys, len(q), self.heads, self.kv_heads, self.head_dim, self.head_dim, q.dtype, q.device.type
        )
        predicate = None if problem.is_full else full.bind(domain, keys)
        check_extent(problem)
        biases = bound_biases(problem, terms, q.device)
        scores = scores_of(problem, predicate, biases, 1 / math.sqrt(self.head_dim), self.softcap, None)
        index = (
            torch.arange(q.shape[2], device=q.device)
            if rows is None
            else as_tensor("rows", rows, "a list of indices").to(q.device)
        )
        index = index if index.numel() else index.long()
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows must be a vector of integers; got {index.dtype} of shape {tuple(index.shape)}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < q.shape[2]):
            raise ValueError(f"rows must index the {q.shape[2]} queries; got {index.tolist()}")
        blocks = [
            probabilities(q.index_select(2, rows), key, scores, rows, self.sinks)
            for rows in index.split(rows_per_block(problem))
        ]
        return torch.cat(blocks, 2) if blocks else q.new_zeros(*q.shape[:2], 0, key.shape[2])

    def _plan(
        self,
        domain: Domain,
        keys: Domain | None = None,
        mask: Mask | None = None,
        position: Position | None = None,
        **call: Any,
    ) -> Plan:
        """The plan of the layer's attention for a ``call`` (batch, dtype, device)."""
        return plan(
            self._mask(mask), domain, keys, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            bias=self._biases(position) or None, dropout_p=self.dropout if self.training else 0.0, softcap=self.softcap,
            sinks=self.sinks is not None, kernel=self.kernel, **{"dtype": dtype_of(self), **call},
        )  # fmt: skip

    def _project(
        self,
        x: Tensor,
        domain: Domain | None,
        context: Tensor | None,
        context_domain: Domain | None,
        position: Position | None,
        cache: Cache | None,
        last: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Domain, Domain]:
        """Queries, keys and values by head, normalised, rotated and joined with cached ones, and where they live."""
        domain = place("x", x, self.dim, domain)
        check_is_position(position)
        check_dtype("x", x, self.qkv)
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"cache must be an xformerlib.Cache(); got {type(cache).__name__}")
        cross = context is not None or (cache is not None and cache.holds_context(self))
        if context_domain is not None and context is None:
            raise ValueError("context_domain says where context lives, but no context came; give context too")
        own = self.heads * self.head_dim
        queries = domain if last is None else check_last(last, domain)
        asked = x if last is None else x[..., -last:, :]
        if not cross:
            q, key, value = self._own(domain.zero_padding(x), own, asked)
            q, key = _normed(self.query_norm, q), _normed(self.key_norm, key)
            for rotation in self._rotations(position):
                q, key = rotation.rotate(q, key, queries, domain)
            if cache is None:
                return q, key, value, queries, domain
            # Not the mask of this call alone: later calls may look back further.
            lookback = None if self.mask is None else self.mask.lookback()
            key, value, domain, keys = cache.extend(self, key, value, domain, lookback)
            return q, key, value, domain if last is None else domain.last(last), keys
        domain = queries
        q = _normed(self.query_norm, self._heads(columns_of(self.qkv, domain.zero_padding(asked), 0, own)))
        if context is None:
            assert cache is not None
            key, value, keys = cache.context(self)
        else:
            keys = place("context", context, self.dim, context_domain)
            check_dtype("context", context, self.qkv)
            key, value = (
                self._heads(part) for part in columns_of(self.qkv, keys.zero_padding(context), own, None).chunk(2, -1)
            )
            key = _normed(self.key_norm, key)
            if cache is not None:
                cache.keep_context(self, key, value, keys)
        for rotation in self._rotations(position):
            q, key = rotation.rotate(q, key, domain, keys)
        return q, key, value, domain, keys

    def _own(self, x: Tensor, own: int, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of ``x``, and queries of the tokens at its end that are ``asked`` for."""
        other = self.kv_heads * self.head_dim
        if asked.shape == x.shape:
            q, key, value = self.qkv(x).split([own, other, other], -1)
        else:
            q = columns_of(self.qkv, asked, 0, own)
            key, value = columns_of(self.qkv, x, own, None).split([other, other], -1)
        return self._heads(q), self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H * D) or (T, H * D) to (B, H, T, D)."""
        x = x if x.ndim == 3 else x[None]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _mask(self, mask: Mask | None) -> Mask | None:
        return self.mask if mask is None else check_mask(mask) if self.mask is None else self.mask & mask

    def _rotations(self, position: Position | None) -> list[Rotation]:
        return [rotation for own in (self.position, position) if own is not None for rotation in own.rotations]

    def _biases(self, position: Position | None) -> list[Bias]:
        return [bias for own in (self.position, position) if own is not None for bias in own.biases]

    def extra_repr(self) -> str:
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}, kv_heads={self.kv_heads}"
        return f"{self.dim}, {heads}, mask={self.mask!r}, kernel={self.kernel!r}"


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalised in the precision of the norm's parameters, under autocast too."""
    parameter = next(norm.parameters(), None)
    return norm(x) if parameter is None else norm(x.to(parameter.dtype)).to(x.dtype)


def _qk_norm(kind: QKNorm | None, head_dim: int, heads: int | None) -> nn.Module:
    if kind is None:
        return nn.Identity()
    if callable(kind):
        made: nn.Module = made_by("qk_norm", kind, head_dim)
        return made
    if kind == "cosine":
        return Cosine(head_dim, heads)
    if kind not in ("rms", "layer"):
        raise ValueError(
            f"qk_norm must be None, 'rms', 'layer', 'cosine' or a callable that makes a module from head_dim; got qk_norm={kind!r}"
        )
    return nn.RMSNorm(head_dim, eps=1e-6) if kind == "rms" else nn.LayerNorm(head_dim, eps=1e-6)
