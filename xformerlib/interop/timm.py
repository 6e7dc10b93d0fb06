"""Vision Transformers of timm as ours, and ours as timm's: the same weights, the same logits.

>>> import timm
>>> from xformerlib.interop.timm import from_timm
>>> theirs = timm.create_model("test_vit", pretrained=False).eval()
>>> ours, images = from_timm(theirs), torch.randn(2, 3, 160, 160)
>>> torch.allclose(ours(images), theirs(images), atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from ..vision import Swin, ViT
from ._timm_swin import swin
from ._timm_vit import vit

_CONVERTERS: dict[type[nn.Module], Callable[[Any], Any]] = {
    VisionTransformer: vit,
    VisionTransformerDistilled: vit,
    Eva: vit,
    Beit: vit,
    VisionTransformerRelPos: vit,
    SwinTransformer: swin,
    SwinTransformerV2: swin,
}


def from_timm(model: nn.Module) -> ViT | Swin:
    """Our model with copies of the weights of one of timm's, which is left as it is.

    Raises:
        TypeError: a model of another class, or weights that are not plain parameters.
        ValueError: what ours cannot express, by name.
    """
    convert = _CONVERTERS.get(type(model))
    if convert is None:
        names = ", ".join(kind.__name__ for kind in _CONVERTERS)
        raise TypeError(f"model must be one of timm's {names}; got {type(model).__name__}")
    return convert(model)
