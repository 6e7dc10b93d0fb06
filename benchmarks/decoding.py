"""A series that goes on step by step, each step from those before it: with what layers have kept of these, and from the start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import positions

from ._measure import Call, Line, Setting, Target, Work, installed

CHANNELS, HEADS, DEPTH = 7, 4, 3


class Model(nn.Module):
    """A decoder-only Transformer from numbers to the numbers of the next step, as x-transformers builds it."""

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.embed, self.output = nn.Linear(CHANNELS, dim, bias=False), nn.Linear(dim, CHANNELS, bias=False)
        self.decoder = xf.Decoder(
            dim, DEPTH, HEADS, cross=False, position=positions.Learned(dim, steps), qkv_bias=False, out_bias=False,
            norm_layer=partial(nn.LayerNorm, bias=False),
        )  # fmt: skip
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, std=0.1)

    @torch.inference_mode()
    def cached(self, x: Tensor, horizon: int) -> Tensor:
        """Each step computed once."""
        cache, start, piece, out = xf.Cache(), 0, x, []
        for _ in range(horizon):
            where = xf.Sequence(piece.shape[1], start=start)
            start += piece.shape[1]
            piece = self.output(self.decoder(self.embed(piece), where, cache=cache, last=1))
            out.append(piece)
        return torch.cat(out, 1)

    @torch.inference_mode()
    def again(self, x: Tensor, horizon: int) -> Tensor:
        """All steps computed anew for each."""
        series = x
        for _ in range(horizon):
            hidden = self.decoder(self.embed(series), xf.Sequence(series.shape[1]))
            series = torch.cat([series, self.output(hidden[:, -1:])], 1)
        return series[:, x.shape[1] :]


@torch.inference_mode()
def bare(model: Model, x: Tensor, horizon: int) -> Tensor:
    """As ``cached``, in torch's functions alone and for this one model: caches of the right size made beforehand, nothing checked."""
    blocks, table, (batch, lookback, _) = model.decoder.blocks, model.decoder.position.table, x.shape
    dim, steps = table.shape[1], lookback + horizon
    kept = [x.new_empty(2, batch, HEADS, steps, dim // HEADS) for _ in blocks]
    start, piece, out = 0, x, []
    for _ in range(horizon):
        end = start + piece.shape[1]
        h = model.embed(piece) + table[start:end]
        for layer, (block, cache) in enumerate(zip(blocks, kept, strict=True), 1):
            qkv = block.attention.qkv(block.attention_residual.norm(h))
            q, *new = qkv.view(batch, end - start, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            cache[:, :, :, start:end] = torch.stack(new)
            if layer == len(blocks):
                q, h = q[:, :, -1:], h[:, -1:]
            heads = F.scaled_dot_product_attention(q, *cache[:, :, :, :end], is_causal=q.shape[2] > 1)
            h = h + block.attention.out(heads.transpose(1, 2).flatten(2))
            h = h + block.feed_forward.down(F.gelu(block.feed_forward.up(block.feed_forward_residual.norm(h))))
        start, piece = end, model.output(model.decoder.norm(h))
        out.append(piece)
    return torch.cat(out, 1)


def theirs(model: Model, dim: int, steps: int) -> nn.Module:
    """x-transformers with the same weights; its fused attention, which is the faster of its two here."""
    from x_transformers import ContinuousTransformerWrapper, Decoder
    from x_transformers.continuous import ContinuousAutoregressiveWrapper

    layers = Decoder(dim=dim, depth=DEPTH, heads=HEADS, attn_dim_head=dim // HEADS, attn_flash=True)
    net = ContinuousTransformerWrapper(dim_in=CHANNELS, dim_out=CHANNELS, max_seq_len=steps, attn_layers=layers)
    own = model.decoder  # their norms multiply by 1 + gamma
    state = {
        "pos_emb.emb.weight": own.position.table * dim**0.5, "project_in.weight": model.embed.weight,
        "project_out.weight": model.output.weight, "attn_layers.final_norm.gamma": own.norm.weight - 1,
    }  # fmt: skip
    for i, block in enumerate(own.blocks):
        attention, feed_forward = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        for name, part in zip("qkv", block.attention.qkv.weight.chunk(3), strict=True):
            state[f"{attention}.1.to_{name}.weight"] = part
        state |= {
            f"{attention}.0.0.gamma": block.attention_residual.norm.weight - 1,
            f"{attention}.1.to_out.weight": block.attention.out.weight,
            f"{feed_forward}.0.0.gamma": block.feed_forward_residual.norm.weight - 1,
            f"{feed_forward}.1.ff.0.0.weight": block.feed_forward.up.weight,
            f"{feed_forward}.1.ff.0.0.bias": block.feed_forward.up.bias,
            f"{feed_forward}.1.ff.2.weight": block.feed_forward.down.weight,
            f"{feed_forward}.1.ff.2.bias": block.feed_forward.down.bias,
        }
    net.load_state_dict(state)
    return ContinuousAutoregressiveWrapper(net).eval()


def decoding(setting: Setting, dim: int, against: str) -> Work:
    """Forecasts of one model, by two ways to compute them."""
    batch, lookback, horizon = setting.size(32, 2), setting.size(168, 6), setting.size(48, 3)
    torch.manual_seed(0)
    model = Model(dim, lookback + horizon).to(setting.device, setting.dtype).eval()
    x = setting.random(batch, lookback, CHANNELS)

    def peer() -> Call:
        if against == "again":
            return Call(lambda: model.again(x, horizon))
        if against == "bare":
            return Call(lambda: bare(model, x, horizon))
        net = theirs(model, dim, lookback + horizon).to(setting.device, setting.dtype)
        generate: Callable[..., Tensor] = torch.inference_mode()(net.generate)
        return Call(lambda: generate(x, horizon))

    steps = lookback + horizon - 1
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    flops = 2 * batch * steps * weights + 4 * DEPTH * batch * (steps * (steps + 1) // 2) * dim
    return Work(Call(lambda: model.cached(x, horizon)), installed(peer), "sdpa", flops, 4 * weights * horizon)


LINES = (
    Line(
        "decoding", "48 steps after 168, one by one, with a cache: 32 series, 3 layers, 4 heads x 16", "ours, without a cache",
        partial(decoding, dim=64, against="again"), Target(faster=40),
    ),
    Line(
        "decoding-cached", "the same", "x-transformers, with its cache",
        partial(decoding, dim=64, against="theirs"), Target(faster=1),
    ),
    Line("decoding-bare", "the same", "a loop of torch's functions for this one model", partial(decoding, dim=64, against="bare")),
)  # fmt: skip
