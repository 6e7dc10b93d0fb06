"""What a plan says of a model, and that slow paths can be forbidden."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xformerlib as xf
from xformerlib import masks, positions


def test_every_attention_layer_is_explained_as_it_is_computed() -> None:
    model = xf.EncoderDecoder(
        32, 4, encoder_depth=2, decoder_depth=1, mask=masks.Local(3), position=positions.DistanceDecay(4)
    )
    found = xf.explain(model, xf.Sequence(2048), xf.Sequence(4096))
    assert list(found) == [
        "encoder.blocks.0.attention",
        "encoder.blocks.1.attention",
        "decoder.blocks.0.attention",
        "decoder.blocks.0.cross_attention",
    ]
    assert [plan.kernel for plan in found.values()] == ["windowed", "windowed", "chunked", "sdpa"]
    assert "a dense bias of 2,048 x 2,048 is not small" in str(found)
    assert str(found).count("kernel ") == 3  # the two layers of the encoder are shown together


def test_a_mask_is_explained_as_by_plan() -> None:
    assert xf.explain(masks.Causal(), xf.Sequence(9), heads=2) == xf.plan(masks.Causal(), xf.Sequence(9), heads=2)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="must have attention layers; Linear has none"):
        xf.explain(nn.Linear(2, 2), xf.Sequence(3))
    with pytest.raises(TypeError, match="module_or_mask must be a model or a mask"):
        xf.explain("model", xf.Sequence(3))


def test_slow_paths_can_be_forbidden() -> None:
    q = torch.randn(1, 1, 1100, 4)
    slow = masks.Where(lambda b, h, q, k: (q + k) % 3 == 0)
    with xf.strict("fused"):
        xf.attention(q, q, q, mask=masks.Local(3))
        with pytest.raises(ValueError, match=r"strict\(\"fused\"\) forbids the kernel 'chunked'.*is not small"):
            xf.attention(q, q, q, mask=slow)
        assert xf.attention(q, q, q, mask=slow, kernel="chunked").shape == q.shape
    assert xf.attention(q, q, q, mask=slow).shape == q.shape
    with pytest.raises(ValueError, match="level must be 'fused'"), xf.strict("fast"):
        pass
