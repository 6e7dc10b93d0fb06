"""Models of timm, taken over, compute the same: at their size and at others, whatever their blocks, positions and heads are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm import layers
from torch import Tensor, nn

from tests.closeness import InDefaultPrecision, assert_close
from xformerlib import vision
from xformerlib.interop import _timm_weights
from xformerlib.interop.timm import from_timm

NARROW = {"embed_dim": 192, "num_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    # class token, means, registers, attention pooling; norms and places of embeddings
    "vit_tiny_patch16_224": {"num_classes": 1000},
    "test_vit": {},
    "vit_base_patch32_224": NARROW,
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "flexivit_small": {},
    "vit_base_patch16_gap_224": NARROW,
    "vit_medium_patch16_gap_240": {},
    "test_vit2": {},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_betwixt_patch16_reg1_gap_256": NARROW,
    "test_vit3": {},
    "vit_base_patch16_siglip_224": NARROW,
    "vit_so150m_patch16_reg4_map_256": {"embed_dim": 128, "num_heads": 2},
    "test_vit4": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 224, **NARROW},
    "vit_base_patch16_clip_224": NARROW,
    "vit_base_patch16_clip_quickgelu_224": {},
    "beit3_base_patch16_224": NARROW,
    "aimv2_large_patch14_224": NARROW,
    "vit_intern300m_patch14_448": {"img_size": 224, **NARROW},
    # other blocks
    "vit_base_patch16_xp_224": NARROW,
    "vit_pwee_patch16_reg1_gap_256": {},
    "vit_small_patch16_18x2_224": {},
    "vit_base_patch16_rpn_224": NARROW,
    "eva02_enormous_patch14_clip_224": NARROW,
    # rotary positions
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": NARROW,
    "eva02_base_patch16_clip_224": NARROW,
    "eva_giant_patch14_224": NARROW,
    "vit_medium_patch16_rope_reg1_gap_256": NARROW,
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_plus_patch16_dinov3": {},
    "vit_7b_patch16_dinov3": {**NARROW, "img_size": 224},
    "vit_pe_core_tiny_patch16_384": {"img_size": 224},
    "vit_pe_spatial_tiny_patch16_512": {"img_size": 224},
    "vit_base_patch16_sapiens2": {**NARROW, "num_kv_heads": (3, 1), "img_size": 224},
    # relative positions
    "beit_base_patch16_224": NARROW,
    "beitv2_base_patch16_224": NARROW,
    "test_vit_relpos": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_small_patch16_rpn_224": {},
    "vit_relpos_medium_patch16_cls_224": NARROW,
    "vit_relpos_base_patch16_clsgap_224": NARROW,
    "vit_srelpos_small_patch16_224": {},
}
# Made with options that no named model has at once.
OPTIONS: dict[str, dict[str, Any]] = {
    "test_vit": {
        "qk_norm": True, "init_values": 0.1, "global_pool": "avgmax", "qkv_bias": False, "proj_bias": False, "no_embed_class": True,
        "norm_layer": layers.RmsNorm, "act_layer": layers.GELUTanh,
    },
    "test_vit2": {"global_pool": "max", "class_token": True, "pre_norm": True, "embed_norm_layer": layers.LayerNorm, "fc_norm": False},
    "test_vit3": {"pool_include_prefix": True, "class_token": True, "mlp_layer": layers.GluMlp, "act_layer": nn.SiLU},
    "vit_small_patch16_rope_224": {
        "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2, "qk_norm": True, "global_pool": "map",
        "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True,
    },
    "vit_small_patch16_rope_mixed_224": {"class_token": False, "num_reg_tokens": 2, "global_pool": "avg", "qk_norm": True},
    "beit_base_patch16_224": {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "global_pool": "token", **NARROW},
    "test_vit_relpos": {"rel_pos_type": "mlp_swin", "class_token": True, "global_pool": "token", "qk_norm": True},
    "vit_pwee_patch16_reg1_gap_256": {"qk_norm": True, "qkv_bias": False, "init_values": 0.1},
}  # fmt: skip
TABLES = ("beit", "vit_srelpos")  # relative tables, which timm resamples to another size by a rule of its own


def made(name: str, **options: Any) -> nn.Module:
    """A model of timm with two blocks, every parameter drawn anew, in the default precision."""
    with InDefaultPrecision():
        model = timm.create_model(name, pretrained=False, **{"depth": 2, "num_classes": 10, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        draw = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
        if leaf.startswith("gamma") or (is_norm and leaf == "weight"):
            draw = 1 + 0.3 * draw
        elif leaf.endswith("bias"):
            draw = 0.3 * draw
        else:
            draw = draw / parameter[0].numel() ** 0.5 if leaf == "weight" else 0.5 * draw
        parameter.data.copy_(draw)
    return model


def image_of(model: Any) -> Tensor:
    return torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def assert_same(ours: vision.ViT, theirs: Any, image: Tensor) -> None:
    with torch.no_grad():
        with InDefaultPrecision():
            wanted = theirs(image)
        inferred = ours(image)
    assert 0.1 < float(wanted.std()) < 10
    # An embedding, the blocks and a head. Without gradients ours multiplies matrices by oneDNN, which adds in another order.
    for what, got in (("with gradients", ours(image)), ("without", inferred)):
        assert_close(got, wanted, f"logits {what}", depth=len(theirs.blocks) + 2)


CASES = [pytest.param(name, options, id=name) for name, options in MODELS.items()] + [
    pytest.param(name, options, id=f"{name} with options") for name, options in OPTIONS.items()
]


FAMILIES = (
    "test_vit", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3", "beit_base_patch16_224", "test_vit_relpos", "vit_srelpos_small_patch16_224",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # theirs, in resampling
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.usefixtures("double")
def test_logits_are_the_same(name: str, options: dict[str, Any]) -> None:
    theirs: Any = made(name, **options)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours = from_timm(theirs)
    assert_same(ours, theirs, image_of(theirs))

    pointers = {parameter.data_ptr() for parameter in theirs.parameters()}
    assert all(parameter.data_ptr() not in pointers for parameter in ours.parameters())
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())

    size = tuple(patch * count for patch, count in zip(theirs.patch_embed.patch_size, (5, 7), strict=True))
    with InDefaultPrecision():
        theirs.set_input_size(size)
    if name.startswith(TABLES) or options.get("rel_pos_type") == "mlp_swin":
        ours = from_timm(theirs)
    assert_same(ours, theirs, image_of(theirs))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_close_in_single_precision(name: str) -> None:
    theirs = made(name, **MODELS[name])
    assert_same(from_timm(theirs), theirs, image_of(theirs))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_images_of_any_size_as_timm_takes_them(name: str) -> None:
    theirs = made(name, dynamic_img_size=True)
    image = torch.randn(2, 3, 4 * theirs.patch_embed.patch_size[0], 6 * theirs.patch_embed.patch_size[1])
    assert_same(from_timm(theirs), theirs, image)


@pytest.mark.parametrize(
    "name", ["test_vit3", "vit_pwee_patch16_reg1_gap_256", "vit_small_patch16_rope_mixed_ape_224", "test_vit_relpos"]
)
def test_gradients_reach_every_parameter(name: str) -> None:
    ours = from_timm(made(name))
    ours(image_of(timm.create_model(name, pretrained=False, depth=1))).square().sum().backward()
    blind = {path for path, parameter in ours.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not blind


@pytest.mark.usefixtures("precision")
def test_gradients_are_those_of_timm() -> None:
    theirs = made("test_vit")
    ours, image = from_timm(theirs), image_of(theirs)
    for model in (ours, theirs):
        model(image).square().sum().backward()
    for mine, wanted in (
        (ours.encoder.position.table, theirs.pos_embed.grad[0, 1:]),
        (ours.embed.proj.weight, theirs.patch_embed.proj.weight.grad.flatten(1)),
        (ours.encoder.blocks[0].attention.qkv.weight, theirs.blocks[0].attn.qkv.weight.grad),
    ):
        assert_close(mine.grad, wanted, "gradient", depth=2 * 4)  # two blocks, an embedding and a head, there and back


def test_what_weights_do_not_hold_carries_over() -> None:
    options = {
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "drop_rate": 0.4,
        "pos_drop_rate": 0.5,
        "patch_drop_rate": 0.6,
    }
    theirs = made("vit_tiny_patch16_224", depth=3, **options).bfloat16().train()
    theirs.set_grad_checkpointing()
    theirs.patch_embed.requires_grad_(False)
    theirs.blocks[1].attn.qkv.weight.requires_grad_(False)
    ours = from_timm(theirs)
    block = ours.encoder.blocks[1]
    assert ours.training and ours.encoder.checkpoint and ours.head.weight.dtype == torch.bfloat16
    assert ours.head_dropout.p == 0.4 and ours.position_dropout.p == 0.5 and ours.patch_dropout.share == 0.6
    assert block.attention.dropout == 0.2
    assert (
        block.attention_residual.dropout.p
        == block.feed_forward.dropout.p
        == block.feed_forward_residual.dropout.p
        == 0.1
    )
    assert [one.attention_residual.drop_path.p for one in ours.encoder.blocks] == pytest.approx([0.0, 0.15, 0.3])
    assert not any(p.requires_grad for p in ours.embed.parameters())
    assert not block.attention.qkv.weight.requires_grad and block.attention.qkv.bias.requires_grad
    assert not from_timm(made("test_vit")).training


@pytest.mark.usefixtures("double")
def test_a_distilled_model_has_both_heads() -> None:
    theirs = made("deit_tiny_distilled_patch16_224").train()
    theirs.set_distilled_training()
    ours, image = from_timm(theirs), image_of(theirs)
    assert_close(ours.logits(ours.features(image)), theirs(image), "logits", depth=4)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_rope_mixed_ape_224",
        "vit_pe_spatial_tiny_patch16_512",
        "beit_base_patch16_224",
        "test_vit_relpos",
    ],
)
def test_images_in_a_list_give_what_each_gives_alone(name: str) -> None:
    ours = from_timm(made(name, **{"img_size": 128, **MODELS[name]}))
    patch = ours.embed.patch[0]
    images = [torch.randn(3, patch * height, patch * width) for height, width in ((3, 5), (4, 2))]
    with torch.no_grad():
        alone = torch.cat([ours(image[None]) for image in images])
        assert_close(ours(images), alone, "logits", depth=4)


def test_an_earlier_timm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    with pytest.raises(ImportError, match=r"timm must be at least 1\.0\.31; got 1\.0\.30"):
        importlib.reload(_timm_weights)


@pytest.mark.usefixtures("double")
def test_no_head() -> None:
    theirs = made("test_vit", num_classes=0)
    assert_same(from_timm(theirs), theirs, image_of(theirs))


class Grafted(nn.Linear):
    """A layer that computes something else."""


def grafted(change: Callable[[Any], object]) -> nn.Module:
    model = made("test_vit")
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: made("vit_dpwee_patch16_reg1_gap_256"), ValueError, r"blocks\.0 cannot be taken over: DiffParallelScalingBlock"),
        (lambda: made("vit_dwee_patch16_reg1_gap_256"), ValueError, r"blocks\.0\.attn cannot be taken over: DiffAttention"),
        (lambda: made("test_vit", global_pool="prr"), ValueError, "global_pool must be one of .* got 'prr'"),
        (lambda: made("test_vit", global_pool=""), ValueError, r"what features\(images\) returns"),
        (lambda: made("test_vit", global_pool="avg", pool_include_prefix=True), ValueError, "pool_include_prefix=True"),
        (lambda: made("test_vit", norm_layer=layers.SimpleNorm), ValueError, "SimpleNorm is no norm that torch has"),
        (lambda: made("test_vit", mlp_layer=layers.GatedMlp), ValueError, r"blocks\.0\.mlp .* GatedMlp"),
        (lambda: made("test_vit", mlp_layer=layers.GluMlp, act_layer=nn.Sigmoid), ValueError, "a gate of Sigmoid"),
        (lambda: made("vit_base_patch16_rpn_224", **NARROW, proj_drop_rate=0.1), ValueError, "proj_drop_rate"),
        (lambda: made("vit_small_patch16_18x2_224", drop_path_rate=0.1), ValueError, "drops each of its branches apart"),
        (lambda: made("vit_small_patch16_18x2_224", qk_norm=True), ValueError, r"norms in its branches \(qk_norm"),
        (lambda: made("eva02_tiny_patch14_224", rope_type="mrope"), ValueError, "rope cannot be taken over: RotaryEmbeddingMRope"),
        (lambda: made("vit_tiny_r_s16_p8_224"), ValueError, "patch_embed cannot be taken over: HybridEmbed"),
        (lambda: made("test_vit").blocks, TypeError, r"model must be one of timm's VisionTransformer, .* got Sequential"),
        (lambda: timm.create_model("test_resnet", pretrained=False), TypeError, "got ResNet"),
        (lambda: grafted(lambda m: m.blocks[1].attn.register_parameter("adapter", nn.Parameter(torch.ones(3)))), ValueError,
         r"has no place for: blocks\.1\.attn\.adapter"),
        (lambda: grafted(lambda m: setattr(m.blocks[1].attn, "proj", Grafted(64, 64))), ValueError,
         r"blocks\.1\.attn\.proj cannot be taken over: Grafted is no nn\.Linear"),
        (lambda: grafted(lambda m: setattr(m.blocks[0].mlp, "forward", lambda x: x)), ValueError,
         r"blocks\.0\.mlp cannot be taken over: Mlp has a forward of its own"),
        (lambda: grafted(lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].mlp.fc1)), (TypeError, ValueError),
         "Parametrized|parametrizations"),
    ],
)  # fmt: skip
def test_what_ours_cannot_express_is_refused_by_name(make: Callable[[], nn.Module], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        from_timm(make())
