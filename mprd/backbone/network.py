"""F: images to unit features (Sec. 3.1, 5.2).

A network up to its last feature map (pool-5 and later removed), pooling, and an appended batch normalization.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.backbone.batch_norm import BatchSplit, CameraBatchNorm, register_optional, replace_batch_norms
from mprd.backbone.pixels import PIXELS, pixel_affine
from mprd.backbone.trunk import PRETRAINED, build_trunk
from mprd.backbone.weights import load_weights
from mprd.errors import UserError
from mprd.runtime.distributed import WorkerGroup

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig


GEM_POWER = 3.0
"""Initial exponent of generalized-mean pooling (Radenović et al., TPAMI 2018), which is trained."""
GEM_LEAST = 1e-6
"""Least activation of generalized-mean pooling, whose power is not defined below 0."""
PRIOR_IMAGES = 10
"""Images that the statistics of all count for in those of a camera: a camera's mean over few images holds their
identities, which subtracting it would remove."""


class Backbone(nn.Module):
    """Map images `[B, 3, H, W]` to unit features `[B, D]`.

    Args:
        trunk: images to maps `[B, C, h, w]`, which are pooled here, or to vectors `[B, C]`.
        uses_gem: pool by a generalized mean instead of the mean.
        pixel_affine: `[2, 3]`, scale and shift from ImageNet's normalization to that of the trunk; None: none.
        layers: the layer of each parameter of the trunk, counted from the images, for layer-wise rates.
    """

    pixel_affine: Tensor | None

    def __init__(
        self,
        trunk: nn.Module,
        num_channels: int,
        *,
        num_stripes: int = 1,
        uses_gem: bool = False,
        pixel_affine: Tensor | None = None,
        layers: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_stripes = num_stripes
        self.layers = layers
        self.gem = nn.Parameter(torch.full((1,), GEM_POWER)) if uses_gem else None
        # part of checkpoints, which are loaded without the weights' file
        register_optional(self, "pixel_affine", pixel_affine)
        self.num_features = num_channels * num_stripes
        self.neck = nn.BatchNorm1d(self.num_features)
        self.is_bf16 = False
        """Whether the trunk computes in bfloat16; pooling and what follows are float32."""
        self.batch_split = BatchSplit(WorkerGroup(), 0)
        """The split of a batch into normalization groups and workers' shards."""

    def pool(self, images: Tensor) -> Tensor:
        """Return the pooled feature before the appended batch norm, `[B, D]`, not normalized."""
        if self.pixel_affine is not None:
            scale, shift = self.pixel_affine.view(2, 3, 1, 1)
            images = images * scale + shift
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.is_bf16):
            maps = self.trunk(images)
        # a mean over the 128 cells of a map loses digits in bfloat16
        maps = maps.float() if maps.dtype != torch.float64 else maps
        if maps.ndim == 2:
            return maps
        if self.gem is None:
            return stripe_means(maps, self.num_stripes)
        return stripe_means(maps.clamp(min=GEM_LEAST).pow(self.gem), self.num_stripes).pow(1 / self.gem)

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Return unit features after the batch norm, `[B, D]`: the paper's F~(x).

        Args:
            cameras: `[B]`, of each image, which picks the statistics that `CameraBatchNorm` evaluates by; those of all
                images where it is -1 or was not trained on.
        """
        after, _ = self.embed(images, cameras)
        return F.normalize(after, dim=1)

    def features(self, images: Tensor, cameras: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return unit features after and before the batch norm, each `[B, D]`; see `forward`."""
        after, pooled = self.embed(images, cameras)
        return F.normalize(after, dim=1), F.normalize(pooled, dim=1)

    def embed(self, images: Tensor, cameras: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the features after and before the batch norm, each `[B, D]`, not normalized; see `forward`."""
        self.batch_split.cameras = self.camera_rows(cameras)
        pooled = self.pool(images)
        after = self.neck(pooled)
        self.batch_split.sync_running_stats()
        return after, pooled

    @property
    def neck_moments(self) -> Tensor | None:
        """Statistics of each camera and of all images in the appended batch norm, `[K + 1, 2, D]`; None without."""
        return getattr(self.neck, "camera_moments", None)

    @property
    def num_cameras(self) -> int:
        """K, the cameras that batch norms have statistics of."""
        moments = self.neck_moments
        return 0 if moments is None else len(moments) - 1

    def has_own_statistics(self, camera: int) -> bool:
        """Return whether batch norms have other statistics of a camera than of all images."""
        moments = self.neck_moments
        return moments is not None and camera < len(moments) - 1 and not torch.equal(moments[camera], moments[-1])

    def camera_rows(self, cameras: Tensor | None) -> Tensor | None:
        """Return the row of each camera's statistics `[B]`, the last for cameras that are not known."""
        if cameras is None or self.num_cameras == 0:
            return None
        return cameras.where((cameras >= 0) & (cameras < self.num_cameras), self.num_cameras)


def set_training_format(backbone: Backbone, *, precision: str) -> Backbone:
    """Set the precision of the trunk, `float32` or `bf16`, and its memory layout, in place."""
    backbone.is_bf16 = precision == "bf16"
    # most convolutions run faster on channels-last maps, on CPUs and GPUs
    return backbone.to(memory_format=torch.channels_last)


def stripe_means(maps: Tensor, num_stripes: int) -> Tensor:
    """Average maps `[B, C, H, W]` over each of `num_stripes` horizontal stripes: `[B, C * num_stripes]`."""
    if num_stripes == 1:
        return maps.mean((2, 3))
    return F.adaptive_avg_pool2d(maps, (num_stripes, 1)).flatten(1)


def build_backbone(config: BackboneConfig, *, size: tuple[int, int], workers: WorkerGroup | None = None) -> Backbone:
    """Build the network and load its weights; batch-norm statistics are taken over the batch of all workers.

    Args:
        size: height and width of the images.

    Raises UserError where the weights cannot be read or downloaded, or do not fit, and for an unknown network.
    """
    trunk = build_trunk(config, size)
    if config.weights == "none":
        affine = None
    elif config.weights in PRETRAINED:
        affine = pixel_affine(trunk.pixels)
    else:
        affine = load_weights(trunk, Path(config.weights), name=config.name)
    backbone = Backbone(
        trunk.network,
        trunk.num_channels,
        num_stripes=config.num_stripes,
        uses_gem=config.pool == "gem",
        pixel_affine=affine if config.pixels == "auto" else pixel_affine(PIXELS[config.pixels]),
        layers=trunk.layers,
    )
    backbone.batch_split = BatchSplit(workers or WorkerGroup(), config.bn_group)
    replace_batch_norms(backbone, backbone.batch_split, by_camera=config.camera_bn)
    return backbone


def parameter_groups(
    backbone: Backbone, *, is_pretrained: bool, lr_backbone: float, lr_new: float, layer_decay: float = 1.0
) -> list[dict]:
    """Return optimizer groups for the trunk and the new layers, each with its learning rate (Sec. 5.2).

    Without pre-trained weights both have the learning rate of new layers. Below 1, `layer_decay` is the ratio of a
    layer's rate to that of the layer above; the groups of the trunk then come from the uppermost layer down.
    """
    lr_trunk = lr_backbone if is_pretrained else lr_new
    named = [(name, p) for name, p in backbone.trunk.named_parameters() if p.requires_grad]
    layers = backbone.layers
    if layer_decay < 1 and layers is None:
        raise UserError("train.layer_decay needs a network with numbered layers, such as timm:NAME; use 1 for this one")
    depth = {
        name: 0 if layer_decay == 1 or layers is None else max(layers.values()) - layers[name] for name, _ in named
    }
    new = [p for p in (backbone.gem, *backbone.neck.parameters()) if p is not None and p.requires_grad]
    groups = [
        ([p for name, p in named if depth[name] == level], lr_trunk * layer_decay**level)
        for level in sorted(set(depth.values()))
    ]
    return [{"params": params, "lr": lr, "base_lr": lr} for params, lr in (*groups, (new, lr_new))]


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-norm layers below a module."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def estimate_bn(backbone: Backbone, images: Iterable[Tensor]) -> None:
    """Set all running statistics to their plain mean over the batches, in place; weights are not changed."""
    norms, was_training = batch_norms(backbone), backbone.training
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    backbone.train()
    for batch in images:
        backbone(batch)
    backbone.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def estimate_camera_bn(backbone: Backbone, samples: Iterable[tuple[int, Iterable[Tensor]]]) -> None:
    """Estimate the statistics of each camera, given a number of images and their batches, and last of all, in place.

    Training leaves statistics of augmented images, and of weights that have moved on. A camera of n images takes
    n / (n + 10) of its own statistics and the rest from those of all; n may be 0, but 1 has no variance.
    """
    norms = [norm for norm in batch_norms(backbone) if isinstance(norm, CameraBatchNorm)]
    counts, moments = list[int](), []
    for count, batches in samples:
        if count:
            estimate_bn(backbone, batches)
        counts.append(count)
        moments.append([running_moments(norm) for norm in norms])
    sizes = torch.tensor(counts)[:, None, None]
    own = sizes / (sizes + PRIOR_IMAGES)
    # in the last row both are those of all images
    for norm, found in zip(norms, zip(*moments, strict=True), strict=True):
        norm.camera_moments = torch.lerp(found[-1], torch.stack(found), own.to(found[-1]))


def fix_camera(backbone: Backbone, row: int) -> None:
    """Evaluate every image by the statistics of one camera from now on, -1 for those of all images, in place."""
    for norm in batch_norms(backbone):
        if isinstance(norm, CameraBatchNorm) and norm.camera_moments is not None:
            norm.running_mean, norm.running_var = norm.camera_moments[row].clone()
            norm.camera_moments = None


def running_moments(norm: CameraBatchNorm) -> Tensor:
    """Return a copy of a batch norm's running mean and variance, `[2, C]`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return torch.stack([norm.running_mean, norm.running_var])
