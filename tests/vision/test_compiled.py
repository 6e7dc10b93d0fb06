"""Vision models as graphs: exported for all sizes, compiled whole, and run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from tests.closeness import assert_close
from xformerlib import positions, vision

POSITIONS: dict[str, Any] = {
    "learned": "learned",
    "sin-cos": positions.Sinusoidal(32),
    "rotary": positions.Rotary(8, coordinates="resized", layout="interleaved"),
    "normalized rotary": positions.Rotary(8, coordinates="normalized", theta=100),
    "mixed rotary": positions.Rotary(8, mixed=True, heads=4),
}


def made(position: Any = "learned", **options: Any) -> vision.ViT:
    torch.manual_seed(0)
    model = vision.ViT(5, size=16, patch=4, dim=32, depth=1, heads=4, position=position, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("position", POSITIONS)
def test_export_for_all_batches_heights_and_widths(position: str, precision: torch.dtype) -> None:
    model = made(POSITIONS[position], pool="attention" if position == "rotary" else None)
    batch, height, width = Dim("batch", min=1, max=64), Dim("height", min=2, max=64), Dim("width", min=2, max=64)
    sizes = {"images": {0: batch, 2: 4 * height, 3: 4 * width}}
    exported = export(model, (torch.randn(2, 3, 24, 20),), dynamic_shapes=sizes).module()
    for shape in ((1, 3, 16, 16), (5, 3, 8, 40)):
        x = torch.randn(shape)
        assert_close(exported(x), model(x))


@pytest.mark.parametrize("position", ["learned", "normalized rotary"])
def test_compiled_whole(position: str, precision: torch.dtype) -> None:
    torch.compiler.reset()
    model = made(POSITIONS[position])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 16, 16), (3, 3, 8, 24), (4, 3, 20, 12)):
        x = torch.randn(shape)
        assert_close(compiled(x), model(x))


@pytest.mark.parametrize("options", [{}, {"pool": "attention", "class_token": False}], ids=["token", "attention"])
def test_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    model, path = made(**options), tmp_path / "model.onnx"
    sizes = {"images": {0: Dim("batch")}}
    torch.onnx.export(model, (torch.randn(2, 3, 16, 16),), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(5, 3, 16, 16)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(logits), model(x), depth=2)  # the runtime computes in fp32
