"""Sparse attention by one fused kernel for each pass, on CUDA: an online softmax of each row, long rows in pieces (FlashAttention's
recurrence, Dao et al. 2022, arXiv:2205.14135, over compressed rows).

The forward computes a row for each program, with its log-sum-exp. The backward computes the scores again, in one pass over the rows for the
queries' gradients and one over the columns for those of keys and values; what all heads or rows of the batch share (features, biases that
broadcast) takes another. Rows and columns of more than ``DIVIDED_ENTRIES`` entries are divided, and their parts added up in their order.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._merge import Gradients, Merged
from ._pattern import Pieces
from ._sparse_torch import Call, FeatureGradients, Made
from ._triton_arguments import Counts, Inputs, PerEntry, Planes, Ranges, Static, Upstream

# Triton comes with torch where there is a CUDA device.
AVAILABLE = find_spec("triton") is not None

# Numbers of a tile of entries x channels: for each warp, and at most.
WARP_NUMBERS, TILE_NUMBERS = 2**9, 2**11


def forward(call: Call) -> Made:
    """Output, log-sum-exp, and the sums of features."""
    from . import _triton_kernels as programs

    (batch, heads, tokens), like = call.query.shape[:3], call.query.new_empty((), dtype=call.wide)
    by_token = call.query.stride(1) < call.query.stride(2)  # then a model will want to merge the heads again
    out = like.new_empty(batch, *((tokens, heads) if by_token else (heads, tokens)), call.value.shape[-1])
    out, lse = out.transpose(1, 2) if by_token else out, like.new_empty(batch, heads, tokens)
    sums = None if call.features is None else like.new_empty(batch, heads, tokens, call.features.attr.shape[1])
    run = _Run(call, call.pattern.pieces, call.pattern.num_rows)
    parts = [run.parts(x, heads) for x in (out, lse[..., None], sums)]
    run(
        programs.forward, heads, out=_planes(out), lse=_planes(lse), sums=_planes(sums), out_part=_planes(parts[0]),
        lse_part=_planes(parts[1]), sums_part=_planes(parts[2]), col=call.pattern.col,
    )  # fmt: skip
    for x, part in ((out, parts[0]), (sums, parts[2])):
        if x is not None:
            run.combine(x, part, heads, call.pattern.num_queries, lse, parts[1])
    return Made(out, lse, sums, ())


def backward(
    call: Call, merged: Merged, into: Gradients, bias_grad: Tensor | None, wanted: FeatureGradients | None
) -> None:
    """Add every gradient, that of the entries' biases to ``bias_grad``."""
    from . import _triton_kernels as programs

    pattern, (batch, heads), kv_heads = call.pattern, call.query.shape[:2], call.key.shape[1]
    dq, dk, dv = (_Target(x) for x in into.buffers(call.query, call.key, call.value))
    du = None if wanted is None else _Target(wanted.query)
    up = Upstream(
        _planes(_by_rows(merged.grad)), _planes(merged.lse), _planes(merged.delta),
        None if wanted is None else _planes(_by_rows(wanted.sums)),
    )  # fmt: skip
    run = _Run(call, pattern.pieces, pattern.num_rows)
    all_own = bias_grad is not None and bias_grad.shape[:2] == (1 if pattern.rows is not None else batch, heads)
    parts = [run.parts(x, heads) for x in (dq.tensor, None if du is None else du.tensor)]
    run(
        programs.backward_queries, heads, up=up, dq=dq.planes, du=None if du is None else du.planes, dq_part=_planes(parts[0]),
        du_part=_planes(parts[1]), dbias=_per_entry(bias_grad if all_own else None), col=pattern.col,
    )  # fmt: skip
    for target, part in ((dq, parts[0]), (du, parts[1])):
        if target is not None:
            run.combine(target.tensor, part, heads, pattern.num_queries)
            target.finish()
    if bias_grad is not None and not all_own:
        run.entries(up, bias_grad.shape[0], bias_grad.shape[1], bias_grad, None)
    if wanted is not None and wanted.attr is not None:
        attr = _Target(wanted.attr)
        run.entries(up, 1, 1, None, attr.tensor)
        attr.finish()
    run = _Run(call, pattern.pieces_by_key, pattern.num_cols)
    parts = [run.parts(x.tensor, kv_heads) for x in (dk, dv)]
    run(
        programs.backward_keys, kv_heads, up=up, dk=dk.planes, dv=dv.planes, dk_part=_planes(parts[0]), dv_part=_planes(parts[1]),
        order=pattern.by_key[1], row=pattern.row_by_key,
    )  # fmt: skip
    for target, part in zip((dk, dv), parts, strict=True):
        run.combine(target.tensor, part, kv_heads, pattern.num_keys)
        target.finish()


class _Target:
    """A gradient that a program adds to; if its channels are not side by side, by way of a copy whose are."""

    def __init__(self, x: Tensor) -> None:
        self._original = x
        self.tensor = (
            x if x.stride(-1) == 1 or x.shape[-1] <= 1 else torch.zeros_like(x, memory_format=torch.contiguous_format)
        )

    @property
    def planes(self) -> Any:
        return _planes(self.tensor)

    def finish(self) -> None:
        if self.tensor is not self._original:
            self._original.add_(self.tensor)


class _Run:
    """Launches programs over the pieces of a pattern's rows, or of its columns, for all planes."""

    def __init__(self, call: Call, pieces: Pieces, num_runs: int) -> None:
        from . import _triton_kernels as programs

        self._call, self._pieces = call, pieces
        pattern, scores, wide = call.pattern, call.scores, call.wide
        heads, group = call.query.shape[1], call.query.shape[1] // max(call.key.shape[1], 1)
        query, key, value = (_by_rows(x) for x in (call.query, call.key, call.value))
        u, e = (None, None) if call.features is None else (_by_rows(x) for x in call.features)
        dims = query.shape[-1], value.shape[-1], 0 if e is None else e.shape[-1]
        blocks = _block(dims[0]), _block(dims[1]), _block(dims[2])
        self._rows = 1 if pattern.rows is not None else call.query.shape[0]
        self._dtype = programs.FLOAT64 if wide == torch.float64 else programs.FLOAT32
        step, warps = _tile(pattern.num_entries / max(num_runs, 1), max(blocks), wide.itemsize)
        self._ranges = Ranges(pieces.bounds, pieces.run, pieces.slot)
        self._arguments = {
            "x": Inputs(
                _planes(query), _planes(key), _planes(value), _planes(u), None if e is None else _planes(e[None, None]),
                scores.seed if scores.dropout_p else None,
            ),
            "bias": _per_entry(call.bias),
            "allowed": _per_entry(None if call.allowed is None else call.allowed.view(torch.uint8)),
            "counts": Counts(heads, group, pattern.num_queries, pattern.num_keys),
            "num_pieces": pieces.bounds.numel() - 1,
            "scale": float(scores.scale), "softcap": float(scores.softcap or 1),
            "dropped": int(scores.dropout_p * (1 << 24)), "factor": 1 / (1 - scores.dropout_p),
            "S": Static(
                *dims, *blocks, step, self._dtype, scores.softcap is not None, pattern.rows is not None, key.stride(1) < key.stride(2)
            ),
            "num_warps": warps,
        }  # fmt: skip

    def __call__(self, program: Any, heads: int, **arguments: Any) -> None:
        """One program for each piece, row of the batch and head."""
        self._launch(program, self._rows * heads, **arguments)

    def entries(self, up: Any, rows: int, heads: int, bias_grad: Tensor | None, attr: Tensor | None) -> None:
        """The pass for what entries have for each of ``rows`` rows of the batch and ``heads`` heads, which others share."""
        from . import _triton_kernels as programs

        self._launch(
            programs.backward_entries, rows * heads, up=up, dbias=_per_entry(bias_grad),
            de=None if attr is None else _planes(attr[None, None]), col=self._call.pattern.col,
            outer_heads=heads, inner_rows=self._rows // rows, inner_heads=self._call.query.shape[1] // heads,
        )  # fmt: skip

    def _launch(self, program: Any, planes: int, **arguments: Any) -> None:
        count = (self._pieces.bounds.numel() - 1) * planes
        if count:
            with torch.cuda.device_of(self._call.query):  # Triton launches on the current device
                program[(count,)](**self._arguments, ranges=self._ranges, **arguments)

    def parts(self, x: Tensor | None, heads: int) -> Tensor | None:
        """Where the pieces of divided runs leave what belongs into ``x``."""
        if x is None or not self._pieces.num_slots:
            return None
        return x.new_empty(self._rows, heads, self._pieces.num_slots, x.shape[-1])

    def combine(
        self,
        x: Tensor,
        parts: Tensor | None,
        heads: int,
        tokens: int,
        lse: Tensor | None = None,
        parts_lse: Tensor | None = None,
    ) -> None:
        """Add the parts of each run up to the whole."""
        from . import _triton_kernels as programs

        divided, dim = self._pieces.divided, x.shape[-1]
        if parts is None or divided is None or not divided.numel() * parts.shape[0] * heads:
            return
        block = _block(dim)
        with torch.cuda.device_of(x):
            programs.combine[(divided.numel() * self._rows * heads,)](
                _planes(parts), _planes(parts_lse), divided, self._pieces.slots, _planes(x), _planes(lse), divided.numel(), heads,
                tokens, D=dim, BLOCK_D=block, BLOCK_P=_tile(16, block, x.itemsize)[0], ACC=self._dtype,
                OWN=self._call.pattern.rows is not None, num_warps=1,
            )  # fmt: skip


def _by_rows(x: Tensor) -> Tensor:
    """``x`` with the channels of a token side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _planes(x: Tensor | None) -> Any:  # None for None
    return None if x is None else Planes(x, *x.stride()[:3])


def _per_entry(x: Tensor | None) -> Any:
    if x is None:
        return None
    return PerEntry(x, *(0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1)))


def _block(dim: int) -> int:
    return _power_of_two(max(dim, 2))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(entries: float, block: int, itemsize: int) -> tuple[int, int]:
    """Entries that are taken at a time where a run has so many, and warps, for vectors of up to ``block`` numbers."""
    most = max(TILE_NUMBERS * 4 // itemsize // block, 2)
    step = min(_power_of_two(max(int(entries), 4)), 32, most)
    return step, min(max(step * block * itemsize // (4 * WARP_NUMBERS), 1), 8)
