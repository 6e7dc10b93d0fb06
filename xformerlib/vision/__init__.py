"""Vision Transformers: images, volumes, videos and signals of any size, cut into tokens on a ``Grid``."""

from ._classifier import Classifier as Classifier
from ._groups import parameter_groups as parameter_groups
from ._kept import Features as Features, PatchDropout as PatchDropout
from ._maps import AttentionMap as AttentionMap, attention_maps as attention_maps, rollout as rollout
from ._masked import MaskedAutoencoder as MaskedAutoencoder, Restored as Restored
from ._patches import ConvStem as ConvStem, PatchEmbed as PatchEmbed, Tokenizer as Tokenizer
from ._swin import PatchMerging as PatchMerging, Swin as Swin
from ._vit import ViT as ViT
