"""Swin Transformers of timm give the same logits as ours with their weights, all drawn anew."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.closeness import InDefaultPrecision, assert_close
from xformerlib.interop.timm import from_timm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


TINY, TINY_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def made(name: str, **options: Any) -> nn.Module:
    """Every parameter drawn anew: at initialisation many models are nearly the identity."""
    torch.manual_seed(0)
    with InDefaultPrecision():
        model = timm.create_model(name, depths=(2, 2, 2, 2), **options).eval()
    for key, parameter in model.named_parameters():
        if "table" in key:
            nn.init.normal_(parameter, std=0.5)
        elif "logit_scale" in key:
            nn.init.normal_(parameter, math.log(10), 0.3)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        else:
            nn.init.normal_(parameter, float(key.endswith("weight")), 0.3)
    return model


CASES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    (TINY, {}, (224, 224)),
    (TINY, {"img_size": (448, 224), "embed_dim": 48, "num_classes": 7}, (448, 224)),
    ("swin_s3_tiny_224", {"embed_dim": 48}, (224, 224)),
    (TINY, {"img_size": 96, "window_size": 6, "embed_dim": 48, "qkv_bias": False, "global_pool": "avgmax"}, (96, 96)),
    (TINY, {"embed_dim": 48, "head_dim": 24, "mlp_ratio": 2.0, "strict_img_size": False, "img_size": 448}, (448, 672)),
    (TINY_V2, {}, (256, 256)),
    ("swinv2_tiny_window16_256", {"embed_dim": 48}, (256, 256)),
    (TINY_V2, {"img_size": (512, 256), "embed_dim": 48, "act_layer": "gelu_tanh", "qkv_bias": False}, (512, 256)),
    ("swinv2_base_window12to16_192to256", {"embed_dim": 48, "num_heads": (2, 4, 8, 16)}, (256, 256)),
]  # fmt: skip


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("name", "options", "size"), CASES)
def test_logits_are_those_of_timm(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    compare(name, options, size)


@pytest.mark.parametrize(("name", "options", "size"), [CASES[3], CASES[-1]], ids=["Swin", "Swin V2"])
def test_logits_are_close_in_single_precision(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    compare(name, options, size)


def compare(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = made(name, **options)
    before = copy.deepcopy(theirs.state_dict())
    ours = from_timm(theirs)
    x = torch.randn(1, 3, *size)
    logits = ours(x).detach()
    with torch.no_grad():
        with InDefaultPrecision():
            wanted, maps = theirs(x), theirs.forward_intermediates(x)[1]
        assert float(wanted.std()) > 0.3
        # Eight blocks, an embedding, three mergers and a head. Without gradients ours multiplies matrices by oneDNN.
        for what, got in (("with gradients", logits), ("without", ours(x))):
            assert_close(got, wanted, f"logits {what}", depth=13)
        assert_close([features.maps for features in ours.intermediates(x)], maps, "maps", depth=13)
        for parameter in ours.parameters():
            parameter.zero_()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, before[key])  # nothing is shared


def test_rates_modes_and_frozen_weights_carry_over() -> None:
    theirs = made(TINY, embed_dim=24, drop_path_rate=0.7, drop_rate=0.3, proj_drop_rate=0.1)
    theirs.patch_embed.requires_grad_(False)
    ours = from_timm(theirs.train().double())
    assert ours.training and ours.head.weight.dtype == torch.float64
    assert not any(p.requires_grad for p in ours.embed.parameters()) and ours.head.weight.requires_grad
    rates = [block.attention_residual.drop_path.p for stage in ours.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    assert ours.head_dropout.p == 0.3 and ours.stages[1].blocks[1].feed_forward_residual.dropout.p == 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (TINY, {"always_partition": True}, r"layers.3.blocks.1 .* shifts windows of \(7, 7\) by \(3, 3\)"),
        (TINY, {"global_pool": "catavgmax"}, "global_pool must be one of 'avg', 'max', 'avgmax'"),
        (TINY_V2, {"proj_drop_rate": 0.1}, "drops channels before the norm"),
    ],
)  # fmt: skip
def test_what_ours_cannot_express_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(timm.create_model(name, depths=(1, 1, 2, 2), embed_dim=24, **options))
