"""A training step of a classifier of series of unequal length: packed, and padded to the longest of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import positions, time_series as ts
from xformerlib.interop.torch_nn import from_torch

from ._measure import Line, Setting, Side, Target, Work, attention_flops

# The sizes of the Transformer classifier of Zerveas et al. 2020 (arXiv:2010.02803), as its authors' code trains it on JapaneseVowels.
DIM, HEADS, HIDDEN, DEPTH = 128, 8, 256, 3

# Steps of a training series at these shares of the data set, from timeseriesclassification.com, and the longest of all its series.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
JAPANESE_VOWELS = (7, 11, 13, 15, 18, 21, 26), 29
PLAID = (100, 200, 200, 300, 434, 500, 1344), 1344


def lengths_like(quantiles: Sequence[int], count: int) -> Tensor:
    """As many lengths, evenly over a distribution that is linear between its quantiles, in random order."""
    share, at = (torch.arange(count) + 0.5) / count, torch.tensor(SHARES)
    piece = torch.searchsorted(at, share).clamp(1, len(SHARES) - 1)
    low, high = (torch.tensor(quantiles)[i].double() for i in (piece - 1, piece))
    drawn = low + (high - low) * (share - at[piece - 1]) / (at[piece] - at[piece - 1])
    return drawn.round().long()[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


class Padded(nn.Module):
    """The same classifier as users of torch build it: rows of one length, and a mask of the tokens that are padding."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed = nn.Linear(width, DIM)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.output = nn.Linear(DIM, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor, sinusoids: Tensor, valid: Tensor) -> Tensor:
        h = self.encoder(self.embed(x) + sinusoids, src_key_padding_mask=~valid)
        return self.output(h.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True))


def training_step(
    setting: Setting, quantiles: Sequence[int], longest: int, batch: int, channels: int, classes: int, patch: int
) -> Work:
    """Logits, and gradients of all weights."""
    lengths = lengths_like(quantiles, setting.size(batch, 8))
    x = setting.random(int(lengths.sum()), channels)
    torch.manual_seed(0)
    theirs = Padded(2 * patch * channels, classes).to(setting.device, setting.dtype)
    model = ts.SeriesClassifier(
        channels, classes, patch=patch, dim=DIM, depth=DEPTH, heads=HEADS, hidden=HIDDEN, dropout=0.0,
        position=positions.Sinusoidal(DIM, scale=1 / patch),
    ).to(setting.device, setting.dtype)  # fmt: skip
    model.embed.load_state_dict(theirs.embed.state_dict())
    model.encoder.load_state_dict(from_torch(theirs.encoder).state_dict())
    model.output.load_state_dict(theirs.output.state_dict())
    grad = setting.random(len(lengths), classes, seed=1)
    ours = Side(lambda: model(x, lengths=lengths), by_kind(model.embed, model.encoder, model.output), grad)

    rows, tokens = -(-longest // patch), (lengths + patch - 1) // patch
    valid = torch.arange(rows) < tokens[:, None]
    steps = torch.full((len(lengths), rows * patch, channels), torch.nan)
    steps[torch.arange(rows * patch) < lengths[:, None]] = x.float().cpu()
    features = torch.cat([steps.nan_to_num().unflatten(1, (rows, patch)), steps.isnan().unflatten(1, (rows, patch))], 3)
    padded = features.flatten(2).to(setting.device, setting.dtype)
    sinusoids = positions.Sinusoidal(DIM)(padded.new_zeros(rows, DIM), xf.Sequence(rows))
    valid = valid.to(setting.device)
    peer = Side(
        lambda: theirs(padded, sinusoids, valid), by_kind(theirs.embed, theirs.encoder, theirs.output), grad,
        held=[padded, valid],
    )  # fmt: skip
    kernel = xf.plan(None, xf.Sequence.packed(tokens), heads=HEADS, head_dim=DIM // HEADS, dtype=setting.dtype).kernel
    linear = 6.0 * int(tokens.sum()) * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    flops = linear + DEPTH * attention_flops(int((tokens**2).sum()), HEADS, DIM // HEADS)
    return Work(ours, peer, kernel, flops, 0.0)


def by_kind(*modules: nn.Module) -> list[nn.Parameter]:
    """All weights, in an order that does not depend on who wrote the blocks: a block's matrices, then its vectors, by their place in it."""
    found = [p for module in modules for name, p in module.named_parameters() if "norm" not in name]
    return found + [p for module in modules for name, p in module.named_parameters() if "norm" in name]


LINES = (
    Line(
        "vowels", "128 utterances (lengths as in JapaneseVowels, 12 channels), classifier of 3 blocks, 8 heads x 16",
        "nn.TransformerEncoder, padded to the longest of the set, src_key_padding_mask",
        partial(training_step, quantiles=JAPANESE_VOWELS[0], longest=JAPANESE_VOWELS[1], batch=128, channels=12, classes=9, patch=1),
        Target(faster=2),
    ),
    Line(
        "appliances", "32 switched appliances (lengths as in PLAID, 5 steps in a token), classifier of 3 blocks, 8 heads x 16",
        "nn.TransformerEncoder, padded to the longest of the set, src_key_padding_mask",
        partial(training_step, quantiles=PLAID[0], longest=PLAID[1], batch=32, channels=1, classes=11, patch=5),
        Target(faster=2),
    ),
)  # fmt: skip
