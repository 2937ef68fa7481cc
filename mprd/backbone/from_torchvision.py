"""torchvision's networks, and a small one for small images."""

from __future__ import annotations

import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mprd.backbone.trunk import PRETRAINED, Trunk
from mprd.config.loading import suggest
from mprd.errors import UserError

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig


def build(name: str, config: BackboneConfig, _size: tuple[int, int]) -> Trunk:
    """Build a network of `TRUNKS`."""
    if name not in TRUNKS:
        hint = suggest(name, [*TRUNKS])
        raise UserError(f"backbone.name: unknown network {name!r}{hint}; known: {', '.join(TRUNKS)}, and timm:NAME")
    if config.pool in ("token", "clip"):
        raise UserError(f"backbone.pool={config.pool} needs a network with a class token, but {name} has none")
    if config.freeze_patches:
        raise UserError(f"backbone.freeze_patches needs a network with a patch projection, but {name} has none")
    network, num_channels = TRUNKS[name](config.last_stride)
    if config.weights in PRETRAINED:
        # the classifier is not part of the trunk
        state = {key: part for key, part in imagenet_state(name).items() if not key.startswith(("fc.", "classifier."))}
        network.load_state_dict(state)
    return Trunk(network, num_channels)


def resnet_trunk(name: str, last_stride: int) -> tuple[nn.Module, int]:
    """Return a torchvision ResNet up to layer4 (Sec. 5.2), and its number of channels."""
    net = torchvision.models.get_model(name, weights=None)
    if last_stride == 1:
        drop_stride(net.layer4)
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((part, getattr(net, part)) for part in parts)), net.fc.in_features


def mobilenet_trunk(last_stride: int) -> tuple[nn.Module, int]:
    """Return torchvision's MobileNetV2 up to its last convolution; its last stage begins at block 14."""
    net = torchvision.models.mobilenet_v2(weights=None)
    if last_stride == 1:
        drop_stride(net.features[14])
    return nn.Sequential(OrderedDict(features=net.features)), net.last_channel


class SmallBlock(nn.Module):
    """The basic block of a ResNet (He et al. 2016)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps))


def small_trunk(last_stride: int) -> tuple[nn.Module, int]:
    """Return a ResNet of three basic blocks for images of 64 x 32."""
    width = 32
    trunk = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        SmallBlock(width, width, 1),
        SmallBlock(width, 2 * width, 2),
        SmallBlock(2 * width, 2 * width, last_stride),
    )
    return trunk, 2 * width


TRUNKS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    **{name: partial(resnet_trunk, name) for name in ("resnet50", "resnet34", "resnet18")},
    "mobilenet_v2": mobilenet_trunk,
    "small": small_trunk,
}


def drop_stride(stage: nn.Module) -> None:
    """Set every convolution of a stage to stride 1, the shortcut included."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def imagenet_state(name: str) -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights, from its cache or downloaded."""
    if name == "small":
        raise UserError("backbone.weights: there are no ImageNet weights for the network small; use none or a path")
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"backbone.weights: cannot download the ImageNet weights of {name} ({error}); "
            "give the path of a torchvision state dict, or none"
        ) from None


def has_imagenet_weights(name: str) -> bool:
    """Return whether torchvision's ImageNet weights of a network are in its cache or their server answers."""
    if name == "small":
        return False
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    if (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file():
        return True
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except (OSError, ValueError):
        return False
