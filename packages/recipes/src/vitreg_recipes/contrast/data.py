"""Batches of images with captions. Seed, step and share decide every pixel and token, whichever worker reads."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomResizedCrop
from tqdm import tqdm
from vitreg_core.clip_config import CLIP_MEAN, CLIP_STD
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.extras import require

from vitreg_recipes.augment import Finish, Transform
from vitreg_recipes.config import SCENES
from vitreg_recipes.contrast.captions import Captioned, open_captions
from vitreg_recipes.contrast.config import ContrastConfig
from vitreg_recipes.data import Data
from vitreg_recipes.data.batch import Share
from vitreg_recipes.data.order import Shuffled
from vitreg_recipes.data.reading import Reader
from vitreg_recipes.data.scenes import EPOCH

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Images of one step, of one process, with their captions."""

    images: Float[Tensor, "b 3 height width"]
    """Normalised pixels."""
    tokens: Int[Tensor, "b context"]
    """Of open_clip's tokenizer: start, text, end, zeros."""

    def split(self, parts: int) -> "list[Pairs]":
        """Equal parts of the batch, in order."""
        return [Pairs(*part) for part in zip(self.images.chunk(parts), self.tokens.chunk(parts), strict=True)]


def open_pairs(config: ContrastConfig) -> Data:
    """Find the data of a run.

    Raises:
        InputError: there is nothing at its path, no caption, or too little for a batch.
    """
    tokenizer = make_tokenizer(config.text.context_length)
    if config.data.path == SCENES:
        return ScenePairs(config, tokenizer)
    return CaptionPairs(config, open_captions(config.data.path, config.data.text), tokenizer)


def make_tokenizer(context: int) -> Tokenizer:
    """open_clip's tokenizer. A text that is too long loses its end; the end token stays last.

    Raises:
        InputError: open_clip is not installed.
    """
    require("open_clip", "open-clip", "the tokenizer of captions")
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def preprocess_of(config: ContrastConfig) -> PreprocessConfig:
    """What open_clip's models expect of an image, at the size of the run."""
    return PreprocessConfig(image_size=config.model.size[0], mean=CLIP_MEAN, std=CLIP_STD)


class ScenePairs:
    """Drawn scenes with what they say of themselves, each seen once."""

    def __init__(self, config: ContrastConfig, tokenizer: Tokenizer) -> None:
        self.classes: list[str] = []
        self.images = 0
        self.skipped: set[str] = set()
        self.preprocess = preprocess_of(config)
        self.seed = config.seed
        self.tokenizer = tokenizer

    def epoch_steps(self, share: Share) -> int:  # noqa: ARG002 (the same for all)
        """A fixed number, since scenes have no end."""
        return EPOCH

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Pairs]:
        """Draw batches without end, from a step on."""
        preprocess = Preprocess(self.preprocess)
        for number in count(step):
            seed = (self.seed, number, share.process)
            scenes = draw_scenes(share.size, seed, image_size=self.preprocess.image_size, device=device)
            yield Pairs(preprocess.normalize(scenes.image), self.tokenizer(scenes.captions()).to(device))


class CaptionPairs:
    """Images with captions, cropped anew each time.

    Raises:
        InputError: fewer images than a batch.
    """

    def __init__(self, config: ContrastConfig, source: Captioned, tokenizer: Tokenizer) -> None:
        self.source = source
        self.images = len(source)
        if self.images < config.data.batch_size:
            raise InputError(
                f"{source.where}: {self.images} images with captions for data.batch_size={config.data.batch_size}; "
                "give a smaller batch, or more images"
            )
        self.classes: list[str] = []
        self.preprocess = preprocess_of(config)
        self.crop = training_crop(config.data.crop_scale, self.preprocess)
        self.tokenizer = tokenizer
        self.order = Shuffled(self.images, config.seed)
        self.reader = Reader(source, self.order, seed=config.seed, workers=config.data.workers)
        self.skipped = self.reader.skipped

    def epoch_steps(self, share: Share) -> int:
        """Whole batches in the data."""
        return self.order.epoch_steps(share)

    def batches(self, step: int, share: Share, device: torch.device) -> Iterator[Pairs]:
        """Read and crop batches without end, from a step on.

        Raises:
            InputError: more than half of the images cannot be read.
        """
        if step == 0 and share.process == 0 and self.source.dropped:
            total = self.images + self.source.dropped
            told = f"{self.source.dropped} of {total} samples lack a caption or an image, and are left out"
            tqdm.write(f"{self.source.where}: {told}", file=sys.stderr)
        for images, tokens in self.reader.batches(self.make, self.join, step, share, device):
            yield Pairs(images, tokens)

    def make(self, image: Image.Image, index: int) -> tuple[Tensor, str]:
        """One cropped image and its caption."""
        return self.crop(image), self.source.caption(index)

    def join(self, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        """Images and tokens of a batch."""
        images, captions = zip(*samples, strict=True)
        return torch.stack(images), self.tokenizer(list(captions))


def training_crop(scale: tuple[float, float], preprocess: PreprocessConfig) -> Transform:
    """A random crop of some share of the area, resized with a bicubic filter; no flip, which would falsify captions."""
    size = preprocess.image_size
    return Compose([RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC), Finish(preprocess)])
