"""CPU tricks with and without, alternating: ``python -m benchmarks --ablate``. A trick that gains less than 5 % on its model goes.

The guard is no trick but a price: outputs and gradients of kernels that compute pairs which do not count are looked at for NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import xformerlib as xf
from xformerlib import masks, positions, vision
from xformerlib._dropout import Dropout
from xformerlib.kernels import _plan, _tiled
from xformerlib.positions import _bias

from ._measure import Setting


@dataclass(frozen=True)
class Trick:
    """Something that can be left out.

    Attributes:
        holder, name, without: the attribute that is replaced, and by what.
        model: makes the model on which it is measured, and its input.
    """

    title: str
    holder: Any
    name: str
    without: Any
    model: Callable[[Setting], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]


@contextmanager
def left_out(trick: Trick) -> Iterator[None]:
    """Within this context the trick is not used."""
    own = getattr(trick.holder, trick.name)
    setattr(trick.holder, trick.name, trick.without)
    try:
        yield
    finally:
        setattr(trick.holder, trick.name, own)


def _vit(setting: Setting) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    size = setting.size(224, 32)
    model = vision.ViT(100, size=size, dim=192, depth=2, heads=3, dropout=0.1)
    images = setting.random(setting.size(16, 1), 3, size, size)
    return model, lambda m: m(images)


def _swin(version: int) -> Callable[[Setting], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]:
    def make(setting: Setting) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
        size = setting.size(224, 56)
        model = vision.Swin(100, window=7, depths=(2, 2), heads=(3, 6), version=version)  # type: ignore[arg-type]
        images = setting.random(setting.size(4, 1), 3, size, size)
        return model, lambda m: m(images)

    return make


def _window(setting: Setting) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    tokens = setting.size(4096, 128)
    model = xf.Encoder(128, 2, 4, mask=masks.Causal() & masks.Local(63), position=positions.Rotary(32))
    x, domain = setting.random(1, tokens, 128), xf.Sequence(tokens)
    return model, lambda m: m(x, domain)


TRICKS = (
    Trick("random bits of dropout shared", Dropout, "forward", nn.Dropout.forward, _vit),
    Trick("weights of few keys kept", _tiled.TiledPart, "_keeps_weights", lambda *_: False, _swin(1)),
    Trick("bias networks remembered", _bias, "remembered", lambda owner, key, weights, make: make(), _swin(2)),
    Trick("guard against NaN (a price)", _plan, "is_finite", lambda x: True, _window),
)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ablate(setting: Setting) -> list[dict[str, Any]]:
    """Measure and print each trick, forward alone and with backward: the least of all rounds with and without."""
    rows = []
    for trick in TRICKS:
        torch.manual_seed(0)
        model, call = trick.model(setting)
        row: dict[str, Any] = {"trick": trick.title}

        def forward(model: nn.Module = model, call: Any = call) -> None:
            with torch.no_grad():
                call(model)

        def step(model: nn.Module = model, call: Any = call) -> None:
            torch.autograd.grad(
                call(model).square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
            )

        for name, run, training in (("forward", forward, False), ("with backward", step, True)):
            model.train(training)
            best = [float("inf"), float("inf")]
            run()  # plans and pages of memory
            for _ in range(max(setting.rounds, 2)):
                best[0] = min(best[0], _seconds(run))
                with left_out(trick):
                    best[1] = min(best[1], _seconds(run))
            row[name] = best[1] / best[0] - 1
            times = f"{best[0] * 1e3:8.1f} ms with, {best[1] * 1e3:8.1f} without"
            print(f"{trick.title:<32} {name:<14} {times}: {row[name]:+.1%}", flush=True)
        rows.append(row)
    return rows
