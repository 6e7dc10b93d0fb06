"""Which kernel computes what, as text: a change of plan is a change of ``plans.txt``.

``python -m tests.kernels.test_plan`` writes the file anew, to be read before it is committed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import xformerlib as xf
from benchmarks._measure import Setting, memory
from xformerlib import masks, positions
from xformerlib.masks import Axial, Causal, Dilated, Edges, Expander, Global, Local, Segments, Where, Windows

SNAPSHOT = Path(__file__).with_name("plans.txt")
GENERATOR = torch.Generator().manual_seed(0)
EDGES = torch.randint(0, 2000, (2, 8000), generator=GENERATOR)
SWIN = positions.RelativeBias(4, size=(7, 7))

CASES: dict[str, tuple[masks.Mask | None, xf.Domain, dict[str, object]]] = {
    "everything": (None, xf.Sequence(4096), {}),
    "causal": (Causal(), xf.Sequence(4096), {}),
    "few tokens under any mask": (Local(3) | Global(1), xf.Sequence(200), {}),
    "window": (Causal() & Local(127), xf.Sequence(8192), {}),
    "window and global tokens": (Local(64) | Global(2), xf.Sequence(8192), {}),
    "window between times": (Local(0.5), xf.Timeline(torch.arange(4096) / 16), {}),
    "dilated": (Dilated(4, step=8), xf.Sequence(8192), {}),
    "neighbourhood and a class token": (Local(3), xf.Grid(56, 56, prefix=1), {}),
    "shifted windows and a table": (Windows(7, shift=3), xf.Grid(56, 56), {"bias": SWIN}),
    "equal windows": (Windows(7), xf.Grid(56, 56), {}),
    "axes": (Axial(0) | Axial(1), xf.Grid(64, 64), {}),
    "documents": (Segments(torch.arange(4096) // 500), xf.Sequence(4096), {}),
    "packed, causal": (Causal(), xf.Sequence.packed([1000, 200, 3000]), {}),
    "padded": (None, xf.Sequence.padded([1000, 200, 3000]), {}),
    "edges": (Edges(self_loops=True), xf.Graph(EDGES, 2000), {}),
    "edges, an expander and a global node": (Edges() | Expander(4, seed=0) | Global(1), xf.Graph(EDGES, 2000), {}),
    "graphs": (None, xf.Graph(EDGES[:, :0], 2000, batch=torch.arange(2000) // 50), {}),
    "balls": (Local(0.05), xf.Points(torch.rand(4096, 3, generator=GENERATOR)), {}),
    "a function": (Where(lambda b, h, q, k: q > k), xf.Sequence(4096), {}),
    "a function within a window": (Where(lambda b, h, q, k: q > k) & Local(64), xf.Sequence(4096), {}),
    "trained buckets": (None, xf.Sequence(4096), {"bias": positions.RelativeBias(4)}),
    "window, refused to sparse": (Local(64), xf.Sequence(4096), {"kernel": "sparse"}),
    "dropout": (Causal(), xf.Sequence(4096), {"dropout_p": 0.1}),
}


def text(name: str) -> str:
    mask, where, options = CASES[name]
    try:
        shown = str(xf.plan(mask, where, heads=4, **options))  # type: ignore[arg-type]
    except ValueError as refusal:
        shown = str(refusal)
    shown = re.sub(r"<function .*? at \w+>", "<function>", shown)
    return f"# {name}\n{shown}\n"


@pytest.mark.parametrize("name", CASES)
def test_plans_are_as_written(name: str) -> None:
    assert text(name) in SNAPSHOT.read_text(encoding="utf-8")


HELD: dict[str, tuple[masks.Mask | None, xf.Domain, dict[str, Any]]] = {
    "a window's mask": (Causal() & Local(127), xf.Sequence(8192), {}),
    "dropout": (Causal() & Local(127), xf.Sequence(8192), {"dropout_p": 0.1}),
    "soft cap": (Causal() & Local(127), xf.Sequence(8192), {"softcap": 2.0}),
    "a bias": (Local(64), xf.Sequence(8192), {"bias": positions.RelativeBias(2)}),
    "padding": (None, xf.Sequence.padded([3000]), {}),
    "edges": (Edges(), xf.Graph(torch.randint(0, 2000, (2, 200_000), generator=GENERATOR), 2000), {}),
    "weights that are kept": (masks.Segments(torch.arange(8192) // 8), xf.Sequence(8192), {}),
    "nothing: flash attention in order": (Causal(), xf.Sequence.packed([1000, 200, 3000]), {}),
    "nothing: flash attention of whole groups": (Windows(7), xf.Grid(56, 56), {}),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bytes_are_what_is_held(name: str, kv_heads: int) -> None:
    mask, domain, options = HELD[name]
    query, key = (
        torch.randn(1, domain.num_tokens, heads, 2).transpose(1, 2).requires_grad_("kept" in name)
        for heads in (2, kv_heads)
    )

    def forward() -> tuple[torch.Tensor]:
        with torch.set_grad_enabled("kept" in name):
            return (xf.attention(query, key, key, mask=mask, domain=domain, **options),)

    forward()  # what is kept for the next call is there
    most = memory(forward, Setting())[0]
    plan = xf.plan(mask, domain, heads=2, kv_heads=kv_heads, head_dim=2, **options)
    vectors = 20 * query.numel() * query.element_size()
    assert plan.bytes / 2 <= most <= 2 * plan.bytes + vectors
    assert (plan.bytes == 0) == name.startswith("nothing")


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(map(text, CASES)), encoding="utf-8")
