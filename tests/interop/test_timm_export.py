"""Plain models as timm's: there and back, and what timm has no place for is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import InDefaultPrecision, assert_close
from xformerlib import masks, positions, vision
from xformerlib.interop.timm import from_timm, to_timm

SMALL: dict[str, Any] = {"size": (16, 24), "patch": (4, 8), "dim": 32, "depth": 2, "heads": 4, "channels": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers and mean": {"class_token": False, "registers": 3, "pool": "mean"},
    "no prefix, maximum": {"class_token": False, "pool": "mean-max", "norm_layer": "rms"},
    "clip": {"embed_norm": "layer", "norm_layer": "layer", "activation": nn.GELU("tanh")},
    "every norm": {"qk_norm": "layer", "out_norm": vision._vit.LAYER_NORM, "hidden_norm": vision._vit.LAYER_NORM, "layer_scale": 0.1},
    "swiglu, no biases": {"activation": "swiglu", "hidden": 40, "bias": False, "out_bias": False, "qkv_bias": False},
    "attention pool": {"class_token": False, "pool": "attention", "activation": "gelu"},
    "pool sees registers": {"pool": xf.Pooling(32, "attention", heads=4, prefix=True, norm_layer=vision._vit.LAYER_NORM)},
    "no head": {"classes": None, "final_norm": False},
    "norm after the mean": {"pool": "mean", "pool_norm": True},
}  # fmt: skip


def made(**options: Any) -> vision.ViT:
    torch.manual_seed(0)
    model = vision.ViT(**{"classes": 5, **SMALL, **options}).to(torch.get_default_dtype()).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 2, height, width)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(name: str) -> None:
    ours = made(**VARIANTS[name])
    theirs = to_timm(ours)
    pointers = {parameter.data_ptr() for parameter in ours.parameters()}
    assert all(parameter.data_ptr() not in pointers for parameter in theirs.parameters())
    back = from_timm(theirs)
    assert {key: value.shape for key, value in back.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
    for x in (images(16, 24), images(8, 40)):
        wanted = ours(x)
        with InDefaultPrecision():  # timm resamples positions in single precision
            assert_close(theirs(x), wanted, "logits of timm", depth=4)
        assert_close(back(x), wanted, "logits of what came back", depth=4)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_vit2",
        "test_vit3",
        "test_vit4",
        "vit_base_patch16_clip_224",
        "beit3_base_patch16_224",
        "vit_giant_patch14_dinov2",
    ],
)
def test_a_model_of_timm_comes_back_as_it_was(name: str) -> None:
    size = {} if name.startswith("test") else {"embed_dim": 48, "num_heads": 3, "img_size": 56}
    theirs = timm.create_model(
        name, pretrained=False, depth=2, drop_path_rate=0.2, proj_drop_rate=0.1, patch_drop_rate=0.3, **size
    )
    theirs.blocks[1].requires_grad_(False)
    back = to_timm(from_timm(theirs))
    before, after = theirs.state_dict(), back.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    for one, other in zip(theirs.parameters(), back.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    assert str(back.blocks) == str(theirs.blocks)
    assert back.patch_drop.prob == 0.3


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: made(position=positions.Rotary(8)), "position"),
        (lambda: made(position=lambda: positions.RelativeBias(4, size=(4, 3))), "position, position of each block"),
        (lambda: made(mask=masks.Windows(2) | masks.Global(1)), "mask"),
        (lambda: made(norm="sandwich"), "norm"),
        (lambda: made(norm="parallel"), "norm"),
        (lambda: made(kv_heads=2, gate=True, sinks=True, softcap=10.0), "kv_heads, sinks, softcap, gate"),
        (lambda: made(head_dim=16), "head_dim"),
        (lambda: made(activation="geglu"), "activation"),
        (lambda: made(pool="sum"), "pool"),
        (lambda: made(distillation=True), "distillation"),
        (lambda: vision.ViT(5, size=32, dim=32, heads=4, depth=1, embed=vision.ConvStem(32)), "embed"),
    ],
)  # fmt: skip
def test_what_timm_has_no_place_for_is_refused_by_name(make: Callable[[], vision.ViT], names: str) -> None:
    with pytest.raises(ValueError, match=f"to_timm is for plain models: .*; got another {names}$"):
        to_timm(make())


def test_what_must_be_one_is_said() -> None:
    with pytest.raises(ValueError, match=r"norm_layer must be one for all: .* LayerNorm\(eps=1e-06\), RMSNorm"):
        to_timm(made(qk_norm="rms"))
    model = made(layer_scale=1.0)
    model.encoder.blocks[1].attention_residual.scale = None
    with pytest.raises(ValueError, match=r"layer_scale must be the same in all blocks; got \[False, True\]"):
        to_timm(model)
    with pytest.raises(ValueError, match="activation, of blocks and pool"):
        to_timm(made(class_token=False, pool="attention", activation=nn.SiLU()))
    model = made()
    model.pool_norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="final_norm and pool_norm"):
        to_timm(model)
    with pytest.raises(TypeError, match=r"model must be a vision\.ViT; got Linear"):
        to_timm(nn.Linear(2, 2))  # type: ignore[arg-type]
