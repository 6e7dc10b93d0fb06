"""The programs of sparse attention on CUDA. Importing this imports Triton, which torch brings along where there is a CUDA device.

A program computes one piece of one row (or column) of the pattern for one head, a few entries at a time: a tile of entries x channels is
gathered, reduced, and never stored. Each result has one program that writes it, or pieces that another adds up in order, so there are no
atomics and results are the same bit by bit.
"""

# Triton reads annotations as objects: no postponed evaluation here.

import triton
import triton.language as tl

FLOAT32, FLOAT64 = tl.float32, tl.float64


@triton.jit
def _place(num_pieces, heads, HEADS_FIRST: tl.constexpr):
    """Piece, row of the batch and head of this program; neighbouring programs read what lies close."""
    pid = tl.program_id(0).to(tl.int64)
    if HEADS_FIRST:
        piece, h = pid // heads % num_pieces, pid % heads
    else:
        piece, h = pid % num_pieces, pid // num_pieces % heads
    return piece, pid // num_pieces // heads, h


@triton.jit
def _piece(ranges, piece):
    """First entry, last entry, run and slot of a piece."""
    first, last = tl.load(ranges.bounds + piece), tl.load(ranges.bounds + piece + 1)
    item = piece
    slot = piece * 0 - 1
    if ranges.item is not None:
        item = tl.load(ranges.item + piece).to(tl.int64)
        slot = tl.load(ranges.slot + piece).to(tl.int64)
    return first, last, item, slot


@triton.jit
def _token(item, b, count, OWN: tl.constexpr):
    """Row of the batch and token of a run; where rows have entries of their own, their runs are numbered through."""
    if OWN:
        return item // count, item % count
    else:
        return b, item


@triton.jit
def _number(x, b, h, t, inside):
    """Numbers of tokens ``t``."""
    return tl.load(x.ptr + b * x.b + h * x.h + t * x.t, mask=inside, other=0)


@triton.jit
def _vector(x, b, h, t, D: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The vector of one token, ``(1, BLOCK)``."""
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(x.ptr + b * x.b + h * x.h + t * x.t + d, mask=d < D, other=0).to(ACC)


@triton.jit
def _vectors(x, b, h, t, inside, D: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The vectors of tokens ``t``, ``(len(t), BLOCK)``; 0 outside."""
    d = tl.arange(0, BLOCK)[None, :]
    at = x.ptr + b * x.b + h * x.h + (t * x.t)[:, None] + d
    return tl.load(at, mask=inside[:, None] & (d < D), other=0).to(ACC)


@triton.jit
def _store(x, b, h, t, vector, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Store the vector of one token, or add to it."""
    d = tl.arange(0, BLOCK)
    at = x.ptr + b * x.b + h * x.h + t * x.t + d
    if ADD:
        vector += tl.load(at, mask=d < D, other=0)
    tl.store(at, vector, mask=d < D)


@triton.jit
def _store_piece(
    x, part, b, h, t, plane, slot, vector, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Store the vector of a whole run at its token (or add to it), or that of a piece among the parts."""
    if part is None:
        _store(x, b, h, t, vector, D, BLOCK, ADD)
    else:
        if slot < 0:
            _store(x, b, h, t, vector, D, BLOCK, ADD)
        else:
            _store(part, plane, h, slot, vector, D, BLOCK, False)


@triton.jit
def _store_number(x, part, b, h, t, plane, slot, number):
    """``_store_piece`` for a number."""
    at = x.ptr + b * x.b + h * x.h + t * x.t
    if part is not None:
        at = tl.where(slot < 0, at, part.ptr + plane * part.b + h * part.h + slot * part.t)
    tl.store(at, number)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(seed, b, h, q, k, dropped, factor, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """What dropout multiplies weights by; which ones it keeps is the hash of ``Scores.kept``."""
    keep = tl.full((BLOCK,), 1.0, ACC)
    if seed is not None:
        x = _mixed(tl.load(seed).to(tl.uint32) ^ b.to(tl.uint32))
        x = _mixed(x ^ h.to(tl.uint32))
        x = _mixed(x ^ q.to(tl.uint32))
        x = _mixed(x ^ k.to(tl.uint32))
        keep = tl.where((x & 0xFFFFFF).to(tl.int32) >= dropped, tl.full((), factor, ACC), 0.0)
    return keep


@triton.jit
def _allowed(allowed, b, h, entry, inside):
    if allowed is not None:
        inside = inside & (tl.load(allowed.ptr + b * allowed.b + h * allowed.h + entry, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _tanh(x, ACC: tl.constexpr):
    e = tl.exp(-2 * tl.abs(x))
    result = (1 - e) / (1 + e)
    result = tl.where(x < 0, -result, result)
    if tl.float32 == ACC:  # the difference above cancels for small x, where a few terms of the series are exact
        y = x * x
        series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        result = tl.where(tl.abs(x) < 0.3, series, result)
    return result


@triton.jit
def _zeros(BLOCK: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros((BLOCK,), ACC)  # Triton 3.6 takes for a shape what is an argument, not what is of a tuple


@triton.jit
def _keys(x, col, b, h, entry, inside, counts, S: tl.constexpr):
    """Token, key, value and features (0 where there are none) of a query's entries."""
    t = tl.load(col + entry, mask=inside, other=0).to(tl.int64)
    if S.OWN:
        t -= b * counts.keys
    k = _vectors(x.key, b, h // counts.group, t, inside, S.D, S.BLOCK_D, S.ACC)
    v = _vectors(x.value, b, h // counts.group, t, inside, S.DV, S.BLOCK_DV, S.ACC)
    e = 0.0
    if S.F > 0:
        e = _vectors(x.e, 0, 0, entry, inside, S.F, S.BLOCK_F, S.ACC)
    return t, k, v, e


@triton.jit
def _query(x, up, b, h, t, S: tl.constexpr):
    """Query, feature query, what came for output and sums of features, log-sum-exp and delta of one token."""
    q, g = _vector(x.query, b, h, t, S.D, S.BLOCK_D, S.ACC), _vector(up.grad, b, h, t, S.DV, S.BLOCK_DV, S.ACC)
    u, f = 0.0, 0.0
    if S.F > 0:
        u, f = _vector(x.u, b, h, t, S.F, S.BLOCK_F, S.ACC), _vector(up.sums, b, h, t, S.F, S.BLOCK_F, S.ACC)
    return q, u, g, f, _number(up.lse, b, h, t, True), _number(up.delta, b, h, t, True)


@triton.jit
def _queries(x, up, b, h, t, inside, S: tl.constexpr):
    """``_query`` of each of some tokens."""
    q = _vectors(x.query, b, h, t, inside, S.D, S.BLOCK_D, S.ACC)
    g = _vectors(up.grad, b, h, t, inside, S.DV, S.BLOCK_DV, S.ACC)
    u, f = 0.0, 0.0
    if S.F > 0:
        u = _vectors(x.u, b, h, t, inside, S.F, S.BLOCK_F, S.ACC)
        f = _vectors(up.sums, b, h, t, inside, S.F, S.BLOCK_F, S.ACC)
    return q, u, g, f, _number(up.lse, b, h, t, inside), _number(up.delta, b, h, t, inside)


@triton.jit
def _products(a, b, u, e, S: tl.constexpr):
    """``a . b``, and ``u . e`` where there are features."""
    products = tl.sum(a * b, 1)
    if S.F > 0:
        products += tl.sum(u * e, 1)
    return products


@triton.jit
def _scored(q, k, u, e, bias, b, h, entry, inside, scale, softcap, S: tl.constexpr):
    """Scores of entries, minus infinity where one does not count, and the tanh of the soft cap."""
    s = _products(q, k, u, e, S) * tl.full((), scale, S.ACC)
    tanh = s
    if S.CAPPED:
        cap = tl.full((), softcap, S.ACC)
        tanh = _tanh(s / cap, S.ACC)
        s = cap * tanh
    if bias is not None:
        s += tl.load(bias.ptr + b * bias.b + h * bias.h + entry, mask=inside, other=0).to(S.ACC)
    return tl.where(inside, s, float("-inf")), tanh


@triton.jit
def _slopes(
    q, u, g, f, lse, delta, k, v, e, bias, seed, b, h, q_token, k_token, entry, inside, scale, softcap, dropped, factor,
    S: tl.constexpr,
):  # fmt: skip
    """Weight after dropout, and the derivatives by the score after and before the soft cap, of entries."""
    s, tanh = _scored(q, k, u, e, bias, b, h, entry, inside, scale, softcap, S)
    keep = _keep(seed, b, h, q_token, k_token, dropped, factor, S.BLOCK_E, S.ACC)
    p = tl.where(inside, tl.exp(s - lse), 0.0)
    after = tl.where(inside, p * (_products(g, v, f, e, S) * keep - delta), 0.0)
    before = after
    if S.CAPPED:
        before = tl.where(inside, after * (1 - tanh * tanh), 0.0)
    return p * keep, after, before


@triton.jit
def forward(
    x, bias, allowed, out, lse, sums, out_part, lse_part, sums_part, ranges, col, num_pieces, counts,
    scale: tl.float64, softcap: tl.float64, dropped, factor: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and sums of features of one piece of a query's entries, by an online softmax."""
    piece, plane, h = _place(num_pieces, counts.heads, S.HEADS_FIRST)
    first, last, item, slot = _piece(ranges, piece)
    b, t = _token(item, plane, counts.queries, S.OWN)
    q = _vector(x.query, b, h, t, S.D, S.BLOCK_D, S.ACC)
    u = 0.0
    if S.F > 0:
        u = _vector(x.u, b, h, t, S.F, S.BLOCK_F, S.ACC)
    top, total, acc = tl.full((), float("-inf"), S.ACC), tl.full((), 0.0, S.ACC), _zeros(S.BLOCK_DV, S.ACC)
    f_acc = _zeros(S.BLOCK_F, S.ACC)
    for start in range(first, last, S.BLOCK_E):
        entry = start + tl.arange(0, S.BLOCK_E).to(tl.int64)
        inside = _allowed(allowed, b, h, entry, entry < last)
        k_token, k, v, e = _keys(x, col, b, h, entry, inside, counts, S)
        s, _ = _scored(q, k, u, e, bias, b, h, entry, inside, scale, softcap, S)
        new = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p, shrink = tl.exp(s - safe), tl.exp(top - safe)
        top, total = new, total * shrink + tl.sum(p, 0)
        p *= _keep(x.seed, b, h, t, k_token, dropped, factor, S.BLOCK_E, S.ACC)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        if S.F > 0:
            f_acc = f_acc * shrink + tl.sum(p[:, None] * e, 0)
    share = 1 / tl.maximum(total, 1.0)  # less than 1 only where nothing counts
    _store_piece(out, out_part, b, h, t, plane, slot, acc * share, S.DV, S.BLOCK_DV, False)
    _store_number(lse, lse_part, b, h, t, plane, slot, top + tl.log(tl.maximum(total, 1.0)))
    if S.F > 0:
        _store_piece(sums, sums_part, b, h, t, plane, slot, f_acc * share, S.F, S.BLOCK_F, False)


@triton.jit
def backward_queries(
    x, bias, allowed, up, dq, du, dq_part, du_part, dbias, ranges, col, num_pieces, counts,
    scale: tl.float64, softcap: tl.float64, dropped, factor: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Gradients of one query (and its feature query), and of biases that each row of the batch and head has for itself."""
    piece, plane, h = _place(num_pieces, counts.heads, S.HEADS_FIRST)
    first, last, item, slot = _piece(ranges, piece)
    b, t = _token(item, plane, counts.queries, S.OWN)
    q, u, g, f, lse, delta = _query(x, up, b, h, t, S)
    acc, f_acc = _zeros(S.BLOCK_D, S.ACC), _zeros(S.BLOCK_F, S.ACC)
    for start in range(first, last, S.BLOCK_E):
        entry = start + tl.arange(0, S.BLOCK_E).to(tl.int64)
        inside = _allowed(allowed, b, h, entry, entry < last)
        k_token, k, v, e = _keys(x, col, b, h, entry, inside, counts, S)
        _, after, before = _slopes(
            q, u, g, f, lse, delta, k, v, e, bias, x.seed, b, h, t, k_token, entry, inside, scale, softcap, dropped, factor, S
        )  # fmt: skip
        if dbias is not None:
            at = dbias.ptr + b * dbias.b + h * dbias.h + entry
            tl.store(at, tl.load(at, mask=inside, other=0) + after, mask=inside)
        acc += tl.sum(before[:, None] * k, 0)
        if S.F > 0:
            f_acc += tl.sum(before[:, None] * e, 0)
    _store_piece(dq, dq_part, b, h, t, plane, slot, acc * tl.full((), scale, S.ACC), S.D, S.BLOCK_D, True)
    if S.F > 0:
        _store_piece(du, du_part, b, h, t, plane, slot, f_acc * tl.full((), scale, S.ACC), S.F, S.BLOCK_F, True)


@triton.jit
def backward_keys(
    x, bias, allowed, up, dk, dv, dk_part, dv_part, ranges, order, row, num_pieces, counts,
    scale: tl.float64, softcap: tl.float64, dropped, factor: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Gradients of one key and value, summed over the query heads that they serve; ``order`` and ``row`` are sorted by key."""
    piece, plane, kv = _place(num_pieces, counts.heads // counts.group, S.HEADS_FIRST)
    first, last, item, slot = _piece(ranges, piece)
    b, t = _token(item, plane, counts.keys, S.OWN)
    k, v = _vector(x.key, b, kv, t, S.D, S.BLOCK_D, S.ACC), _vector(x.value, b, kv, t, S.DV, S.BLOCK_DV, S.ACC)
    k_acc, v_acc = _zeros(S.BLOCK_D, S.ACC), _zeros(S.BLOCK_DV, S.ACC)
    for member in range(counts.group):
        h = kv * counts.group + member
        for start in range(first, last, S.BLOCK_E):
            at = start + tl.arange(0, S.BLOCK_E).to(tl.int64)
            entry = tl.load(order + at, mask=at < last, other=0).to(tl.int64)
            inside = _allowed(allowed, b, h, entry, at < last)
            q_token = tl.load(row + at, mask=inside, other=0).to(tl.int64)
            if S.OWN:
                q_token = tl.where(inside, q_token - b * counts.queries, 0)
            q, u, g, f, lse, delta = _queries(x, up, b, h, q_token, inside, S)
            e = 0.0
            if S.F > 0:
                e = _vectors(x.e, 0, 0, entry, inside, S.F, S.BLOCK_F, S.ACC)
            weight, _, before = _slopes(
                q, u, g, f, lse, delta, k, v, e, bias, x.seed, b, h, q_token, t, entry, inside, scale, softcap, dropped, factor, S
            )  # fmt: skip
            k_acc += tl.sum(before[:, None] * q, 0)
            v_acc += tl.sum(weight[:, None] * g, 0)
    _store_piece(dk, dk_part, b, kv, t, plane, slot, k_acc * tl.full((), scale, S.ACC), S.D, S.BLOCK_D, True)
    _store_piece(dv, dv_part, b, kv, t, plane, slot, v_acc, S.DV, S.BLOCK_DV, True)


@triton.jit
def backward_entries(
    x, bias, allowed, up, de, dbias, ranges, col, num_pieces, outer_heads, inner_rows, inner_heads, counts,
    scale: tl.float64, softcap: tl.float64, dropped, factor: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Gradients of what entries share among ``inner_rows`` rows of the batch and ``inner_heads`` heads: features, biases."""
    piece, outer_row, outer_head = _place(num_pieces, outer_heads, S.HEADS_FIRST)
    first, last, item, _ = _piece(ranges, piece)
    for start in range(first, last, S.BLOCK_E):
        entry = start + tl.arange(0, S.BLOCK_E).to(tl.int64)
        present = entry < last
        acc, f_acc = _zeros(S.BLOCK_E, S.ACC), _zeros(S.BLOCK_E, S.ACC)[:, None] + _zeros(S.BLOCK_F, S.ACC)[None, :]
        for inner in range(inner_rows * inner_heads):
            b, t = _token(item, outer_row * inner_rows + inner // inner_heads, counts.queries, S.OWN)
            h = outer_head * inner_heads + inner % inner_heads
            inside = _allowed(allowed, b, h, entry, present)
            q, u, g, f, lse, delta = _query(x, up, b, h, t, S)
            k_token, k, v, e = _keys(x, col, b, h, entry, inside, counts, S)
            weight, after, before = _slopes(
                q, u, g, f, lse, delta, k, v, e, bias, x.seed, b, h, t, k_token, entry, inside, scale, softcap, dropped, factor, S
            )  # fmt: skip
            acc += after
            if S.F > 0:
                more = (before * tl.full((), scale, S.ACC))[:, None] * u + weight[:, None] * f
                f_acc += tl.where(inside[:, None], more, 0.0)
        if dbias is not None:
            at = dbias.ptr + outer_row * dbias.b + outer_head * dbias.h + entry
            tl.store(at, tl.load(at, mask=present, other=0) + acc, mask=present)
        if de is not None:
            d = tl.arange(0, S.BLOCK_F)[None, :]
            at = de.ptr + (entry * de.t)[:, None] + d
            mask = present[:, None] & (d < S.F)
            tl.store(at, tl.load(at, mask=mask, other=0) + f_acc, mask=mask)


@triton.jit
def combine(
    parts, parts_lse, items, bounds, out, lse, num_items, heads, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The parts of one divided run in their order: their sum, added to ``out``; or outputs weighted by their log-sum-exp."""
    place, plane, h = _place(num_items, heads, False)
    b, t = _token(tl.load(items + place).to(tl.int64), plane, count, OWN)
    first, last = tl.load(bounds + place), tl.load(bounds + place + 1)
    top, total, acc = tl.full((), float("-inf"), ACC), tl.full((), 0.0, ACC), tl.zeros((BLOCK_D,), ACC)
    for start in range(first, last, BLOCK_P):
        slot = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = slot < last
        x = _vectors(parts, plane, h, slot, inside, D, BLOCK_D, ACC)
        if parts_lse is not None:
            at = parts_lse.ptr + plane * parts_lse.b + h * parts_lse.h + slot * parts_lse.t
            l = tl.load(at, mask=inside, other=float("-inf"))
            new = tl.maximum(top, tl.max(l, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            weight, shrink = tl.exp(l - safe), tl.exp(top - safe)
            acc, total = acc * shrink + tl.sum(weight[:, None] * x, 0), total * shrink + tl.sum(weight, 0)
            top = new
        else:
            acc += tl.sum(x, 0)
    if parts_lse is not None:
        _store(out, b, h, t, acc / tl.maximum(total, 1.0), D, BLOCK_D, False)
        tl.store(lse.ptr + b * lse.b + h * lse.h + t * lse.t, top + tl.log(tl.maximum(total, 1.0)))
    else:
        _store(out, b, h, t, acc, D, BLOCK_D, True)
