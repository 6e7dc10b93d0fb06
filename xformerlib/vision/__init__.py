"""Vision Transformers: images, volumes, videos and signals of any size, cut into tokens on a ``Grid``."""

from ._patches import ConvStem as ConvStem, PatchEmbed as PatchEmbed, Tokenizer as Tokenizer
from ._vit import Features as Features, ViT as ViT
