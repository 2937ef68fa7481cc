"""The ViTs of TransReID-SSL with a convolutional stem (+ICS) on timm's: `ics:vit_small_patch16_224`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mprd.backbone.from_timm import build_timm
from mprd.backbone.pixels import PIXELS
from mprd.backbone.trunk import Trunk

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig

WIDTH = 64


class InstanceBatchNorm(nn.Module):
    """Instance normalization of the first half of the channels, batch normalization of the others (IBN-Net, Fig. 3)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_instance = num_channels // 2
        self.IN = nn.InstanceNorm2d(self.num_instance, affine=True)
        self.BN = nn.BatchNorm2d(num_channels - self.num_instance)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([self.IN(maps[:, : self.num_instance]), self.BN(maps[:, self.num_instance :])], dim=1)


class ConvStem(nn.Module):
    """Three convolutions at half the resolution in front of the patch projection; timm's interface of `PatchEmbed`."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.grid_size = img_size[0] // patch_size, img_size[1] // patch_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, WIDTH, 7, 2, 3, bias=False),
            InstanceBatchNorm(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False),
            InstanceBatchNorm(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )
        self.proj = nn.Conv2d(WIDTH, embed_dim, patch_size // 2, patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.conv(images)).flatten(2).transpose(1, 2)


def build(name: str, config: BackboneConfig, size: tuple[int, int]) -> Trunk:
    """Build a ViT of timm with the stem."""
    return build_timm(name, config, size, pixels=PIXELS["half"], embed_layer=ConvStem)
