"""Images as tensors: augmented for training, plain for features.

Images are prepared one at a time in the loader's processes, or, where they are packed, by whole batches on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mprd.config.schema import DataConfig
from mprd.data.cache import Pack, Packs, Purpose
from mprd.data.camera_style import StyleFiles
from mprd.data.datasets import ImageSet
from mprd.data.decode import SKIP_HINT, read_image, to_rgb
from mprd.data.loaders import Item
from mprd.data.transforms import AugmentParams, View, augment, draw_params, normalize
from mprd.data.transforms_batch import augment_batch, normalize_batch
from mprd.errors import UserError

logger = logging.getLogger("mprd")

ImageSource = Path | str | Image.Image
"""A file, or a decoded image."""


class TrainImages:
    """Training images without labels, augmented as a function of (seed, epoch, image, view) alone.

    Args:
        images: the training images; their pids are not kept.
        style: CamStyle's images of them; None: no camera style transfer.
        view: `train`, or `perturbed` for the copy with grayscale and blur in place of erasing (Sec. 4.2, 5.2).
        packs: the cache of decoded images; None: files are decoded on each access.

    Items are (float32 `[3, H, W]`, index). Raises UserError naming an image that cannot be read.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        *,
        style: StyleFiles | None,
        seed: int,
        view: View = "train",
        packs: Packs | None = None,
    ) -> None:
        self.paths = images.paths
        self.camids = None if style is None else images.camids
        self.cameras = np.empty(0, dtype=np.int64) if self.camids is None else np.unique(self.camids)
        self.config, self.style, self.seed, self.view, self.epoch = config, style, seed, view, 0
        self.drawn: tuple[int, AugmentParams] | None = None
        self.pack = open_pack(packs, self.files(), config, purpose="train")

    def files(self) -> list[Path]:
        """Return every file that may be read, CamStyle's included."""
        if self.style is None or self.camids is None:
            return list(self.paths)
        names = self.style.all_names(self.paths, self.camids)
        return [*self.paths, *(self.style.folder / name for name in names if name not in self.style.missing)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation; a loader uses it from its next iteration on."""
        self.epoch = epoch
        # here, so that a loader's forked processes have it
        self.draw()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, *self.config.size

    def __getitem__(self, index: int) -> Item:
        height, width = self.config.size
        params = self.draw().rows(index)
        return augment(self.read(index, int(params.camera)), params, height=height, width=width), index

    def read(self, index: int, camera: int) -> Image.Image:
        """Return an image in the style of one of the training cameras, given by its index in `cameras`."""
        path = self.find(index, camera)
        return read_image(path) if self.pack is None else self.pack.read(path)

    def find(self, index: int, camera: int) -> Path:
        """Return the file of an image in the style of a training camera."""
        path = self.paths[index]
        if self.style is None or self.camids is None:
            return path
        return self.style.find(path, int(self.camids[index]), int(self.cameras[camera]))

    def is_batched(self, device: torch.device) -> bool:
        """Return whether to use `batch` instead of a loader, which is faster on a CPU."""
        return self.pack is not None and device.type != "cpu"

    def batch(self, ids: np.ndarray, device: torch.device) -> Tensor:
        """Return the items of packed images `[B]` as one tensor on a device, float32 `[B, 3, H, W]`."""
        assert self.pack is not None
        params = self.draw().rows(ids)
        found = [self.find(index, camera) for index, camera in zip(ids.tolist(), params.camera.tolist(), strict=True)]
        rows = np.array([self.pack.rows[path] for path in found])
        pixels = self.pack.gather(rows, device=device).permute(0, 3, 1, 2)
        return augment_batch(pixels, params, height=self.config.height, width=self.config.width)

    def draw(self) -> AugmentParams:
        """Return this epoch's augmentation of all images, drawn once."""
        if self.drawn is None or self.drawn[0] != self.epoch:
            images, cameras = np.arange(len(self)), len(self.cameras)
            view, config = self.view, self.config
            params = draw_params(self.seed, self.epoch, images=images, view=view, num_cameras=cameras, config=config)
            self.drawn = self.epoch, params
        return self.drawn[1]


class PlainImages:
    """Images as used for testing: resized (bicubic, antialiased) and normalized.

    Args:
        images: files or decoded images; with `packs` paths alone.
        packs: the cache of decoded images; None: files are decoded on each access.
        skip_bad: give zeros and the index `~index` for a file that cannot be read; otherwise raise UserError.
        hint: the remedy for such a file, for the error message.

    Items are (float32 `[3, H, W]`, index).
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        config: DataConfig,
        *,
        packs: Packs | None = None,
        skip_bad: bool = False,
        hint: str = SKIP_HINT,
    ) -> None:
        self.images, self.config, self.skip_bad, self.hint = images, config, skip_bad, hint
        # read only where there is a pack
        self.paths = cast("Sequence[Path]", images)
        self.pack = open_pack(packs, self.paths, config, purpose="test")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, *self.config.size

    def __getitem__(self, index: int) -> Item:
        if self.pack is not None:
            return normalize(self.pack.read(self.paths[index])), index
        image = self.images[index]
        try:
            decoded = to_rgb(image) if isinstance(image, Image.Image) else read_image(image, hint=self.hint)
        except UserError:
            if not self.skip_bad:
                raise
            return torch.zeros(self.shape), ~index
        size = self.config.width, self.config.height
        return normalize(decoded.resize(size, Image.Resampling.BICUBIC)), index

    def is_batched(self, device: torch.device) -> bool:
        """Return whether to use `batch` instead of a loader, whose processes cost more than decoded pixels."""
        return self.pack is not None

    def batch(self, ids: np.ndarray, device: torch.device) -> Tensor:
        """Return the items of packed images `[B]` as one tensor on a device, float32 `[B, 3, H, W]`."""
        assert self.pack is not None
        rows = np.array([self.pack.rows[self.paths[index]] for index in ids.tolist()])
        return normalize_batch(self.pack.gather(rows, device=device).permute(0, 3, 1, 2))


def open_pack(packs: Packs | None, paths: Sequence[Path], config: DataConfig, *, purpose: Purpose) -> Pack | None:
    """Return the pack of some files, or None where there is no cache or the pack does not fit."""
    if packs is None:
        return None
    return packs.open(paths, height=config.height, width=config.width, purpose=purpose)
