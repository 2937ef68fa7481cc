"""Load the trained network of a run, and extract unit features of images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.features import ordered_batches, stream_features
from mprd.backbone.network import Backbone, build_backbone
from mprd.config.schema import Config
from mprd.data.datasets import to_number
from mprd.data.images import ImageSource, PlainImages
from mprd.errors import UserError
from mprd.neighbors.similarity import Similarity, Whitening
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.runtime.device import choose_device
from mprd.storage.copies import fetch

if TYPE_CHECKING:
    from mprd.data.loaders import Images


logger = logging.getLogger("mprd")


@dataclass(frozen=True, eq=False)
class Model:
    """The network of a run in evaluation mode."""

    name: str
    """Name of the run folder."""
    config: Config
    """The settings of the run."""
    backbone: Backbone
    device: torch.device
    similarity: Similarity | None = None
    """The map to the features that training compares."""
    camera_numbers: tuple[int, ...] = ()
    """The numbers in file names of the training's cameras 0, 1, ..."""
    camera_words: tuple[str, ...] = ()
    """The names of these cameras, where they are not numbers."""

    @property
    def num_features(self) -> int:
        """D, the length of a feature."""
        return self.backbone.num_features

    def extract(
        self,
        images: Sequence[ImageSource],
        *,
        cameras: Sequence[int | None] | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> np.ndarray:
        """Return unit features after the batch norm, which `mprd.evaluate` ranks by: float32 `[n, D]`.

        Args:
            images: paths, or PIL images of any mode.
            cameras: of each image, as numbered in file names, for batch norms with statistics of each camera
                (`backbone.camera_bn`); those of all training images serve where it is None or was not trained on.
            batch_size: images per forward pass; by default the run's `eval.batch_size`.
            num_workers: decoding processes; 0 decodes in this one.

        Raises UserError naming a file that cannot be read, and for other than one camera an image.

        >>> features = model.extract([path, Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
        >>> features.shape, features.dtype
        ((2, 256), dtype('float32'))
        >>> cosine = features[0] @ features[1]
        >>> bool(cosine > 0.9)
        True
        """
        if cameras is not None and len(cameras) != len(images):
            raise UserError(f"cameras must be one of each of the {len(images)} images, but are {len(cameras)}")
        features = np.empty((len(images), self.num_features), np.float32)
        batches = ordered_batches(torch.arange(len(images)), batch_size or self.config.eval.batch_size)
        prepared = PlainImages(images, self.config.data, hint="")
        for ids, rows in self.stream(prepared, batches, cameras=cameras, num_workers=num_workers):
            features[ids] = rows
        return features

    def stream(
        self,
        images: Images,
        batches: Sequence[Sequence[int]],
        *,
        cameras: Sequence[int | None] | None = None,
        num_workers: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids int64 `[B]` and unit features float32 `[B, D]` batch by batch; `cameras` as in `extract`."""
        rows = None if cameras is None else self.camera_rows(cameras)
        for ids, features in stream_features(
            self.backbone, images, batches, num_workers=num_workers, device=self.device, cameras=rows
        ):
            yield ids.numpy(), features.float().numpy(force=True)

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The names in file names of the training's cameras 0, 1, ..."""
        return self.camera_words or tuple(map(str, self.camera_numbers))

    def camera_number(self, name: str) -> int | None:
        """Return the number of a camera as named in file names; None where it has none and was not trained on."""
        if name in self.camera_words:
            return self.camera_numbers[self.camera_words.index(name)]
        number = to_number(name)
        # the numbers of words are not in names
        return None if self.camera_words and number in self.camera_numbers else number

    def camera_rows(self, cameras: Sequence[int | None]) -> Tensor:
        """Return the training's number of each camera, int64 `[n]` on the CPU, -1 where it is unknown."""
        strange = next((name for name in cameras if name is not None and not isinstance(name, int | np.integer)), None)
        if strange is not None:
            raise UserError(f"cameras must be numbers or None, but got {strange!r}; camera_number gives that of a name")
        rows = {number: row for row, number in enumerate(self.camera_numbers)}
        return torch.tensor([-1 if number is None else rows.get(number, -1) for number in cameras], dtype=torch.int64)

    def tell_cameras(self, cameras: Sequence[int | None]) -> None:
        """Log which cameras, as numbered in file names, features will take the statistics of, and who has none."""
        seen = {*cameras}
        if None in seen and any(map(self.backbone.has_own_statistics, range(len(self.camera_numbers)))):
            logger.warning(
                "no camera in the names of %d of %d images: they take the statistics of all training images "
                "(--name-pattern)",
                sum(number is None for number in cameras),
                len(cameras),
            )
        known = [
            name
            for row, (number, name) in enumerate(zip(self.camera_numbers, self.camera_names, strict=True))
            if number in seen and self.backbone.has_own_statistics(row)
        ]
        if known:
            logger.info(
                "features take the statistics of the cameras %s in the images' names; --other-cameras if these are not "
                "the cameras that %s was trained on",
                ", ".join(known), self.name,
            )  # fmt: skip

    def need_whitening(self) -> Whitening:
        """Return the whitening; raise UserError where the run has none."""
        if self.similarity is None or self.similarity.whitening is None:
            raise UserError(
                f"{self.name}: has no whitening, which neighbors.whitening=true fits in training (one of an earlier "
                "version is not read)"
            )
        return self.similarity.whitening

    def whiten(self, features: np.ndarray) -> np.ndarray:
        """Map unit features `[n, D]` to those that training compares, of unit length.

        Raises UserError where the run has no whitening.
        """
        given = torch.as_tensor(features, dtype=torch.float32, device=self.device)
        return self.need_whitening()(given).numpy(force=True)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all weights, batch-norm statistics and known cameras, 16 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.camera_numbers).encode())
        for name, tensor in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_model(run: Path | str, *, best: bool = False, device: str = "auto", other_cameras: bool = False) -> Model:
    """Load the trained network of a run folder.

    Args:
        run: a path, or a URL of object storage.
        best: load the checkpoint with the best label-free score, in place of the last.
        device: `auto` (an accelerator if there is one), `cpu`, `cuda` or `cuda:N`.
        other_cameras: images come from cameras that were not trained on, whatever their numbers.

    Raises UserError without a run, its checkpoint, or the device.

    >>> from mprd import load_model
    >>> model = load_model(run, device="cpu")
    >>> model.num_features, model.config.data.height, model.config.data.width
    (256, 32, 16)
    """
    folder = RunFolder(run)
    fetch(folder.path)
    config = folder.read_config()
    place = choose_device(device, setting="device")
    path = folder.best if best else folder.last
    # the checkpoint replaces any pretrained weights
    backbone = build_backbone(config.backbone.model_copy(update={"weights": "none"}), size=config.data.size)
    state = checkpoint.load(path)
    checkpoint.load_module(backbone, state["backbone"], path=path, name="backbone")
    # older checkpoints lack it, and what follows
    saved = state.get("similarity")
    similarity = None if saved is None else Similarity.from_state_dict(saved, place)
    # as in training, whose figures are of that precision
    backbone.is_bf16 = config.train.precision == "bf16" and place.type == "cuda"
    cameras = [() if other_cameras else tuple(state.get(name, ())) for name in ("camera_numbers", "camera_words")]
    return Model(folder.path.resolve().name, config, backbone.to(place).eval(), place, similarity, *cameras)
