"""The options of ``vision.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common

Position = Literal["none", "learned", "sincos", "rotary", "relative"]


@dataclass(frozen=True)
class Options:
    """Train a Vision Transformer from scratch on small data, and see what it takes for what, and what it looks at."""

    data: Path | None = None
    """The folder of CIFAR-10's batches, or one with a folder of images for each class. Without it: digits."""
    size: int | None = None
    """Pixels on each side of an image, for a folder of images: each is resized, and its middle taken. Digits have 8, CIFAR-10 32."""
    test: float = 0.2
    """Share of the images that is held out to test, where the data comes without a test part. The same images for every run."""
    validation: float = 0.1
    """Share of the training images that is held out to choose the weights by; 0 trains on all, and keeps the last weights."""
    positions: tuple[Position, ...] = ("learned",)
    """How patches know where they are: none, a learned table, sines and cosines, rotary or a relative table. Several are compared."""
    stem: int | None = None
    """Convolutions that make the tokens, each followed by pooling that halves the image. Without it one, unless --patch is given."""
    patch: int | None = None
    """Pixels on each side of a patch, in place of convolutions. For small images a small one: 4 for 32 pixels, 2 for 8."""
    dim: int = 64
    """Width of the model."""
    depth: int = 2
    """Layers, one after the other."""
    heads: int = 4
    """Attention heads of a layer."""
    pool: Literal["token", "mean", "attention"] = "token"
    """What the classes are read from: a class token, the mean of all patches, or a learned query that attends to them."""
    dropout: float = 0.0
    """Share of the values dropped in training."""
    drop_path: float = 0.1
    """Share of the images for which the last layer is left out in training; it rises from 0 at the first."""
    augment: Literal["batch", "timm"] | None = None
    """How training images are altered: batch, all at once on the device, for small images that fit into memory; timm, each by
    itself on --workers processes, with timm's random resized crops. Without it: timm for a folder of images."""
    shift: int | None = None
    """Pixels by which an image is moved at most, with --augment batch. Without it: an eighth of its size."""
    flip: bool = False
    """Mirror every second image. Not for digits."""
    rand_augment: int = 0
    """Magnitude of RandAugment, from 0 (none) to 10."""
    erase: float = 0.0
    """Probability with which a rectangle of an image is replaced by noise."""
    mixup: float = 0.0
    """Strength of MixUp, which mixes two images; 0 is none, 0.8 is usual."""
    cutmix: float = 0.0
    """Strength of CutMix, which puts a part of one image into another; 0 is none, 1 is usual."""
    smoothing: float = 0.1
    """Label smoothing: the share of certainty that is given to all classes alike."""
    epochs: int = 40
    """Times that training goes through all images."""
    pretrain: int = 0
    """Times that a masked autoencoder goes through all training images first, without their labels. It needs --patch."""
    mask_ratio: float = 0.75
    """Share of the patches that it hides."""
    batch_size: int = 64
    """Images in a training step."""
    eval_batch_size: int = 512
    """Images scored at a time in validation and test. A matter of memory."""
    lr: float = 3e-3
    """Highest learning rate."""
    warmup: float = 0.1
    """Share of training over which the learning rate rises. After it it falls to 0 along half a cosine."""
    weight_decay: float = 0.05
    """Weight decay of AdamW: of weights, not of biases, norms, tokens and positions."""
    layer_decay: float | None = None
    """Factor by which each layer learns more slowly than the one behind it."""
    ema: float = 0.98
    """Decay of the mean of the weights over the steps of training, which is then scored; 0 is none. For long training: 0.999."""
    clip: float = 1.0
    """Greatest norm of the gradient."""
    seeds: tuple[int, ...] = (0,)
    """Where random numbers start, one run for each. The same seed, options and machine give the same result."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ... On CUDA the model computes in bfloat16."""
    threads: int = 1
    """CPU threads. One is enough for a model as small as the default."""
    workers: int = 2
    """Processes that read images, with --augment timm: at most one for each core."""
    run: Path = Path("runs/vision")
    """Directory for all that is written, for several runs one within it for each. A run that is there already is replaced, or
    continued with --resume."""
    resume: bool = False
    """Continue the run in --run from where it was last saved. The result is that of a run which was never cut off."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        common.check_least(self, 1, "patch", "stem", "size", "dim", "depth", "heads", "epochs")
        common.check_least(self, 1, "batch_size", "eval_batch_size", "threads")
        common.check_least(self, 0, "shift", "weight_decay", "mixup", "cutmix", "pretrain", "workers")
        common.check_shares(self, "validation", "test", "dropout", "drop_path", "warmup", "smoothing", "ema")
        common.check_positive(self, "lr", "clip")
        common.check_different(self, "seeds", "positions")
        common.check_heads(self)
        if self.patch is not None and self.stem is not None:
            raise ValueError("--patch and --stem both say how tokens are made: give one of them")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"--mixup and --cutmix mix pairs: --batch-size must be even; got {self.batch_size}")
        if self.pretrain and self.patch is None:
            raise ValueError("--pretrain hides patches and restores them: give their size with --patch")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask-ratio must be between 0 and 1; got {self.mask_ratio}")
        if not 0 <= self.rand_augment <= 10 or not 0 <= self.erase <= 1:
            raise ValueError(
                f"--rand-augment must be from 0 to 10, --erase from 0 to 1; got {self.rand_augment} and {self.erase}"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay must be in (0, 1]; got {self.layer_decay}")
