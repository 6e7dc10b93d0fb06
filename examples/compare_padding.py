"""Train one classifier of series of unequal length in two ways, packed and padded: same weights, same results, and what each costs.

    python examples/compare_padding.py                          # handwritten digits, which are of nearly one length
    python examples/compare_padding.py --data JapaneseVowels
    python examples/compare_padding.py --data PLAID --patch 5 --epochs 2
    python examples/compare_padding.py --help

Packed: ``SeriesClassifier``, to which all series of a batch go one behind the other. Padded: ``nn.TransformerEncoder``, as users of torch
have it, on rows of one length with a mask of what is padding. Both see the same batches, which are put together before the clock
starts; an epoch is forward, backward and optimiser. The ways take turns, and the fastest epoch of each counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import common
import labelled_series as data
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import positions, time_series as ts
from xformerlib.interop.torch_nn import from_torch


@dataclass(frozen=True)
class Options:
    """Train one classifier of series of unequal length packed and padded: same weights, same results, and what each costs."""

    data: Path | None = None
    """A folder with files NAME_TRAIN.ts and NAME_TEST.ts, as timeseriesclassification.com has them. Without it: digits."""
    scale: Literal["train", "series"] = "train"
    """As in series_classification.py, as are the options down to --batch-size."""
    logarithm: bool = False
    """Show the model the logarithm of each value's size, too."""
    patch: int = 1
    """Steps in a token."""
    dim: int = 64
    """Width of the model."""
    depth: int = 2
    """Layers, one after the other."""
    heads: int = 4
    """Attention heads of a layer."""
    hidden: int = 256
    """Width inside the feed-forward layers."""
    batch_size: int = 32
    """Series in a training step."""
    epochs: int = 5
    """Epochs of each way."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """Where random numbers start: weights, and which series are in a batch."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int = 1
    """CPU threads."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        common.check_least(self, 1, "patch", "dim", "depth", "heads", "hidden", "batch_size", "epochs", "threads")
        common.check_positive(self, "lr")
        common.check_heads(self)


class Padded(nn.Module):
    """The classifier as users of torch build it: rows of ``longest`` tokens, and a mask of those that exist."""

    def __init__(self, width: int, classes: int, static: int, longest: int, o: Options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(o.dim, o.heads, o.hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed = nn.Linear(width, o.dim)
        self.encoder = nn.TransformerEncoder(layer, o.depth, nn.LayerNorm(o.dim), enable_nested_tensor=False)
        self.output = nn.Linear(o.dim + static, classes)
        table = positions.Sinusoidal(o.dim)(torch.zeros(longest, o.dim), xf.Sequence(longest))
        self.register_buffer("sinusoids", table, persistent=False)

    def forward(self, x: Tensor, valid: Tensor, static: Tensor | None = None) -> Tensor:
        h = self.encoder(self.embed(x) + self.get_buffer("sinusoids")[: x.shape[1]], src_key_padding_mask=~valid)
        pooled = h.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True)
        return self.output(pooled if static is None else torch.cat([pooled, static], 1))


def packed_like(theirs: Padded, channels: int, classes: int, static: int, o: Options) -> ts.SeriesClassifier:
    """The same classifier for packed series, with the same weights."""
    model = ts.SeriesClassifier(
        channels,
        classes,
        patch=o.patch,
        dim=o.dim,
        depth=o.depth,
        heads=o.heads,
        hidden=o.hidden,
        dropout=0.0,
        position=positions.Sinusoidal(o.dim, scale=1 / o.patch),
        static=static,
    )
    model.embed.load_state_dict(theirs.embed.state_dict())
    model.encoder.load_state_dict(from_torch(theirs.encoder).state_dict())
    model.output.load_state_dict(theirs.output.state_dict())
    return model


def rows(batch: data.Labelled, patch: int, longest: int | None) -> dict[str, Tensor]:
    """A batch as rows of patches, padded to the longest in it, or to ``longest`` tokens."""
    tokens = max(-(-len(x) // patch) for x in batch.series) if longest is None else longest
    x = torch.full((len(batch.series), tokens * patch, batch.series[0].shape[1]), torch.nan)
    for row, series in zip(x, batch.series, strict=True):
        row[: len(series)] = series
    cut = x.unflatten(1, (tokens, patch))
    missing = cut.isnan()
    given = {"x": torch.cat([cut.nan_to_num(), missing], -1).flatten(2), "valid": ~missing.flatten(2).all(-1)}
    return given | ({"static": batch.static} if batch.static.shape[1] else {})


@dataclass
class Way:
    """A model, and the batches it is given: the arguments of a call, and the classes."""

    name: str
    model: nn.Module
    train: list[tuple[dict[str, Any], Tensor]]
    test: list[tuple[dict[str, Any], Tensor]]
    tokens: int
    optimizer: torch.optim.Optimizer = field(init=False)
    fastest: float = float("inf")
    loss: float = float("nan")

    def epoch(self, device: torch.device) -> None:
        """Train for one epoch, and take the time."""
        self.model.train()
        losses = []
        began = time.perf_counter()
        for inputs, labels in self.train:
            loss = F.cross_entropy(self.model(**inputs), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.fastest = min(self.fastest, time.perf_counter() - began)
        self.loss = float(torch.stack(losses).mean())

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of the test series whose class is found."""
        self.model.eval()
        right = torch.cat([self.model(**inputs).argmax(1) == labels for inputs, labels in self.test])
        return float(right.double().mean())


def ways(known: data.Data, o: Options, device: torch.device) -> list[Way]:
    """Packed, padded to the longest of a batch, and padded to the longest of the data set, as archives hand series out."""
    parts = data.scaled({"train": known.train, "test": known.test}, o.scale, o.logarithm)
    train, test, classes = parts["train"], parts["test"], len(known.classes)
    channels, static = train.series[0].shape[1], train.static.shape[1]
    longest = max(-(-len(x) // o.patch) for x in train.series + test.series)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(o.seed))
    batches = [
        [part.take(index) for index in order.split(o.batch_size)]
        for part, order in ((train, order), (test, torch.arange(len(test.labels))))
    ]
    torch.manual_seed(o.seed)
    theirs = Padded(2 * o.patch * channels, classes, static, longest, o)
    ours = packed_like(theirs, channels, classes, static, o)

    def way(name: str, model: nn.Module, given: Any, count: Any) -> Way:
        made = [[(to(given(batch), device), batch.labels.to(device)) for batch in part] for part in batches]
        tokens = sum(count(inputs) for inputs, _ in made[0])
        one = Way(name, model.to(device), made[0], made[1], tokens)
        one.optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, fused=True)
        return one

    def copied() -> Padded:
        copy = Padded(2 * o.patch * channels, classes, static, longest, o)
        copy.load_state_dict(theirs.state_dict())
        return copy

    def area(inputs: dict[str, Tensor]) -> int:
        return inputs["valid"].numel()

    return [
        way("packed", ours, lambda b: b.inputs, lambda i: sum(-(-length // o.patch) for length in i["lengths"])),
        way("padded to the batch", copied(), lambda b: rows(b, o.patch, None), area),
        way("padded to the set", theirs, lambda b: rows(b, o.patch, longest), area),
    ]


def to(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same on another device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def table(all_ways: list[Way]) -> str:
    """The comparison, a line for each way."""
    lines = [f"{'':<22}{'tokens':>10}{'s an epoch':>12}{'times packed':>14}{'train loss':>12}{'test accuracy':>15}"]
    for way in all_ways:
        ratio = way.fastest / all_ways[0].fastest
        lines.append(
            f"{way.name:<22}{way.tokens:>10,}{way.fastest:>12.3g}{ratio:>14.2f}{way.loss:>12.4f}{way.accuracy():>15.2%}"
        )
    return "\n".join(lines)


def main(o: Options) -> None:
    with common.plain_errors():
        o.check()
        device = common.choose_device(o.device)
        known = data.load(o.data)
    torch.set_num_threads(o.threads)
    all_ways = ways(known, o, device)
    inputs = [way.test[0][0] for way in all_ways]
    with torch.no_grad():
        logits = [way.model.eval()(**given) for way, given in zip(all_ways, inputs, strict=True)]
    furthest = max(float((other - logits[0]).abs().max()) for other in logits[1:])
    print(
        f"{known.name}: before training the logits differ by {furthest:.1e} at most, the largest of which is {logits[0].abs().max():.2g}"
    )
    for _ in range(o.epochs):
        for way in all_ways:
            way.epoch(device)
    print(f"after {o.epochs} epochs each:\n{table(all_ways)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
