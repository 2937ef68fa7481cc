"""F: images to unit features (Sec. 3.1, 5.2).

A torchvision network up to its last feature map (pool-5 and later removed), average pooling, and an appended batch
normalization.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mprd.backbone.batch_norm import BatchSplit, replace_batch_norms
from mprd.errors import UserError
from mprd.runtime.distributed import WorkerGroup

if TYPE_CHECKING:
    from mprd.config.schema import BackboneConfig


class Backbone(nn.Module):
    """Map images `[B, 3, H, W]` to unit features `[B, D]`."""

    def __init__(self, trunk: nn.Module, num_channels: int, *, num_stripes: int = 1, bn_bias: bool = True) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_stripes = num_stripes
        self.num_features = num_channels * num_stripes
        self.neck = nn.BatchNorm1d(self.num_features)
        self.neck.bias.requires_grad_(bn_bias)
        self.is_bf16 = False
        """Whether the trunk computes in bfloat16; pooling and what follows are float32."""
        self.batch_split = BatchSplit(WorkerGroup(), 0)
        """The split of a batch into normalization groups and workers' shards."""

    def pool(self, images: Tensor) -> Tensor:
        """Return the pooled feature before the appended batch norm, `[B, D]`, not normalized."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.is_bf16):
            maps = self.trunk(images)
        # a mean over the 128 cells of a map loses digits in bfloat16
        return stripe_means(maps.float() if maps.dtype != torch.float64 else maps, self.num_stripes)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit features after the batch norm, `[B, D]`: the paper's F~(x)."""
        after = self.neck(self.pool(images))
        self.batch_split.sync_running_stats()
        return F.normalize(after, dim=1)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit features after and before the batch norm, each `[B, D]`."""
        pooled = self.pool(images)
        after = self.neck(pooled)
        self.batch_split.sync_running_stats()
        return F.normalize(after, dim=1), F.normalize(pooled, dim=1)


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


def build_backbone(config: BackboneConfig, *, workers: WorkerGroup | None = None) -> Backbone:
    """Build the network and load its weights; batch-norm statistics are taken over the batch of all workers.

    Raises UserError where the weights cannot be read or downloaded, or do not fit.
    """
    trunk, num_channels = TRUNKS[config.name](config.last_stride)
    load_trunk_weights(trunk, config)
    backbone = Backbone(trunk, num_channels, num_stripes=config.num_stripes, bn_bias=config.bn_bias)
    backbone.batch_split = BatchSplit(workers or WorkerGroup(), config.bn_group)
    replace_batch_norms(backbone, backbone.batch_split)
    return backbone


def resnet_trunk(name: str, last_stride: int) -> tuple[nn.Module, int]:
    """Return a torchvision ResNet up to layer4 (Sec. 5.2), and its number of channels."""
    net = torchvision.models.get_model(name, weights=None)
    num_channels = net.fc.in_features
    if last_stride == 1:
        drop_stride(net.layer4)
    del net.fc, net.avgpool
    stem = [(part, getattr(net, part)) for part in ("conv1", "bn1", "relu", "maxpool")]
    stages = [(part, getattr(net, part)) for part in ("layer1", "layer2", "layer3", "layer4")]
    trunk = nn.Sequential()
    for part, module in stem + stages:
        trunk.add_module(part, module)
    return trunk, num_channels


def mobilenet_trunk(last_stride: int) -> tuple[nn.Module, int]:
    """Return torchvision's MobileNetV2 up to its last convolution; its last stage begins at block 14."""
    net = torchvision.models.mobilenet_v2(weights=None)
    if last_stride == 1:
        drop_stride(net.features[14])
    trunk = nn.Sequential()
    trunk.add_module("features", net.features)
    return trunk, net.last_channel


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


TRUNKS = {
    "resnet50": lambda last_stride: resnet_trunk("resnet50", last_stride),
    "resnet34": lambda last_stride: resnet_trunk("resnet34", last_stride),
    "resnet18": lambda last_stride: resnet_trunk("resnet18", last_stride),
    "mobilenet_v2": mobilenet_trunk,
    "small": small_trunk,
}


def drop_stride(stage: nn.Module) -> None:
    """Set every convolution of a stage to stride 1, the shortcut included."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def load_trunk_weights(trunk: nn.Module, config: BackboneConfig) -> None:
    """Load torchvision's ImageNet weights or a local state dict, or keep the random weights."""
    if config.weights == "none":
        return
    state = imagenet_state(config.name) if config.weights == "imagenet" else read_state(Path(config.weights))
    # "module." is the prefix of DataParallel; the classifier is not part of the trunk
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "classifier."))}
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone.weights: {config.weights} does not hold a torchvision {config.name}: {reason}"
        ) from None


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


def has_imagenet_weights(name: str, *, timeout: float = 5) -> bool:
    """Return whether torchvision's ImageNet weights of a network are in its cache or their server answers."""
    if name == "small":
        return False
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    if (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file():
        return True
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return True
    except (OSError, ValueError):
        return False


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file without running code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"backbone.weights: no such file: {path}") from None
    except Exception as error:  # the readers raise many types, from pickle's to their own
        raise UserError(f"backbone.weights: {path} is not a readable state dict: {type(error).__name__}") from None
    return state.get("state_dict", state) if isinstance(state, dict) else {}


def parameter_groups(backbone: Backbone, *, is_pretrained: bool, lr_backbone: float, lr_new: float) -> list[dict]:
    """Return optimizer groups for the trunk and the appended batch norm, each with its learning rate (Sec. 5.2).

    Without pre-trained weights both have the learning rate of new layers.
    """
    trunk = [p for p in backbone.trunk.parameters() if p.requires_grad]
    neck = [p for p in backbone.neck.parameters() if p.requires_grad]
    lr_trunk = lr_backbone if is_pretrained else lr_new
    return [{"params": trunk, "lr": lr_trunk, "base_lr": lr_trunk}, {"params": neck, "lr": lr_new, "base_lr": lr_new}]


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-norm layers below a module."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def recalibrate_bn(backbone: Backbone, batches: Iterable[Tensor]) -> None:
    """Re-estimate all running statistics as the plain mean over the batches, in place; weights are not changed."""
    norms = batch_norms(backbone)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    backbone.train()
    for images in batches:
        backbone(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
